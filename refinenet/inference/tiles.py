"""Images that do not fit memory: the network sees the scaled image in overlapping tiles, their logits become one map.

Tiles begin where the network's grids begin, so that a tile's logits are those of the whole image wherever the border of
the tile is out of sight. Where two overlap, each leaves the quarter next to its border to the other, and in the half
between one fades into the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from refinenet.model.blocks import keys_taps

Span = tuple[int, int]  # first and one past the last pixel of a row or column of the scaled image

GRID = 64  # pixels: the coarsest map has a cell every 32, in a network that also takes the image at half its size 64
STRIDE = 4  # pixels a logit: the network's output is a quarter of its input, rounded up
_SHARE = 4  # an overlap is this part of a tile's side


class Tile(NamedTuple):
    """A tile on one axis: its pixels, those of its logits that count, and how much; over all tiles that sums to 1."""

    span: Span
    kept: slice
    weights: Tensor


def cut(length: int, side: int, device: torch.device | None = None) -> list[Tile]:
    """Tiles of at most `side` pixels over `length` pixels of one axis, each overlapping the next by a quarter or more.

    One tile of the whole length where that is no longer than `side`.
    """
    if length <= side:
        every = -(-length // STRIDE)
        return [Tile((0, length), slice(0, every), torch.ones(every, device=device))]
    side -= side % GRID
    overlap = max(GRID, side // _SHARE // GRID * GRID)
    starts = [*range(0, length - side, side - overlap), -(-(length - side) // GRID) * GRID]
    margin, ramp = overlap // STRIDE // 4, overlap // STRIDE // 2  # in logits
    total = torch.zeros(-(-length // STRIDE), device=device)
    tiles = []
    for start in starts:
        stop = min(start + side, length)
        count = -(-(stop - start) // STRIDE)
        inside = torch.arange(count, device=device) + 0.5
        weights = torch.ones_like(inside)
        kept = slice(margin if start else 0, count - margin if stop < length else count)
        if start:
            weights = ((inside - margin) / ramp).clamp_max(1)
        if stop < length:
            weights = weights.minimum((inside.flip(0) - margin) / ramp)
        weights = weights[kept]
        total[start // STRIDE :][kept] += weights
        tiles.append(Tile((start, stop), kept, weights))
    for tile in tiles:
        tile.weights.div_(total[tile.span[0] // STRIDE :][tile.kept])
    return tiles


def tiled(
    logits: Callable[[Tensor], Tensor],
    window: Callable[[Span, Span], Tensor],
    size: Sequence[int],
    side: int,
    device: torch.device | None = None,
) -> Tensor:
    """Logits N x classes x h x w of an image of `size` pixels, of which no more than side x side is looked at at once.

    `window(rows, columns)` is that part of the scaled image, N x 3 x its height x its width; `logits` is the network.
    """
    whole: Tensor | None = None
    columns = cut(size[1], side, device)
    for down in cut(size[0], side, device):
        for across in columns:
            part = logits(window(down.span, across.span))
            if whole is None:
                whole = part.new_zeros(*part.shape[:2], *(-(-length // STRIDE) for length in size))
            place = whole[..., down.span[0] // STRIDE :, across.span[0] // STRIDE :][..., down.kept, across.kept]
            place += part[..., down.kept, across.kept] * down.weights[:, None] * across.weights
    assert whole is not None
    return whole


def imresize_window(images: Tensor, size: Sequence[int], rows: Span, columns: Span) -> Tensor:
    """What `blocks.imresize(images, size)` has in these rows and columns; reads the pixels that this takes.

    images: N x 3 x H x W of any type, as float32 never held as a whole.
    """
    (top, bottom, down), (left, right, across) = (
        _cubic_rows(n, m, span, images.device)
        for n, m, span in zip(images.shape[2:], size, (rows, columns), strict=True)
    )
    return down @ images[..., top:bottom, left:right].float() @ across.T


def _cubic_rows(inputs: int, outputs: int, span: Span, device: torch.device) -> tuple[int, int, Tensor]:
    """(first, stop, matrix): rows `span` of the matrix of `blocks.imresize`, of its columns those from first to stop.

    The others are 0 there.
    """
    scale = outputs / inputs
    shrink = min(scale, 1.0)
    reach = 2 / shrink
    positions, weights = keys_taps(torch.arange(*span, device=device, dtype=torch.float64), inputs, scale, shrink)
    # All of these lie between the first and the last position: mirrored ones are nearer to the border than the others
    # reach inwards. From the numbers alone, so that the device is not waited for.
    first = max(0, math.floor((span[0] + 0.5) / scale - 0.5 - reach) - 1)
    stop = min(inputs, math.floor((span[1] - 0.5) / scale - 0.5 - reach) + positions.shape[1] + 1)
    matrix = torch.zeros(span[1] - span[0], stop - first, dtype=torch.float64, device=device)
    return first, stop, matrix.scatter_add(1, positions - first, weights).float()
