"""Training: the same bytes however often it is interrupted, the schedule, the loss, the crops."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from refinenet import RefineNet
from refinenet.augment import Crops, assemble
from refinenet.config import Recipe
from refinenet.data import Schema, Split, write_split
from refinenet.device import reproducible
from refinenet.files import UserError
from refinenet.training import Progress, loss_of, rate, train

CPU = torch.device("cpu")
RECIPE = Recipe(
    steps=9, batch=2, crop=40, input_scale=1.0, lr=0.01, initial="scaled", log_every=2, checkpoint_every=3, clip=1.0
)


@pytest.fixture(scope="module")
def split(tmp_path_factory: pytest.TempPathFactory) -> Split:
    path = tmp_path_factory.mktemp("split") / "train.arrow"
    rng = np.random.default_rng(0)
    with write_split(path, Schema("toy", "train", ("a", "b", "c"), ((0, 0, 0), (1, 1, 1), (2, 2, 2)))) as writer:
        for i in range(6):
            size = (48 + i, 60 - i)
            label = rng.integers(0, 3 if i else 2, size, dtype=np.uint8)
            label[:3] = 255
            writer.add(f"image{i}", rng.integers(0, 256, (*size, 3), dtype=np.uint8), label)
    return Split(path)


def model() -> RefineNet:
    net = RefineNet(3, backbone="resnet50", stem=2, width=4, dropout=0.5)
    net.initialise("scaled", torch.Generator().manual_seed(0))
    return net


def run(split: Split, folder: Path, stop_at: int | None = None, fingerprint: str = "f") -> tuple[bytes, list[float]]:
    """Train; `stop_at` ends it as a kill would, after that step. Weights as bytes, and the losses of the curve."""
    reproducible(0, 1)
    torch.manual_seed(0)
    net = model()

    def on_step(progress: Progress) -> None:
        if progress.step == stop_at:
            raise KeyboardInterrupt

    curve = train(net, split, RECIPE, 0, folder, fingerprint, on_step)
    return b"".join(v.numpy().tobytes() for v in net.state_dict().values()), [p.loss for p in curve]


def test_interrupted_anywhere_ends_in_the_same_bytes(split: Split, tmp_path: Path) -> None:
    weights, curve = run(split, tmp_path / "whole")
    assert len(curve) == 5
    assert run(split, tmp_path / "again") == (weights, curve)
    for stop in (1, 5, 8):
        folder = tmp_path / str(stop)
        with pytest.raises(KeyboardInterrupt):
            run(split, folder, stop)
        with pytest.raises(KeyboardInterrupt):
            run(split, folder, stop + 1)
        assert run(split, folder) == (weights, curve)


def test_broken_checkpoint_is_noticed(split: Split, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = run(split, tmp_path / "whole")
    folder = tmp_path / "broken"
    with pytest.raises(KeyboardInterrupt):
        run(split, folder, 8)
    older, newest = sorted(folder.glob("*.pt"))
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert run(split, folder) == whole
    assert f"{newest}: broken checkpoint" in capsys.readouterr().err
    assert older.name == "step-000000004.pt"


def test_checkpoint_of_something_else_is_not_taken(split: Split, tmp_path: Path) -> None:
    whole = run(split, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        run(split, tmp_path, 8, fingerprint="other settings")
    assert run(split, tmp_path) == whole


def test_loss_that_is_not_finite_names_step_and_images(split: Split, tmp_path: Path) -> None:
    net = model()
    with torch.no_grad():
        net.classifier.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"loss is nan in step 1 on image\d, image\d; last good checkpoint: none"):
        train(net, split, RECIPE, 0, tmp_path, "f")


def test_loss_is_the_mean_over_labelled_pixels_at_a_quarter() -> None:
    logits = torch.randn(2, 3, 5, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (2, 20, 24), dtype=torch.uint8)
    labels[0, :10] = 255
    truth = labels[:, 2::4, 2::4].long()  # the centre of each 4 x 4 cell
    expected = F.cross_entropy(logits.float(), truth, ignore_index=255)
    torch.testing.assert_close(loss_of(logits, labels), expected)
    void = loss_of(logits, torch.full_like(labels, 255))
    void.backward()  # type: ignore[no-untyped-call]
    assert void.item() == 0
    assert logits.grad is not None
    assert not logits.grad.any()


def test_schedules() -> None:
    drop = Recipe(steps=100, lr=1.0, drop_at=0.8)
    assert [rate(drop, s) for s in (0, 79, 80, 99)] == pytest.approx([1, 1, 0.1, 0.1])
    cosine = Recipe(steps=100, lr=1.0, schedule="cosine", warmup=10)
    assert rate(cosine, 0) == pytest.approx(0.1)
    assert rate(cosine, 50) == pytest.approx(0.5)
    assert rate(cosine, 99) < 0.001


def test_crops_are_balanced_centred_and_depend_on_the_step_alone(split: Split) -> None:
    crops = Crops(split, 40, (0.7, 1.0, 1.3), True, True, seed=3)
    again = Crops(split, 40, (0.7, 1.0, 1.3), True, True, seed=3)
    for step in (7, 2):
        for a, b in zip(crops.draw(step, 4), again.draw(step, 4), strict=True):
            assert a.name == b.name
            assert np.array_equal(a.image, b.image)
            assert (a.scale, a.flip) == (b.scale, b.flip)
    # Class c is in five of six images and must still be drawn as often as the others.
    drawn = [w for step in range(100) for w in crops.draw(step, 2)]
    assert {w.scale for w in drawn} == {0.7, 1.0, 1.3}
    assert 60 < sum(w.flip for w in drawn) < 140
    assert all(max(w.label.shape) <= round(40 / w.scale) for w in drawn)


def test_assembled_batch_keeps_image_and_label_together(split: Split, tmp_path: Path) -> None:
    """An image whose red channel is its label: after scale, flip and padding they still agree."""
    path = tmp_path / "s.arrow"
    label = np.zeros((50, 70), np.uint8)
    label[:, 35:] = 1
    label[25:, :] += 1
    image = np.repeat(label[:, :, None] * 100, 3, axis=2).astype(np.uint8)
    with write_split(path, Schema("toy", "train", ("a", "b", "c"), ((0, 0, 0), (1, 1, 1), (2, 2, 2)))) as writer:
        writer.add("x", image, label)
    crops = Crops(Split(path), 44, (0.7, 1.0, 1.3), True, True, seed=1)
    for step in range(20):
        batch = assemble(crops.draw(step, 3), 44, 1.2, CPU)
        assert batch.images.shape == (3, 3, 53, 53)
        assert batch.labels.shape == (3, 53, 53)
        known = batch.labels != 255
        agree = ((batch.images[:, 0] / 100).round() == batch.labels)[known].float().mean()
        assert agree > 0.93  # all but the blurred edges
    single = assemble(crops.draw(0, 1), 200, 1.0, CPU)
    assert single.images.shape[2] < 200  # one image is not padded
    assert (single.labels != 255).all()
