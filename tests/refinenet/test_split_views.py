"""Images and labels of real splits, written, opened and memory-mapped, in every library that gets to see one.

A split's samples are read-only views into a mapped file. Fresh arrays are not, so what a library says of the one it
does not say of the other: pydensecrf2 refuses them, torch.from_numpy warns that writing is undefined. Warnings are
errors here, and afterwards the file has the bytes that it had.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from pipeline.evaluate import triptych
from pipeline.formats import label_images
from pipeline.page import dataset_section, inline_images
from pipeline.test_servers.formats import SERVERS
from refinenet import RefineNet
from refinenet.config import Protocol, Resizing
from refinenet.data.augment import copy_windows
from refinenet.data.concat import ConcatSplits
from refinenet.data.crops import Crops, Window
from refinenet.data.loader import Loader
from refinenet.data.split import Schema, Split
from refinenet.data.writer import write_split
from refinenet.inference.crf import DenseCRF
from refinenet.inference.multiscale import predict, upload
from refinenet.inference.predictor import Predictor
from refinenet.metrics import Confusion
from refinenet.model.network import save

CLASSES = ("sky", "tree", "house")
PALETTE = ((10, 20, 200), (20, 160, 40), (150, 80, 60))
HEIGHT, WIDTH = 40, 56
CPU = torch.device("cpu")


@pytest.fixture
def split(tmp_path: Path) -> Iterator[Split]:
    """Two images with labels in a file that must not change; whatever warns in the meantime raises."""
    path, rng = tmp_path / "val.arrow", np.random.default_rng(0)
    with write_split(path, Schema("voc", "val", CLASSES, PALETTE)) as writer:
        for name in ("a", "b"):
            label = rng.integers(0, 3, (5, 7)).astype(np.uint8).repeat(8, 0).repeat(8, 1)
            label[0] = 255
            noise = rng.integers(-9, 10, (HEIGHT, WIDTH, 3))
            image = (np.array([*PALETTE, *[(0, 0, 0)] * 253])[label] + noise).clip(0, 255).astype(np.uint8)
            writer.add(name, image, label)
    before = path.read_bytes()
    opened = Split(path)
    assert not any(pixels.flags.writeable for pixels in opened[0][1:] if pixels is not None), "these are the real ones"
    with warnings.catch_warnings(action="error"):
        yield opened
    assert path.read_bytes() == before


@pytest.fixture
def model(tmp_path: Path) -> RefineNet:
    """A thin network that finds several classes in noise; also in model.safetensors."""
    torch.manual_seed(0)
    net = RefineNet(3, backbone="resnet50", stem=2, width=4, coarse_width=8)
    net.initialise("scaled", torch.Generator().manual_seed(1))
    with torch.no_grad():
        net.classifier.weight.normal_(generator=torch.Generator().manual_seed(2))
    about = {"dataset": "voc", "classes": CLASSES, "palette": PALETTE, "short_edge": [40, 40]}
    save(net, tmp_path / "model.safetensors", about)
    return net.eval()


def label_of(split: Split, index: int = 0) -> Any:
    """The label of an image, which all of them have here."""
    label = split[index].label
    assert label is not None
    return label


def test_dense_crf(split: Split, model: RefineNet) -> None:
    """As it is called by itself, and as a protocol: what stopped the paper's VOC after all of its training."""
    pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is not built here")
    probabilities = np.random.default_rng(1).dirichlet([1, 1, 1], (HEIGHT, WIDTH)).astype(np.float32)
    probabilities = np.ascontiguousarray(probabilities.transpose(2, 0, 1))
    image = split[0].image
    refined = DenseCRF()(image, probabilities)
    assert np.array_equal(refined, DenseCRF()(np.array(image), probabilities))
    part = image[3:33, 5:45]  # a view that is not contiguous either
    assert np.array_equal(
        DenseCRF()(part, probabilities[:, 3:33, 5:45]), DenseCRF()(part.copy(), probabilities[:, 3:33, 5:45].copy())
    )
    protocols = {"crf": Protocol((1.0,), crf=True)}
    labels = predict(model, image, protocols, Resizing())["crf"]
    assert np.array_equal(labels, predict(model, np.array(image), protocols, Resizing())["crf"])


