"""RefineNet: a cascade of refinement blocks over a backbone (paper, sections 3.1 and 4.3)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refinenet.atomic import atomic_file
from refinenet.config import Config, Initial
from refinenet.errors import UserError
from refinenet.model.backbones import build_backbone
from refinenet.model.blocks import RefineNetBlock, conv3x3, imresize

# "Dropout on the taps with more channels than this": stages 3 and 4 of a ResNet (add_init_net_dropout).
_DROPOUT_ABOVE = 512
# Standard deviations for the maps of stages 1 to 4, see `RefineNet.match_variance`; benchmarks/learning.md has what
# else was tried.
MAP_STD = (0.25, 0.5, 1.0, 2.0)


class RefineNet(nn.Module):
    """RefineNet(classes=21, backbone="resnet101", cascade="four", pools=4); see `Config` for all settings.

    `model(images)`: N x 3 x H x W RGB, uint8 or float in 0..255, any size from 32 up -> logits N x classes x H/4 x W/4
    (rounded up); with `void_output` one more channel, the last, for void. The model normalises images itself, with mean
    and standard deviation of the backbone's training.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, classes: int, **settings: Any) -> None:
        super().__init__()
        self.config = config = Config(classes, **settings)
        self.cascade = config.paths
        backbones = [build_backbone(config) for _ in self.cascade.scales]
        channels = backbones[0].channels
        self.backbones = nn.ModuleList(backbones)
        self.adapt = nn.ModuleDict()
        self.blocks = nn.ModuleList()
        previous: int | None = None
        for taps in self.cascade.blocks:
            widths = [config.coarse_width if stage == 4 else config.width for _, stage in taps]
            for (scale, stage), width in zip(taps, widths, strict=True):
                self.adapt[f"{scale}-{stage}"] = conv3x3(channels[stage - 1], width)
            units = config.last_units if taps is self.cascade.blocks[-1] else 3
            how = (config.pools, config.order, config.upsample, units, config.relu_without_pools)
            block = RefineNetBlock(widths, previous, *how)
            self.blocks.append(block)
            previous = block.channels
        assert previous is not None
        self.classifier = conv3x3(previous, config.outputs, bias=True)
        mean, std = config.mean or backbones[0].mean, config.std or backbones[0].std
        self.register_buffer("mean", torch.tensor(mean, dtype=torch.float32).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std, dtype=torch.float32).view(3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        x = (images - self.mean) / self.std
        maps = []
        for scale, net in zip(self.cascade.scales, self.backbones, strict=True):
            # As my_get_batch_ds_info.m: imresize to the rounded size, half up.
            small = x if scale == 1 else imresize(x, [torch.sym_int(side * scale + 0.5) for side in x.shape[2:]])
            maps.append(net(small))
        previous: Tensor | None = None
        for taps, block in zip(self.cascade.blocks, self.blocks, strict=True):
            inputs = [self._adapted(maps[scale][stage - 1], f"{scale}-{stage}") for scale, stage in taps]
            previous = block(inputs, previous)
        assert previous is not None
        logits: Tensor = self.classifier(self._drop(previous))
        return logits

    def _adapted(self, tap: Tensor, name: str) -> Tensor:
        adapted: Tensor = self.adapt[name](self._drop(tap) if tap.shape[1] > _DROPOUT_ABOVE else tap)
        return adapted

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.config.dropout, self.training)

    def backbone_parameters(self) -> list[nn.Parameter]:
        """Return the parameters that start from ImageNet weights; `Recipe.backbone_lr` is for them."""
        return list(self.backbones.parameters())

    def initialise(self, how: Initial, generator: torch.Generator) -> None:
        """Draw the weights of every new layer; biases become 0, the backbone keeps its weights.

        "gaussian": N(0, 0.01^2), the authors'. It is meant for 256 channels: through a thin decoder the signal would
        vanish. "scaled": N(0, gain / fan-in), where gain 2 keeps the variance after a ReLU; branches that are summed
        onto a path start small, since nothing in a RefineNet normalises the sum. "variance_matched" (ours): the same,
        but a fusion starts as the identity, or as an orthogonal matrix where channel counts differ, and pooling adds
        less, so that no block of a cascade blurs the coarse maps that pass through it; call `match_variance` next.
        """
        gains = {"conv1": 2.0, "conv2": 0.02, "pooling": 0.1, "fusion": 0.5, "adapt": 2.0, "classifier": 0.02}
        if how == "variance_matched":
            gains |= {"pooling": 0.02, "fusion": 0.02}
        for name, module in self.named_modules():
            if not isinstance(module, nn.Conv2d) or name.startswith("backbones"):
                continue
            parts = name.split(".")
            part = next(part for part in (parts[-1], *reversed(parts)) if part in gains)
            std = 0.01 if how == "gaussian" else (gains[part] / module.weight[0].numel()) ** 0.5
            with torch.no_grad():
                module.weight.normal_(0, std, generator=generator)
                if how == "variance_matched" and part == "fusion":
                    out, into = module.weight.shape[:2]
                    mixed = torch.eye(out)
                    if out != into:
                        mixed = nn.init.orthogonal_(torch.empty(out, into), generator=generator)
                    module.weight[:, :, 1, 1] += mixed
                if module.bias is not None:
                    module.bias.zero_()

    @torch.no_grad()
    def match_variance(self, images: Tensor) -> None:
        """Scale the adapting convolutions so that on `images` their outputs have the standard deviations `MAP_STD`.

        images: as of the model's input. Ours. A RefineNet sums maps without normalising them, so at first the map with
        the largest values dominates. In some backbones that is the finest, which has the least semantic content.
        """
        outputs: dict[str, Tensor] = {}
        hooks = [
            module.register_forward_hook(lambda _, inputs, output, name=name: outputs.__setitem__(name, output))
            for name, module in self.adapt.items()
        ]
        before = self.training
        self.eval()
        self(images)
        self.train(before)
        for hook in hooks:
            hook.remove()
        for name, module in self.adapt.items():
            module.get_parameter("weight").mul_(MAP_STD[int(name[-1]) - 1] / outputs[name].std())

    def load_backbone(self, weights: Mapping[str, Tensor], source: str) -> None:
        """Load every backbone from tensors named as in its state dict; strict, as `load_tensors`."""
        for backbone in self.backbones:
            load_tensors(backbone, weights, source)


