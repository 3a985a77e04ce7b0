"""Multi-scale prediction of whole images (paper, section 4; the authors' fuse_multiscale_results.m).

Nothing here waits for the device, so that the next image is queued while this one is computed, except `predict`, which
returns numpy arrays, and a dense CRF, which runs on the host; in `predict_stream` the next images are computed
meanwhile.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import reduce
from typing import TYPE_CHECKING, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refinenet.config import SMALLEST_TILE, Average, Precision, Protocol, Resizing
from refinenet.data.split import Array
from refinenet.device import choose_precision
from refinenet.errors import UserError
from refinenet.inference.crf import Floats, crf_labels
from refinenet.inference.crf_processes import CRFProcesses, Refinement
from refinenet.inference.tiles import Span, imresize_window, tiled
from refinenet.model.blocks import imresize, resize

if TYPE_CHECKING:
    from refinenet.model.network import RefineNet

_T = TypeVar("_T")

View = tuple[float, bool]  # scale, mirrored
Size = tuple[int, int]  # height, width in pixels

_LOG_FLOOR = -20.0  # of the authors' log-space resizing
# Scores resized at once on a GPU: 1 GiB, which is what is held. On a CPU class by class is 1.5 to 3 times faster,
# measured on one core.
_AT_ONCE = 2**28
_LONG = 4096  # pixels; longer sides are resized piece by piece


def optimise_for_inference(
    model: RefineNet,
    *,
    fast: bool = False,
    channels_last: bool = False,
    compile: bool = False,
    precision: Precision = "float32",
) -> nn.Module:
    """Return a faster version of `model` for many images; `model` itself where nothing is asked for.

    Args:
        model: is not changed.
        fast: folded norms, channels last, and on a CPU in float32 Winograd's convolution: logits differ by about 1e-5
            of the largest.
        channels_last: memory format of the maps.
        compile: torch.compile, which compiles for the first size or two, then once for any size; with `fast` norms are
            folded, but without Winograd.
        precision: what `predict` will be called with.
    """
    from refinenet.inference.fast import FastRefineNet, fold

    if fast and not compile:
        device = next(model.parameters()).device
        return FastRefineNet(model, winograd=choose_precision(precision, device) == "float32")
    if not (fast or channels_last or compile):
        return model
    net = copy.deepcopy(model).eval()
    if fast:
        for backbone in net.backbones:
            fold(backbone)
    if fast or channels_last:
        net = net.to(memory_format=torch.channels_last)
    return cast(nn.Module, torch.compile(net)) if compile else net


@torch.inference_mode()
def predict(
    model: nn.Module,
    image: Array,
    protocols: Mapping[str, Protocol],
    resizing: Resizing,
    average: Average = "probability",
    precision: Precision = "float32",
    tile: int | None = None,
) -> dict[str, Array]:
    """Label one image by each protocol; a scale that several protocols share is computed once.

    Args:
        model: a RefineNet, or what `optimise_for_inference` made of it.
        image: H x W x 3 uint8 RGB.
        protocols: name -> how to test.
        resizing: of the image before the scales.
        average: "probability" averages the softmax; "log" resizes it in log space with the floor of the authors' code,
            then averages.
        precision: of the convolutions.
        tile: side in pixels above which the scaled image is cut into overlapping tiles (refinenet/inference/tiles.py).

    Returns:
        For each protocol H x W uint8 class indices; the number of classes where a void output wins.

    Raises:
        UserError: `tile` is too small.
    """
    (labels,) = predict_many(model, [image], protocols, resizing, average, precision, tile)
    return {name: label.cpu().numpy() for name, label in labels.items()}


@torch.inference_mode()
def predict_many(
    model: nn.Module,
    images: Sequence[Array],
    protocols: Mapping[str, Protocol],
    resizing: Resizing,
    average: Average = "probability",
    precision: Precision = "float32",
    tile: int | None = None,
) -> list[dict[str, Tensor]]:
    """Label each of `images` as `predict`, whose arguments these are; the label maps stay on the model's device.

    Images that have one size after scaling are one batch, whatever its size. A batch may sum in another order than one
    image: where two classes are within a rounding error, the label may differ.
    """
    found = _predict(model, images, protocols, resizing, average, precision, tile, crf_labels)
    return [{name: _on_device(label, model) for name, label in labels.items()} for labels in found]


def predict_stream(
    model: nn.Module,
    batches: Iterable[Sequence[Array]],
    protocols: Mapping[str, Protocol],
    resizing: Resizing,
    average: Average,
    precision: Precision,
    tile: int | None,
    crf: CRFProcesses,
) -> Iterator[list[dict[str, Tensor]]]:
    """Label batch after batch as `predict_many` does, in their order, with dense CRFs in the processes of `crf`.

    The network goes on until those have as many images as they take, so it is ahead of the labels that this yields;
    where no protocol has a CRF it is not. Raises UserError as `predict_many`, and where a process of `crf` was killed.
    """
    waiting: deque[list[dict[str, Tensor | Refinement]]] = deque()
    for images in batches:
        waiting.append(_predict(model, images, protocols, resizing, average, precision, tile, crf.submit))
        while waiting and all(_done(label) for labels in waiting[0] for label in labels.values()):
            yield [{name: _on_device(x, model) for name, x in labels.items()} for labels in waiting.popleft()]
    for found in waiting:
        yield [{name: _on_device(label, model) for name, label in labels.items()} for labels in found]


def _done(label: Tensor | Refinement) -> bool:
    return isinstance(label, Tensor) or label.done()


def _on_device(label: Tensor | Array | Refinement, model: nn.Module) -> Tensor:
    if isinstance(label, Tensor):
        return label
    labels = label.labels() if isinstance(label, Refinement) else label
    return torch.from_numpy(labels).to(next(model.parameters()).device)


@torch.inference_mode()
def _predict(
    model: nn.Module,
    images: Sequence[Array],
    protocols: Mapping[str, Protocol],
    resizing: Resizing,
    average: Average,
    precision: Precision,
    tile: int | None,
    refine: Callable[[Array, Floats], _T],
) -> list[dict[str, Tensor | _T]]:
    """Label each of `images` as `predict_many`; what `refine` returns stands for the labels of a dense CRF."""
    if tile is not None and tile < SMALLEST_TILE:
        raise UserError(f"tile is {tile} pixels a side, expected {SMALLEST_TILE} or more")
    device = next(model.parameters()).device
    views = sorted({view for protocol in protocols.values() for view in _views(protocol)})
    groups: dict[tuple[Size, ...], list[int]] = {}
    for index, image in enumerate(images):
        sizes = tuple(scaled_size(image, scale, resizing) for scale, _ in views)
        groups.setdefault(sizes, []).append(index)
    labels: list[dict[str, Tensor | _T]] = [{} for _ in images]
    for sizes, indices in groups.items():
        pixels = [upload(images[index], device).permute(2, 0, 1)[None] for index in indices]
        maps = {}
        for view, size in zip(views, sizes, strict=True):
            logits = _logits(model, pixels, size, view[1], precision, tile)
            if average == "log":
                maps[view] = F.log_softmax(logits, dim=1).clamp_min_(_LOG_FLOOR)
            else:
                maps[view] = F.softmax(logits, dim=1)
        fused: dict[tuple[View, ...], Tensor] = {}
        for name, protocol in protocols.items():
            own = _views(protocol)
            if own not in fused:
                fused[own] = _fuse([maps[view] for view in own], average)
            for place, index in enumerate(indices):
                scores, image = fused[own][place : place + 1], images[index]
                if protocol.crf:
                    labels[index][name] = refine(image, _probabilities(scores, image, average))
                else:
                    labels[index][name] = _best(scores, (image.shape[0], image.shape[1]))
    return labels


def upload(values: Array, device: torch.device) -> Tensor:
    """Copy a uint8 array of any shape to the device, from pinned memory to a GPU without waiting."""
    tensor = torch.from_numpy(np.array(values))
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _views(protocol: Protocol) -> tuple[View, ...]:
    return tuple((scale, flip) for scale in protocol.scales for flip in ((False, True) if protocol.flip else (False,)))


def scaled_size(image: Array, scale: float, resizing: Resizing) -> Size:
    """Return the height and width at which the network sees an image (H x W x 3) at a protocol's `scale`, pixels."""
    # The network halves five times: below 32 pixels a cell of its coarsest map would exceed the image.
    height, width = image.shape[:2]
    factor = resizing.factor(height, width) * scale
    return max(32, round(height * factor)), max(32, round(width * factor))


