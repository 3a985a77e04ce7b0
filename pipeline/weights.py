"""Stage `weights`: what a backbone starts from -> weights/<backbone>.safetensors.

The paper profile fetches torchvision's ImageNet weights and checks their hash. The mini profile has no host to fetch
from: it writes a seeded, untrained start of the thin network.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline import settings
from pipeline.stage import main
from refinenet.files import UserError, whole_file

if TYPE_CHECKING:
    from torch import Tensor


def seeded(backbone: str, stem: int, seed: int) -> dict[str, Tensor]:
    """Tensors of an untrained ResNet under torchvision's names: the same bits on every machine.

    He's initialisation with uniform draws, so that nothing but integers, products and square roots goes into a value.
    The norms' moments are constants, so nothing else holds the signal in bounds: the last norm of a unit starts at
    0.5 / sqrt(units of its stage), which lets the variance grow by half in each stage.
    """
    import torch

    from refinenet.backbones import ResNet
    from refinenet.config import RESNETS

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


def fetched(source: settings.Source, backbone: str, store: Path) -> dict[str, Tensor]:
    """ImageNet weights of torchvision for this backbone, downloaded, hash-checked and without the classifier."""
    import torch

    from pipeline.archives import fetch

    file = store / source.url.rsplit("/", 1)[-1]
    fetch(source, file)
    try:
        # A downloaded file: tensors only, nothing in it is executed.
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise UserError(f"{file}: not a PyTorch state dict ({' '.join(str(error).split())[:200]})") from None
    return {k: v for k, v in state.items() if k not in ("fc.weight", "fc.bias")}


def run(name: str) -> None:
    """Write weights/<name>.safetensors."""
    choice = settings.load("weights", name)
    from safetensors.torch import save_file

    from refinenet.backbones import ResNet
    from refinenet.network import load_tensors

    if choice.source is None:
        tensors = seeded(choice.backbone, choice.stem, choice.seed)
    else:
        tensors = fetched(choice.source, choice.backbone, Path("data/archives/weights"))
    backbone = ResNet(choice.backbone, choice.stem)
    load_tensors(backbone, tensors, choice.source.url if choice.source else "seeded start")
    with whole_file(Path(f"weights/{name}.safetensors")) as part:
        save_file(backbone.state_dict(), part)


if __name__ == "__main__":
    main(run, __doc__, "BACKBONE")
