"""Images held out of a training: never trained on, looked at in between; the weights that are best on them stay."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy_training import RECIPE, model, run, weights, write

from pipeline.datasets import custom
from refinenet import RefineNet
from refinenet.config import Protocol, Recipe, Resizing
from refinenet.data.concat import ConcatSplits
from refinenet.data.split import Schema, Split
from refinenet.data.subset import Subset, held_out_names
from refinenet.data.writer import write_split
from refinenet.errors import UserError
from refinenet.inference.predictor import Predictor
from refinenet.model.network import save
from refinenet.training import held_out, loop
from refinenet.training.distributed import ProcessGroup
from refinenet.training.held_out import HeldOut
from refinenet.training.loop import Phase, best, hold_out, train

ROOT = Path(__file__).resolve().parents[2]
HELD: Recipe = replace(RECIPE, hold_out=0.5, hold_out_every=3, input_scale=1.2)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return write(tmp_path_factory.mktemp("split") / "image.arrow")


def names(images: Any) -> list[str]:
    return [images[index].name for index in range(len(images))]


def parts(split: Split) -> tuple[Subset, Subset]:
    """The images trained on and those held out, by the names alone."""
    held = held_out_names(names(split), HELD.hold_out, 0)
    assert 2 <= len(held) <= len(split) - 2
    trained = [index for index, name in enumerate(names(split)) if name not in held]
    return Subset(split, trained), Subset(split, [index for index in range(len(split)) if index not in trained])


def scripted(monkeypatch: pytest.MonkeyPatch, *values: float) -> list[bytes]:
    """Have looks score `values`, one after the other; return a list that gets the weights at each look."""
    seen: list[bytes] = []

    def score(self: HeldOut, net: Any, processes: ProcessGroup) -> float:
        seen.append(weights(net))
        return values[len(seen) - 1]

    monkeypatch.setattr(HeldOut, "score", score)
    return seen


def test_about_the_share_by_name_and_seed() -> None:
    every = [f"photo{index}" for index in range(4000)]
    held = held_out_names(every, 0.1, 0)
    assert 330 < len(held) < 470
    assert held_out_names(every[::-2], 0.1, 0) == held & set(every[::-2])
    assert held < held_out_names(every, 0.2, 0)
    assert held_out_names(every, 0.1, 1) != held
    # Also of what a user's own data set, split by the same seed, has left in train.
    left = custom.split(every, 0.2, 0)[0]
    assert 250 < len(held & set(left)) < 390


def test_a_subset_is_these_images(split: Split) -> None:
    some = Subset(ConcatSplits([split]), [4, 1])
    assert names(some) == ["image4", "image1"]
    assert [list(present) for present in some.present()] == [list(split.present()[index]) for index in (4, 1)]
    assert some.counts is not None
    assert np.array_equal(some.counts(), split.counts()[[4, 1]])
    with pytest.raises(IndexError):
        some[2]


def test_off_changes_no_byte_and_looking_changes_no_step(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it nobody looks. With it, training is that on the other images alone, where the last look is the best."""
    trained, _ = parts(split)
    wanted, curve = run(trained, tmp_path / "alone", replace(HELD, hold_out=0.0))
    score = HeldOut.score
    rising = iter((0.1, 0.2, 0.3))

    def real_but_rising(self: HeldOut, net: Any, processes: ProcessGroup) -> float:
        state, grad = torch.get_rng_state(), [parameter.grad for parameter in net.parameters()]
        score(self, net, processes)
        assert torch.equal(torch.get_rng_state(), state)
        assert all(one is parameter.grad for one, parameter in zip(grad, net.parameters(), strict=True))
        assert net.training
        return next(rising)

    monkeypatch.setattr(HeldOut, "score", real_but_rising)
    found, looked = run(split, tmp_path / "held", HELD)
    assert found == wanted
    assert [(p.step, p.held_out) for p in looked] == [(2, None), (3, 0.1), (4, None), (6, 0.2), (7, 0.3)]
    assert [p.step for p in curve] == [2, 4, 6, 7]
    assert all(p.held_out is None for p in curve)
    # Two points of the one are a point of the other.
    assert [looked[0].loss, (looked[1].loss + looked[2].loss) / 2] == pytest.approx([p.loss for p in curve[:2]])

    def refuse(*args: Any) -> None:
        raise AssertionError("something is held out")

    monkeypatch.setattr(loop, "HeldOut", refuse)
    monkeypatch.setattr(loop, "held_out_names", refuse)
    assert run(split, tmp_path / "off", replace(RECIPE, hold_out_every=1)) == run(split, tmp_path / "today")


