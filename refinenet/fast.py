"""Fast inference: the same function in fewer operations. Norms folded, channels last, Winograd's convolution on CPUs.

Most of a RefineNet's arithmetic is 3 x 3 convolutions of stride 1. Winograd's algorithm F(4 x 4, 3 x 3) (Lavin and
Gray, CVPR 2016) does each with a quarter of the multiplications, as 36 matrix products. Its price is a rounding error
some four times as large, 1e-5 of the largest value, and four times the memory for these weights.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_weights

from refinenet.backbones import Bottleneck, FrozenBatchNorm, ResNet, TimmBackbone
from refinenet.blocks import ChainedResidualPooling
from refinenet.network import RefineNet

# The transforms of image tile, filter and result for the points 0, 1, -1, 2, -2 and infinity.
_TILE = (
    (4, 0, -5, 0, 1, 0),
    (0, -4, -4, 1, 1, 0),
    (0, 4, -4, -1, 1, 0),
    (0, -2, -1, 2, 1, 0),
    (0, 2, -1, -2, 1, 0),
    (0, 4, 0, -5, 0, 1),
)
_FILTER = (
    (1 / 4, 0, 0),
    (-1 / 6, -1 / 6, -1 / 6),
    (-1 / 6, 1 / 6, -1 / 6),
    (1 / 24, 1 / 12, 1 / 6),
    (1 / 24, -1 / 12, 1 / 6),
    (0, 0, 1),
)
_RESULT = (
    (1, 1, 1, 1, 1, 0),
    (0, 1, -1, 2, -2, 0),
    (0, 1, 1, 4, 4, 0),
    (0, 1, -1, 8, -8, 1),
)

# Floats of transformed tiles worked on at a time: 8 MB stay in a CPU's last cache.
_AT_A_TIME = 2**21
# Below this many channels the transforms cost more than the products save.
_CHANNELS = 64


class Winograd(nn.Module):
    """A 3 x 3 convolution of stride 1 and padding 1 as F(4 x 4, 3 x 3): N x C x H x W -> N x K x H x W, float32."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        outputs, inputs = conv.weight.shape[:2]
        weight = conv.weight.detach().permute(2, 3, 1, 0).reshape(9, inputs * outputs)
        transform = torch.tensor(_FILTER, dtype=weight.dtype)
        both = torch.kron(transform, transform)  # 36 x 9
        self.register_buffer("weight", (both @ weight).view(36, inputs, outputs))
        self.register_buffer("bias", None if conv.bias is None else conv.bias.detach())
        self.register_buffer("tile", torch.tensor(_TILE, dtype=weight.dtype), persistent=False)
        self.register_buffer("result", torch.tensor(_RESULT, dtype=weight.dtype), persistent=False)

    @staticmethod
    def fits(conv: nn.Conv2d) -> bool:
        """Whether this convolution can be done so, and gains by it."""
        form = (conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups)
        return form == ((3, 3), (1, 1), (1, 1), (1, 1), 1) and min(conv.in_channels, conv.out_channels) >= _CHANNELS

    def forward(self, x: Tensor) -> Tensor:
        batch, channels, height, width = x.shape
        weight, tile, result = (cast(Tensor, t) for t in (self.weight, self.tile, self.result))
        outputs = weight.shape[2]
        down, across = -(-height // 4), -(-width // 4)  # tiles of 4 x 4 results; each sees 6 x 6 pixels
        padded = F.pad(x, (1, 4 * across + 1 - width, 1, 4 * down + 1 - height)).permute(0, 2, 3, 1).contiguous()
        y = x.new_empty(batch, 4 * down, 4 * across, outputs)
        step = max(1, _AT_A_TIME // (36 * across * channels))
        for image, into in zip(padded, y, strict=True):
            for first in range(0, down, step):
                rows = min(step, down - first)
                strip = image[4 * first : 4 * (first + rows) + 2]
                tiles = strip.unfold(0, 6, 4).unfold(1, 6, 4)  # rows x across x C x 6 x 6
                v = tile @ tiles.permute(3, 4, 0, 1, 2).reshape(6, -1)
                v = torch.matmul(tile, v.view(6, 6, -1)).view(36, rows * across, channels)
                m = result @ torch.bmm(v, weight).view(6, -1)
                m = torch.matmul(result, m.view(4, 6, -1)).view(4, 4, rows, across, outputs)
                cells = into[4 * first : 4 * (first + rows)].view(rows, 4, across, 4, outputs)
                if self.bias is None:
                    cells.copy_(m.permute(2, 0, 3, 1, 4))
                else:
                    torch.add(m.permute(2, 0, 3, 1, 4), cast(Tensor, self.bias), out=cells)
        return y[:, :height, :width].permute(0, 3, 1, 2)


class FastRefineNet(nn.Module):
    """A RefineNet for inference: `fast(images)` are the logits of `model(images)`, to 1e-4 of the largest.

    It follows its model: when a weight of that has changed, what was made of it is made again before the next image. A
    change that PyTorch does not count (`weight.data`, inference tensors) it cannot see; `refresh()` then.

    The model is left as it is; what needs no change is shared with it. Without `winograd`, which is for float32 on a
    CPU only, it takes no more memory than the model.
    """

    def __init__(self, model: RefineNet, winograd: bool = True) -> None:
        super().__init__()
        self._model = (model,)  # in a tuple: it is no part of this module
        self._winograd = winograd
        self.refresh()

    def refresh(self) -> None:
        """Fold and transform the model's weights as they are now."""
        self._net = _prepared(self._model[0], self._winograd)
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


def _prepared(model: RefineNet, winograd: bool) -> RefineNet:
    """The model in eval mode with other modules, all tensors that need not change shared."""
    shared: dict[int, Any] = {id(t): t for t in (*model.parameters(), *model.buffers())}
    net = copy.deepcopy(model, shared).eval()
    with torch.no_grad():
        for backbone in net.backbones:
            _fold(backbone)
        weight = net.classifier.weight
        on_cpu = weight.device.type == "cpu"
        winograd = winograd and on_cpu and weight.dtype == torch.float32
        for parent in list(net.modules()):
            for name, module in list(parent.named_children()):
                if winograd and isinstance(module, nn.Conv2d) and Winograd.fits(module):
                    setattr(parent, name, Winograd(module))
            if on_cpu and isinstance(parent, ChainedResidualPooling):
                # The largest of 5 x 5 is the largest of five largest of five.
                parent.pool = nn.Sequential(nn.MaxPool2d((5, 1), 1, (2, 0)), nn.MaxPool2d((1, 5), 1, (0, 2)))
    return net


def _fold(backbone: nn.Module) -> None:
    """Multiply every norm of the backbone into the convolution before it."""
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
        except Exception:  # what cannot be traced stays as it is: slower, not wrong
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
