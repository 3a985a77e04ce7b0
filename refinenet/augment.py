"""Crops on the host, scale and flip on the device (paper, section 4; authors' batch_do_data_{augmentation,crop}.m).

The authors resize the whole image by the drawn scale and then cut the crop. Cutting the window that the crop comes
from first, and resizing only that, gives the same picture but for a border of the filter's width and touches a
fraction of the pixels: a crop is a view into the memory-mapped split until it is copied into the batch.

Every draw depends on (seed, step) alone, so that training can stop and go on at any step with nothing to remember.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from refinenet.blocks import imresize
from refinenet.config import clamp_short_edge
from refinenet.data import IGNORE_INDEX, Array, Split


@dataclass(frozen=True)
class Window:
    """A drawn crop before resizing. `image`: h x w x 3, `label`: h x w, uint8 views."""

    name: str
    image: Array
    label: Array
    scale: float
    flip: bool


@dataclass(frozen=True)
class Batch:
    """On the device. `images`: N x 3 x H x W float32 in 0..255; `labels`: N x H x W uint8; padding is void."""

    names: tuple[str, ...]
    images: Tensor
    labels: Tensor


class Crops:
    """Draws the windows of a training step.

    Args:
        split: the training images.
        crop: side of the crop in pixels, after scaling; smaller where the scaled image is.
        scales: one of these is drawn for each crop.
        flip: whether half of the crops are mirrored.
        balanced: True: a class is drawn, then one of its images, and the crop is centred on a random pixel of the class
            (the authors' "type 1"). False: an image and a position are drawn.
        seed: of all draws.
        short_edge: each image's short edge is brought into these limits before it is scaled.
    """

    def __init__(
        self,
        split: Split,
        crop: int,
        scales: Sequence[float],
        flip: bool,
        balanced: bool,
        seed: int,
        short_edge: tuple[int, int] | None = None,
    ) -> None:
        self._split, self._crop, self._scales = split, crop, tuple(scales)
        self._flip, self._balanced, self._seed, self._short_edge = flip, balanced, seed, short_edge
        images: dict[int, list[int]] = {}
        for index, present in enumerate(split.present()):
            for wanted in present.tolist():
                images.setdefault(wanted, []).append(index)
        self._images = sorted(images.items())  # class, the images that have it

    def draw(self, step: int, batch: int) -> list[Window]:
        """The windows of step `step`: the same for the same seed, whatever was drawn before."""
        rng = np.random.Generator(np.random.PCG64([self._seed, step]))
        return [self._window(rng) for _ in range(batch)]

    def _window(self, rng: np.random.Generator) -> Window:
        if self._balanced:
            wanted, found = self._images[rng.integers(len(self._images))]
            sample = self._split[found[rng.integers(len(found))]]
        else:
            sample = self._split[int(rng.integers(len(self._split)))]
        assert sample.label is not None
        height, width = sample.label.shape
        if self._balanced:
            pixels = np.flatnonzero(sample.label == wanted)
            y, x = divmod(int(pixels[rng.integers(len(pixels))]), width)
        else:
            y, x = int(rng.integers(height)), int(rng.integers(width))
        scale = self._scales[rng.integers(len(self._scales))] * clamp_short_edge(height, width, self._short_edge)
        side = round(self._crop / scale)
        top = min(max(y - side // 2, 0), max(height - side, 0))
        left = min(max(x - side // 2, 0), max(width - side, 0))
        here = (slice(top, top + side), slice(left, left + side))
        flip = bool(self._flip and rng.integers(2))
        return Window(sample.name, sample.image[here], sample.label[here], scale, flip)


def assemble(windows: Sequence[Window], crop: int, input_scale: float, device: torch.device) -> Batch:
    """Move windows to the device as bytes, then scale, flip and pad them to one batch.

    The network sees crop x input_scale pixels a side (the authors' code enlarges by 1.2 after the crop). Several
    windows are padded to the full side, with the mean colour and void; a single one is not.
    """
    full = round(crop * input_scale)
    images, labels = [], []
    for window in windows:
        image = torch.from_numpy(window.image.copy()).to(device, non_blocking=True)
        label = torch.from_numpy(window.label.copy()).to(device, non_blocking=True)
        size = [min(full, max(1, round(s * window.scale * input_scale))) for s in label.shape]
        pixels = imresize(image.permute(2, 0, 1)[None].float(), size).clamp(0, 255)
        marks = torch.nn.functional.interpolate(label[None, None], size=size, mode="nearest-exact")
        if window.flip:
            pixels, marks = pixels.flip(3), marks.flip(3)
        if len(windows) > 1 and size != [full, full]:
            pad = (0, full - size[1], 0, full - size[0])
            pixels = torch.nn.functional.pad(pixels, pad, value=128.0)
            marks = torch.nn.functional.pad(marks, pad, value=IGNORE_INDEX)
        images.append(pixels)
        labels.append(marks[:, 0])
    return Batch(tuple(w.name for w in windows), torch.cat(images), torch.cat(labels))
