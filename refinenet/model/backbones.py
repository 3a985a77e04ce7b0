"""Backbones: image -> maps at 1/4, 1/8, 1/16 and 1/32 (paper, section 3.1). ResNets, and whatever timm has.

Batch-norm moments are constants in training too, scale and shift are trained (authors' fix_batch_norm_resnet in
My_net_util.m).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from difflib import get_close_matches
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refinenet.config import RESNETS, Config, Stride
from refinenet.errors import UserError
from refinenet.model.blocks import conv_dtype


class FrozenBatchNorm(nn.Module):
    """Weights of a batch norm whose moments are constants; `fold_norms` makes it part of the convolution before it."""

    running_mean: Tensor
    running_var: Tensor
    eps = 1e-5

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))


# A convolution and the norm after it. An identity stands where the norm is part of the weights already (fast.py).
Pair = tuple[nn.Conv2d, FrozenBatchNorm | nn.Identity]
Kernel = tuple[Tensor, Tensor] | None  # weight and bias to convolve with; None: the convolution's own


def fold_norms(pairs: Sequence[Pair]) -> list[Kernel]:
    """Return for each pair the kernel of norm(conv(x)) as one convolution; conv has no bias.

    With constant moments a norm only rescales the filters. Rescaling them in the graph (arXiv 2305.11624) keeps scale
    and shift trainable and saves the map between the two, nearly half of the memory of a ResNet's backward pass.

    All pairs are folded together. One by one a RefineNet-101 launches 1,352 small operators for it in a training step,
    more than for everything else; so it is about 190. Nothing is kept until the next call, so nothing can be stale.
    """
    kernels: list[Kernel] = [None] * len(pairs)
    groups: dict[int, list[int]] = {}  # numbers in a filter -> pairs: these filters are the rows of one matrix
    for at, (conv, norm) in enumerate(pairs):
        if not isinstance(norm, nn.Identity):
            groups.setdefault(conv.weight.numel() // conv.out_channels, []).append(at)
    order = [at for group in groups.values() for at in group]
    if not order:
        return kernels
    mean, var, factor, bias = (
        torch.cat([getattr(pairs[at][1], name) for at in order])
        for name in ("running_mean", "running_var", "weight", "bias")
    )
    scale = factor * torch.rsqrt(var + FrozenBatchNorm.eps)
    shift = bias - mean * scale
    dtype = conv_dtype(scale)  # autocast would convert weight by weight, in front of every convolution
    filters = [conv.out_channels for conv, _ in pairs]
    shifts = iter(shift.to(dtype).split_with_sizes([filters[at] for at in order]))
    factors = iter(scale.split_with_sizes([sum(filters[at] for at in group) for group in groups.values()]))
    for group in groups.values():
        weights = [pairs[at][0].weight for at in group]
        scaled = _scaled_rows(next(factors), [_rows(weight) for weight in weights]).to(dtype)
        parts = scaled.split_with_sizes([filters[at] for at in group])
        for at, weight, rows in zip(group, weights, parts, strict=True):
            kernels[at] = _like(rows, weight), next(shifts)
    return kernels


def _scaled_rows(factor: Tensor, rows: Sequence[Tensor]) -> Tensor:
    if torch.compiler.is_compiling():  # which decides itself what it keeps
        return torch.cat(list(rows)) * factor[:, None]
    scaled: Tensor = _ScaledRows.apply(factor, *rows)
    return scaled


class _ScaledRows(torch.autograd.Function):
    """torch.cat(rows) * factor[:, None], without a copy of all rows that is kept for the backward pass."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, *rows: Tensor) -> Tensor:
        ctx.save_for_backward(factor, *rows)
        return torch.cat(rows).mul_(factor[:, None])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        (gradient,), (factor, *rows) = gradients, ctx.saved_tensors
        of_factor = torch.cat(rows).mul_(gradient).sum(1)
        return of_factor, *(gradient * factor[:, None]).split_with_sizes([len(row) for row in rows])


def _rows(weight: Tensor) -> Tensor:
    """Return a view of a convolution's weight with a filter in each row, in the order in which it lies in memory."""
    return weight.flatten(1) if _channels_first(weight) else weight.permute(0, 2, 3, 1).flatten(1)