def test_a_crf_is_given_bytes_of_its_own(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds without the package as well: whatever stands in for it gets an image that it may write to."""
    seen: dict[str, Any] = {}

    class Field:
        def __init__(self, width: int, height: int, labels: int) -> None:
            self.shape = labels, height * width

        def __getattr__(self, name: str) -> Any:
            return lambda *values, **named: seen.update({name: values, **named})

        def inference(self, _: int) -> Any:
            return np.zeros(self.shape, np.float32)

    def library(_: str) -> Any:
        return SimpleNamespace(DenseCRF2D=Field)

    monkeypatch.setattr("refinenet.inference.crf.importlib.import_module", library)
    DenseCRF()(split[0].image, np.full((3, HEIGHT, WIDTH), 1 / 3, np.float32))
    assert seen["rgbim"].flags.writeable
    assert seen["rgbim"].flags.c_contiguous
    assert not np.shares_memory(seen["rgbim"], split[0].image)
    assert seen["setUnaryEnergy"][0].flags.writeable
    assert np.array_equal(seen["rgbim"], split[0].image)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_counting(split: Split, device: str) -> None:
    """Labels as they are, on the host and (here: where tensors have no values) on a device."""
    truth = label_of(split)
    counted = Confusion(3, device)
    counted.add(truth, truth)
    if device == "cpu":
        assert counted.counts().sum() == (truth != 255).sum() == np.trace(counted.counts())


def test_uploading_and_training(split: Split) -> None:
    for pixels in (split[0].image, label_of(split)):
        tensor = upload(pixels, CPU)
        assert np.array_equal(tensor.numpy(), pixels)
        tensor.zero_()  # not the split's memory
    window = Window("a", split[0].image[4:20, 8:30], label_of(split)[4:20, 8:30], 1.0, True)
    assert copy_windows([window], CPU).numel() == 4 * 16 * 22
    crops = Crops(ConcatSplits([split, split]), 32, (1.0,), True, True, 0)
    with Loader(crops, 2, 32, 1.2, CPU, stop=2) as loader:
        assert [tuple(batch.labels.shape) for batch in loader] == [(2, 38, 38)] * 2


@pytest.mark.parametrize("fast", [False, True])
def test_predicting(split: Split, model: RefineNet, fast: bool, tmp_path: Path) -> None:
    """As `evaluate` and `submit` do, of several scales and in tiles; as `predict` does."""
    predictor = Predictor(tmp_path / "model.safetensors", CPU, fast=fast, tile=256)
    protocols = {"it": Protocol((0.5, 1.0, 7.0), flip=True)}
    image = split[0].image
    label = predictor.under_protocols
    assert np.array_equal(label(image, protocols)["it"], label(np.array(image), protocols)["it"])
    photo = predictor.label_photo(image, protocols["it"], "a")
    assert np.array_equal(photo, predictor.label_photo(np.array(image), protocols["it"], "a"))


def test_exporting(split: Split, model: RefineNet) -> None:
    """What is exported is compared with the model on images of any origin; they need a batch, so a tensor of theirs."""
    from refinenet.inference import export

    program = export._program(export._copied(model), torch.uint8).module()
    images = upload(split[0].image, CPU).permute(2, 0, 1)[None]
    torch.testing.assert_close(program(images), model(images), atol=1e-4, rtol=1e-3)


def test_pictures(split: Split) -> None:
    """Of `evaluate`, `predict`, the report and the test servers, all by way of Pillow."""
    sample, label = split[0], label_of(split)
    assert triptych(sample, label, PALETTE).size == (3 * WIDTH + 2 * label_images.GAP, HEIGHT)
    indexed = label_images.indexed(label, PALETTE)
    assert np.array_equal(np.asarray(indexed), label)
    assert label_images.overlay(sample.image, label, CLASSES, PALETTE).width >= WIDTH
    assert label_images.legend(label, CLASSES, PALETTE)
    for width in (WIDTH, WIDTH // 2):
        assert inline_images.photo(sample.image, "a", width, 50).width == width
        assert inline_images.label_map(label, PALETTE, "a", width).width == width
        assert inline_images.flat(sample.image, "a", width).width == width
    assert len(dataset_section.sheet(split, 2, WIDTH, 50)) == 2
    assert dataset_section.contents(label, CLASSES)
    png = SERVERS["voc"].png(np.minimum(label, 20))
    SERVERS["voc"].check_png(png, "a", (HEIGHT, WIDTH))


def test_a_split_of_a_split(split: Split, tmp_path: Path) -> None:
    """Views written to another file, as own data and benchmarks do."""
    copy = tmp_path / "copy.arrow"
    with write_split(copy, split.schema) as writer:
        for sample in split:
            writer.add(*sample)
        writer.add("part", split[0].image[::2, ::2], label_of(split)[::2, ::2])
    assert np.array_equal(Split(copy)[1].image, split[1].image)
    assert np.array_equal(Split(copy)[2].image, split[0].image[::2, ::2])


def test_serving(split: Split, model: RefineNet, tmp_path: Path) -> None:
    """MLflow's served model gets files; one made of a sample, by Pillow, labels as the sample itself."""
    from io import BytesIO

    from pipeline.tracking.serving import Served

    with warnings.catch_warnings(action="ignore"):  # of MLflow's imports
        served = Served(tmp_path / "model.safetensors", "cpu")
        file = BytesIO()
        Image.fromarray(split[0].image).save(file, "png")
        table = served.predict(pd.DataFrame({"image": [file.getvalue()]}))
    label = np.asarray(Image.open(BytesIO(cast(bytes, table["label"][0]))))
    predictor = Predictor(tmp_path / "model.safetensors", CPU)
    assert np.array_equal(label, predictor.label_photo(split[0].image, Protocol((1.0,)), "a"))
