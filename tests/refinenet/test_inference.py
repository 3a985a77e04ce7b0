"""Prediction: label resolution, flip, protocols in one pass, the authors' sizes; batches, tiles, other arithmetic."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from thin_network import network
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from refinenet import RefineNet
from refinenet.config import Protocol, Resizing
from refinenet.data.split import Array
from refinenet.errors import UserError
from refinenet.inference import multiscale
from refinenet.inference.fast import FastRefineNet
from refinenet.inference.multiscale import optimise_for_inference, predict, predict_many
from refinenet.inference.tiles import GRID, STRIDE, cut, imresize_window, tiled
from refinenet.model.blocks import imresize

torch.set_num_threads(1)

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


def test_classes_are_compared_one_by_one_as_all_at_once() -> None:
    scores = torch.randn(1, 30, 11, 15, generator=torch.Generator().manual_seed(0))
    scores[:, 7] = scores[:, 3]  # of equal ones the first
    with torch.inference_mode():
        label = multiscale._best(scores, (40, 57))
        assert torch.equal(label, F.interpolate(scores, size=(40, 57), mode="bilinear").argmax(1)[0].to(torch.uint8))
    assert (label == 3).any()


def test_resizing_is_the_authors() -> None:
    assert Resizing(1.2).factor(300, 500) == 1.2
    voc = Resizing(1.2, (450, 800))
    assert voc.factor(375, 500) == pytest.approx(1.2 * 450 / 375)
    assert voc.factor(500, 600) == pytest.approx(1.2)
    assert voc.factor(1600, 1000) == pytest.approx(1.2 * 0.8)


def photo(height: int, width: int, seed: int = 0) -> Array:
    """Smooth noise: H x W x 3."""
    cells = torch.rand(1, 3, 2 + height // 16, 2 + width // 16, generator=torch.Generator().manual_seed(seed))
    pixels = F.interpolate(cells, size=(height, width), mode="bilinear")[0].permute(1, 2, 0)
    return (pixels * 255).to(torch.uint8).numpy()


@contextmanager
def forwards(model: nn.Module) -> Iterator[list[tuple[int, ...]]]:
    """The shapes of what goes into the model in this block."""
    shapes: list[tuple[int, ...]] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: shapes.append(tuple(inputs[0].shape)))
    yield shapes
    handle.remove()


def test_a_batch_gives_the_labels_of_each_image_alone(model: RefineNet) -> None:
    """Also of images that only the limits of the short edge make equally large; answers in the images' order."""
    images = [photo(40, 56, 1), photo(44, 40, 2), photo(40, 56, 3), photo(20, 28, 4), photo(40, 56, 5)]
    resizing = Resizing(1.2, (40, 80))
    with forwards(model) as shapes:
        labels = predict_many(model, images, PROTOCOLS, resizing)
    assert sorted({shape[0] for shape in shapes}) == [1, 4]
    assert len(shapes) == 2 * 4
    for image, answer in zip(images, labels, strict=True):
        alone = predict(model, image, PROTOCOLS, resizing)
        assert alone.keys() == answer.keys()
        for name, label in answer.items():
            assert label.dtype == torch.uint8
            assert label.shape == image.shape[:2]
            assert (label.numpy() != alone[name]).sum() <= 2  # sums in another order may tip a tie


