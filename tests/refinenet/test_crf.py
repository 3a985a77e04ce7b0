"""The dense CRF against mean-field inference over all pairs of pixels, in plain numpy."""

from __future__ import annotations

import sys

import numpy as np
import numpy.typing as npt
import pytest

from refinenet.config import Protocol, Resizing
from refinenet.data.split import Array
from refinenet.errors import UserError
from refinenet.inference.crf import DenseCRF

Floats = npt.NDArray[np.float64]

HEIGHT, WIDTH, LABELS = 12, 16, 3


@pytest.fixture
def library() -> None:
    pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is not built here")


def scene(seed: int = 0) -> tuple[Array, npt.NDArray[np.float32]]:
    """Two regions of noisy colour, and probabilities that follow them badly: image, LABELS x HEIGHT x WIDTH."""
    rng = np.random.default_rng(seed)
    colours = np.zeros((HEIGHT, WIDTH, 3))
    colours[:, :9], colours[:, 9:] = (200, 40, 40), (30, 60, 200)
    image = (colours + rng.normal(0, 1.5, colours.shape)).clip(0, 255).astype(np.uint8)
    label = np.zeros((HEIGHT, WIDTH), int)
    label[:, 8:] = 1  # a column too far to the left
    label[3:6, 2:4] = 2  # a speck that the image does not have
    probabilities = (
        0.15 + 0.4 * (label == np.arange(LABELS)[:, None, None]) + rng.uniform(0, 0.2, (LABELS, *label.shape))
    )
    return image, (probabilities / probabilities.sum(0)).astype(np.float32)


def softmax(values: Floats) -> Floats:
    powers = np.exp(values - values.max(0))
    return np.asarray(powers / powers.sum(0))


def exact(image: Array, probabilities: npt.NDArray[np.float32], crf: DenseCRF) -> Floats:
    """Krähenbühl and Koltun's algorithm 1, with the message passing as one matrix product over all pairs."""
    labels, height, width = probabilities.shape
    y, x = np.mgrid[:height, :width]
    place = np.stack([x.ravel(), y.ravel()], 1).astype(float)
    colour = image.reshape(-1, 3) / crf.colour_std
    message = np.zeros((height * width, height * width))
    for weight, features in (
        (crf.position_weight, place / crf.position_std),
        (crf.colour_weight, np.concatenate([place / crf.colour_position_std, colour], 1)),
    ):
        kernel = np.exp(-((features[:, None] - features) ** 2).sum(2) / 2)
        norm = 1 / np.sqrt(kernel.sum(1))
        message += weight * norm[:, None] * kernel * norm
    log = np.log(probabilities.clip(1e-5, 1)).reshape(labels, -1).astype(np.float64)
    belief = softmax(log)
    for _ in range(crf.iterations):
        belief = softmax(log + belief @ message)
    return belief.reshape(probabilities.shape)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("iterations", [1, 2, 10])
def test_against_all_pairs(iterations: int) -> None:
    """The library's lattice approximates the kernels; a wrong weight, deviation or sign would be far off."""
    image, probabilities = scene()
    crf = DenseCRF(iterations)
    refined, wanted = crf(image, probabilities), exact(image, probabilities, crf)
    assert np.abs(refined - wanted).mean() < 0.003
    assert np.abs(refined - wanted).max() < 0.06
    if iterations == 10:
        assert np.array_equal(refined.argmax(0), wanted.argmax(0))
        assert (refined.argmax(0)[:, :9] == 0).all()  # the edge is where the colours change, the speck is gone
        assert (refined.argmax(0)[:, 9:] == 1).all()
        assert not np.array_equal(probabilities.argmax(0), refined.argmax(0))


def test_the_values_are_deeplabs() -> None:
    """kazuto1011/deeplab-pytorch, configs/voc12.yaml: ITER_MAX, POS_W, POS_XY_STD, BI_W, BI_XY_STD, BI_RGB_STD."""
    assert DenseCRF() == DenseCRF(10, 3, 1, 4, 67, 3)


