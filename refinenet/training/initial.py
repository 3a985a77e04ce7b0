"""What a training starts from: weights/<start>.safetensors, of a backbone or a whole network, and whether it fits."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from refinenet.config import Recipe
from refinenet.data.augment import make_batch
from refinenet.data.crops import Crops, Samples
from refinenet.errors import UserError
from refinenet.model.network import RefineNet

if TYPE_CHECKING:
    from torch import Tensor

    from refinenet.data.crops import Samples


def load_initial_weights(start: Path, network: RefineNet, images: Samples, recipe: Recipe, seed: int) -> None:
    """Give `network` the weights in `start`.

    Of a backbone: every new layer is drawn from `seed` (`training.initialise`). Of a pretraining: all of it goes on,
    the classes too. UserError where the file is broken or was trained for another network than this.
    """
    tensors, metadata = _read(start)
    if "refinenet" not in metadata:
        check_fit(start, network)
        pass

        network.load_backbone(tensors, str(start))
        initialise(network, images, recipe, seed)
        return
    from refinenet.model.network import load_tensors

    trained = json.loads(metadata["refinenet"])["config"]
    wanted = json.loads(json.dumps(asdict(network.config)))  # lists for tuples, as in the file
    for key, value in wanted.items():
        if key != "dropout" and trained.get(key) != value:
            raise UserError(f"{start}: a network with {key} {trained.get(key)}, expected {value}")
    load_tensors(network, {name: tensor.float() for name, tensor in tensors.items()}, str(start))


def _read(start: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(start), framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError:
        raise UserError(f"{start}: no such file; `python -m pipeline.weights {start.stem}` makes it") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{start}: not a safetensors file, or cut short ({error})") from None


def check_fit(start: Path, network: RefineNet) -> None:
    """UserError where weights/<start>.safetensors was trained with a stride or colours that `network` does not have.

    The mean may be 32 levels off: the authors take 128 from what was trained with about (123, 116, 103).
    """
    from safetensors import safe_open

    with safe_open(str(start), framework="pt") as file:
        trained = json.loads((file.metadata() or {}).get("trained", "{}"))
    if trained.get("stride", network.config.stride) not in (None, network.config.stride):
        raise UserError(
            f"{start}: trained with the stride in the {trained['stride']} convolutions, "
            f"the network has it in the {network.config.stride} ones (network.stride)"
        )
    for name, close in (("mean", lambda a, b: abs(a - b) <= 32), ("std", lambda a, b: 0.9 < a / b < 1.1)):
        have = getattr(network, name).flatten().tolist()
        if not all(map(close, trained.get(name, have), have)):
            own = ", ".join(f"{value:g}" for value in have)
            raise UserError(f"{start}: trained with {name} {trained[name]}, the network has [{own}] (network.{name})")


def initialise(model: RefineNet, images: Samples, recipe: Recipe, seed: int) -> None:
    """Draw the weights of the new layers as `recipe.init` says; "variance_matched" looks at first crops of `images`."""
    model.initialise(recipe.init, torch.Generator().manual_seed(seed))
    if recipe.init == "variance_matched":
        windows = crops_of(images, recipe, seed).draw(0, max(recipe.batch_size, 8))
        device = next(model.parameters()).device
        model.match_variance(make_batch(windows, recipe.crop, recipe.input_scale, device).images)


def crops_of(images: Samples, recipe: Recipe, seed: int) -> Crops:
    """The crops that a training with this recipe sees of `images`."""
    return Crops(
        images,
        recipe.crop,
        recipe.scales,
        recipe.flip,
        recipe.class_balanced,
        seed,
        recipe.short_edge,
        recipe.epoch_sampling,
        recipe.square_crops,
        recipe.class_sampling_power,
    )