class _Waits(TorchDispatchMode):
    """Refuses what makes the host wait for a device: numbers and sizes that are read out of tensors."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        assert not any(
            word in name for word in ("item", "scalar_dense", "nonzero", "masked_select", "unique", "index.Tensor")
        ), name
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("tile", [None, 256])
def test_the_host_reads_nothing_back_within_an_image(model: RefineNet, tile: int | None) -> None:
    image = photo(40, 300)
    predict_many(model, [image], PROTOCOLS, Resizing(), tile=tile)
    with _Waits():
        predict_many(model, [image, image], PROTOCOLS, Resizing(), "log", tile=tile)
    with pytest.raises(AssertionError), _Waits():
        torch.ones(1).item()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("tile", [None, 256])
def test_no_wait_for_the_gpu(model: RefineNet, tile: int | None) -> None:
    net = RefineNet(**vars(model.config))
    net.load_state_dict(model.state_dict())
    net = net.cuda().eval()
    image = photo(300, 420)
    alone = predict(net, image, PROTOCOLS, Resizing(), tile=tile)
    torch.cuda.set_sync_debug_mode("error")
    try:
        (labels,) = predict_many(net, [image], PROTOCOLS, Resizing(), tile=tile)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    host = predict(model, image, PROTOCOLS, Resizing(), tile=tile)
    for name, label in labels.items():
        assert label.device.type == "cuda"
        assert np.array_equal(label.cpu().numpy(), alone[name])
        assert (alone[name] == host[name]).mean() > 0.98  # its convolutions are less exact (TF32)


@pytest.mark.parametrize(("height", "width"), [(64, 100), (33, 47), (200, 90), (1, 30), (30, 1), (400, 31)])
def test_a_window_of_the_scaled_image(height: int, width: int) -> None:
    images = torch.randint(0, 256, (2, 3, height, width), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for size in ((64, 100), (130, 33), (31, 290)):
        whole = imresize(images.float(), size)
        for rows in ((0, size[0]), (0, 9), (size[0] - 7, size[0]), (13, 29)):
            for columns in ((0, size[1]), (0, 1), (size[1] - 20, size[1]), (11, 30)):
                part = imresize_window(images, size, rows, columns)
                assert (part - whole[..., slice(*rows), slice(*columns)]).abs().max() < 1e-3  # of 255


@pytest.mark.parametrize("side", [256, 300, 512, 1000])
def test_tiles_cover_an_axis_once(side: int) -> None:
    for length in (40, side, side + 1, side + 64, 2 * side - 3, 1999, 5120, 20000):
        tiles = cut(length, side)
        total = torch.zeros(-(-length // STRIDE))
        for tile in tiles:
            start, stop = tile.span
            assert 0 <= start < stop <= length
            assert stop - start <= side
            assert start % GRID == 0
            assert (tile.weights > 0).all()
            total[start // STRIDE :][tile.kept] += tile.weights
            # Logits that a border within the image may have spoilt are not kept.
            assert start == 0 or tile.kept.start >= 4
            assert stop == length or tile.kept.stop <= (stop - start) // STRIDE - 4
        assert torch.allclose(total, torch.ones_like(total), atol=1e-6)
        assert len(tiles) == 1 if length <= side else len(tiles) <= 1 + length / (side - GRID) * 4 / 3 + 1


class Short(nn.Module):
    """A network that sees 18 pixels to each side, less than a tile's border is wide; its last output never wins.

    Of whole pixel values it makes sums without any rounding error: they are the same in whatever order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.convs = [nn.Conv2d(n, 5, 3, padding=1, bias=False) for n in (3, 5, 5, 5)]
        self.bias = nn.Parameter(torch.tensor([0, 1, 2, 3, -torch.inf])[:, None, None] / 128)  # as void's, switched off
        for seed, conv in enumerate(self.convs):
            weights = torch.randint(-1, 2, conv.weight.shape, generator=torch.Generator().manual_seed(seed))
            conv.weight = nn.Parameter(weights.float())

    def forward(self, images: Tensor) -> Tensor:
        x = F.avg_pool2d(images - 128, STRIDE, ceil_mode=True)
        for conv in self.convs:
            x = conv(F.hardtanh(x, -100, 100))
        return x + self.bias


@torch.no_grad()
def test_tiles_give_the_logits_of_the_whole_image() -> None:
    """Bit for bit where one tile covers a pixel, to rounding where two do: nothing of a seam is left."""
    net, size = Short(), (333, 702)
    images = torch.from_numpy(photo(*size)).permute(2, 0, 1)[None].float()
    whole = net(images)
    got = tiled(net, lambda rows, columns: images[..., slice(*rows), slice(*columns)], size, 256)
    assert got.shape == whole.shape
    assert torch.equal(got[:, :4].argmax(1), whole[:, :4].argmax(1))
    assert torch.allclose(got[:, :4], whole[:, :4], atol=1e-3)  # of 1000
    assert (got[:, 4] == -torch.inf).all()
    alone = torch.ones(got.shape[2:], dtype=torch.bool)
    for axis, length in enumerate(size):
        for tile in cut(length, 256):
            shared = (tile.weights < 1).nonzero()[:, 0] + tile.span[0] // STRIDE + tile.kept.start
            alone.index_fill_(axis, shared, False)
    assert 0.2 < alone.float().mean() < 0.9
    assert torch.equal(got[..., alone], whole[..., alone])


