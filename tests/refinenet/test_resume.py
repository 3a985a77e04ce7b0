"""Checkpoints: a training that is killed, stopped or finds a broken file ends in the same bytes."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from toy_training import RECIPE, run, write

from pipeline import download, prepare, settings, weights
from pipeline.runtime.cli import EXIT_HELD, EXIT_TRY_AGAIN
from refinenet.config import Recipe
from refinenet.data.split import Split
from refinenet.training import checkpoints
from refinenet.training.loop import Phase, Stopped

ROOT = Path(__file__).resolve().parents[2]
EACH_STEP = {"running": {"checkpoint_minutes": 0}}


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return write(tmp_path_factory.mktemp("split") / "image.arrow")


@pytest.fixture(scope="module")
def whole(split: Split, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """What the training ends in that nothing happens to."""
    return run(split, tmp_path_factory.mktemp("whole"))


def test_interrupted_anywhere_ends_in_the_same_bytes(split: Split, whole: Any, tmp_path: Path) -> None:
    assert [point.step for point in whole[1]] == [2, 4, 6, 7]
    # A checkpoint lies after step 3, between two points of the curve: a loss is carried along.
    for stop in (1, 4):
        with pytest.raises(KeyboardInterrupt):
            run(split, tmp_path / str(stop), stop_at=stop)
    assert checkpoints.read(tmp_path / "4" / "step-000000003.pt")["pending"].shape == (1, 2)
    assert run(split, tmp_path / "1") == whole
    assert run(split, tmp_path / "4") == whole


@pytest.mark.parametrize(
    "recipe",
    [
        replace(RECIPE, optimiser="adamw", precision="bfloat16", channels_last=True),
        replace(RECIPE, activation_checkpointing=True, schedule="cosine", grad_clip=None),
    ],
)
def test_every_state_is_in_a_checkpoint(split: Split, recipe: Recipe, tmp_path: Path) -> None:
    """Moments of AdamW, the order of maps in memory, random states inside recomputed parts."""
    recipe = replace(recipe, steps=4)
    whole = run(split, tmp_path / "whole", recipe)
    with pytest.raises(KeyboardInterrupt):
        run(split, tmp_path / "parts", recipe, stop_at=3, every=2)
    assert [path.name for path in (tmp_path / "parts").iterdir()] == ["step-000000002.pt"]
    assert run(split, tmp_path / "parts", recipe) == whole


def test_phases_go_on_where_they_were(split: Split, tmp_path: Path) -> None:
    other = write(tmp_path / "other.arrow", seed=1)
    phases = [Phase(split, 3), Phase(other, 3, lr=0.004)]
    recipe = replace(RECIPE, drop_at=0.5)
    whole = run(phases, tmp_path / "whole", recipe)
    assert [point.step for point in whole[1]] == [2, 3, 4, 6]
    assert [point.lr for point in whole[1]] == pytest.approx([0.01, 0.001, 0.004, 0.0004])
    for every in (3, 4):  # right between the two, where no momentum is carried on, and within the second
        with pytest.raises(KeyboardInterrupt):
            run(phases, tmp_path / str(every), recipe, stop_at=5, every=every)
        assert [path.name for path in (tmp_path / str(every)).iterdir()] == [f"step-00000000{every}.pt"]
        assert run(phases, tmp_path / str(every), recipe) == whole


def test_asked_to_stop_it_leaves_a_checkpoint(split: Split, whole: Any, tmp_path: Path) -> None:
    with pytest.raises(Stopped) as stopped:
        run(split, tmp_path, stop=lambda: True)
    assert (stopped.value.step, stopped.value.path) == (1, tmp_path / "step-000000001.pt")
    assert stopped.value.path.is_file()
    assert run(split, tmp_path) == whole
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):  # not told of a checkpoint that could not be written
        run(split, tmp_path / "file", stop=lambda: True)


def test_checkpoint_of_something_else_is_not_taken(split: Split, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(split, tmp_path, stop_at=4, fingerprint="other settings")
    assert checkpoints.newest(tmp_path, "f") is None
    assert not list(tmp_path.glob("*.pt"))


def test_broken_checkpoint_is_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cut at any byte, or a single bit of it changed; the one before is taken."""
    older, newest = tmp_path / "step-000000003.pt", tmp_path / "step-000000006.pt"
    for step, path in ((3, older), (6, newest)):
        checkpoints.write(path, {"fingerprint": "f", "step": step, "model": {"weight": torch.rand(50, 50)}})
    good = newest.read_bytes()

    def taken() -> int:
        found = checkpoints.newest(tmp_path, "f")
        assert found is not None
        return int(found[1]["step"])

    assert taken() == 6
    assert not capsys.readouterr().err
    rng = random.Random(0)
    broken = [good[: rng.randrange(len(good))] for _ in range(20)] + [b"", good[:-1], good + b"\0"]
    for _ in range(50):
        place = rng.randrange(len(good))
        broken.append(good[:place] + bytes([good[place] ^ 1 << rng.randrange(8)]) + good[place + 1 :])
    for content in broken:
        newest.write_bytes(content)
        assert taken() == 3
        assert f"{newest}: broken checkpoint" in capsys.readouterr().err


