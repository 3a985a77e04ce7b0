"""Fast inference: folded norms, channels last, and on CPUs Winograd's convolution; the same function to rounding.

Most of a RefineNet's arithmetic is 3 x 3 convolutions of stride 1. Winograd's algorithm (Lavin and Gray, CVPR 2016)
computes 6 x 6 results from a tile of 8 x 8 pixels with 64 multiplications instead of 324, as 64 matrix products over
all tiles and channels. It costs a rounding error of 1e-5 of the largest value and seven times the memory for these
weights.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from refinenet.model.backbones import Bottleneck, FrozenBatchNorm, ResNet, TimmBackbone
from refinenet.model.blocks import ResidualConvUnit
from refinenet.model.network import RefineNet

# Points at which the polynomials of a tile are evaluated, besides infinity. These have the smallest rounding errors.
_POINTS: Mapping[int, tuple[str, ...]] = {
    4: ("0", "1", "-1", "1/2", "-2"),
    6: ("0", "1", "-1", "2", "-2", "1/2", "-1/2"),
}
# Wider filters are those of coarse maps with few tiles: larger tiles would only mean more weights to read.
_WIDE = 256

# Floats of transformed tiles at a time: 32 MB. With fewer the weights would be read more often.
_AT_A_TIME = 2**23
# Below this many channels the transforms cost more than the products save.
_CHANNELS = 64


def transforms(size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return B (n x n), G (n x 3), A (size x n), n = size + 2: A((G g) * (B d)) correlates d with g (Toom-Cook).

    Computed in fractions, rounded once to float64.
    """
    points = [Fraction(point) for point in _POINTS[size]]
    n = len(points) + 1
    others = [[q for q in points if q != p] for p in points]
    scale = [math.prod((p - q for q in rest), start=Fraction(1)) for p, rest in zip(points, others, strict=True)]
    b = [_polynomial(rest, n) for rest in [*others, points]]
    g = [[p**power / factor for power in range(3)] for p, factor in zip(points, scale, strict=True)] + [[0, 0, 1]]
    a = [[*(p**power for p in points), int(power == size - 1)] for power in range(size)]
    made = [torch.tensor([[float(value) for value in row] for row in rows], dtype=torch.float64) for rows in (b, g, a)]
    return made[0], made[1], made[2]


def _polynomial(roots: Sequence[Fraction], length: int) -> list[Fraction]:
    """Return the coefficients of prod(x - root), lowest power first, with zeros up to `length`."""
    coefficients = [Fraction(1)]
    for root in roots:
        coefficients = [
            u - root * v for u, v in zip([Fraction(0), *coefficients], [*coefficients, Fraction(0)], strict=True)
        ]
    return coefficients + [Fraction(0)] * (length - len(coefficients))


