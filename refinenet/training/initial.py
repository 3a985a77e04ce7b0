"""Initial weights of a training: weights/<start>.safetensors, of a backbone or a pretraining, checked to fit."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from refinenet.config import Recipe
from refinenet.data.augment import make_batch
from refinenet.data.crops import Crops
from refinenet.errors import UserError
from refinenet.model.network import RefineNet, load_tensors, with_defaults

if TYPE_CHECKING:
    from torch import Tensor

    from refinenet.data.crops import Samples


def load_initial_weights(start: Path, network: RefineNet, images: Samples, recipe: Recipe, seed: int) -> None:
    """Load the weights in `start` into `network`.

    From a backbone's weights: they fill every backbone, and the new layers are drawn (`initialise`). From a
    pretraining's: the whole network is loaded, with its classifier.

    Args:
        start: weights/<start>.safetensors.
        network: in place.
        images: the training images, for `init: variance_matched`.
        recipe: of the training.
        seed: of the new layers.

    Raises:
        UserError: the file is missing, broken, or of another network.
    """
    tensors, metadata = _read(start)
    if "refinenet" not in metadata:
        check_fit(start, network)
        network.load_backbone(tensors, str(start))
        initialise(network, images, recipe, seed)
        return
    trained = with_defaults(json.loads(metadata["refinenet"])["config"])
    expected = json.loads(json.dumps(asdict(network.config)))  # lists for tuples, as in the file
    for key, value in expected.items():
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
    """Raise UserError where the weights in `start` were trained with another stride, mean or std than `network` has.

    The mean may differ by 32 of 255: the authors use 128 with weights that were trained with about (123, 116, 103).
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
    """Draw the weights of the new layers by `recipe.init`.

    Args:
        model: in place.
        images: training images; "variance_matched" takes its statistics from the first crops.
        recipe: of the training.
        seed: of the weights and of these crops.
    """
    model.initialise(recipe.init, torch.Generator().manual_seed(seed))
    if recipe.init == "variance_matched":
        windows = crops_of(images, recipe, seed).draw(0, max(recipe.batch_size, 8))
        device = next(model.parameters()).device
        model.match_variance(make_batch(windows, recipe.crop, recipe.input_scale, device).images)


def crops_of(images: Samples, recipe: Recipe, seed: int) -> Crops:
    """Return the crops that a training with this recipe draws from `images`."""
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
