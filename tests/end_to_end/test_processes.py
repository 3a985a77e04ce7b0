"""One training in several processes, started by the stage itself (`train: {num_processes: 2}`), over gloo on a CPU."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file

from pipeline import download, preflight, prepare, settings, weights
from pipeline.config import resolve
from pipeline.graph import Stage
from pipeline.runtime.cli import EXIT_HELD, EXIT_TRY_AGAIN
from refinenet.config import Recipe
from refinenet.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
NAME = "person-res50"


def configure(folder: Path, checkpoint_minutes: float = 10, **train: Any) -> None:
    """Write the folder's settings.json with these changes of the recipe."""
    recipe = {"steps": 40, "batch_size": 2, "crop": 48, "log_every": 4, "warmup": 0, **train}
    rendered = {"train": 4, "val": 2, "height": 64, "width": 80}
    tiny = {"base": "mini", "rendered": rendered, "train": recipe, "dtype": "float32"}
    tiny["running"] = {"checkpoint_minutes": checkpoint_minutes}
    (folder / "profiles" / "tiny.yaml").write_text(yaml.safe_dump(tiny))
    settings.run()


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project in which Person-Part is prepared."""
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({**params, "profile": "tiny"}))
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    monkeypatch.chdir(tmp_path)
    configure(tmp_path)
    download.run("person")
    prepare.run("person")
    weights.run("resnet50")
    return tmp_path


def start(folder: Path) -> subprocess.Popen[str]:
    """The stage as dvc.yaml names it, in a process group of its own."""
    unset = ("DVC_STAGE", "PIPELINE_ENGINE", "WORLD_SIZE", "LOCAL_RANK", "RANK")
    environment = {key: value for key, value in os.environ.items() if key not in unset}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pipeline.train", NAME]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def children(parent: int) -> list[int]:
    """The Python processes that a process has started and that run."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            name, _, rest = (folder / "stat").read_text().rpartition(")")
            if int(rest.split()[1]) == parent and "(python" in name:
                found.append(int(folder.name))
    return found


def finish(folder: Path) -> tuple[Mapping[str, Any], str, bytes]:
    """Run it to its end: weights, curve, the weights' bytes."""
    process = start(folder)
    _, told = process.communicate(timeout=400)
    assert process.returncode == 0, told
    model = folder / "models" / f"{NAME}.safetensors"
    return load_file(model), (folder / "curves" / f"{NAME}.csv").read_text(), model.read_bytes()


@pytest.mark.slow
def test_two_processes_do_as_one_and_stop_as_one(folder: Path) -> None:
    """The same weights to rounding; a SIGTERM to all of them at once ends in 75, and then in the same bytes.

    So does a SIGKILL of one of them, which the other, that only misses it, is not the one to tell of.
    """
    one, curve, _ = finish(folder)
    configure(folder, num_processes=2)
    two, other, whole = finish(folder)
    assert max(abs(two[name] - one[name]).max() for name in one) < 1e-5
    pairs = zip(other.splitlines()[1:], curve.splitlines()[1:], strict=True)
    for left, right in pairs:
        assert [float(x) for x in left.split(",")] == pytest.approx([float(x) for x in right.split(",")], abs=1e-3)

    configure(folder, 0, num_processes=2)
    process = start(folder)
    checkpoints = folder / "checkpoints" / NAME
    while not any(checkpoints.glob("step-*.pt")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    lease = json.loads(checkpoints.with_suffix(".lease").read_text())
    assert lease["pid"] == process.pid, "one lease for all of them, of the stage"
    together = [process.pid, *children(process.pid)]  # torchrun gives each a process group of its own
    assert len(together) == 3
    for one in together:
        os.kill(one, signal.SIGSTOP)  # so that they are not done before the second has looked
    second = start(folder)
    _, told = second.communicate(timeout=200)
    assert second.returncode == EXIT_HELD, told
    assert told.startswith(f"error: {NAME} is already being trained, by process {process.pid} on ")
    for one in together:
        os.kill(one, signal.SIGCONT)
    os.killpg(process.pid, signal.SIGTERM)  # what a scheduler does: to the stage and to both processes
    _, told = process.communicate(timeout=200)
    assert process.returncode == EXIT_TRY_AGAIN, told
    assert "the same command goes on from checkpoints/" in told
    assert "Traceback" not in told
    assert any(checkpoints.glob("step-*.pt"))
    assert not checkpoints.with_suffix(".lease").exists()
    assert finish(folder)[2] == whole

    process = start(folder)
    while not any(checkpoints.glob("step-*.pt")):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    os.kill(children(process.pid)[-1], signal.SIGKILL)  # as a system does that has no memory left
    _, told = process.communicate(timeout=200)
    assert process.returncode == 1, told
    assert re.search(r"^error: process [01] of 2 was ended by SIGKILL; the same command goes on from", told, re.M), told
    assert any(checkpoints.glob("step-*.pt"))
    assert finish(folder)[2] == whole


@pytest.mark.slow
def test_what_is_wrong_is_told_without_a_report_of_processes(folder: Path) -> None:
    configure(folder, num_processes=2)
    shutil.rmtree(folder / "data" / "person")
    process = start(folder)
    _, told = process.communicate(timeout=200)
    assert process.returncode == 1
    assert all(line.startswith("error: data/person/") for line in told.split("\n") if line.strip()), told


def test_more_processes_than_images_of_a_batch() -> None:
    with pytest.raises(UserError, match=r"train\.batch_size is 1, expected an image for each of 2 processes"):
        Recipe(steps=1, num_processes=2)


def test_gpus_for_the_cluster() -> None:
    def gpus(chosen: dict[str, Any]) -> int:
        return Stage("a", "a", "a", (), (), (), {"train.a": chosen}, {"gpu": 1}, False).gpus

    assert gpus({"device": "cuda", "recipe": {"num_processes": 4}}) == 4
    assert gpus({"device": "cuda"}) == 1
    assert gpus({"device": "cpu", "recipe": {"num_processes": 4}}) == 0


def test_as_many_cores_as_threads_where_the_processor_computes() -> None:
    """Else Snakemake starts two trainings of two threads at once on two cores, and all four wait for each other."""

    def cores(**chosen: Any) -> int:
        return Stage("a", "a", "a", (), (), (), {"train.a": chosen}, {"gpu": 1}, False).cores(8)

    assert cores(device="cpu", threads=2) == 2
    assert cores(device="cpu", threads=32) == 8
    assert cores(device="cpu", threads=1) == cores(device="cuda", threads=4) == cores() == 1
    # An evaluation, whose dense CRF is computed on the CPU beside any device.
    protocols = {"multi": {"scales": [1.0]}, "crf": {"scales": [1.0], "crf": True}}
    assert cores(device="cuda", threads=4, protocols=protocols) == 4
    assert cores(device="cuda", threads=4, protocols={"multi": protocols["multi"]}) == 1


def test_the_head_of_a_cluster_needs_no_gpu(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    resolved = resolve.resolve()
    for entry in resolved["train"].values():
        entry["device"] = "cuda"
    if not Path("/dev/nvidiactl").exists():
        with pytest.raises(UserError, match="this machine has no GPU"):
            preflight.check(resolved)
    monkeypatch.setenv("PIPELINE_ELSEWHERE", "1")
    preflight.check(resolved)
