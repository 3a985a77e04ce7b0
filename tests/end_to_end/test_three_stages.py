"""VOC's three stages through the real stages: COCO + SBD + VOC and SBD + VOC before the experiment, which is on VOC."""

from __future__ import annotations

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
from chosen_profile import choose
from safetensors.torch import load_file
from small_project import ROOT

from pipeline import download, prepare, train, weights
from refinenet.data.split import Split
from refinenet.training import initial

TINY: dict[str, Any] = {
    "base": "mini",
    "dtype": "float32",
    "rendered": {"train": 5, "val": 2, "height": 64, "width": 80},
    "train": {"batch_size": 2, "crop": 48, "log_every": 1, "warmup": 0},
    "datasets": {
        "voc": {
            "phases": {
                "pretrain": [
                    {"parts": [["coco", "train"], ["voc", "train"]], "steps": 3},
                    {"parts": [["voc", "train"]], "steps": 2},
                ],
                "train": [{"parts": [["voc", "train_voc"]], "steps": 2, "lr": 1e-12}],
            }
        }
    },
}
NAME, EARLY = "voc-res101", "voc-res101-coco"


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")  # leaves MLflow out
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    choose(TINY)
    for name in ("voc", "coco"):
        download.run(name)
        prepare.run(name)
    weights.run("resnet101")
    return tmp_path


def steps(name: str) -> list[int]:
    with Path(f"curves/{name}.csv").open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def test_each_stage_has_its_images_and_goes_on_from_the_one_before(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []
    crops = initial.Crops

    def spy(images: Any, *arguments: Any, **more: Any) -> Any:
        seen.append([images[index].name for index in range(len(images))])
        return crops(images, *arguments, **more)

    monkeypatch.setattr(initial, "Crops", spy)
    train.run(EARLY)
    train.run(NAME)
    coco, both, own = (
        [sample.name for sample in Split(Path(f"data/{file}.arrow"))]
        for file in ("coco/train", "voc/train", "voc/train_voc")
    )
    assert seen == [coco + both, both, own]
    assert set(own) < set(both)
    assert (steps(EARLY), steps(NAME)) == ([1, 2, 3, 4, 5], [1, 2])
    assert not Path(f"models/{EARLY}.safetensors").exists()
    before, after = load_file(f"weights/{EARLY}.safetensors"), load_file(f"models/{NAME}.safetensors")
    # The rate of the last stage is next to nothing: what it ends in is what it started from, the classifier too.
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert (tensor - after[key]).abs().max() < 1e-6, key
    assert before["classifier.bias"].abs().max() > 0


def test_without_phases_the_start_is_passed_on(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    choose({**TINY, "datasets": {"voc": {"phases": {"pretrain": [], "train": []}, "train": {"steps": 2}}}})
    train.run(EARLY)
    assert "weights/resnet101.safetensors is copied" in capsys.readouterr().out
    start = Path("weights/resnet101.safetensors").read_bytes()
    assert Path(f"weights/{EARLY}.safetensors").read_bytes() == start
    assert steps(EARLY) == []
    train.run(NAME)
    assert steps(NAME) == [1, 2]
