"""Two processes train as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_training import RECIPE, model, write

from refinenet.config import CASCADES, Recipe
from refinenet.errors import UserError
from refinenet.training.distributed import ProcessGroup, parameters_without_gradient
from refinenet.training.loop import train

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers"
STEPS = 20
# Settings of a network, and which parameters no gradient reaches. The loss of a training depends on all others.
VARIANTS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    **{name: ({"cascade": name}, ()) for name in CASCADES},
    "no pooling": ({"cascade": "four", "pools": 0, "last_units": 0}, ()),
    "up to stage 3": ({"cascade": {"blocks": [[[0, 3]], [[0, 2], [0, 1]]]}}, ("backbones.0.layer4.",)),
    "stage 1 alone": ({"cascade": {"blocks": [[[0, 1]]]}}, tuple(f"backbones.0.layer{n}." for n in (2, 3, 4))),
    "half the size up to stage 2": (
        {"cascade": {"blocks": [[[0, 4], [1, 2]], [[0, 1], [1, 1]]], "scales": [1.0, 0.5]}},
        ("backbones.1.layer3.", "backbones.1.layer4."),
    ),
    "of timm, up to stage 3": (
        {"cascade": {"blocks": [[[0, 3]], [[0, 1]]]}, "backbone": "timm:tf_efficientnet_lite0"},
        ("backbones.0.net.blocks.5.", "backbones.0.net.blocks.6."),
    ),
}
FAST = {"channels_last": True, "activation_checkpointing": True}  # for "up to stage 3"
# What each process runs. "whole": trainings with batches of 4 and 3, one that process 1 is asked to stop and that goes
# on, one with dropout twice, two steps of each variant, gradients of one with several buckets. "killed": the one with
# dropout, in which process 1 is killed; "resumed": the same again.
SCRIPT = f"""
import json, os, signal, sys, time, torch
from dataclasses import replace
from pathlib import Path
from toy_training import RECIPE, after_steps, model
from refinenet.data.split import Split
from refinenet.training.distributed import parameters_without_gradient, processes
from refinenet.training.loop import Stopped, train

folder, what = Path(sys.argv[1]), sys.argv[2]
with processes(torch.device("cpu")) as together:
    asked = [False]
    # What process 1 holds to be due does not count.
    due = {{0: after_steps(4), 1: lambda: True}}
    def go(name, batch, on_step=lambda progress: None, steps={STEPS}, change={{}}, **settings):
        net = model(**{{"dropout": 0.0, **settings}})
        recipe = replace(RECIPE, batch_size=batch, steps=steps, log_every=6, **change)
        curve = train(net, Split(folder / "image.arrow"), recipe, 0, folder / name, "f", on_step,
                      lambda: asked[0], due.get(together.rank, bool), together)
        torch.save((net.state_dict(), [(p.step, p.loss) for p in curve]), folder / f"{{name}}-{{together.rank}}.out")
        assert all(parameter.requires_grad for parameter in net.parameters())

    def whole():
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
        for name in ("masks", "again"):
            go(name, 4, dropout=0.5)
        for name, settings in json.loads((folder / "variants.json").read_text()).items():
            go(f"variant {{name}}", 2, steps=2, **settings)
        go("variant fast", 2, steps=2, change={FAST!r}, **settings_of("up to stage 3"))
        for name in ("four", "up to stage 3"):
            (folder / f"{{name}}-{{together.rank}}.order").write_text(" ".join(order(settings_of(name))))

    def settings_of(name):
        return json.loads((folder / "variants.json").read_text())[name]

    def order(settings):
        # When a bucket's sum begins, and when the last gradient is there, that of the first layer: in three steps.
        net, told = model(0.0, stem=32, **settings), []
        def sum_of(state, bucket):
            told.append("sum")
            work = torch.distributed.all_reduce(bucket.buffer(), async_op=True)
            return work.get_future().then(lambda done: done.value()[0] / 2)
        with together.wrap_ddp(net, parameters_without_gradient(net, 32)) as network:
            network.register_comm_hook(None, sum_of)
            net.backbones[0].conv1.weight.register_hook(lambda gradient: told.append("last"))
            for _ in range(3):
                told.append("step")
                network(torch.zeros(1, 3, 32, 32)).sum().backward()
        return told

    def killed(kill):
        def on_step(progress):
            if kill and together.rank == 1 and progress.step == 9:
                while not (folder / "killed" / "step-000000005.pt").exists():
                    time.sleep(0.01)
                os.kill(os.getpid(), signal.SIGKILL)
        go("killed", 4, on_step, dropout=0.5)

    whole() if what == "whole" else killed(what == "killed")
"""


def launch(folder: Path, what: str) -> subprocess.CompletedProcess[str]:
    """Run two processes of the script."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"PYTHONPATH": f"{HELPERS}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command += [str(folder / "script.py"), str(folder), what]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400, check=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    write(folder / "image.arrow")
    (folder / "script.py").write_text(SCRIPT)
    (folder / "variants.json").write_text(json.dumps({name: settings for name, (settings, _) in VARIANTS.items()}))
    done = launch(folder, "whole")
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return folder


