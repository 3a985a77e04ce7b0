"""Make a batch of windows: bytes to the device; scale, flip, padding there (authors' batch_do_data_augmentation.m).

The authors resize the image by the drawn scale and enlarge the crop for the network, each time rounded to bytes. Here a
window is resized once, by both factors, by PyTorch's anti-aliased bicubic interpolation: in float32, and on a CPU from
bytes to bytes. It has the kernel of MATLAB's imresize, but at a border it leaves out what lies beyond and scales the
other weights to 1, where imresize mirrors the image (docs/explanation/differences.md says what that is worth).
Normalisation is the network's, and the label is brought to the scores' resolution by the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from refinenet.data import IGNORE_INDEX
from refinenet.data.crops import Window

PADDING = 128.0  # the authors' mean colour

# Where bytes are resized as they are, which PyTorch has for CPUs: in integers, so the same comes out with and without
# AVX, and in a quarter of the time of float32 (benchmarks/loader.md). It rounds after each pass: 0.3 of 255 on average.
ON_BYTES: tuple[str, ...] = ("cpu",)


@dataclass(frozen=True)
class Batch:
    """On the device. `images`: N x 3 x H x W float32 in 0..255; `labels`: N x H x W uint8; padding is void."""

    names: tuple[str, ...]
    images: Tensor
    labels: Tensor


def copy_windows(windows: Sequence[Window], device: torch.device) -> Tensor:
    """Copy the windows' pixels to the device, one after the other in one tensor of bytes: image, label, image, ...

    To a GPU they go from pinned memory, and the host does not wait for them: PyTorch keeps the memory until they are
    there. Needs no interpreter for most of its time.
    """
    cuda = device.type == "cuda"
    arrays = [pixels for window in windows for pixels in (window.image, window.label)]
    host = torch.empty(sum(pixels.size for pixels in arrays), dtype=torch.uint8, pin_memory=cuda)
    for part, pixels in zip(torch.split(host, [pixels.size for pixels in arrays]), arrays, strict=True):
        np.copyto(part.numpy().reshape(pixels.shape), pixels)
    return host.to(device, non_blocking=cuda)


def _unpacked(pixels: Tensor, windows: Sequence[Window]) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield image, 1 x 3 x h x w, and label, 1 x 1 x h x w, of each window: views of what `copy_windows` made."""
    parts = iter(torch.split(pixels, [array.size for window in windows for array in (window.image, window.label)]))
    for window in windows:
        height, width = window.label.shape
        yield next(parts).view(1, height, width, 3).permute(0, 3, 1, 2), next(parts).view(1, 1, height, width)


@torch.no_grad()
def resize_windows(
    windows: Sequence[Window], pixels: Tensor, crop: int, input_scale: float, pad: bool | None = None
) -> Batch:
    """Scale, flip and pad windows to one batch, without the host waiting for anything: it knows all sizes.

    Each window is resized by itself, so that it becomes the same bytes in any company.

    Args:
        windows: of the batch.
        pixels: theirs, on the device, as `copy_windows` laid them out.
        crop: as of `make_batch`.
        input_scale: as of `make_batch`.
        pad: as of `make_batch`.
    """
    full = round(crop * input_scale)
    sizes = [
        [min(full, max(1, round(side * window.scale * input_scale))) for side in window.label.shape]
        for window in windows
    ]
    padded = len(windows) > 1 if pad is None else pad
    if not windows or (not padded and any(size != sizes[0] for size in sizes)):
        raise ValueError(f"windows become {sizes}, expected one size or padding")
    shape = [full, full] if padded else sizes[0]
    images = torch.full((len(windows), 3, *shape), PADDING, device=pixels.device)
    labels = torch.full((len(windows), 1, *shape), IGNORE_INDEX, dtype=torch.uint8, device=pixels.device)
    unpacked = _unpacked(pixels, windows)
    for index, (window, size, (image, label)) in enumerate(zip(windows, sizes, unpacked, strict=True)):
        image = _resize(image, size)
        label = F.interpolate(label, size, mode="nearest-exact")
        if window.flip:
            image, label = image.flip(3), label.flip(3)
        images[index, :, : size[0], : size[1]] = image[0]
        labels[index, :, : size[0], : size[1]] = label[0]
    return Batch(tuple(window.name for window in windows), images, labels[:, 0])


def _resize(image: Tensor, size: list[int]) -> Tensor:
    """Resize 1 x 3 x h x w uint8 to 1 x 3 x size, in 0..255: uint8 or float32."""
    if image.device.type in ON_BYTES:
        return F.interpolate(image, size, mode="bicubic", antialias=True)
    return F.interpolate(image.float(), size, mode="bicubic", antialias=True).clamp_(0, 255)


def make_batch(
    windows: Sequence[Window], crop: int, input_scale: float, device: torch.device, pad: bool | None = None
) -> Batch:
    """Move windows to the device as bytes, then scale, flip and pad them to one batch.

    The network sees crop x input_scale pixels a side (the authors' code enlarges by 1.2 after the crop). Several
    windows are padded to the full side, with the mean colour and void; a single one is not, unless `pad` says so, as
    where it is a process's part of a larger batch.

    Args:
        windows: of the batch.
        crop: side in pixels, before `input_scale`, of what the network sees at most.
        input_scale: by which it is enlarged.
        device: where the batch is to be.
        pad: whether windows are padded to the full side; None: where there are several.
    """
    return resize_windows(windows, copy_windows(windows, device), crop, input_scale, pad)
