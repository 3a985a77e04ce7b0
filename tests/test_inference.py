"""Prediction: label resolution, flip, several protocols in one pass, the sizes of the authors' code."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from refinenet import RefineNet, inference
from refinenet.config import Protocol, Resizing
from refinenet.inference import predict

PROTOCOLS = {"single": Protocol((1.0,)), "multi": Protocol((0.8, 1.0, 1.2)), "flip": Protocol((1.0,), flip=True)}


@pytest.fixture(scope="module")
def model() -> RefineNet:
    torch.manual_seed(0)
    net = RefineNet(4, backbone="resnet50", stem=2, width=4)
    net.initialise("scaled", torch.Generator().manual_seed(1))
    return net.eval()


@pytest.mark.parametrize("average", ["probability", "log"])
def test_against_the_plain_computation(model: RefineNet, average: str) -> None:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (50, 71, 3), dtype=np.uint8)
    labels = predict(model, image, PROTOCOLS, Resizing(), average)  # type: ignore[arg-type]
    assert {k: (v.shape, v.dtype) for k, v in labels.items()} == dict.fromkeys(PROTOCOLS, ((50, 71), np.dtype("uint8")))
    x = torch.from_numpy(image).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        plain = F.interpolate(model(x).softmax(1), size=(50, 71), mode="bilinear").argmax(1)[0].numpy()
    if average == "probability":
        assert np.array_equal(labels["single"], plain)
    else:
        assert (labels["single"] == plain).mean() > 0.9


def test_flip_of_a_flipped_image_is_the_flip(model: RefineNet) -> None:
    image = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    one = predict(model, image, {"f": Protocol((1.0,), True)}, Resizing())["f"]
    two = predict(model, image[:, ::-1].copy(), {"f": Protocol((1.0,), True)}, Resizing())["f"]
    assert (one == two[:, ::-1]).mean() > 0.999  # sums in another order may tip a tie


def test_a_shared_scale_is_computed_once(model: RefineNet, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda x: (calls.append(tuple(x.shape)), forward(x))[1])
    predict(model, np.zeros((40, 40, 3), np.uint8), PROTOCOLS, Resizing())
    assert len(calls) == 4  # 0.8, 1.0, 1.2, and 1.0 mirrored


def test_a_large_photo_is_labelled_class_by_class(model: RefineNet, monkeypatch: pytest.MonkeyPatch) -> None:
    image = np.random.default_rng(2).integers(0, 256, (40, 57, 3), dtype=np.uint8)
    whole = predict(model, image, PROTOCOLS, Resizing())
    monkeypatch.setattr(inference, "_AT_ONCE", 100)
    for name, label in predict(model, image, PROTOCOLS, Resizing()).items():
        assert np.array_equal(label, whole[name])


def test_resizing_is_the_authors() -> None:
    assert Resizing(1.2).factor(300, 500) == 1.2
    voc = Resizing(1.2, (450, 800))
    assert voc.factor(375, 500) == pytest.approx(1.2 * 450 / 375)
    assert voc.factor(500, 600) == pytest.approx(1.2)
    assert voc.factor(1600, 1000) == pytest.approx(1.2 * 0.8)
