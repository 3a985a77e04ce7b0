"""Stage `weights`: what a backbone starts from -> weights/<backbone>.safetensors.

The paper profile names ImageNet weights of torchvision, which knows their address and hash. The mini profile has no
host to fetch from: it writes a seeded, untrained start of the thin network. Any file that convert/recognise.py
recognises will do.

    refinenet weights import FILE [--to FILE] [--dataset NAME]

is a command for people: it converts a file of weights that others made, also a whole RefineNet, for use without a
graph; the graph takes them by itself (`models` of a profile, see profiles/released.yaml).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.config import resolve
from pipeline.runtime.cli import add_to, command_parser, main, run_cli, user_path
from refinenet.atomic import atomic_file
from refinenet.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


def seeded(backbone: str, stem: int, seed: int) -> dict[str, Tensor]:
    """Tensors of an untrained ResNet under torchvision's names: the same bits on every machine.

    He's initialisation with uniform draws, so that nothing but integers, products and square roots goes into a value.
    The norms' moments are constants, so nothing else holds the signal in bounds: the last norm of a unit starts at
    0.5 / sqrt(units of its stage), which lets the variance grow by half in each stage.
    """
    import torch

    from refinenet.config import RESNETS
    from refinenet.model.backbones import ResNet

    rng = np.random.Generator(np.random.PCG64([seed, stem, RESNETS[backbone][2]]))
    tensors = {}
    for name, tensor in ResNet(backbone, stem).state_dict().items():
        if tensor.ndim == 4:
            bound = np.sqrt(6 / tensor[0].numel())
            tensors[name] = torch.from_numpy(((2 * rng.random(tensor.shape) - 1) * bound).astype(np.float32))
        elif name.endswith("bn3.weight"):
            units = RESNETS[backbone][int(name[len("layer")]) - 1]
            tensors[name] = torch.full_like(tensor, 0.5 / np.sqrt(units))
        elif name.endswith("downsample.1.weight"):
            # Its input comes from a ReLU, its output goes into a sum: half the variance keeps the level.
            tensors[name] = torch.full_like(tensor, np.sqrt(0.5))
        else:
            tensors[name] = tensor
    return tensors


def run(name: str) -> None:
    """Write weights/<name>.safetensors."""
    cfg = resolve.load("weights", name)
    target = Path(f"weights/{name}.safetensors")
    from refinenet.config import Config

    config = Config(1, cfg.backbone, stem=cfg.stem)
    if cfg.source is not None:
        from pipeline.convert import imagenet

        found = imagenet.backbone(cfg.source, config, Path("data/archives/weights"))
        found.save(target)
        print(f"{target}: {found.what}")
        return
    if cfg.backbone.startswith("timm:"):
        raise UserError(f"weights.{name}: a seeded start is a ResNet's, expected {{package: ...}}")
    from safetensors.torch import save_file

    from refinenet.model.backbones import build_backbone
    from refinenet.model.network import load_tensors

    backbone = build_backbone(config)
    load_tensors(backbone, seeded(cfg.backbone, cfg.stem, cfg.seed), "seeded start")
    with atomic_file(target) as part:
        save_file(backbone.state_dict(), part)
    print(f"{target}: drawn from seed {cfg.seed}")


def import_finished_weights(arguments: Sequence[str]) -> None:
    """The command `import`: recognise a file of weights, convert it, say in one line what it was and where it went."""
    parser = command_parser(
        "weights import", "Convert a ResNet of torchvision or MatConvNet, or a RefineNet of the authors or of DrSleep."
    )
    parser.add_argument("file", metavar="FILE", type=user_path, help="recognised by what is in it")
    add_to(parser, "FILE", "default: weights/ or models/, by what it is")
    parser.add_argument("--dataset", metavar="NAME", help="whose classes a RefineNet has to have")
    given = parser.parse_args(arguments)
    from pipeline.convert import recognise

    found = recognise.read(given.file, given.dataset)
    target: Path = given.to or found.place
    if given.to is None and target.exists():
        raise UserError(f"{target}: exists already; --to FILE names another place, or this one")
    found.save(target)
    print(f"{given.file}: {found.what} -> {target}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["import"]:
        sys.exit(run_cli(lambda: import_finished_weights(sys.argv[2:])))
    main(run, __doc__, "BACKBONE")
