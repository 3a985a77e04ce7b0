"""The stage `train` with `hold_out`: what it draws from, what it says and records, and that val plays no part."""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from chosen_profile import choose
from small_project import ROOT

from pipeline import download, prepare, train, weights
from refinenet.data.split import Split
from refinenet.errors import UserError
from refinenet.training import initial, loop

NAME = "person-res50"
TINY: dict[str, Any] = {
    "base": "mini",
    "rendered": {"train": 12, "val": 2, "height": 64, "width": 80},
    "train": {
        **{"steps": 5, "batch_size": 2, "crop": 48, "log_every": 2, "warmup": 0, "init": "variance_matched"},
        **{"hold_out": 0.4, "hold_out_every": 2},
    },
}


class Log:
    """What a run records, in place of MLflow."""

    def __init__(self) -> None:
        self.points: list[tuple[int, dict[str, float]]] = []

    def log(self, step: int, **values: float) -> None:
        self.points.append((step, values))

    def scores(self, values: Any) -> None: ...

    def wrote(self, weights: Path) -> None: ...


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    choose(TINY)
    download.run("person")
    prepare.run("person")
    weights.run("resnet50")
    return tmp_path


def test_the_stage_takes_the_best_and_never_val(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log, drawn = Log(), list[set[str]]()
    crops = initial.Crops

    @contextmanager
    def track(*args: Any, **more: Any) -> Iterator[Log]:
        yield log

    def spy(images: Any, *arguments: Any, **more: Any) -> Any:
        drawn.append({images[index].name for index in range(len(images))})
        return crops(images, *arguments, **more)

    monkeypatch.setattr(train, "track", track)
    monkeypatch.setattr(initial, "Crops", spy)
    train.run(NAME)
    line = capsys.readouterr().out.splitlines()[-1]
    found = re.fullmatch(
        rf"models/{NAME}\.safetensors: 5 steps, loss \d\.\d{{3}}, best on (\d) held-out images at step (\d): "
        r"mean IoU (\d+\.\d)",
        line,
    )
    assert found is not None, line
    looks = {step: values["held_out_mean_iou"] for step, values in log.points if "held_out_mean_iou" in values}
    assert list(looks) == [2, 4, 5]
    best = max(looks, key=lambda step: looks[step])
    assert (int(found[2]), found[3]) == (best, f"{100 * looks[best]:.1f}")
    with Path(f"curves/{NAME}.csv").open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0] == ["step", "loss", "lr"]
    assert [row[0] for row in rows[1:]] == ["2", "4", "5"]
    # The new layers' variance is matched on crops, too: on none of a held-out image.
    everything = {sample.name for sample in Split(Path("data/person/train.arrow"))}
    assert len(drawn) == 2
    assert drawn[0] == drawn[1] < everything
    assert len(everything - drawn[0]) == int(found[1])

    # Val cannot be read at all, and nothing changes.
    model = Path(f"models/{NAME}.safetensors")
    before = model.read_bytes()
    model.unlink()
    Path("data/person/val.arrow").write_bytes(b"not a split")
    train.run(NAME)
    assert model.read_bytes() == before
    assert capsys.readouterr().out.splitlines()[-1] == line


def test_too_few_images_are_told_of_before_anything_is_trained(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")  # leaves MLflow out
    monkeypatch.setattr(loop, "train", lambda *args: pytest.fail("it trains"))
    choose({**TINY, "train": {**TINY["train"], "hold_out": 0.001}})
    told = r"train\.hold_out is 0\.001: holds out 0 and leaves 12 of 12 training images, expected 2 or more of each"
    with pytest.raises(UserError, match=told):
        train.run(NAME)
