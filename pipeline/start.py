"""What a training starts from: weights/<backbone>.safetensors, and whether it fits the network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from refinenet.files import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from refinenet.network import RefineNet


def load_start(start: Path, network: RefineNet) -> dict[str, Tensor]:
    """The tensors in `start`; UserError where the file is broken or was trained for another network than this."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(start)
    except SafetensorError as error:
        raise UserError(f"{start}: not a safetensors file, or cut short ({error})") from None
    check_fit(start, network)
    return tensors


def check_fit(start: Path, network: RefineNet) -> None:
    """UserError where weights/<backbone>.safetensors was trained with a stride or colours that `network` does not have.

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
            told = ", ".join(f"{value:g}" for value in have)
            raise UserError(f"{start}: trained with {name} {trained[name]}, the network has [{told}] (network.{name})")