def _like(rows: Tensor, weight: Tensor) -> Tensor:
    """Return a view of `rows` that is what `_rows` would make them of."""
    filters, channels, height, width = weight.shape
    if _channels_first(weight):
        return rows.view(filters, channels, height, width)
    return rows.view(filters, height, width, channels).permute(0, 3, 1, 2)


def _channels_first(weight: Tensor) -> bool:
    """Return whether a filter's columns are next to each other. A 1 x 1 filter is contiguous in either order.

    Its gradient has the strides that are taken for it here, and several processes want those of the weight.
    """
    return weight.stride(3) == 1


def _convolve(conv: nn.Conv2d, kernel: Kernel, x: Tensor) -> Tensor:
    if kernel is None:
        own: Tensor = conv(x)
        return own
    return F.conv2d(x, *kernel, conv.stride, conv.padding)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 convolutions around an identity; `width` is that of the 3 x 3, the output has 4 times it."""

    def __init__(self, inputs: int, width: int, stride: int, where: Stride) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, stride if where == "1x1" else 1, bias=False)
        self.bn1: FrozenBatchNorm | nn.Identity = FrozenBatchNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride if where == "3x3" else 1, padding=1, bias=False)
        self.bn2: FrozenBatchNorm | nn.Identity = FrozenBatchNorm(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3: FrozenBatchNorm | nn.Identity = FrozenBatchNorm(outputs)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), FrozenBatchNorm(outputs))

    def pairs(self) -> list[Pair]:
        """Return the unit's convolutions, each with its norm: three, and that of the shortcut where it has one."""
        pairs = [(self.conv1, self.bn1), (self.conv2, self.bn2), (self.conv3, self.bn3)]
        return pairs if self.downsample is None else [*pairs, cast(Pair, tuple(self.downsample))]

    def forward(self, x: Tensor, kernels: Sequence[Kernel]) -> Tensor:
        """Return the unit's map; `kernels`: of its pairs, from `fold_norms`."""
        # In place, where nothing else holds the map.
        y = F.relu(_convolve(self.conv1, kernels[0], x), inplace=True)
        y = F.relu(_convolve(self.conv2, kernels[1], y), inplace=True)
        y = _convolve(self.conv3, kernels[2], y)
        if self.downsample is not None:
            x = _convolve(cast(nn.Conv2d, self.downsample[0]), kernels[3], x)
        return F.relu(y.add_(x), inplace=True)


