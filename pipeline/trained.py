"""The model of an experiment as its settings test it: what `evaluate` scores is what `submit` sends."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pipeline.settings import Evaluate
from refinenet.config import Protocol, Resizing
from refinenet.data import Array
from refinenet.files import UserError


class Trained:
    """The model of the experiment `name`, on the device of its settings `choice`, for images of `classes`.

    Making one sets up the process: seeds, threads, deterministic kernels. UserError where there is no such model, or
    where it was trained on other classes. `void=False`: a void output never wins, every pixel gets a class.
    """

    def __init__(self, name: str, choice: Evaluate, classes: tuple[str, ...], void: bool = True) -> None:
        self.path = Path("models") / f"{name}.safetensors"
        if not self.path.is_file():
            raise UserError(f"{self.path}: no such file; `train {name}` makes it, or `dvc pull train`")

        import torch

        from refinenet.device import choose_device, reproducible
        from refinenet.network import load

        device = choose_device(choice.device)
        reproducible(choice.seed, choice.threads)
        self.model, about = load(self.path, device)
        if tuple(about["classes"]) != classes:
            raise UserError(
                f"{self.path}: trained on {about['dataset']}, expected the {len(classes)} classes of {choice.data}"
            )
        if self.model.config.void_output and not void:
            bias = self.model.classifier.bias
            assert bias is not None
            bias.data[-1] = -torch.inf
        self._resizing = Resizing(choice.input_scale, choice.short_edge)
        self._average = choice.average

    def __call__(self, image: Array, protocols: Mapping[str, Protocol]) -> dict[str, Array]:
        """H x W x 3 uint8 -> for each protocol H x W uint8: class index, or their number where a void output wins."""
        from refinenet.inference import predict

        return predict(self.model, image, protocols, self._resizing, self._average)