def results(folder: Path, name: str) -> list[tuple[dict[str, torch.Tensor], list[tuple[int, float]]]]:
    """Weights and curve, as each process has them."""
    return [torch.load(folder / f"{name}-{rank}.out", weights_only=True) for rank in (0, 1)]


def assert_same_bytes(folder: Path, name: str, other: str) -> None:
    for (weights, points), (whole, wanted) in zip(results(folder, name), results(folder, other), strict=True):
        assert points == wanted
        assert all(torch.equal(weights[key], whole[key]) for key in whole)


@pytest.mark.parametrize(("name", "batch"), [("four", 4), ("three", 3)])
def test_two_processes_equal_one_with_the_same_batches(folder: Path, name: str, batch: int, tmp_path: Path) -> None:
    net = model(dropout=0.0)
    recipe: Recipe = replace(RECIPE, batch_size=batch, steps=STEPS, log_every=6)
    curve = train(net, write(folder / "image.arrow"), recipe, 0, tmp_path, "f")
    for weights, points in results(folder, name):
        torch.testing.assert_close(weights, dict(net.state_dict()), rtol=0, atol=1e-5)
        assert [step for step, _ in points] == [p.step for p in curve]
        assert [loss for _, loss in points] == pytest.approx([p.loss for p in curve], abs=1e-5)


def test_all_stop_at_one_step_and_go_on_in_the_same_bytes(folder: Path) -> None:
    assert (folder / "stopped-0").read_text() == (folder / "stopped-1").read_text() == "8"
    # The first process alone decides when a checkpoint is due; all hear of it one step later.
    assert (folder / "kept-0").read_text() == (folder / "kept-1").read_text() == "step-000000005.pt step-000000008.pt"
    assert_same_bytes(folder, "stopped", "four")


@pytest.mark.slow
def test_a_killed_process_ends_both_and_both_go_on_in_the_same_bytes(folder: Path) -> None:
    """With dropout, of which each draws its own masks; and without anything that happens it is the same twice."""
    assert_same_bytes(folder, "again", "masks")
    assert launch(folder, "killed").returncode != 0
    assert not list(folder.glob("killed-*.out"))
    assert [path.name for path in (folder / "killed").iterdir()] == ["step-000000005.pt"]
    done = launch(folder, "resumed")
    assert done.returncode == 0, done.stderr
    assert_same_bytes(folder, "killed", "masks")


@pytest.mark.parametrize("name", [*VARIANTS, "fast"])
def test_every_cascade_trains_in_two_processes(folder: Path, name: str, tmp_path: Path) -> None:
    """Two steps as of one process; the parameters that no gradient reaches are known, and are as they were."""
    (settings, idle), change = (VARIANTS[name], {}) if name in VARIANTS else (VARIANTS["up to stage 3"], FAST)
    net = model(dropout=0.0, **settings).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    without = {id(parameter) for parameter in parameters_without_gradient(net, 32)}
    found = {key for key, parameter in net.named_parameters() if id(parameter) in without}
    assert found == {key for key, _ in net.named_parameters() if key.startswith(idle)}
    assert bool(found) == bool(idle)
    recipe: Recipe = replace(RECIPE, batch_size=2, steps=2, log_every=6, **change)
    train(net, write(tmp_path / "image.arrow"), recipe, 0, tmp_path, "f")
    for weights, _ in results(folder, f"variant {name}"):
        torch.testing.assert_close(weights, dict(net.state_dict()), rtol=0, atol=1e-5)
        assert {key for key, _ in net.named_parameters() if torch.equal(weights[key], before[key])} == found


@pytest.mark.parametrize("name", ["four", "up to stage 3"])
def test_gradients_are_summed_while_others_are_computed(folder: Path, name: str) -> None:
    """A bucket's sum begins before the first layer's gradient is there. The first step only makes the buckets."""
    for rank in (0, 1):
        first, *steps = (folder / f"{name}-{rank}.order").read_text().split("step")[1:]
        assert first.split() == ["last", "sum"]
        assert len(steps) == 2
        for step in steps:
            told = step.split()
            assert told.count("last") == 1
            assert told.count("sum") > 1
            assert told[0] == "sum", told


def test_a_batch_is_shared_out() -> None:
    for batch, world in ((8, 4), (7, 3), (3, 3)):
        shares = [list(range(batch))[ProcessGroup(rank, world).share(batch)] for rank in range(world)]
        assert [place for share in shares for place in share] == list(range(batch))
        assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_more_processes_than_images(tmp_path: Path) -> None:
    split = write(tmp_path / "image.arrow")
    with pytest.raises(UserError, match=r"train\.batch_size is 2"):
        train(model(), split, replace(RECIPE, batch_size=2), 0, tmp_path, "f", processes=ProcessGroup(0, 3))
