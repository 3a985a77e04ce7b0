"""A trained model for whole images, the same for `evaluate`, `submit`, `predict` and MLflow serving."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from refinenet.config import AS_IT_IS, Average, Precision, Protocol, Resizing
from refinenet.data import IGNORE_INDEX
from refinenet.data.split import RGB, Array
from refinenet.errors import UserError
from refinenet.inference.multiscale import optimise_for_inference, predict_many
from refinenet.model.network import load

SHORT_EDGE = (450, 800)  # pixels; the authors' demos (demo_predict_mscale_*.m), for a model file without its own
ASPECT = 4.0  # long edge / short edge; a photograph with a larger ratio is scaled down to save memory


class Predictor:
    """Labels whole images with the model in the file `path`.

    `model` is the network as loaded, on `device`; `about` the metadata of its file: class names, palette, data set,
    image size.

    Args:
        path: what `refinenet.model.network.save` wrote.
        device: where the network computes.
        resizing: of an image before the protocols' scales; None: as the model's file says.
        void: False: a void output never wins, every pixel gets a class.
        average, precision, tile: as in `predict_many`.
        fast, channels_last, compile: as in `optimise_for_inference`.

    Raises:
        UserError: no such file, or not a model of this project.
    """

    def __init__(
        self,
        path: Path,
        device: torch.device,
        *,
        resizing: Resizing | None = None,
        void: bool = True,
        average: Average = "probability",
        precision: Precision = "float32",
        tile: int | None = None,
        fast: bool = True,
        channels_last: bool = False,
        compile: bool = False,
    ) -> None:
        if not path.is_file():
            raise UserError(f"{path}: no such file; `train {path.stem}` makes it, or `dvc pull train`")
        self.path, self.device = path, device
        self.model, self.about = load(path, device)
        self.classes: tuple[str, ...] = tuple(self.about.get("classes", ()))
        self.palette: tuple[RGB, ...] = tuple((r, g, b) for r, g, b in self.about.get("palette", ()))
        count = self.model.config.classes
        if not len(self.classes) == len(self.palette) == count:
            raise UserError(
                f"{path}: {len(self.classes)} class names and {len(self.palette)} colours in its metadata, "
                f"expected {count} as the network has classes"
            )
        if self.model.config.void_output and not void:
            bias = self.model.classifier.bias
            assert bias is not None
            bias.data[-1] = -torch.inf
        self._net = optimise_for_inference(
            self.model, fast=fast, channels_last=channels_last, compile=compile, precision=precision
        )
        edge = self.about.get("short_edge") or SHORT_EDGE
        short_edge = None if edge == AS_IT_IS else (edge[0], edge[1])
        self.resizing = resizing or Resizing(self.about.get("input_scale", 1.0), short_edge)
        self._average, self._precision, self._tile = average, precision, tile

    def expect_classes(self, classes: Sequence[str], data: str) -> None:
        """Raise UserError unless the model was trained on `classes`, those of the data set `data`."""
        if self.classes != tuple(classes):
            trained_on = self.about.get("dataset", "other classes")
            raise UserError(f"{self.path}: trained on {trained_on}, expected the {len(classes)} classes of {data}")

    def __call__(self, image: Array, protocols: Mapping[str, Protocol]) -> dict[str, Array]:
        """Label H x W x 3 uint8: for each protocol H x W uint8, classes or, where void wins, their number."""
        (labels,) = self.many([image], protocols)
        return {name: label.cpu().numpy() for name, label in labels.items()}

    def many(
        self, images: Sequence[Array], protocols: Mapping[str, Protocol], resizing: Resizing | None = None
    ) -> list[dict[str, Tensor]]:
        """Label each of `images` (H x W x 3 uint8) as `predict_many`; the maps stay on `device`."""
        how = resizing or self.resizing
        return predict_many(self._net, images, protocols, how, self._average, self._precision, self._tile)

    def label_photo(self, image: Array, protocol: Protocol, where: str) -> Array:
        """Label a photograph of any shape: H x W x 3 uint8 -> H x W class indices, 255 where a void output wins.

        A panorama or strip is scaled down to the pixels and the long edge of a photograph of 4 : 1 (`ASPECT`). Raises
        UserError, which begins with `where`, for an image that does not fit into memory.
        """
        height, width = image.shape[:2]
        factor = self.resizing.factor(height, width)
        if self.resizing.short_edge is not None:
            edge = self.resizing.short_edge[1] * self.resizing.input_scale
            factor = min(
                factor, math.sqrt(ASPECT / (height * width)) * edge, max(1.0, ASPECT * edge / max(height, width))
            )
        try:
            (labels,) = self.many([image], {"label": protocol}, Resizing(factor))
        except (RuntimeError, MemoryError) as error:
            # On a CPU PyTorch raises a plain RuntimeError.
            if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
                raise
            raise UserError(
                f"{where}: {width} x {height} pixels do not fit into memory; try a smaller --short-edge"
            ) from None
        label = labels["label"].cpu().numpy()
        return np.where(label < len(self.classes), label, np.uint8(IGNORE_INDEX))
