"""Training: equal to the plain loop, the schedule, the loss, precision, memory, what is not finite."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from toy_training import RECIPE, model, run, weights, write

from refinenet import RefineNet, device
from refinenet.config import Recipe
from refinenet.data.augment import make_batch
from refinenet.data.concat import ConcatSplits
from refinenet.data.crops import Crops
from refinenet.data.loader import Loader
from refinenet.data.split import Split
from refinenet.errors import UserError
from refinenet.training import loop
from refinenet.training.loop import Phase, train
from refinenet.training.memory import activation_bytes
from refinenet.training.step import lr_at_step, pixel_loss, step_bytes, wrap_for_training


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    return write(tmp_path_factory.mktemp("split") / "image.arrow")


def plain(split: Split, recipe: Recipe) -> tuple[bytes, list[float]]:
    """The same training without any of the engine: weights, and the loss of each step."""
    net = model().train()
    backbone = net.backbone_parameters()
    new = [p for p in net.parameters() if all(p is not q for q in backbone)]
    optimiser = torch.optim.SGD(
        [{"params": new}, {"params": backbone}], 1.0, recipe.momentum, weight_decay=recipe.weight_decay, foreach=True
    )
    crops = Crops(
        split,
        recipe.crop,
        recipe.scales,
        recipe.flip,
        recipe.class_balanced,
        0,
        epoch_sampling=recipe.epoch_sampling,
        square_crops=recipe.square_crops,
    )
    losses = []
    for step in range(recipe.steps):
        torch.manual_seed(step)
        for group, factor in zip(optimiser.param_groups, (1, recipe.backbone_lr), strict=True):
            group["lr"] = lr_at_step(recipe, step) * factor
        batch = make_batch(crops.draw(step, recipe.batch_size), recipe.crop, recipe.input_scale, torch.device("cpu"))
        loss = pixel_loss(net(batch.images), batch.labels)
        optimiser.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        assert recipe.grad_clip is not None
        torch.nn.utils.clip_grad_norm_(net.parameters(), recipe.grad_clip, foreach=True)
        optimiser.step()
        losses.append(loss.item())
    return weights(net), losses


def test_equals_the_plain_loop(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the bit, but for the fused optimiser, which rounds once where the plain one does several times."""
    recipe = replace(RECIPE, log_every=1, steps=5)
    wanted, losses = plain(split, recipe)
    _, curve = run(split, tmp_path / "fused", recipe)
    assert [point.loss for point in curve] == pytest.approx(losses, rel=1e-6)
    sgd = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *args, fused, **more: sgd(*args, **more, foreach=True))
    found, curve = run(split, tmp_path / "foreach", recipe)
    assert [point.loss for point in curve] == losses
    assert found == wanted