def _logits(
    model: nn.Module, images: Sequence[Tensor], size: Size, flip: bool, precision: Precision, tile: int | None
) -> Tensor:
    """Return logits of images (1 x 3 x H x W uint8) scaled to `size`: N x outputs x h x w float32, at 1/4 of it."""
    device = images[0].device
    half = choose_precision(precision, device) == "bfloat16"

    def run(batch: Tensor) -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=half):
            logits: Tensor = model(batch)
        return logits.float()

    if tile is None or max(size) <= tile:
        batch = torch.cat([scaled(image, size) for image in images])
        logits = run(batch.flip(3) if flip else batch)
    else:
        logits = tiled(run, _window(images, size, flip), size, tile, device)
    return logits.flip(3) if flip else logits


def scaled(image: Tensor, size: Size) -> Tensor:
    """Resize 1 x 3 x H x W uint8 to `size`: float32 in 0..255."""
    if image.shape[2:] == size:  # imresize would change nothing
        return image.float()
    if max(*image.shape[2:], *size) <= _LONG:
        return imresize(image.float(), size).clamp_(0, 255)
    # The matrix of a side grows with its square: of a strip of 16,000 pixels it takes a gigabyte. So piece by piece.
    whole = torch.empty(1, image.shape[1], *size, device=image.device)
    spans = [[(start, min(start + _LONG // 4, side)) for start in range(0, side, _LONG // 4)] for side in size]
    for rows in spans[0]:
        for columns in spans[1]:
            whole[..., rows[0] : rows[1], columns[0] : columns[1]] = imresize_window(image, size, rows, columns)
    return whole.clamp_(0, 255)


def _window(images: Sequence[Tensor], size: Size, flip: bool) -> Callable[[Span, Span], Tensor]:
    def window(rows: Span, columns: Span) -> Tensor:
        if flip:
            columns = size[1] - columns[1], size[1] - columns[0]
        part = torch.cat([imresize_window(image, size, rows, columns) for image in images]).clamp_(0, 255)
        return part.flip(3) if flip else part

    return window


def _fuse(maps: Sequence[Tensor], average: Average) -> Tensor:
    """Resize to the largest map and average: N x outputs x h x w, log-probabilities if `average` is "log"."""
    largest = max((m.shape[2:] for m in maps), key=lambda s: s[0] * s[1])
    resized = (resize(m, largest) for m in maps)  # one at a time: of a large image they take gigabytes
    mean = reduce(torch.add, (m.exp() for m in resized) if average == "log" else resized)
    if len(maps) > 1:
        mean /= len(maps)
    return mean.clamp_min(np.exp(_LOG_FLOOR)).log_() if average == "log" else mean


def _best(scores: Tensor, size: Size) -> Tensor:
    """Resize 1 x outputs x h x w to `size` and return the argmax, H x W uint8; of equal scores the first."""
    if scores.device.type != "cpu" and scores.shape[1] * size[0] * size[1] <= _AT_ONCE:
        return resize(scores, size).argmax(1)[0].to(torch.uint8)
    # For a photo of 24 megapixels 150 classes at once would take 14 GB.
    best = resize(scores[:, :1], size)[0, 0].clone()
    label = torch.zeros(size, dtype=torch.uint8, device=scores.device)
    for index in range(1, scores.shape[1]):
        score = resize(scores[:, index : index + 1], size)[0, 0]
        label.masked_fill_(score > best, index)
        torch.maximum(best, score, out=best)
    return label


def _probabilities(scores: Tensor, image: Array, average: Average) -> Floats:
    """Return outputs x H x W at the image's size, of scores 1 x outputs x h x w."""
    probabilities = resize(scores, image.shape[:2])[0]
    if average == "log":
        probabilities = probabilities.softmax(0)
    return probabilities.cpu().numpy()
