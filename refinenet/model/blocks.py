"""The parts of a RefineNet block (paper, section 3.2, figure 3), wired as the authors' code wires them.

Shapes: every map is N x C x H x W. Convolutions are 3 x 3, stride 1, padding 1. There is no normalisation and no
non-linearity but the ReLUs named here: the long-range paths from the loss to the backbone stay linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refinenet.config import PoolOrder, Upsample


def conv3x3(inputs: int, outputs: int, bias: bool = False) -> nn.Conv2d:
    """Return a 3 x 3 convolution that keeps the size."""
    return nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias)


def conv_dtype(x: Tensor) -> torch.dtype:
    """Return the type of number in which a convolution of `x` computes: its own, or autocast's."""
    device = x.device.type
    half = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if half else x.dtype


def resize(maps: Tensor, size: Sequence[int], how: Upsample = "bilinear") -> Tensor:
    """Enlarge maps N x C x H x W to N x C x size.

    "bilinear" is the paper's (section 3.2), "bilinear-aligned" the same with align_corners. "bicubic" is the authors'
    my_resize.m as it runs on a GPU: both sides are scaled by the larger of the two ratios, and what exceeds `size` at
    the bottom or on the right is cropped.
    """
    # An exported graph is for any size, so it cannot depend on this test; resizing to the same size changes nothing.
    if not torch.compiler.is_exporting() and maps.shape[2:] == tuple(size):
        return maps
    if how == "bicubic":
        scale = torch.sym_max(size[0] / maps.shape[2], size[1] / maps.shape[3])
        return _apply(maps, [_cubic(n, m, scale, 1.0, maps) for n, m in zip(maps.shape[2:], size, strict=True)])
    aligned = how == "bilinear-aligned"
    # A CPU's own gradient is repeatable; an MPS device has no float64, of which the matrices are made.
    if maps.device.type in ("cpu", "mps"):
        return F.interpolate(maps, size=list(size), mode="bilinear", align_corners=aligned)
    if maps.requires_grad and torch.is_grad_enabled():
        return bilinear_product(maps, size, aligned)
    # With deterministic algorithms on, F.interpolate takes seven times the memory for the sake of a gradient.
    resized: Tensor = torch.ops.aten.upsample_bilinear2d(maps, list(size), aligned)
    return resized


def bilinear_product(maps: Tensor, size: Sequence[int], aligned: bool) -> Tensor:
    """Resize N x C x H x W to N x C x size like F.interpolate's "bilinear", as two matrix products.

    Their gradient is repeatable on a GPU; that of interpolation is not, and what PyTorch does instead when it is asked
    for deterministic algorithms holds seven times the result. aligned: its align_corners.
    """
    # A compiled graph has the matrices as constants or computes them; to it a size may be a symbol.
    matrix = bilinear_matrix.__wrapped__ if torch.compiler.is_compiling() else bilinear_matrix
    dtype = conv_dtype(maps)
    rows, columns = (matrix(n, m, aligned, maps.device, dtype) for n, m in zip(maps.shape[2:], size, strict=True))
    if maps.is_contiguous() or not maps.is_contiguous(memory_format=torch.channels_last):
        return rows @ maps @ columns.T
    # In the order in which the maps lie in memory, and the convolution after this one wants them.
    high = rows @ maps.permute(0, 2, 3, 1).flatten(2)
    wide: Tensor = columns @ high.view(*high.shape[:2], maps.shape[3], maps.shape[1])
    return wide.permute(0, 3, 1, 2)


@lru_cache(maxsize=256)  # a training on crops has ten; one on whole images has new ones at each step
def bilinear_matrix(inputs: int, outputs: int, aligned: bool, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return the matrix, outputs x inputs, of bilinear interpolation along one side. Each row sums to 1."""
    at = torch.arange(outputs, device=device, dtype=torch.float64)
    if aligned:
        at = at * ((inputs - 1) / (outputs - 1) if outputs > 1 else 0.0)
    else:
        at = ((at + 0.5) * (inputs / outputs) - 0.5).clamp_min(0)
    distance = (at[:, None] - torch.arange(inputs, device=device, dtype=torch.float64)).abs()
    weights = (1 - distance).clamp_min(0)
    # Half a pixel beyond the last centre it is the last pixel's value.
    return (weights / weights.sum(1, keepdim=True)).to(dtype)


def imresize(images: Tensor, size: Sequence[int]) -> Tensor:
    """Resize N x C x H x W to N x C x size like MATLAB's imresize: bicubic, anti-aliased; values are not clipped."""
    sides = zip(images.shape[2:], size, strict=True)
    return _apply(images, [_cubic(n, m, m / n, torch.sym_min(m / n, 1.0), images) for n, m in sides])


def _larger(a: Any, b: Any) -> Any:
    return torch.sym_max(a, b)  # max, for sizes that an exported graph leaves open as well


def _apply(maps: Tensor, weights: Sequence[Tensor]) -> Tensor:
    # As matrix products: their backward pass is deterministic on a GPU, that of interpolation is not.
    return weights[0] @ maps @ weights[1].T


def _cubic(inputs: int, outputs: int, scale: Any, shrink: Any, like: Tensor) -> Tensor:
    """Return the matrix, outputs x inputs, of Keys' kernel. Each row sums to 1."""
    rows = torch.arange(outputs, device=like.device, dtype=torch.float64)
    positions, weights = keys_taps(rows, inputs, scale, shrink)
    matrix = torch.zeros(outputs, inputs, dtype=torch.float64, device=like.device)
    return matrix.scatter_add(1, positions, weights).to(like.dtype)


def keys_taps(rows: Tensor, inputs: int, scale: Any, shrink: Any) -> tuple[Tensor, Tensor]:
    """Return the input positions (int64) and weights of the output pixels `rows`, both rows x taps.

    Keys' kernel (a = -0.5) at half-pixel centres, the border mirrored.

    Args:
        rows: output positions, float64.
        inputs: number of input pixels.
        scale: outputs / inputs.
        shrink: the kernel is widened by 1 / shrink against aliasing; 1 when enlarging.
    """
    reach = 2 / shrink
    centres = (rows + 0.5) / scale - 0.5
    taps = torch.arange(torch.sym_int(2 * reach) + 2, device=rows.device)
    positions = torch.floor(centres - reach).long()[:, None] + taps
    x = ((centres[:, None] - positions) * shrink).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x <= 1, near, torch.where(x < 2, far, 0.0))
    # The period as a tensor: as a number it could not be left open in an ONNX graph.
    mirrored = positions.remainder(torch.full_like(taps[0], 2 * inputs))
    return torch.minimum(mirrored, 2 * inputs - 1 - mirrored), weights / weights.sum(1, keepdim=True)


