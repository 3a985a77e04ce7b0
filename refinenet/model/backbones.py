"""Backbones: image -> maps at 1/4, 1/8, 1/16 and 1/32 (paper, section 3.1). ResNets, and whatever timm has.

Batch-norm moments are constants in training too, scale and shift are trained (authors' fix_batch_norm_resnet in
My_net_util.m).
"""

from __future__ import annotations

from contextlib import nullcontext
from difflib import get_close_matches
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refinenet.config import RESNETS, Config, Stride
from refinenet.errors import UserError


class FrozenBatchNorm(nn.Module):
    """Batch norm whose moments are constants: y = x * scale() + shift(), both per channel and differentiable."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def scale(self) -> Tensor:
        return self.weight * torch.rsqrt(self.running_var + self.eps)

    def forward(self, x: Tensor) -> Tensor:
        scale = self.scale()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


def conv_norm(conv: nn.Conv2d, norm: FrozenBatchNorm | nn.Identity, x: Tensor) -> Tensor:
    """norm(conv(x)) as one convolution. An identity stands where the norm is part of the weights already (fast.py).

    With constant moments a norm only rescales the filters. Rescaling them in the graph (arXiv 2305.11624) keeps scale
    and shift trainable and saves the map between the two, nearly half of the memory of a ResNet's backward pass.
    """
    if isinstance(norm, nn.Identity):
        folded: Tensor = conv(x)
        return folded
    scale = norm.scale()
    weight = conv.weight * scale[:, None, None, None]
    bias = norm.bias - norm.running_mean * scale
    return F.conv2d(x, weight, bias, conv.stride, conv.padding)


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

    def forward(self, x: Tensor) -> Tensor:
        # In place, where nothing else holds the map.
        y = F.relu(conv_norm(self.conv1, self.bn1, x), inplace=True)
        y = F.relu(conv_norm(self.conv2, self.bn2, y), inplace=True)
        y = conv_norm(self.conv3, self.bn3, y)
        if self.downsample is not None:
            conv, norm = self.downsample
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, (FrozenBatchNorm, nn.Identity))
            x = conv_norm(conv, norm, x)
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
      and shift; norms folded into the convolutions (`conv_norm`) train those two and save the map between convolution
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
        x = F.max_pool2d(F.relu(conv_norm(self.conv1, self.bn1, x), inplace=True), 3, stride=2, padding=1)
        maps = []
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
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
