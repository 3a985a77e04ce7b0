"""Images that do not fit into memory: overlapping tiles of the scaled image, whose logits are blended into one map.

Tiles start on the network's grid, so that a tile's logits equal those of the whole image outside the receptive field of
its border. Where two tiles overlap, the quarter next to a tile's border is left to the other tile, and in the half
between the weights change linearly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from refinenet.model.blocks import keys_taps

Span = tuple[int, int]  # first and one past the last pixel of a row or column of the scaled image

GRID = 64  # pixels a cell of the coarsest map: 32, or 64 in a network that also takes the image at half its size
STRIDE = 4  # pixels a logit: the network's output is a quarter of its input, rounded up
_SHARE = 4  # an overlap is a tile's side divided by this


class Tile(NamedTuple):
    """A tile on one axis: its pixels, which logits are used, and their weights, which sum to 1 over all tiles."""

    span: Span
    kept: slice
    weights: Tensor


def cut(length: int, side: int, device: torch.device | None = None) -> list[Tile]:
    """Return tiles of at most `side` pixels over `length` pixels of an axis; neighbours overlap by 1/4 of it or more.

    A single tile where `length` is at most `side`.
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
    """Return the logits, N x classes x h x w, of an image of `size` pixels, computed side x side pixels at a time.

    Args:
        logits: the network.
        window: (rows, columns) -> that part of the scaled image, N x 3 x height x width.
        size: height and width of the scaled image.
        side: of a tile, in pixels.
        device: of the tiles' weights.
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
    """Return these rows and columns of `blocks.imresize(images, size)`, reading only the pixels that they depend on.

    Args:
        images: N x 3 x H x W of any type; never converted to float32 as a whole.
        size: height and width after resizing.
        rows: first and one past the last row.
        columns: the same of the columns.
    """
    (top, bottom, down), (left, right, across) = (
        _cubic_rows(n, m, span, images.device)
        for n, m, span in zip(images.shape[2:], size, (rows, columns), strict=True)
    )
    return down @ images[..., top:bottom, left:right].float() @ across.T


def _cubic_rows(inputs: int, outputs: int, span: Span, device: torch.device) -> tuple[int, int, Tensor]:
    """Return (first, stop, matrix): rows `span` of `blocks.imresize`'s matrix, columns first to stop; the rest is 0."""
    scale = outputs / inputs
    shrink = min(scale, 1.0)
    reach = 2 / shrink
    positions, weights = keys_taps(torch.arange(*span, device=device, dtype=torch.float64), inputs, scale, shrink)
    # All positions lie in this range: mirrored ones are nearer to the border than the others reach inwards. Computed on
    # the host, so that nothing waits for the device.
    first = max(0, math.floor((span[0] + 0.5) / scale - 0.5 - reach) - 1)
    stop = min(inputs, math.floor((span[1] - 0.5) / scale - 0.5 - reach) + positions.shape[1] + 1)
    matrix = torch.zeros(span[1] - span[0], stop - first, dtype=torch.float64, device=device)
    return first, stop, matrix.scatter_add(1, positions - first, weights).float()
