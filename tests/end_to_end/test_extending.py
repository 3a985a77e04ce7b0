"""docs/how-to/add-a-dataset.md, followed to the letter for a made-up data set: the steps it lists are all it takes."""

from __future__ import annotations

import csv
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import small_project
import yaml
from html_page import Page
from small_project import ROOT, call

READER = '''
"""Fields from above: one zip of photographs and grey label PNGs, 0 = void, class + 1 otherwise."""

import numpy as np

from pipeline import datasets
from pipeline.formats import decode
from refinenet.data import IGNORE_INDEX

TITLE = "Fields from above"
CLASSES = ("soil", "wheat", "road")
PALETTE = ((128, 64, 0), (200, 200, 0), (90, 90, 90))
COUNTS = {"train": 400, "val": 100}
TYPICAL_SIZE = (1000, 1500)  # all are

_TABLE = np.array([IGNORE_INDEX, 0, 1, 2], np.uint8)


class Reader(datasets.Reader):
    def __init__(self, raw):
        super().__init__(raw)
        self._archive = self.archive("fields.zip")

    def names(self, split):
        members = [member for member in self._archive if member.startswith(f"{split}/") and member.endswith(".jpg")]
        return sorted(member.removeprefix(f"{split}/").removesuffix(".jpg") for member in members)

    def where(self, split, name):
        return self._archive.where(f"{split}/{name}.png")

    def read(self, split, name):
        image = decode.photo(*self._archive.read_named(f"{split}/{name}.jpg"))
        data, where = self._archive.read_named(f"{split}/{name}.png")
        return image, decode.relabel(decode.index_png(data, where, modes="L"), _TABLE, where)
'''
WRITER = '''
"""Fields from above in the layout of their archive."""

from pipeline.datasets import fields
from pipeline.formats.encode import jpeg, png, write_zip
from pipeline.synthetic.album import paint, shifted


def render(settings, folder):
    def members():
        for p in paint("fields", fields.CLASSES, settings, "outdoor"):
            yield f"{p.split}/{p.number:03}.jpg", jpeg(p.image)
            yield f"{p.split}/{p.number:03}.png", png(shifted(p.label))

    write_zip(folder / "fields.zip", members())
'''
NEW = {"pipeline/datasets/fields.py": READER, "pipeline/synthetic/fields.py": WRITER}
# What stands before the line of the page in a file that is there, and what is written before and after it.
PLACES = {
    "pipeline/datasets/__init__.py": ("\nNAMES = (", "", " "),
    "pipeline/synthetic/__init__.py": ("\n_WRITERS = {\n", "    ", "\n"),
    "profiles/paper.yaml": ("\nsources:\n", "  ", "\n"),
    "profiles/mini.yaml": ("\nsources:\n", "  ", "\n"),
}
COMMAND = ("snakemake", "--cores", "2", "results/fields_table.csv", "results/fields_report.html")


def steps() -> dict[str, str]:
    """Return what the page tells to do, in its order: file -> the lines that it gets, "" where none are printed."""
    page = (ROOT / "docs/how-to/add-a-dataset.md").read_text(encoding="utf-8")
    section = page.partition("\n## A data set with archives of its own\n")[2].partition("\n## ")[0]
    found = {}
    for step in re.split(r"^\d+\. ", section, flags=re.MULTILINE)[1:]:
        match = re.match(r"`(.+?)`", step)
        assert match, f"names no file first: {step}"
        found[match[1]] = "\n".join(re.findall(r"^ {7}(\S.*)$", step, re.MULTILINE))
    return found


def apply(file: Path, name: str, lines: str) -> None:
    """Do one step in the project's `file`, which the page calls `name`."""
    if name in NEW:
        assert not file.exists()
        assert not lines
        file.write_text(NEW[name].lstrip())
    elif name == "params.yaml":
        params: dict[str, Any] = yaml.safe_load(file.read_text())
        for key, more in yaml.safe_load(lines).items():
            params[key] = params[key] + more if isinstance(more, list) else params[key] | more
        file.write_text(yaml.safe_dump(params, sort_keys=False))
    else:
        text = file.read_text()
        place, before, after = PLACES[name]
        assert text.count(place) == 1
        file.write_text(text.replace(place, f"{place}{before}{lines}{after}"))


def test_the_page_has_the_steps_that_are_done_here() -> None:
    assert {*NEW, *PLACES, "params.yaml", "docs/reference/data-sets.md"} == set(steps())
    page = (ROOT / "docs/how-to/add-a-dataset.md").read_text(encoding="utf-8")
    assert " ".join(COMMAND) in " ".join(page.split())


@pytest.mark.slow
def test_the_steps_suffice(tmp_path: Path) -> None:
    project = small_project.make(tmp_path / "project", small_project.TINY.replace("{voc:", "{fields:"))
    for name in ("Makefile", "README.md", "docs", "pyproject.toml", "CITATION.cff"):
        source = ROOT / name
        shutil.copytree(source, project / name) if source.is_dir() else shutil.copy(source, project / name)
    params = yaml.safe_load((project / "params.yaml").read_text())
    (project / "params.yaml").write_text(yaml.safe_dump(params | {"experiments": {}}))
    for name, lines in steps().items():
        if name == "docs/reference/data-sets.md":
            call(project, "python", "docs/generated.py")
        else:
            apply(project / name, name, lines)
    assert "| `fields` Fields from above | 3 | 400 | 100 |" in (project / "docs/reference/data-sets.md").read_text()
    call(project, *COMMAND)
    with (project / "results/fields_table.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert [(row["experiment"], row["protocol"], row["images"]) for row in rows] == [
        ("fields-res101", "single", "3"),
        ("fields-res101", "multi", "3"),
    ]
    assert {"iou soil", "iou wheat", "iou road"} < set(rows[0])
    page = Page((project / "results/fields_report.html").read_text(encoding="utf-8"))
    assert "Fields from above" in page.text
    assert "fields-res101" in page.text
    # Nothing of the paper was made for it, and DVC finds nothing to do.
    assert not (project / "data/voc").exists()
    again = call(project, "dvc", "repro", "report-further")
    assert "Running stage" not in again.stdout
    # What docs/explanation/code.md says to whoever has trained, when only code has moved.
    with (project / "refinenet/training/loop.py").open("a") as file:
        file.write("# a comment\n")
    assert "train@fields-res101" in call(project, "dvc", "status", "train").stdout
    call(project, "dvc", "commit", "--force", "train", "evaluate")
    assert "train@fields-res101" not in call(project, "dvc", "status", "train", "evaluate").stdout
    cost = call(project, "python", "-m", "pipeline.cost").stdout
    assert "| `fields-res101` |" in cost

    subprocess.run(["make", "clean"], cwd=project, check=True, capture_output=True)
    assert not (project / "data/fields").exists()
    assert (project / "data/raw/fields/fields.zip").is_file()
