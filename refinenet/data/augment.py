"""Windows to a batch: bytes to the device; scale, flip and padding there (authors' batch_do_data_augmentation.m).

The authors resize the image by the drawn scale and enlarge the crop for the network, each time rounded to bytes. Here a
window is resized once, by both factors, in float32. Normalisation is the network's, and the label is brought to the
scores' resolution by the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional as F

from refinenet.data import IGNORE_INDEX
from refinenet.data.crops import Crops, Window
from refinenet.data.split import Array

__all__ = ["Batch", "BatchLayout", "Crops", "Window", "make_batch", "resize_taps"]

PADDING = 128.0  # the authors' mean colour


@dataclass(frozen=True)
class Batch:
    """On the device. `images`: N x 3 x H x W float32 in 0..255; `labels`: N x H x W uint8; padding is void."""

    names: tuple[str, ...]
    images: Tensor
    labels: Tensor


@lru_cache(512)
def resize_taps(
    inputs: int, outputs: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.int32]]:
    """Which pixels of a line of `inputs` make a line of `outputs`, as by MATLAB's imresize (bicubic, anti-aliased).

    `refinenet.model.blocks.imresize` without the zeros of its matrices: positions and weights, outputs x taps each; and
    the nearest pixel, outputs.
    """
    scale = outputs / inputs
    shrink = min(scale, 1.0)
    reach = 2 / shrink
    centres = (np.arange(outputs) + 0.5) / scale - 0.5
    positions = np.floor(centres - reach).astype(np.int64)[:, None] + 1 + np.arange(int(np.ceil(2 * reach)))
    x = np.abs((centres[:, None] - positions) * shrink)
    near, far = (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x <= 1, near, np.where(x < 2, far, 0.0))
    weights /= weights.sum(1, keepdims=True)
    mirrored = positions % (2 * inputs)
    mirrored = np.minimum(mirrored, 2 * inputs - 1 - mirrored)
    # In float32, as torch's "nearest-exact" has it.
    step = np.float32(inputs) / np.float32(outputs)
    nearest = ((np.arange(outputs, dtype=np.float32) + np.float32(0.5)) * step).astype(np.int32)
    return mirrored.astype(np.int32), weights.astype(np.float32), np.minimum(nearest, inputs - 1)


class _Part(NamedTuple):
    """An array in a buffer of bytes."""

    begin: int
    end: int
    shape: tuple[int, ...]
    kind: str

    def array(self, buffer: Array) -> npt.NDArray[Any]:
        return buffer[self.begin : self.end].view(self.kind).reshape(self.shape)

    def tensor(self, buffer: Tensor) -> Tensor:
        return buffer[self.begin : self.end].view(getattr(torch, self.kind)).view(self.shape)


class _Group(NamedTuple):
    """Windows `first` to `last` of a batch, lying in one table; N of them. R rows and C columns come of each."""

    first: int
    last: int
    images: _Part  # N x H x W x 3 uint8
    labels: _Part  # N x H x W uint8
    positions: tuple[_Part, _Part]  # N R x taps, N C x taps int32: in a table of all lines, of all columns
    weights: tuple[_Part, _Part]  # as many float32; 0 where there is padding
    nearest: tuple[_Part, _Part]  # N x R in a table of all lines, N x C in each window, int32
    sizes: _Part  # N x 2 int32


class BatchLayout:
    """How the windows of a batch lie in one buffer of bytes, with all that the device needs to make the batch.

    `write` puts them there, on the host; `read` makes the batch from the buffer, or its copy on the device, without the
    host waiting for anything. A pass over the lines and one over the columns add up a few weighted lines of a table
    each, which is what `imresize` does without the zeros of its matrices; the sum for a window is the same in any
    company.

    Args:
        windows: of the batch.
        crop, input_scale, pad: as of `make_batch`.
        together: all windows in one table, as a GPU likes it; else one table a window.
    """

    def __init__(
        self, windows: Sequence[Window], crop: int, input_scale: float, pad: bool | None, together: bool
    ) -> None:
        full = round(crop * input_scale)
        self.names = tuple(window.name for window in windows)
        self._before = [window.label.shape for window in windows]
        self._after = [
            tuple(min(full, max(1, round(side * window.scale * input_scale))) for side in window.label.shape)
            for window in windows
        ]
        padded = len(windows) > 1 if pad is None else pad
        if not windows or (not padded and len(set(self._after)) > 1):
            raise ValueError(f"windows become {self._after}, expected one size or padding")
        self._out = (full, full) if padded else self._after[0]
        self.size = 0  # bytes of the buffer
        step = len(windows) if together else 1
        self._groups = [self._group(first, first + step) for first in range(0, len(windows), step)]

    def _group(self, first: int, last: int) -> _Group:
        n, before, after = last - first, self._before[first:last], self._after[first:last]
        height, width = (max(sides) for sides in zip(*before, strict=True))
        width = -(-width // 32) * 32  # fbgemm makes a kernel for each length of line: let there be few
        lengths = [n * out for out in self._out]
        counts = [max(resize_taps(a[i], b[i])[0].shape[1] for a, b in zip(before, after, strict=True)) for i in (0, 1)]
        return _Group(
            first,
            last,
            self._part((n, height, width, 3), "uint8"),
            self._part((n, height, width), "uint8"),
            (self._part((lengths[0], counts[0]), "int32"), self._part((lengths[1], counts[1]), "int32")),
            (self._part((lengths[0], counts[0]), "float32"), self._part((lengths[1], counts[1]), "float32")),
            (self._part((n, self._out[0]), "int32"), self._part((n, self._out[1]), "int32")),
            self._part((n, 2), "int32"),
        )

    def _part(self, shape: tuple[int, ...], kind: str) -> _Part:
        begin = -(-self.size // 64) * 64
        self.size = begin + int(np.prod(shape)) * np.dtype(kind).itemsize
        return _Part(begin, self.size, shape, kind)

    def write(self, windows: Sequence[Window], buffer: Array) -> None:
        """Copy the windows' bytes to `buffer`, of `size` bytes or more. Needs no interpreter for most of its time."""
        for group in self._groups:
            images, labels, sizes = (part.array(buffer) for part in (group.images, group.labels, group.sizes))
            for i in range(group.last - group.first):
                window = windows[group.first + i]
                height, width = window.label.shape
                images[i, :height, :width] = window.image
                labels[i, :height, :width] = window.label
            sizes[:] = self._after[group.first : group.last]
            for axis in (0, 1):
                parts = (group.positions[axis], group.weights[axis], group.nearest[axis])
                positions, weights, nearest = (part.array(buffer) for part in parts)
                for part in (positions, weights, nearest):
                    part.fill(0)
                for i in range(group.last - group.first):
                    index = group.first + i
                    size = self._after[index][axis]
                    where, factor, near = resize_taps(self._before[index][axis], size)
                    back = slice(None, None, -1 if axis and windows[index].flip else 1)
                    lines, known = slice(i * self._out[axis], i * self._out[axis] + size), slice(where.shape[1])
                    np.add(where[back], i * labels.shape[1 + axis], out=positions[lines, known])
                    weights[lines, known] = factor[back]
                    np.add(near[back], 0 if axis else i * labels.shape[1], out=nearest[i, :size])

    @torch.no_grad()
    def read(self, buffer: Tensor) -> Batch:
        """The batch, from the buffer on the device."""
        count = len(self.names)
        images = torch.empty(count, 3, *self._out, device=buffer.device)
        labels = torch.empty(count, *self._out, dtype=torch.uint8, device=buffer.device)
        for group in self._groups:
            self._read(group, buffer, images[group.first : group.last], labels[group.first : group.last])
        return Batch(self.names, images.clamp_(0, 255), labels)

    def _read(self, group: _Group, buffer: Tensor, images: Tensor, labels: Tensor) -> None:
        n, height, width, _ = group.images.shape
        rows, columns = self._out
        (above, left), (down, across), (near_rows, near_columns) = (
            [part.tensor(buffer) for part in parts] for parts in (group.positions, group.weights, group.nearest)
        )
        # Each pass is over lines that lie one after the other: what is between turns them round.
        pixels = group.images.tensor(buffer).view(n * height, width * 3).float()
        pixels = F.embedding_bag(above, pixels, per_sample_weights=down, mode="sum")
        pixels = pixels.view(n, rows, width * 3).transpose(1, 2).reshape(n * width, 3 * rows)
        pixels = F.embedding_bag(left, pixels, per_sample_weights=across, mode="sum")
        images.view(n, 3 * rows, columns).copy_(pixels.view(n, columns, 3 * rows).transpose(1, 2))
        marks = group.labels.tensor(buffer).view(n * height, width).index_select(0, near_rows.view(-1))
        near = near_columns.long()[:, None, :].expand(n, rows, columns)
        torch.gather(marks.view(n, rows, width), 2, near, out=labels)
        if any(after != self._out for after in self._after[group.first : group.last]):
            sizes = group.sizes.tensor(buffer)
            below, right = (
                torch.arange(out, device=buffer.device) >= sizes[:, axis, None] for axis, out in enumerate(self._out)
            )
            outside = below[:, :, None] | right[:, None, :]
            images.masked_fill_(outside[:, None], PADDING)
            labels.masked_fill_(outside, IGNORE_INDEX)


def make_batch(
    windows: Sequence[Window], crop: int, input_scale: float, device: torch.device, pad: bool | None = None
) -> Batch:
    """Move windows to the device as bytes, then scale, flip and pad them to one batch.

    The network sees crop x input_scale pixels a side (the authors' code enlarges by 1.2 after the crop). Several
    windows are padded to the full side, with the mean colour and void; a single one is not, unless `pad` says so, as
    where it is a process's part of a larger batch.
    """
    packing = BatchLayout(windows, crop, input_scale, pad, together=device.type != "cpu")
    buffer = np.empty(packing.size, np.uint8)
    packing.write(windows, buffer)
    return packing.read(torch.from_numpy(buffer).to(device))