class Winograd(nn.Module):
    """A 3 x 3 convolution of stride 1 and padding 1 as F(m x m, 3 x 3): N x C x H x W -> N x K x H x W.

    `size` is m, 4 or 6. The transformed weight is (m + 2)^2 x C x K.
    """

    def __init__(self, conv: nn.Conv2d, size: int = 6) -> None:
        super().__init__()
        self.size = size
        outputs, inputs = conv.weight.shape[:2]
        weight = conv.weight.detach().permute(2, 3, 1, 0).reshape(9, inputs * outputs)
        tile, filters, result = transforms(size)
        both = torch.kron(filters, filters).to(weight.dtype)
        self.register_buffer("weight", (both @ weight).view(-1, inputs, outputs))
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach())
        self.register_buffer("tile", tile.to(weight.dtype), persistent=False)
        self.register_buffer("result", result.to(weight.dtype), persistent=False)

    @staticmethod
    def fits(conv: nn.Conv2d) -> bool:
        """Return whether this convolution can be computed this way and becomes faster."""
        form = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        return form == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and min(conv.in_channels, conv.out_channels) >= _CHANNELS

    def forward(self, x: Tensor, relu: bool = False, plus: Tensor | None = None) -> Tensor:
        """Return the convolution of x, or of relu(x); `plus`, N x K x H x W, is added to it."""
        batch, channels, height, width = x.shape
        weight, tile, result = (cast(Tensor, t) for t in (self.weight, self.tile, self.result))
        outputs, size, n = weight.shape[2], self.size, self.size + 2
        down, across = -(-height // size), -(-width // size)  # tiles; each makes size x size results of n x n pixels
        padded = _padded(x, size * down + 2, size * across + 2, relu)
        y = x.new_empty(batch, size * down, size * across, outputs)
        step = max(1, _AT_A_TIME // (n * n * across * channels))
        for image in range(batch):
            for first in range(0, down, step):
                rows = min(step, down - first)
                strip = padded[image, size * first : size * (first + rows) + 2]
                tiles = strip.unfold(0, n, size).unfold(1, n, size)  # rows x across x C x n x n
                v = tile @ tiles.permute(3, 4, 0, 1, 2).reshape(n, -1)
                v = torch.matmul(tile, v.view(n, n, -1)).view(n * n, rows * across, channels)
                m = result @ torch.bmm(v, weight).view(n, -1)
                m = torch.matmul(result, m.view(size, n, -1)).view(size, size, rows, across, outputs)
                cells = m.permute(2, 0, 3, 1, 4)
                into = y[image, size * first : size * (first + rows)].view(rows, size, across, size, outputs)
                if self.bias is not None:
                    torch.add(cells, cast(Tensor, self.bias), out=into)
                else:
                    into.copy_(cells)
        convolved = y[:, :height, :width].permute(0, 3, 1, 2)
        return convolved if plus is None else convolved.add_(plus)


def _padded(x: Tensor, height: int, width: int, relu: bool) -> Tensor:
    """Return x or relu(x) after one row and column of zeros, zeros up to the size: N x height x width x C."""
    padded = x.new_empty(x.shape[0], height, width, x.shape[1])
    bottom, right = x.shape[2] + 1, x.shape[3] + 1
    for border in (padded[:, 0], padded[:, bottom:], padded[:, :, 0], padded[:, :, right:]):
        border.zero_()
    inside, pixels = padded[:, 1:bottom, 1:right], x.permute(0, 2, 3, 1)
    if relu:
        torch.clamp_min(pixels, 0, out=inside)
    else:
        inside.copy_(pixels)
    return padded


class _Unit(nn.Module):
    """A residual convolution unit of two Winograd convolutions, with ReLUs and sum fused into them."""

    def __init__(self, conv1: Winograd, conv2: Winograd) -> None:
        super().__init__()
        self.conv1, self.conv2 = conv1, conv2

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv2(self.conv1(x, relu=True), relu=True, plus=x)
        return y


class FastRefineNet(nn.Module):
    """A RefineNet for inference: `fast(images)` are the logits of `model(images)`, to 1e-4 of the largest.

    It follows its model: when a weight of the model has changed, folded and transformed weights are recomputed before
    the next image. It cannot see changes that PyTorch does not count (`weight.data`, inference tensors); call
    `refresh()` after them.

    The model is not changed, and unchanged tensors are shared with it. Without `winograd`, which is for float32 on a
    CPU only, these are all but the backbone's convolutions.
    """

    def __init__(self, model: RefineNet, winograd: bool = True) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple: not a submodule
        self._winograd = winograd
        self.refresh()

    def refresh(self) -> None:
        """Fold and transform the model's weights as they are now."""
        self._net = _fast_copy(self._model[0], self._winograd)
        self._stamp = self._now()

    def _now(self) -> list[int]:
        tensors = (*self._model[0].parameters(), *self._model[0].buffers())
        return [-1 if tensor.is_inference() else tensor._version for tensor in tensors]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        if self._stamp != self._now():
            self.refresh()
        logits: Tensor = self._net(images.contiguous(memory_format=torch.channels_last))
        return logits


def _winograd(conv: nn.Conv2d) -> Winograd:
    return Winograd(conv, 6 if max(conv.in_channels, conv.out_channels) <= _WIDE else 4)


def _fast_copy(model: RefineNet, winograd: bool) -> RefineNet:
    """Return a copy of the model in eval mode with fast modules; unchanged tensors are shared."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    net = copy.deepcopy(model, shared).eval()
    with torch.no_grad():
        for backbone in net.backbones:
            fold(backbone)
        weight = net.classifier.weight
        if not winograd or weight.device.type != "cpu" or weight.dtype != torch.float32:
            return net
        for parent in list(net.modules()):
            for name, module in list(parent.named_children()):
                if isinstance(module, nn.Conv2d) and Winograd.fits(module):
                    setattr(parent, name, _winograd(module))
                elif isinstance(module, ResidualConvUnit) and Winograd.fits(module.conv1):
                    setattr(parent, name, _Unit(_winograd(module.conv1), _winograd(module.conv2)))
    return net


def fold(backbone: nn.Module) -> None:
    """Fold every norm of the backbone into the convolution before it, in place."""
    if isinstance(backbone, ResNet):
        _merge(backbone, "conv1", "bn1")
        for unit in backbone.modules():
            if isinstance(unit, Bottleneck):
                for index in (1, 2, 3):
                    _merge(unit, f"conv{index}", f"bn{index}")
                if unit.downsample is not None:
                    _merge(unit.downsample, "0", "1")
    elif isinstance(backbone, TimmBackbone):
        try:
            graph = _Tracer().trace(backbone.net)
        except Exception:  # what cannot be traced stays unfolded: slower, not wrong
            return
        _merge_pairs(backbone.net, graph)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (nn.Conv2d, _BatchNorm)) or super().is_leaf_module(m, module_qualified_name)


def _merge_pairs(net: nn.Module, graph: fx.Graph) -> None:
    """Merge every batch norm of `net` whose only input is a convolution that feeds nothing else."""
    modules = dict(net.named_modules())
    called = [str(node.target) for node in graph.nodes if node.op == "call_module"]
    for node in graph.nodes:
        before = node.args[0] if node.op == "call_module" and node.args else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        conv, norm = str(before.target), str(node.target)
        alone = called.count(conv) == called.count(norm) == 1
        if alone and isinstance(modules[conv], nn.Conv2d) and isinstance(modules[norm], _BatchNorm):
            _merge(net, conv, norm)


def _merge(parent: nn.Module, conv_name: str, norm_name: str) -> None:
    conv, norm = parent.get_submodule(conv_name), parent.get_submodule(norm_name)
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, (FrozenBatchNorm, _BatchNorm))
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    weight, bias = fuse_conv_bn_weights(conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias)
    conv.weight = nn.Parameter(weight.contiguous(memory_format=torch.channels_last), requires_grad=False)
    conv.bias = nn.Parameter(bias, requires_grad=False)
    # timm's norms carry the activation that follows them.
    activation = [getattr(norm, name) for name in ("drop", "act") if hasattr(norm, name)]
    parent.set_submodule(norm_name, nn.Sequential(*activation) if activation else nn.Identity())