@pytest.mark.parametrize("average", ["probability", "log"])
def test_prediction_in_tiles(average: str) -> None:
    """Of all scales, mirrored too, a batch at once: the labels of the whole images, and no large map on the way."""
    net, images = Short(), [photo(150, 410, 6), photo(150, 410, 7)]
    protocols = {"multi": Protocol((0.5, 1.0, 1.3), flip=True), "single": Protocol((1.0,))}
    with forwards(net) as shapes:
        labels = predict_many(net, images, protocols, Resizing(1.5), average, tile=256)  # type: ignore[arg-type]
    assert max(max(shape[2:]) for shape in shapes) == 256
    assert {shape[0] for shape in shapes} == {2}
    for image, answer in zip(images, labels, strict=True):
        whole = predict(net, image, protocols, Resizing(1.5), average)  # type: ignore[arg-type]
        assert all((answer[name].numpy() != whole[name]).sum() <= 3 for name in protocols)
        assert len(np.unique(whole["multi"])) > 2


def test_an_untrained_refinenet_in_tiles_mostly_agrees(model: RefineNet) -> None:
    """It sees further than a tile's border is wide."""
    image = photo(400, 600, 8)
    with torch.no_grad():
        model.classifier.weight.normal_(generator=torch.Generator().manual_seed(2))
    whole = predict(model, image, {"it": Protocol((1.0,))}, Resizing())["it"]
    label = predict(model, image, {"it": Protocol((1.0,))}, Resizing(), tile=384)["it"]
    assert 0.97 < (whole == label).mean() < 1
    assert len(np.unique(whole)) > 2


def test_a_tile_that_is_all_border() -> None:
    with pytest.raises(UserError, match=r"^tile is 128 pixels a side, expected 256 or more$"):
        predict(Short(), photo(40, 40), PROTOCOLS, Resizing(), tile=128)


@pytest.mark.parametrize("how", ["fast", "channels_last"])
def test_made_ready_it_is_the_same_function(model: RefineNet, how: str) -> None:
    net = optimise_for_inference(model, fast=how == "fast", channels_last=how == "channels_last")
    assert isinstance(net, FastRefineNet) == (how == "fast")
    assert optimise_for_inference(model) is model
    maps = []
    for module in net.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
            module.register_forward_hook(lambda _, __, out: maps.append(out))
    image = photo(64, 96)
    label, plain = (predict(n, image, PROTOCOLS, Resizing()) for n in (net, model))
    assert maps
    assert all(m.is_contiguous(memory_format=torch.channels_last) for m in maps)
    assert all((label[name] == plain[name]).mean() > 0.999 for name in PROTOCOLS)
    assert next(model.parameters()).is_contiguous()  # and left as it was


def test_bfloat16_is_of_the_convolutions_only(model: RefineNet) -> None:
    image, kinds = photo(64, 96), []
    handle = model.classifier.register_forward_hook(lambda _, __, out: kinds.append(out.dtype))
    label = predict(model, image, PROTOCOLS, Resizing(), precision="bfloat16")
    plain = predict(model, image, PROTOCOLS, Resizing())
    handle.remove()
    assert kinds == [torch.bfloat16] * 4 + [torch.float32] * 4
    assert all((label[name] == plain[name]).mean() > 0.9 for name in PROTOCOLS)


@pytest.mark.parametrize("size", [(30, 4500), (60, 9000), (4500, 40)])
def test_a_long_side_is_resized_piece_by_piece(size: tuple[int, int]) -> None:
    """With the numbers of the whole; the matrix of one side of 16,000 pixels would take a gigabyte."""
    shape = (1, 3, 6000, 50) if size[0] > size[1] else (1, 3, 50, 6000)
    image = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    whole = imresize(image.float(), size).clamp_(0, 255)
    torch.testing.assert_close(multiscale.scaled(image, size), whole, rtol=1e-4, atol=1e-2)


STRIP = """\
import resource, sys
from pathlib import Path
import numpy as np, torch
from refinenet.config import Protocol
from refinenet.inference.predictor import Predictor
torch.set_num_threads(1)
predictor = Predictor(Path(sys.argv[1]), torch.device("cpu"))
height, width = int(sys.argv[2]), int(sys.argv[3])
image = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
label = predictor.label_photo(image, Protocol((1.0,)), "strip")
assert label.shape == (height, width)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def test_a_strip_takes_no_more_memory_than_a_photograph(tmp_path: Path) -> None:
    """A book's spine of 200 x 16,000 pixels beside a photograph of as many."""
    network(tmp_path / "m.safetensors", 0)

    def peak(height: int, width: int) -> int:
        command = [sys.executable, "-c", STRIP, str(tmp_path / "m.safetensors"), str(height), str(width)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert peak(200, 16000) < 1.3 * peak(1600, 2000)
    assert peak(16000, 200) < 1.3 * peak(1600, 2000)
