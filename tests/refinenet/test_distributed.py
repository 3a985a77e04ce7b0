"""Two processes train as one; and of several processes each finds a GPU of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from toy_training import RECIPE, model, write

from refinenet.config import Recipe
from refinenet.device import pick
from refinenet.errors import UserError
from refinenet.training.distributed import ProcessGroup
from refinenet.training.loop import train

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers"
STEPS = 20
# What each process runs: trainings with batches of 4 and 3, then one that process 1 is asked to stop and that goes on.
SCRIPT = f"""
import os, sys, torch
from dataclasses import replace
from pathlib import Path
from toy_training import RECIPE, after_steps, model
from refinenet.data.split import Split
from refinenet.training.distributed import processes
from refinenet.training.loop import Stopped, train

folder = Path(sys.argv[1])
with processes(torch.device("cpu")) as together:
    asked = [False]
    # What process 1 holds to be due does not count.
    due = {{0: after_steps(4), 1: lambda: True}}
    def go(name, batch, on_step=lambda progress: None):
        net = model(dropout=0.0)
        recipe = replace(RECIPE, batch_size=batch, steps={STEPS}, log_every=6)
        curve = train(net, Split(folder / "image.arrow"), recipe, 0, folder / name, "f", on_step,
                      lambda: asked[0], due.get(together.rank, bool), together)
        torch.save((net.state_dict(), [(p.step, p.loss) for p in curve]), folder / f"{{name}}-{{together.rank}}.out")
    go("four", 4)
    go("three", 3)
    def on_step(progress):
        asked[0] = together.rank == 1 and progress.step >= 7
    try:
        go("stopped", 4, on_step)
    except Stopped as stopped:
        kept = sorted(path.name for path in (folder / "stopped").glob("*.pt"))
        (folder / f"kept-{{together.rank}}").write_text(" ".join(kept))
        (folder / f"stopped-{{together.rank}}").write_text(str(stopped.step))
    asked[0] = False
    go("stopped", 4)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    write(folder / "image.arrow")
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": f"{HELPERS}:{ROOT}", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, str(folder / "script.py"), str(folder)], env=environment, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return folder


@pytest.mark.parametrize(("name", "batch"), [("four", 4), ("three", 3)])
def test_two_processes_equal_one_with_the_same_batches(folder: Path, name: str, batch: int, tmp_path: Path) -> None:
    net = model(dropout=0.0)
    recipe: Recipe = replace(RECIPE, batch_size=batch, steps=STEPS, log_every=6)
    curve = train(net, write(folder / "image.arrow"), recipe, 0, tmp_path, "f")
    for rank in (0, 1):
        weights, points = torch.load(folder / f"{name}-{rank}.out", weights_only=True)
        torch.testing.assert_close(weights, dict(net.state_dict()), rtol=0, atol=1e-5)
        assert [step for step, _ in points] == [p.step for p in curve]
        assert [loss for _, loss in points] == pytest.approx([p.loss for p in curve], abs=1e-5)


def test_all_stop_at_one_step_and_go_on_in_the_same_bytes(folder: Path) -> None:
    assert (folder / "stopped-0").read_text() == (folder / "stopped-1").read_text() == "8"
    # The first process alone decides when a checkpoint is due; all hear of it one step later.
    assert (folder / "kept-0").read_text() == (folder / "kept-1").read_text() == "step-000000005.pt step-000000008.pt"
    for rank in (0, 1):
        weights, points = torch.load(folder / f"stopped-{rank}.out", weights_only=True)
        whole, wanted = torch.load(folder / f"four-{rank}.out", weights_only=True)
        assert points == wanted
        assert all(torch.equal(weights[name], whole[name]) for name in whole)


def test_a_batch_is_shared_out() -> None:
    for batch, world in ((8, 4), (7, 3), (3, 3)):
        shares = [list(range(batch))[ProcessGroup(rank, world).share(batch)] for rank in range(world)]
        assert [place for share in shares for place in share] == list(range(batch))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_processes_than_images(tmp_path: Path) -> None:
    split = write(tmp_path / "image.arrow")
    with pytest.raises(UserError, match=r"train\.batch_size is 2"):
        train(model(), split, replace(RECIPE, batch_size=2), 0, tmp_path, "f", processes=ProcessGroup(0, 3))


def test_the_gpu_with_the_most_free_memory_that_nobody_took() -> None:
    def choose(free: list[int], *taken: int) -> int:
        return pick(free, lambda index: index not in taken)

    assert choose([3, 9, 5]) == 1
    assert choose([3, 9, 5], 1) == 2
    assert choose([0, 0, 0], 0) == 1  # nothing is known of memory
    assert choose([3, 9, 5], 0, 1, 2) == 1


def test_processes_at_once_take_a_gpu_each(tmp_path: Path) -> None:
    """Four GPUs, six processes: four get one each, two share; what a process held is free once it has ended."""
    code = f"""
import sys
from pathlib import Path
from refinenet.device import hold, pick
taken = []
def take(index):
    taken.append((index, hold(Path({str(tmp_path)!r}) / f"gpu{{index}}")))
    return taken[-1][1]
index = pick([1, 4, 2, 3], take)
print(index, taken[-1][1], flush=True)
sys.stdin.read()
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def start() -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, "-c", code], env=environment, stdin=pipe, stdout=pipe, text=True)

    def told(process: subprocess.Popen[str]) -> tuple[int, bool]:
        assert process.stdout is not None
        index, alone = process.stdout.readline().split()
        return int(index), alone == "True"

    running = [start() for _ in range(6)]
    found = [told(process) for process in running]
    assert sorted(found) == [(0, True), (1, False), (1, False), (1, True), (2, True), (3, True)]
    third = running[found.index((3, True))]
    third.kill()
    third.wait()
    another = start()
    assert told(another) == (3, True)
    for process in (*running, another):
        process.kill()
        process.communicate()