def gradients(recipe: Recipe, dropout: float = 0.0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores of the network as the recipe computes it, its gradient, and the scores after a step."""
    net = model(dropout)
    images = torch.rand(2, 3, 40, 36, generator=torch.Generator().manual_seed(1)) * 255
    labels = torch.randint(0, 3, (2, 40, 36), generator=torch.Generator().manual_seed(2), dtype=torch.uint8)
    with wrap_for_training(net, recipe) as network:
        torch.manual_seed(3)
        net.train()
        scores = network(images)
        assert pixel_loss(scores, labels).dtype == torch.float32
        pixel_loss(scores, labels).backward()  # type: ignore[no-untyped-call]
        flat = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        assert flat.dtype == torch.float32
        net.eval()
        with torch.no_grad():
            network(images)
            for p in net.parameters():
                assert p.grad is not None
                p -= 0.1 * p.grad
            after = network(images)
    with torch.no_grad():
        # What is computed from weights that the optimiser has changed is not what was folded or cached before.
        torch.testing.assert_close(after.float(), net(images), **_CLOSE[recipe.precision])
    return scores.detach(), flat, after


_CLOSE: dict[str, Any] = {"float32": {"rtol": 1e-3, "atol": 1e-4}, "bfloat16": {"rtol": 0.1, "atol": 0.05}}


def test_recomputing_changes_no_bit_and_saves_memory() -> None:
    kept, again = gradients(RECIPE, 0.5), gradients(replace(RECIPE, activation_checkpointing=True), 0.5)
    assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))
    net, recipe = RefineNet(3, stem=2, width=16, coarse_width=16), replace(RECIPE, crop=96)
    assert step_bytes(net, replace(recipe, activation_checkpointing=True)) < 0.7 * step_bytes(net, recipe)


def test_activation_bytes_are_those_of_the_maps() -> None:
    """X is there already; of two sigmoids their result is kept, and a gradient or two are there meanwhile."""
    x = torch.rand(1000, requires_grad=True)
    assert 8_000 <= activation_bytes(lambda: x.sigmoid().sigmoid().sum()) <= 16_100


@pytest.mark.parametrize("change", [{"precision": "bfloat16"}, {"channels_last": True}])
def test_faster_arithmetic_gives_nearly_the_same(change: dict[str, Any]) -> None:
    recipe = replace(RECIPE, **change)
    (scores, flat, _), (wanted, wanted_flat, _) = gradients(recipe), gradients(RECIPE)
    torch.testing.assert_close(scores.float(), wanted, **_CLOSE[recipe.precision])
    assert F.cosine_similarity(flat, wanted_flat, 0) > 0.99
    assert (recipe.precision == "float32") == (scores.dtype == torch.float32)


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="no C++ compiler")
@pytest.mark.parametrize("recompute", [False, True])
def test_compiled_gives_nearly_the_same_and_sees_new_weights(recompute: bool) -> None:
    """Pytorch issue 108863: compiled evaluation could keep the weights of its first call."""
    compiled = gradients(replace(RECIPE, compile=True, activation_checkpointing=recompute))
    for a, b in zip(compiled, gradients(RECIPE), strict=True):
        torch.testing.assert_close(a, b, **_CLOSE["float32"])


def test_loss_is_the_mean_over_labelled_pixels_at_a_quarter() -> None:
    logits = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (2, 20, 24), dtype=torch.uint8)
    labels[0, :10] = 255
    truth = labels[:, 2::4, 2::4].long()  # the centre of each 4 x 4 cell
    expected = F.cross_entropy(logits.float(), truth, ignore_index=255)
    torch.testing.assert_close(pixel_loss(logits, labels), expected)
    void = pixel_loss(logits, torch.full_like(labels, 255))
    void.backward()  # type: ignore[no-untyped-call]
    assert void.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_schedules() -> None:
    drop = Recipe(steps=100, lr=1.0, drop_at=0.8)
    assert [lr_at_step(drop, s) for s in (0, 79, 80, 99)] == pytest.approx([1, 1, 0.1, 0.1])
    cosine = Recipe(steps=100, lr=1.0, schedule="cosine", warmup=10)
    assert lr_at_step(cosine, 0) == pytest.approx(0.1)
    assert lr_at_step(cosine, 50) == pytest.approx(0.5)
    assert lr_at_step(cosine, 99) < 0.001


def test_loss_that_is_not_finite_names_step_and_images(split: Split, tmp_path: Path) -> None:
    net = model()
    with torch.no_grad():
        net.classifier.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"loss is nan in step 1 on image\d, image\d; last good checkpoint: none"):
        train(net, split, RECIPE, 0, tmp_path, "f")


@pytest.mark.parametrize(("stop_at", "seen"), [(None, 6), (5, 5)])
def test_gradient_that_is_not_finite_names_step_images_and_checkpoint(
    split: Split, tmp_path: Path, stop_at: int | None, seen: int
) -> None:
    """The loss of its step and the weights in the last checkpoint are still fine.

    The checkpoint that was due is not waited for and not written: a point of the curve, or a stop, ends in the error.
    """
    net, steps, done = model(), 0, list[int]()

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        nonlocal steps
        steps += 1
        return gradient * float("inf") if steps == 4 else gradient

    net.classifier.weight.register_hook(spoil)
    recipe = replace(RECIPE, log_every=7)
    with pytest.raises(UserError, match=r"gradient is (nan|inf) in step 4 on image\d.*step-000000003.pt"):
        train(
            net,
            split,
            recipe,
            0,
            tmp_path,
            "f",
            lambda progress: done.append(progress.step),
            stop=lambda: len(done) == stop_at,
            due=lambda: len(done) in (3, 5),
        )
    assert done[-1] == seen
    assert [path.name for path in tmp_path.iterdir()] == ["step-000000003.pt"]


def test_phases_draw_from_their_own_images(split: Split, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []

    class Spy(Loader):
        def __next__(self) -> Any:
            batch = super().__next__()
            seen.append({name[:-1] for name in batch.names})
            return batch

    monkeypatch.setattr(loop, "Loader", Spy)
    other = write(tmp_path / "other.arrow", seed=1)
    both = ConcatSplits([split, other])
    assert len(both) == len(both.present()) == len(both.counts()) == 12
    assert [both[i].name for i in (0, 5, 6, 11)] == ["image0", "image5", "other0", "other5"]
    run([Phase(both, 5), Phase(other, 2)], tmp_path)
    assert set.union(*seen[:5]) == {"image", "other"}
    assert seen[5:] == [{"other"}, {"other"}]
    with pytest.raises(UserError, match=r"third.arrow: has the classes a, x, c, expected those of .*image.arrow: a, b"):
        ConcatSplits([split, write(tmp_path / "third.arrow", classes=("a", "x", "c"))])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_host_does_not_wait_for_the_device_in_a_step(split: Split, tmp_path: Path) -> None:
    """But at the points of the curve and for a checkpoint: as often in 40 steps as in 20."""

    def waits(steps: int) -> int:
        recipe = replace(RECIPE, steps=steps, log_every=steps)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                train(model().cuda(), split, recipe, 0, tmp_path / str(steps), "f")
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchroniz" in str(warning.message) for warning in told)

    train(model().cuda(), split, RECIPE, 0, tmp_path / "first", "f")
    assert waits(20) == waits(40)


@pytest.mark.parametrize("has", [True, False])
def test_precision_auto_is_what_the_device_has(
    has: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And one that was asked for all the same is told of, once: it is nine times slower."""
    monkeypatch.setattr("refinenet.device.has_bfloat16", lambda device: has)
    device._warn_of_emulation.cache_clear()
    cpu = torch.device("cpu")
    assert device.choose_precision("auto", cpu) == ("bfloat16" if has else "float32")
    assert device.choose_precision("float32", cpu) == "float32"
    assert capsys.readouterr().err == ""
    for _ in range(2):
        assert device.choose_precision("bfloat16", cpu) == "bfloat16"
    told = capsys.readouterr().err
    assert told.count("\n") == (not has)
    assert has or told.startswith("warning: precision is bfloat16, which this processor has not and emulates")
    seen: list[torch.dtype] = []
    net = model()
    net.classifier.register_forward_hook(lambda module, given, scores: seen.append(scores.dtype))
    for precision in ("auto", "float32"):
        with wrap_for_training(net, replace(RECIPE, precision=precision)) as network:
            network(torch.zeros(1, 3, 32, 32))
    assert seen == [torch.bfloat16 if has else torch.float32, torch.float32]


def test_bfloat16_of_this_processor_is_that_of_the_system() -> None:
    flags = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")), "")
    if not flags:
        pytest.skip("not an x86 Linux")
    assert device.has_bfloat16(torch.device("cpu")) == bool({"avx512_bf16", "amx_tile"} & set(flags.split()))
