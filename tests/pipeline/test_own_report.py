"""The page of a user's own data, on made-up results: complete, self-contained, the same bytes every time."""

from __future__ import annotations

import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys
from contextlib import chdir
from pathlib import Path

import numpy as np
import own_run
import pytest
from html_page import Page

from pipeline import report
from pipeline.formats import label_images
from pipeline.page import custom
from pipeline.page.dataset_section import open_dataset
from pipeline.runtime.dvc_md5 import dvc_md5
from refinenet.data.split import Schema
from refinenet.data.writer import write_split
from refinenet.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own")
    own_run.write_run(root)
    with chdir(root):
        report.run("leaves")
    return root


@pytest.fixture
def run(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy to change, as the working folder."""
    shutil.copytree(made, tmp_path / "run")
    monkeypatch.chdir(tmp_path / "run")
    return Path()


@pytest.fixture(scope="module")
def html(made: Path) -> str:
    return (made / report.path("leaves")).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_asks_for_nothing_and_tells_nothing_of_this_machine(made: Path, html: str, page: Page) -> None:
    assert not page.all("script")
    assert not page.all("link")
    for _, attributes in page.elements:
        for name in ("src", "srcset", "href", "poster", "data", "action"):
            assert (attributes.get(name) or "#").startswith(("data:image/", "#")), attributes
    told = json.loads((made / "settings.json").read_text())["download"]["leaves"]["own"]
    for secret in (str(made), told["images"], told["masks"]):
        assert secret not in html


def test_every_number_of_the_table_and_what_it_was_made_from(made: Path, page: Page) -> None:
    words = " ".join(page.text.split())
    with (made / "results/leaves_table.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    assert len(rows) == 2 * len(own_run.EXPERIMENTS)
    for row in rows:
        numbers = [row[key] for key in ("pixel_accuracy", "mean_accuracy", "mean_iou")]
        left = [row[key] for key in ("experiment", "backbone", "cascade", "pools")]
        assert " ".join([*left, f"{row['protocol']}-scale", *numbers]) in words
    for one in own_run.CLASSES:
        assert f"{one} {' '.join(row[f'iou {one}'] or '–' for row in rows)}" in words
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {(attributes["href"] or "")[1:] for attributes in page.all("a")}
    assert links <= set(ids)
    assert set(own_run.EXPERIMENTS) <= links
    files = ["data/leaves"]
    for name in own_run.EXPERIMENTS:
        files += [f"metrics/leaves/{name}.json", f"models/{name}.safetensors"]
    for file in files:
        assert f"{file} {dvc_md5(made / file)}" in page.text
    archive = (made / "data/raw/leaves/leaves.zip").read_bytes()
    assert hashlib.md5(archive).hexdigest() in page.text


def test_what_speaks_against_the_splits(run: Path, page: Page) -> None:
    share = "1 of the 2 evaluation images (50\N{NO-BREAK SPACE}%)"
    assert f"{share} look nearly like a training image, so the scores flatter: " in page.text
    assert "val 1 and train 0." in page.text
    assert "Recordings (group): 3 in training, 2 in evaluation; in both: north." in page.text
    assert "No pixel in" not in page.text
    Path("data/leaves/checks.json").write_text(
        json.dumps({"near_duplicates": {"val": 2, "found": 0, "examples": []}, "groups": None})
    )
    classes = (*own_run.CLASSES, "root")
    schema = Schema("leaves", "val", classes, label_images.colour_map(4))
    with write_split(Path("data/leaves/val.arrow"), schema) as writer:
        writer.add("one", np.zeros((8, 8, 3), np.uint8), np.ones((8, 8), np.uint8))
    notes = custom.split_notes("leaves", open_dataset(Path(), "leaves"), Path())
    assert notes == [
        "No pixel in the evaluation images: soil, stem, root.",
        "No evaluation image looks nearly like a training image.",
    ]
    Path("data/leaves/checks.json").unlink()  # as of a data set with archives
    assert len(custom.split_notes("leaves", open_dataset(Path(), "leaves"), Path())) == 1


def test_pictures(page: Page) -> None:
    images = page.all("img")
    # 4 training and 2 other images beside their masks; twice image | truth | prediction, curve, matrix of an experiment
    assert len(images) == 2 * (4 + 2) + 2 * (2 * 3 + 2)
    assert all(image["alt"] and image["width"] and image["height"] for image in images)
    for name in own_run.EXPERIMENTS:
        assert any((image["alt"] or "").startswith(f"Prediction of {name} for val 1: ") for image in images)
        # The pictures are of the protocol that `evaluate` takes, the last one in settings.json.
        assert f"Image, truth and prediction of {name}, single-scale" in page.text


def test_without_pictures_where_none_were_asked_for(run: Path) -> None:
    told = json.loads(Path("settings.json").read_text())
    for experiment in own_run.EXPERIMENTS:
        told["evaluate"][experiment]["pictures"] = 0
        for file in Path("predictions", experiment).glob("*.png"):
            file.unlink()
    with pytest.raises(UserError, match=r"no pictures; `evaluate leaves-res101` makes them"):
        custom.html("leaves")
    Path("settings.json").write_text(json.dumps(told))
    page = Page(custom.html("leaves"))
    assert "Image, truth and prediction" not in page.text
    assert len(page.all("img")) == 2 * (4 + 2) + 2 * 2  # sheets; curve and matrix of an experiment


def test_same_bytes_in_another_folder_and_process(made: Path, run: Path, html: str) -> None:
    report.path("leaves").unlink()
    command = [sys.executable, "-m", "pipeline.report", "leaves"]
    subprocess.run(command, check=True, env={"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"})
    assert report.path("leaves").read_text(encoding="utf-8") == html


def test_large_pictures_still_fit(run: Path, html: str) -> None:
    full = len(html.encode())
    assert len(custom.html("leaves", limit=full).encode()) == full
    assert len(custom.html("leaves", limit=full - 1).encode()) < full


def test_names_are_escaped(run: Path) -> None:
    """A user's own names: of images, of the data set."""
    profile = Path("profiles/own.yaml")
    profile.write_text(re.sub("# title: Leaves, 2024", 'title: "<script>x</script>"', profile.read_text()))
    assert "&lt;script&gt;x&lt;/script&gt;" in custom.html("leaves")
    assert "<script" not in custom.html("leaves")


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("metrics/leaves/best.json", "metrics/leaves/best.json: no such file; `evaluate best` makes it"),
        ("curves/best.csv", "curves/best.csv: no such file; `train best` makes it"),
        ("predictions/best", "predictions/best/confusion-single.npy: no such file; `evaluate best` makes it"),
        ("models/best.safetensors", "models/best.safetensors: "),
        ("data/leaves", "data/leaves: no such folder; `prepare leaves` makes it"),
        ("data/raw/leaves", "data/raw/leaves/leaves.zip: no such file; `download leaves` makes it"),
        ("settings.json", "settings.json: no such file; stage settings makes it"),
    ],
)
def test_a_missing_input_is_named(gone: str, message: str, run: Path) -> None:
    shutil.rmtree(gone) if Path(gone).is_dir() else Path(gone).unlink()
    report.path("leaves").unlink()
    with pytest.raises(UserError) as error:
        report.run("leaves")
    assert message in str(error.value)
    assert not report.path("leaves").exists()


def test_a_name_that_has_no_page(run: Path) -> None:
    with pytest.raises(UserError, match=r"^'voc': no data set with a page of its own, expected one of leaves, camvid$"):
        report.run("voc")
