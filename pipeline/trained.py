"""The model of an experiment as its settings test it: what `evaluate` scores is what `submit` sends."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import Evaluate
from refinenet.config import Protocol, Resizing
from refinenet.data.split import Array
from refinenet.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor


class Trained:
    """The model of the experiment `name`, on the device of its settings `choice`, for images of `classes`.

    Making one sets up the process: seeds, threads, deterministic kernels. UserError where there is no such model, or
    where it was trained on other classes. `void=False`: a void output never wins, every pixel gets a class. `model` is
    the network as it was loaded, on `device`.
    """

    def __init__(self, name: str, choice: Evaluate, classes: tuple[str, ...], void: bool = True) -> None:
        self.path = Path("models") / f"{name}.safetensors"
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file; `train {name}` makes it, or `dvc pull train`")

        import torch

        from refinenet.device import choose_device, reproducible
        from refinenet.inference.multiscale import prepared
        from refinenet.model.network import load

        self.device = choose_device(choice.device)
        reproducible(choice.seed, choice.threads)
        self.model, about = load(self.path, self.device)
        if tuple(about["classes"]) != classes:
            raise UserError(
                f"{self.path}: trained on {about['dataset']}, expected the {len(classes)} classes of {choice.data}"
            )
        if self.model.config.void_output and not void:
            bias = self.model.classifier.bias
            assert bias is not None
            bias.data[-1] = -torch.inf
        self._net = prepared(
            self.model,
            fast=choice.fast,
            channels_last=choice.channels_last,
            compiled=choice.compiled,
            precision=choice.precision,
        )
        self._resizing = Resizing(choice.input_scale, choice.short_edge)
        self._choice = choice

    def __call__(self, image: Array, protocols: Mapping[str, Protocol]) -> dict[str, Array]:
        """H x W x 3 uint8 -> for each protocol H x W uint8: class index, or their number where a void output wins."""
        (labels,) = self.many([image], protocols)
        return {name: label.cpu().numpy() for name, label in labels.items()}

    def many(self, images: Sequence[Array], protocols: Mapping[str, Protocol]) -> list[dict[str, Tensor]]:
        """The same for each of `images`, left on `device`; those of one size go through the network together."""
        from refinenet.inference.multiscale import predict_many

        how = self._choice
        return predict_many(self._net, images, protocols, self._resizing, how.average, how.precision, how.tile)