class ResidualConvUnit(nn.Module):
    """RCU: x + conv(relu(conv(relu(x)))), no batch norm, no ReLU after the sum (figure 3b).

    As in gen_network_refine_group.m the first convolution has a bias and the second has none.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(channels, channels, bias=True)
        self.conv2 = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.conv2(F.relu(self.conv1(F.relu(x)), inplace=True))
        return residual.add_(x)


class MultiResolutionFusion(nn.Module):
    """A convolution for each path, to the smallest channel count among them; resized to the largest map; summed.

    A single path passes through unchanged (paper, 3.2). Takes any number of maps of any resolution and depth.
    """

    def __init__(self, inputs: Sequence[int], upsample: Upsample = "bilinear") -> None:
        super().__init__()
        self.channels = min(inputs)
        self.upsample: Upsample = upsample
        self.largest: int | None = None  # export only: the path with the largest map for every image size
        self.convs = nn.ModuleList(conv3x3(c, self.channels) for c in inputs) if len(inputs) > 1 else nn.ModuleList()

    def forward(self, paths: Sequence[Tensor]) -> Tensor:
        if not self.convs:
            return paths[0]
        candidates = paths if self.largest is None else [paths[self.largest]]
        size: list[Any] = [reduce(_larger, [path.shape[side] for path in candidates]) for side in (2, 3)]
        maps = [resize(conv(p), size, self.upsample) for conv, p in zip(self.convs, paths, strict=True)]
        fused = maps[0]
        for other in maps[1:]:
            fused = fused + other
        return fused


class ChainedResidualPooling(nn.Module):
    """CRP: ReLU, then a *chain* of pooling blocks; the output of each is summed onto the main path (figure 3d).

    A pooling block is a 5 x 5 max-pool of stride 1 and a 3 x 3 convolution. "pool-conv" is the paper's order,
    "conv-pool" the one of the authors' later releases (do_gen_block_convbeforepool). Each block works on the output
    of the one before, not on the input: that is what makes the pooled region grow. Without any (`pools=0`) the map
    passes unchanged, as gen_network_pool_block.m has it, or through the ReLU alone (`relu_without_pools`).
    """

    def __init__(
        self, channels: int, pools: int = 2, order: PoolOrder = "pool-conv", relu_without_pools: bool = False
    ) -> None:
        super().__init__()
        self.order: PoolOrder = order
        self.passes = not (pools or relu_without_pools)
        self.convs = nn.ModuleList(conv3x3(channels, channels) for _ in range(pools))
        self.pool: nn.Module = nn.MaxPool2d(5, stride=1, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        if self.passes:
            return x
        # The identity term of the sum is the map after the ReLU.
        total = path = F.relu(x)
        for conv in self.convs:
            path = conv(self.pool(path)) if self.order == "pool-conv" else self.pool(conv(path))
            total = total + path
        return total


class RefineNetBlock(nn.Module):
    """2 RCUs on each map of the backbone -> fusion -> chained pooling -> 3 output RCUs (figure 3a).

    In the paper a block has one output RCU, the next block two on the path from it, and two more come before the
    classifier. The authors' code (refine_block_conv_num_mainflow = 3) and this one put all three at the output, which
    is the same function; the previous block's output then enters the fusion directly.

    Args:
        taps: channels of each map of the backbone, after its adapting convolution.
        previous: channels of the previous block's output, or None for the first block.
        pools: pooling blocks in the chain.
        order: of pooling and convolution in them.
        upsample: how the fusion resizes.
        output_units: RCUs after the pooling.
        relu_without_pools: whether the pooling's ReLU stays where `pools` is 0.
    """

    def __init__(
        self,
        taps: Sequence[int],
        previous: int | None = None,
        pools: int = 2,
        order: PoolOrder = "pool-conv",
        upsample: Upsample = "bilinear",
        output_units: int = 3,
        relu_without_pools: bool = False,
    ) -> None:
        super().__init__()
        self.adapt = nn.ModuleList(nn.Sequential(ResidualConvUnit(c), ResidualConvUnit(c)) for c in taps)
        self.fusion = MultiResolutionFusion([*taps, *([] if previous is None else [previous])], upsample)
        self.channels = self.fusion.channels
        self.pooling = ChainedResidualPooling(self.channels, pools, order, relu_without_pools)
        self.output = nn.Sequential(*(ResidualConvUnit(self.channels) for _ in range(output_units)))

    def forward(self, taps: Sequence[Tensor], previous: Tensor | None = None) -> Tensor:
        paths = [adapt(tap) for adapt, tap in zip(self.adapt, taps, strict=True)]
        if previous is not None:
            paths.append(previous)
        output: Tensor = self.output(self.pooling(self.fusion(paths)))
        return output