@pytest.mark.usefixtures("library")
def test_the_kernels_are_told_apart() -> None:
    """Each value of the settings matters, and does what it does in the exact computation."""
    image, probabilities = scene(1)
    for crf in (
        DenseCRF(3, position_weight=0.2, colour_weight=0.3),
        DenseCRF(3, position_weight=0.2, colour_weight=0.3, position_std=4),
        DenseCRF(3, position_weight=0.2, colour_weight=0.3, colour_std=60),
        DenseCRF(3, position_weight=0, colour_weight=0.5, colour_position_std=3),
    ):
        wanted = exact(image, probabilities, crf)
        assert np.abs(crf(image, probabilities) - wanted).max() < 0.06
        assert np.abs(exact(image, probabilities, DenseCRF(3)) - wanted).max() > 0.2


@pytest.mark.usefixtures("library")
def test_the_same_every_time() -> None:
    image, probabilities = scene()
    assert np.array_equal(DenseCRF()(image, probabilities), DenseCRF()(image, probabilities))


@pytest.mark.usefixtures("library")
def test_one_colour_and_sure_labels_stay() -> None:
    image = np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    probabilities = np.full((LABELS, HEIGHT, WIDTH), 0.1, np.float32)
    probabilities[1] = 0.8
    assert (DenseCRF()(image, probabilities).argmax(0) == 1).all()


@pytest.mark.usefixtures("library")
def test_an_output_that_never_wins() -> None:
    """A void output that is switched off has probability 0; it stays out, also where no other is left but one."""
    image, probabilities = scene()
    void = np.concatenate([probabilities, np.zeros_like(probabilities[:1])])
    refined = DenseCRF()(image, void)
    assert not refined[3].any()
    assert np.array_equal(refined[:3], DenseCRF()(image, probabilities))
    alone = np.zeros_like(probabilities)
    alone[2] = 1
    assert np.array_equal(DenseCRF()(image, alone), alone)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("average", ["probability", "log"])
def test_as_a_protocol(average: str) -> None:
    """`predict` refines its own averaged probabilities at the image's size, void output and all."""
    import torch

    from refinenet import RefineNet
    from refinenet.inference.multiscale import predict

    torch.manual_seed(0)
    model = RefineNet(3, backbone="resnet50", stem=2, width=4, coarse_width=8, void_output=True).eval()
    model.initialise("scaled", torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.classifier.weight.normal_(generator=torch.Generator().manual_seed(5))
    image = np.random.default_rng(3).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    image = image[:5, :7].repeat(8, 0).repeat(8, 1)
    protocols = {"plain": Protocol((1.0,)), "crf": Protocol((1.0,), crf=True)}
    labels = predict(model, image, protocols, Resizing(), average)  # type: ignore[arg-type]
    with torch.no_grad():
        pixels = torch.from_numpy(image.copy()).permute(2, 0, 1)[None].float()
        mean = torch.nn.functional.interpolate(model(pixels).softmax(1), image.shape[:2], mode="bilinear")[0]
    assert set(np.unique(labels["plain"])) >= {0, 3}
    wanted = DenseCRF()(image, mean.numpy()).argmax(0)
    assert labels["crf"].dtype == np.uint8
    agree = (labels["crf"] == wanted).mean()
    assert agree == 1 if average == "probability" else agree > 0.9
    assert (labels["crf"] != labels["plain"]).mean() > 0.02
    model.classifier.bias.data[3] = -torch.inf  # type: ignore[union-attr]
    assert predict(model, image, protocols, Resizing(), average)["crf"].max() < 3  # type: ignore[arg-type]


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pydensecrf.densecrf", None)
    with pytest.raises(UserError, match=r"^a protocol has crf: true, but the package pydensecrf2 is missing; [^\n]*$"):
        DenseCRF()(*scene())