class ResNet(nn.Module):
    """ResNet-50, -101 or -152 without its classifier, under torchvision's names: its state dicts load as they are.

    Args:
        name: "resnet50", "resnet101" or "resnet152".
        stem: channels of the first convolution; 64 is the published network, less makes every layer thinner and leaves
            depth and wiring as they are.
        stride: a unit that halves the map does so in its "3x3" convolution, as torchvision's ResNets, or in the first
            "1x1", as the Caffe models that the authors start from.

    `channels`: depth of the four maps. `mean`, `std`: RGB moments in 0..255 of torchvision's ImageNet weights.

    Not torchvision's own class, because that
    - has a first convolution of 64 channels and no argument for less: `width_per_group` thins only the middle of a
      unit, so there is no thin network to test with,
    - has its strides in the 3 x 3 convolutions, the Caffe ResNets that the authors start from in the first 1 x 1,
    - keeps each norm as a layer of its own, which either learns its moments or, as `FrozenBatchNorm2d`, not even scale
      and shift; norms folded into the convolutions (`fold_norms`) train those two and save the map between convolution
      and norm, nearly half of the memory of a backward pass.
    """

    mean = (123.675, 116.28, 103.53)
    std = (58.395, 57.12, 57.375)

    def __init__(self, name: str, stem: int = 64, stride: Stride = "3x3") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False)
        self.bn1: FrozenBatchNorm | nn.Identity = FrozenBatchNorm(stem)
        channels = stem
        for stage, blocks in enumerate(RESNETS[name]):
            width = stem * 2**stage
            layer = []
            for block in range(blocks):
                layer.append(Bottleneck(channels, width, 2 if stage and not block else 1, stride))
                channels = 4 * width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))
        self.channels = tuple(4 * stem * 2**stage for stage in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """N x 3 x H x W, normalised -> four maps, `self.channels` deep, after the last ReLU of each stage."""
        (stem,) = fold_norms([(self.conv1, self.bn1)])
        x = F.max_pool2d(F.relu(_convolve(self.conv1, stem, x), inplace=True), 3, stride=2, padding=1)
        maps = []
        for stage in range(1, 5):
            units = [cast(Bottleneck, unit) for unit in self.get_submodule(f"layer{stage}").children()]
            # Stage by stage: several processes sum the gradients of one while they compute those of the one before.
            kernels = iter(fold_norms([pair for unit in units for pair in unit.pairs()]))
            for unit in units:
                x = unit(x, [next(kernels) for _ in unit.pairs()])
            maps.append(x)
        return tuple(maps)


class TimmBackbone(nn.Module):
    """Any model of timm that gives maps at 1/4, 1/8, 1/16 and 1/32 ("any other deep network", paper, section 3.1).

    `net` is timm's features-only model; its names are the weights' names. Batch norms keep their moments in training.
    `channels`, `mean` and `std` as in `ResNet`, the last two as timm has them for these weights.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        try:
            import timm
        except ImportError:
            raise UserError(f"backbone timm:{name} needs the package timm: pip install refinenet-repro[timm]") from None
        if not timm.is_model(name):
            near = ", ".join(get_close_matches(name, timm.list_models())) or "nothing"
            raise UserError(f"backbone timm:{name}: timm {timm.__version__} has no such model; near it: {near}")
        # Windowed transformers refuse images of other sizes than their own unless asked not to.
        any_size: dict[str, Any] = {"strict_img_size": False} if name.startswith("swin") else {}
        try:
            net: Any = timm.create_model(name, pretrained=False, features_only=True, **any_size)
        except (RuntimeError, AttributeError, TypeError, AssertionError) as error:
            raise UserError(f"backbone timm:{name}: timm gives no feature maps of it ({error})") from None
        self.net = net
        reductions = net.feature_info.reduction()
        if any(reductions.count(reduction) != 1 for reduction in (4, 8, 16, 32)):
            found = ", ".join(f"1/{r}" for r in reductions)
            raise UserError(f"backbone timm:{name} has maps at {found}; expected 1/4, 1/8, 1/16 and 1/32 among them")
        self.taken = [reductions.index(reduction) for reduction in (4, 8, 16, 32)]
        self.channels = tuple(net.feature_info.channels()[i] for i in self.taken)
        self.channels_last = str(getattr(net, "output_fmt", "")).endswith("NHWC")
        moments: Any = timm.get_pretrained_cfg(name)
        self.mean = tuple(255 * value for value in moments.mean)
        self.std = tuple(255 * value for value in moments.std)

    def train(self, mode: bool = True) -> TimmBackbone:
        """Training mode for all but the batch norms, whose moments are constants."""
        super().train(mode)
        for module in self.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """N x 3 x H x W, normalised -> four maps, `self.channels` deep, H and W over 4, 8, 16, 32, rounded up."""
        height, width = x.shape[2:]
        # Networks round odd sizes in their own ways and some refuse them: they get a multiple of 32, the rest is cut.
        # Spelt out for exported graphs of any size: 32 times a whole number, and divisions of positive numbers only,
        # since ONNX rounds negative ones towards zero.
        across, down = 32 * ((width + 31) // 32), 32 * ((height + 31) // 32)
        # On a CPU the gradient of a strided depthwise convolution is 3 to 33 times slower in bfloat16 than in float32
        # (channels last, benchmarks/learning.md): the backbone stays in float32 there.
        precise = x.device.type == "cpu" and torch.is_autocast_enabled("cpu")
        with torch.autocast("cpu", enabled=False) if precise else nullcontext():
            maps: Any = self.net(F.pad(x.float() if precise else x, (0, across - width, 0, down - height)))
        four = []
        for index, reduction in zip(self.taken, (4, 8, 16, 32), strict=True):
            found = maps[index].permute(0, 3, 1, 2) if self.channels_last else maps[index]
            rows, columns = ((side + reduction - 1) // reduction for side in (height, width))
            four.append(found[:, :, :rows, :columns])
        return tuple(four)


def build_backbone(config: Config) -> ResNet | TimmBackbone:
    """The untrained backbone that `config` names."""
    if config.backbone.startswith("timm:"):
        return TimmBackbone(config.backbone.removeprefix("timm:"))
    return ResNet(config.backbone, config.stem, config.stride)