def test_held_out_images_are_never_drawn(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []

    class Spy(loop.Loader):
        def __next__(self) -> Any:
            batch = super().__next__()
            seen.append(set(batch.names))
            return batch

    monkeypatch.setattr(loop, "Loader", Spy)
    trained, held = parts(split)
    run(split, tmp_path / "one", replace(HELD, steps=40, hold_out_every=40))
    assert set.union(*seen) == set(names(trained))
    # An earlier phase has the images, too: they are left out of it, and its own stay. Looks begin in the last phase.
    seen.clear()
    other = write(tmp_path / "other.arrow", seed=1)
    phases = [Phase(ConcatSplits([other, split]), 40), Phase(split, 6)]
    _, curve = run(phases, tmp_path / "two", replace(HELD, hold_out_every=5))
    assert set.union(*seen[:40]) == {*names(trained), *names(other)}
    assert set.union(*seen[40:]) <= set(names(trained))
    assert [point.step for point in curve if point.held_out is not None] == [45, 46]
    kept, out = hold_out(phases, HELD, 0)
    assert [names(phase.images) for phase in kept] == [[*names(other), *names(trained)], names(trained)]
    assert out is not None
    assert len(out) == len(held)


def test_it_ends_with_the_weights_of_the_best_look(
    split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of equal ones the first; weights are those of that very step, of all that the network has."""
    seen = scripted(monkeypatch, 0.2, 0.5, 0.5, 0.1)
    found, curve = run(split, tmp_path, replace(HELD, hold_out_every=2))
    top = best(curve)
    assert top is not None
    assert (top.step, top.held_out) == (4, 0.5)
    assert len(set(seen)) == 4
    assert found == seen[1]


@pytest.mark.parametrize("stop", [2, 4, 5, 7])
def test_killed_before_and_after_the_best_look(
    stop: int, split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The best step, its score and weights lie in the checkpoint; one of the last step is enough, too."""
    by_step = {1: 0.2, 2: 0.3, 3: 0.6, 4: 0.1, 5: 0.4, 6: 0.5, 7: 0.55}
    recipe = replace(HELD, hold_out_every=1)
    scripted(monkeypatch, *by_step.values())
    whole = run(split, tmp_path / "whole", recipe, every=1)
    top = best(whole[1])
    assert top is not None
    assert top.step == 3
    seen = scripted(monkeypatch, *by_step.values())
    with pytest.raises(KeyboardInterrupt):
        run(split, tmp_path / "parts", recipe, stop_at=stop, every=1)
    # on_step is called before the checkpoint of its step: the training goes on from the one before.
    assert len(seen) == stop
    seen.pop()
    assert run(split, tmp_path / "parts", recipe, every=1) == whole
    assert len(seen) == 7
    assert run(split, tmp_path / "parts", recipe, every=1) == whole  # as if killed after its last checkpoint
    assert len(seen) == 7


def test_the_score_is_that_of_an_evaluation(split: Split, tmp_path: Path) -> None:
    """Whole images at one scale, the model's file read and scored in numpy; void pixels are left out."""
    _, held = parts(split)
    net = RefineNet(3, backbone="resnet50", cascade="single", stem=4, width=4, coarse_width=8)
    net.initialise("scaled", torch.Generator().manual_seed(1))
    net.train()
    found = HeldOut(held, HELD).score(net, ProcessGroup())
    about = {"classes": split.schema.classes, "palette": split.schema.palette}
    save(net, tmp_path / "model.safetensors", about, torch.float32)
    predictor = Predictor(tmp_path / "model.safetensors", torch.device("cpu"), resizing=Resizing(1.2), fast=False)
    samples = [held[index] for index in range(len(held))]
    truth = np.concatenate([sample.label.ravel() for sample in samples if sample.label is not None])
    single = {"single": Protocol((1.0,))}
    labels = [predictor.under_protocols(sample.image, single)["single"].ravel() for sample in samples]
    label = np.concatenate(labels)[truth != 255]
    truth = truth[truth != 255]
    assert len(np.unique(label)) > 1
    ious = [((truth == one) & (label == one)).sum() / ((truth == one) | (label == one)).sum() for one in range(3)]
    assert found == pytest.approx(np.mean(ious), abs=1e-12)
    assert found != HeldOut(held, replace(HELD, input_scale=0.6)).score(net, ProcessGroup())


def test_of_many_images_some_at_even_distances(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(held_out, "MOST", 4)
    assert names(HeldOut(split, HELD)._images) == ["image0", "image1", "image3", "image4"]
    assert names(HeldOut(Subset(split, [5, 3, 1]), HELD)._images) == ["image5", "image3", "image1"]


@pytest.mark.parametrize(
    ("share", "message"),
    [
        (0.01, r"train\.hold_out is 0\.01: holds out 0 and leaves 6 of 6 training images, expected 2 or more of each"),
        (0.99, r"train\.hold_out is 0\.99: holds out 6 and leaves 0 of 6 training images, expected 2 or more of each"),
    ],
)
def test_too_few_images(share: float, message: str, split: Split, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run(split, tmp_path, replace(HELD, hold_out=share))
    assert not list(tmp_path.iterdir())


def test_settings_and_images_that_cannot_be(tmp_path: Path) -> None:
    for share in (-0.1, 1.0, float("nan")):
        with pytest.raises(UserError, match=r"train\.hold_out is .*, expected a share of the images"):
            replace(RECIPE, hold_out=share)
    with pytest.raises(UserError, match=r"train\.hold_out_every is 0, expected 1 or more"):
        replace(RECIPE, hold_out_every=0)
    with write_split(tmp_path / "void.arrow", Schema("toy", "train", ("a",), ((0, 0, 0),))) as writer:
        for index in range(6):
            void = np.full((40, 40), 255, np.uint8)
            writer.add(f"void{index}", np.zeros((40, 40, 3), np.uint8), void)
    with pytest.raises(UserError, match=r"train\.hold_out: none of \d held-out images has a labelled pixel"):
        run(Split(tmp_path / "void.arrow"), tmp_path / "run", HELD)


SCRIPT = """
import sys, torch
from dataclasses import replace
from pathlib import Path
from toy_training import RECIPE, model
from refinenet.data.split import Split
from refinenet.training.distributed import processes
from refinenet.training.loop import train

folder = Path(sys.argv[1])
recipe = replace(RECIPE, hold_out=0.5, hold_out_every=3, input_scale=1.2)
with processes(torch.device("cpu")) as together:
    net = model(dropout=0.0)
    curve = train(net, Split(folder / "image.arrow"), recipe, 0, folder / "run", "f", processes=together)
    points = [(p.step, p.loss, p.held_out) for p in curve]
    torch.save((net.state_dict(), points), folder / f"{together.rank}.out")
"""


def test_two_processes_look_as_one(tmp_path: Path) -> None:
    split = write(tmp_path / "image.arrow")
    net = model(dropout=0.0)
    curve = train(net, split, HELD, 0, tmp_path / "one", "f")
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'tests' / 'helpers'}:{ROOT}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(tmp_path / "script.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    (first, points), (second, same) = (torch.load(tmp_path / f"{rank}.out", weights_only=True) for rank in (0, 1))
    assert points == same
    assert all(torch.equal(first[name], second[name]) for name in first)
    torch.testing.assert_close(first, dict(net.state_dict()), rtol=0, atol=1e-5)
    assert [step for step, *_ in points] == [p.step for p in curve]
    looks = [(score, p.held_out) for (*_, score), p in zip(points, curve, strict=True) if p.held_out is not None]
    assert len(looks) == 3
    assert all(score == pytest.approx(wanted, abs=1e-3) for score, wanted in looks)
