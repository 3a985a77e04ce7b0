"""An experiment with further seeds: its rows in params.yaml, its stages, its metrics."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import small_project
import yaml

from pipeline import settings
from pipeline.config import resolve
from refinenet.errors import UserError

ROOT = small_project.ROOT
NAME = "voc-res101-seed1"
ROW = {"of": "voc-res101", "seed": 1, "data": "voc", "start": "voc-res101-coco"}
PROFILE = """
base: mini
title: of a test
network: {stem: 2, width: 4, coarse_width: 8}
rendered: {train: 4, val: 2, height: 48, width: 64}
datasets:
  voc:
    phases: {pretrain: [], train: []}
    train: {steps: 2, batch_size: 2, crop: 32, log_every: 1}
    evaluate: {protocols: {single: {scales: [1.0]}, multi: {scales: [1.0]}}}
"""


@pytest.fixture
def params(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Those of the project, which lies in the working folder."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    monkeypatch.chdir(tmp_path)
    read: dict[str, Any] = yaml.safe_load(Path("params.yaml").read_text())
    return read


def write(params: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    Path("params.yaml").write_text(yaml.safe_dump({**params, "seeds": rows}))


def test_only_the_seed_differs(params: dict[str, Any]) -> None:
    write(params, {NAME: ROW})
    resolved = resolve.resolve()
    first, second = resolved["train"]["voc-res101"], resolved["train"]["voc-res101-seed1"]
    assert {key for key in first if first[key] != second[key]} == {"seed"}
    assert (first["seed"], second["seed"]) == (0, 1)
    assert resolved["evaluate"]["voc-res101-seed1"]["of"] == "voc-res101"
    assert resolved["evaluate"]["voc-res101"]["of"] is None


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        (
            NAME,
            {"of": "voc-res18"},
            r"seeds\.voc-res101-seed1\.of is 'voc-res18', expected one of ade20k",
        ),
        ("voc-res101-seed0", {"seed": 0}, r"seed is 0, expected another one than the profile's, 0"),
        ("voc-res101-seed2", {}, r"expected the name voc-res101-seed1"),
        (NAME, {"start": "resnet101"}, r"start is 'resnet101', expected 'voc-res101-coco'"),
        (NAME, {"data": "nyud"}, r"data is 'nyud', expected 'voc'"),
        (NAME, {"sed": 3}, r"params\.yaml: unknown key seeds\.voc-res101-seed1\.sed"),
    ],
)
def test_a_mistake_names_the_row(params: dict[str, Any], name: str, changes: dict[str, Any], message: str) -> None:
    write(params, {name: {**ROW, **changes}})
    with pytest.raises(UserError, match=message):
        resolve.resolve()


def test_a_result_whose_row_is_gone_counts_for_nothing_in_silence(params: dict[str, Any]) -> None:
    """Tables read whatever lies in metrics/seeds."""
    write(params, {NAME: ROW})
    Path("metrics/seeds/voc").mkdir(parents=True)
    Path("metrics/seeds/voc/voc-res101-seed1.json").write_text("{}")
    settings.run()
    write(params, {})
    with pytest.raises(
        UserError, match=r"metrics/seeds/voc/voc-res101-seed1\.json: params\.yaml has no seeds\.voc-res101"
    ):
        settings.run()


@pytest.mark.slow
def test_a_seed_in_the_graph(tmp_path: Path) -> None:
    """Snakemake makes it with its table, DVC finds nothing to do, another seed is another training."""
    project = small_project.make(tmp_path, PROFILE)
    params = yaml.safe_load((project / "params.yaml").read_text())
    params["seeds"] = {"voc-res101-seed1": {**ROW, "start": "resnet101"}}
    (project / "params.yaml").write_text(yaml.safe_dump(params))
    small_project.call(project, "snakemake", "--cores", "2", "results/voc_table.csv")
    first = json.loads((project / "metrics/voc/voc-res101.json").read_text())
    again = json.loads((project / "metrics/seeds/voc/voc-res101-seed1.json").read_text())
    assert (first["experiment"], first["seed"]) == ("voc-res101", 0)
    assert (again["experiment"], again["seed"]) == ("voc-res101", 1)
    weights = [(project / f"models/voc-res101{name}.safetensors").read_bytes() for name in ("", "-seed1")]
    assert weights[0] != weights[1]
    for name in ("train-seeds@voc-res101-seed1", "evaluate-seeds@voc-res101-seed1", "table-voc"):
        assert "up to date" in small_project.call(project, "dvc", "status", name).stdout, name
    table = (project / "results/voc_table.csv").read_text()
    assert "voc-res101" in table