def test_two_are_kept_and_errors_of_the_disk_are_told(tmp_path: Path) -> None:
    with checkpoints.Store(tmp_path) as store:
        for step in range(4):
            store.save(step, lambda step=step: {"step": step})  # type: ignore[misc]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000000002.pt", "step-000000003.pt"]
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), checkpoints.Store(tmp_path / "file") as store:
        store.save(1, dict)


def test_due_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100]
    monkeypatch.setattr(checkpoints.time, "monotonic", lambda: clock[-1])
    due, each = checkpoints.due_every(60), checkpoints.due_every(0)
    found = []
    for now in (100, 159, 160, 161, 230, 289, 290):
        clock.append(now)
        found.append(due())
        assert each()
    assert found == [False, False, True, False, True, False, True]


GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize(
    ("device", "room"),
    [("cpu", True), pytest.param("cuda", True, marks=GPU), pytest.param("cuda", False, marks=GPU)],
)
def test_what_is_written_is_what_was_there_and_nothing_waits_for_it(
    device: str, room: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The weights change before the thread has looked; a GPU is waited for only if it has no room for a copy."""
    if not room:
        monkeypatch.setattr(checkpoints, "_has_room", lambda gpu, content: False)
    weight, best = torch.zeros(1 << 20, device=device), torch.ones(2)
    wait = threading.Event()
    with checkpoints.Store(tmp_path) as store:
        store._thread.submit(wait.wait)
        if device == "cuda" and room:
            torch.cuda.set_sync_debug_mode("error")
        try:
            path = store.save(1, lambda: {"model": {"weight": weight}, "curve": [(1, 0.5)]}, {"best": {"weight": best}})
            weight.fill_(1)
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
            wait.set()
    found = checkpoints.read(path)
    assert not found["model"]["weight"].any()
    assert found["curve"] == [(1, 0.5)]
    assert torch.equal(found["best"]["weight"], best)


@pytest.fixture(scope="module")
def trainable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project of its own in which Person-Part is prepared, drawn and tiny: 100 steps, each with a checkpoint."""
    folder = tmp_path_factory.mktemp("trainable")
    shutil.copy(ROOT / "params.yaml", folder)
    shutil.copytree(ROOT / "profiles", folder / "profiles")
    params = yaml.safe_load((folder / "params.yaml").read_text())
    (folder / "params.yaml").write_text(yaml.safe_dump({**params, "profile": "tiny"}))
    train = {"steps": 100, "batch_size": 2, "crop": 48, "log_every": 7, "warmup": 0}
    rendered = {"train": 4, "val": 2, "height": 64, "width": 80}
    tiny = {"base": "mini", "rendered": rendered, "train": train, "network": {"dropout": 0.5}, **EACH_STEP}
    (folder / "profiles" / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        settings.run()
        download.run("person")
        prepare.run("person")
        weights.run("resnet50")
    return folder


def stage(folder: Path, **more: str) -> subprocess.Popen[str]:
    """The real stage; a RANK other than 0 leaves MLflow out. `more`: environment variables."""
    unset = ("DVC_STAGE", "PIPELINE_ENGINE", "WORLD_SIZE", "LOCAL_RANK")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1", "RANK": "1", **more}
    command = [sys.executable, "-m", "pipeline.train", "person-res50"]
    return subprocess.Popen(command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True)


def result(folder: Path) -> tuple[bytes, bytes]:
    """The weights and the curve of a training that ended well, which leaves no checkpoint."""
    assert not any((folder / "checkpoints").iterdir())
    model, curve = folder / "models" / "person-res50.safetensors", folder / "curves" / "person-res50.csv"
    return model.read_bytes(), curve.read_bytes()


def finish(folder: Path) -> tuple[bytes, bytes]:
    process = stage(folder)
    _, told = process.communicate(timeout=600)
    assert process.returncode == 0, told
    return result(folder)


@pytest.mark.slow
def test_stage_killed_twenty_times_ends_in_the_same_bytes(trainable: Path, tmp_path: Path) -> None:
    """Every other time while a checkpoint is being written. Before, two whole runs; after, a SIGTERM."""
    for name in ("whole", "again", "killed"):
        shutil.copytree(trainable, tmp_path / name)
    whole = finish(tmp_path / "whole")
    assert finish(tmp_path / "again") == whole
    folder = tmp_path / "killed"
    checkpoints = folder / "checkpoints" / "person-res50"
    rng = random.Random(0)
    writing = 0

    def newest() -> int:
        """The step of the newest checkpoint; whole ones only have this name."""
        return max((int(path.stem.removeprefix("step-")) for path in checkpoints.glob("step-*.pt")), default=0)

    def begin() -> tuple[subprocess.Popen[str], int]:
        """The stage, as soon as it has written a checkpoint, and the step of that."""
        before, process = newest(), stage(folder)
        while process.poll() is None and newest() <= before:
            time.sleep(0.002)
        return process, newest()

    for kill in range(20):
        process, first = begin()
        if kill % 2:
            while process.poll() is None and not any(checkpoints.glob(".*.part")):
                pass
        else:
            # Two steps later at the latest: a fast machine must not come to the end of the training.
            end = time.monotonic() + rng.uniform(0, 0.3)
            while process.poll() is None and time.monotonic() < end and newest() < first + 2:
                time.sleep(0.002)
        assert process.poll() is None, "too few steps for twenty kills"
        process.kill()
        process.communicate()
        writing += any(checkpoints.glob(".*.part"))
    assert writing > 2
    process, _ = begin()
    assert process.poll() is None, "too few steps for twenty kills"
    process.terminate()
    _, told = process.communicate()
    assert process.returncode == EXIT_TRY_AGAIN, told
    assert "the same command goes on from checkpoints/person-res50/step-" in told
    assert finish(folder) == whole


@pytest.mark.slow
def test_a_second_start_never_writes_beside_the_first(trainable: Path, tmp_path: Path) -> None:
    """Refused by hand; by an engine it waits for the first, takes over when that is killed, or takes what it made."""
    for name in ("whole", "twice"):
        shutil.copytree(trainable, tmp_path / name)
    whole = finish(tmp_path / "whole")
    folder = tmp_path / "twice"
    checkpoints, model = folder / "checkpoints" / "person-res50", folder / "models" / "person-res50.safetensors"

    def begin() -> subprocess.Popen[str]:
        process = stage(folder)
        while process.poll() is None and not any(checkpoints.glob("step-*.pt")):
            time.sleep(0.01)
        assert process.poll() is None, process.communicate()[1]
        process.send_signal(signal.SIGSTOP)  # so that it is not done before the others have looked
        return process

    def waiting() -> subprocess.Popen[str]:
        process = stage(folder, PIPELINE_ENGINE=str(os.getpid()))
        assert process.stderr is not None
        line = process.stderr.readline()
        assert line.startswith(f"person-res50: waits for process {first.pid} on "), line
        return process

    first = begin()
    before = {path.name: path.read_bytes() for path in checkpoints.parent.rglob("*") if path.is_file()}
    second = stage(folder)
    _, told = second.communicate(timeout=200)
    assert second.returncode == EXIT_HELD
    assert told.startswith(f"error: person-res50 is already being trained, by process {first.pid} on ")
    assert told.count("\n") == 1
    third = waiting()
    assert {path.name: path.read_bytes() for path in checkpoints.parent.rglob("*") if path.is_file()} == before
    first.kill()
    first.communicate()
    _, told = third.communicate(timeout=600)
    assert third.returncode == 0, told
    assert f"process {first.pid} on " in told
    assert "has ended; taken over" in told
    assert result(folder) == whole

    model.unlink()
    first = begin()
    third = waiting()
    first.send_signal(signal.SIGCONT)
    assert first.wait(600) == 0
    made = model.stat()
    _, told = third.communicate(timeout=200)
    assert third.returncode == 0, told
    assert (model.stat().st_ino, model.stat().st_mtime_ns) == (made.st_ino, made.st_mtime_ns), "trained again"
    assert result(folder) == whole
