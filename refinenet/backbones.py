"""ResNets as feature extractors: image -> maps at 1/4, 1/8, 1/16 and 1/32 (paper, section 3.1).

Module and parameter names are torchvision's, so that its state dicts load as they are. The stride of a down-sampling
block sits in its 3 x 3 convolution, as in torchvision. Batch-norm moments are constants in training too, scale and
shift are trained (authors' My_net_util.fix_batch_norm_resnet).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refinenet.config import RESNETS


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


def conv_norm(conv: nn.Conv2d, norm: FrozenBatchNorm, x: Tensor) -> Tensor:
    """norm(conv(x)) as one convolution.

    With constant moments a norm only rescales the filters. Rescaling them in the graph (arXiv 2305.11624) keeps scale
    and shift trainable and saves the map between the two, nearly half of the memory of a ResNet's backward pass.
    """
    scale = norm.scale()
    weight = conv.weight * scale[:, None, None, None]
    bias = norm.bias - norm.running_mean * scale
    return F.conv2d(x, weight, bias, conv.stride, conv.padding)


class Bottleneck(nn.Module):
    """1 x 1, 3 x 3, 1 x 1 convolutions around an identity; `width` is that of the 3 x 3, the output has 4 times it."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = FrozenBatchNorm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = FrozenBatchNorm(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = FrozenBatchNorm(outputs)
        self.downsample: nn.Sequential | None = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), FrozenBatchNorm(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(conv_norm(self.conv1, self.bn1, x))
        y = F.relu(conv_norm(self.conv2, self.bn2, y))
        y = conv_norm(self.conv3, self.bn3, y)
        if self.downsample is not None:
            conv, norm = self.downsample
            assert isinstance(conv, nn.Conv2d)
            assert isinstance(norm, FrozenBatchNorm)
            x = conv_norm(conv, norm, x)
        return F.relu(x + y)


class ResNet(nn.Module):
    """ResNet-50, -101 or -152 without its classifier.

    Args:
        name: "resnet50", "resnet101" or "resnet152".
        stem: channels of the first convolution; 64 is the published network, less makes every layer thinner and leaves
            depth and wiring as they are.
    """

    def __init__(self, name: str, stem: int = 64) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, 7, stride=2, padding=3, bias=False)
        self.bn1 = FrozenBatchNorm(stem)
        channels = stem
        for stage, blocks in enumerate(RESNETS[name]):
            width = stem * 2**stage
            layer = []
            for block in range(blocks):
                layer.append(Bottleneck(channels, width, stride=2 if stage and not block else 1))
                channels = 4 * width
            setattr(self, f"layer{stage + 1}", nn.Sequential(*layer))
        self.channels = tuple(4 * stem * 2**stage for stage in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """N x 3 x H x W, normalised -> four maps, `self.channels` deep, after the last ReLU of each stage."""
        x = F.max_pool2d(F.relu(conv_norm(self.conv1, self.bn1, x)), 3, stride=2, padding=1)
        maps = []
        for stage in range(1, 5):
            x = self.get_submodule(f"layer{stage}")(x)
            maps.append(x)
        return tuple(maps)