def load_tensors(module: nn.Module, weights: Mapping[str, Tensor], source: str) -> None:
    """Load `weights` into `module` by name. Raises UserError for a tensor that is missing, unexpected or mis-shaped.

    source: the file's name, for the error.
    """
    expected, given = _without_counters(module.state_dict()), _without_counters(weights)
    for name in sorted(expected.keys() | given.keys()):
        if name not in given:
            raise UserError(f"{source}: tensor {name} is missing")
        if name not in expected:
            raise UserError(f"{source}: tensor {name} is left over, the network has none of that name")
        if expected[name].shape != given[name].shape:
            raise UserError(
                f"{source}: tensor {name} is {list(given[name].shape)}, expected {list(expected[name].shape)}"
            )
    module.load_state_dict(given, strict=False)  # only batch norm's counters are missing, and nothing reads them


def _without_counters(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors without batch norm's counters of batches seen: frozen norms do not use them."""
    return {k: v for k, v in weights.items() if not k.endswith("num_batches_tracked")}


def save(model: RefineNet, path: Path, about: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> None:
    """Write weights, configuration and `about` as one safetensors file.

    Args:
        model: the network.
        path: the file; it appears when it is whole.
        about: metadata that JSON can hold: class names, palette, input scale ...
        dtype: of the stored weights.
    """
    from safetensors.torch import save_file

    tensors = {k: v.detach().to("cpu", dtype).contiguous() for k, v in _without_counters(model.state_dict()).items()}
    metadata = {"refinenet": json.dumps({"config": asdict(model.config), "about": dict(about)}, sort_keys=True)}
    with atomic_file(path) as part:
        save_file(tensors, part, metadata)


def with_defaults(config: Mapping[str, Any]) -> dict[str, Any]:
    """Complete a file's configuration by what it meant when the file was written: without pooling the ReLU stayed."""
    return {"relu_without_pools": config.get("pools") == 0, **config}


def load(path: Path | str, device: torch.device | str = "cpu") -> tuple[RefineNet, dict[str, Any]]:
    """Read what `save` wrote: the model in eval mode and float32, and `about`. Raises UserError for any other file."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = json.loads((file.metadata() or {})["refinenet"])
            tensors = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; `train` makes it, or `dvc pull train`") from None
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{path}: not a RefineNet written by this project, or cut short ({error})") from None
    model = RefineNet(**with_defaults(metadata["config"]))
    load_tensors(model, tensors, str(path))
    about: dict[str, Any] = metadata["about"]
    return model.to(device).eval(), about
