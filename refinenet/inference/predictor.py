"""A trained model for whole images, the same for Python, `evaluate`, `submit`, `predict` and serving."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from refinenet.config import AS_IT_IS, Average, Precision, Protocol, Resizing
from refinenet.data import IGNORE_INDEX
from refinenet.data.split import RGB, Array
from refinenet.device import choose_precision
from refinenet.errors import UserError, nearest
from refinenet.inference.crf_processes import CRFProcesses
from refinenet.inference.multiscale import optimise_for_inference, predict_many, predict_stream
from refinenet.inference.onnx_file import OnnxNetwork
from refinenet.model.network import RefineNet, load

if TYPE_CHECKING:
    from PIL import Image

SHORT_EDGE = (450, 800)  # pixels; the authors' demos (demo_predict_mscale_*.m), for a model file without its own
ONE_SCALE = Protocol((1.0,))
ASPECT = 4.0  # long edge / short edge; a photograph with a larger ratio is scaled down to save memory
TILE = 1024  # pixels a side, of a photograph whose long edge is more than twice the short edge that is usual


def trained_resizing(about: Mapping[str, Any]) -> Resizing:
    """Return how images were resized when a model was trained; about: the metadata of its file."""
    edge = about.get("short_edge")
    return Resizing(about.get("input_scale", 1.0), (edge[0], edge[1]) if isinstance(edge, list) else None)


def no_such_model(path: Path) -> UserError:
    """Return the error about a model file that is missing: which of its folder may be meant, and what makes one."""
    there = {file.stem: file for kind in ("*.safetensors", "*.onnx") for file in path.parent.glob(kind)}
    near = nearest(path.stem, there)
    meant = f": did you mean {there[near]}? Else" if near else ";"
    return UserError(f"{path}: no such file{meant} `train {path.stem}` makes it, or `dvc pull train`")


def pixels_of(image: str | Path | Image.Image | Array) -> tuple[Array, str]:
    """Return an image as H x W x 3 uint8 RGB and how to call it in a message.

    A picture is turned as its EXIF data say and lies on white where it is transparent, as in `refinenet predict`.
    Raises UserError for an array of another shape or type, for a file that is no whole image, and for a picture of more
    than 8 bits a channel, which has no one way to be shown.
    """
    from PIL import Image, ImageOps

    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"array {image.shape} of {image.dtype}, expected H x W x 3 of uint8")
        return image, "array"
    where = "picture" if isinstance(image, Image.Image) else str(image)
    try:
        picture = ImageOps.exif_transpose(image if isinstance(image, Image.Image) else Image.open(image))
        if picture.mode[0] in "IF":
            raise UserError(f"{where}: mode {picture.mode}, expected 8 bits a channel")
        if picture.has_transparency_data:
            picture = picture.convert("RGBA")
            picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
        return np.array(picture.convert("RGB")), where
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises for a broken file
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{where}: cannot be read ({' '.join(reason.split())}), expected an image") from None


class Predictor:
    """Labels whole images with the model in the file `path`.

    For one image, and for the names behind the numbers:

        >>> import refinenet
        >>> predictor = refinenet.Predictor("models/street.safetensors")
        >>> labels = predictor("street.jpg")  # or a PIL image, or an array H x W x 3 of uint8
        >>> labels.shape, labels.dtype
        ((48, 64), dtype('uint8'))
        >>> predictor.classes
        ('sky', 'building', 'pole')

    `model` is the network as loaded, on `device`, or of an .onnx file what runs it on the CPU; `about` the metadata of
    its file: class names, palette, data set, image size; `precision` what is computed in, of "auto" what was chosen.

    Args:
        path: what `refinenet.model.network.save` or, ending in .onnx, `refinenet.inference.export` wrote.
        device: where the network computes, "cuda:1" for one; None: a GPU where there is one.
        resizing: of an image before the protocols' scales; None: as the model's file says.
        void: False: a void output never wins, every pixel gets a class.
        average, precision, tile: as in `predict_many`.
        fast, channels_last, compile: as in `optimise_for_inference`; an .onnx file computes as it was written.

    Raises:
        UserError: no such file, not a model of this project, or an .onnx file on another device than a CPU.
    """

    def __init__(
        self,
        path: Path | str,
        device: torch.device | str | None = None,
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
        path = Path(path)
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.path, self.device = path, device
        self.model: RefineNet | OnnxNetwork
        if path.suffix == ".onnx":
            if device.type != "cpu":
                raise UserError(f"{path}: an ONNX file runs on the CPU here, expected --device cpu")
            self.model = OnnxNetwork(path)
            self.about = self.model.about
        elif path.is_file():
            self.model, self.about = load(path, device)
        else:
            raise no_such_model(path)
        self.classes: tuple[str, ...] = tuple(self.about.get("classes", ()))
        self.palette: tuple[RGB, ...] = tuple((r, g, b) for r, g, b in self.about.get("palette", ()))
        count = self.model.config.classes
        if not len(self.classes) == len(self.palette) == count:
            raise UserError(
                f"{path}: {len(self.classes)} class names and {len(self.palette)} colours in its metadata, "
                f"expected {count} as the network has classes"
            )
        if isinstance(self.model, OnnxNetwork):
            self.precision: Precision = "float32"
            self._net: nn.Module = self.model
            self.model.without_void = not void
        else:
            if self.model.config.void_output and not void:
                bias = self.model.classifier.bias
                assert bias is not None
                bias.data[-1] = -torch.inf
            self.precision = choose_precision(precision, device)
            self._net = optimise_for_inference(
                self.model, fast=fast, channels_last=channels_last, compile=compile, precision=self.precision
            )
        edge = self.about.get("short_edge") or SHORT_EDGE
        short_edge = None if edge == AS_IT_IS else (edge[0], edge[1])
        self.resizing = resizing or Resizing(self.about.get("input_scale", 1.0), short_edge)
        self._average, self._tile = average, tile

    def expect_classes(self, classes: Sequence[str], data: str) -> None:
        """Raise UserError unless the model was trained on `classes`, those of the data set `data`."""
        if self.classes != tuple(classes):
            trained_on = self.about.get("dataset", "other classes")
            raise UserError(f"{self.path}: trained on {trained_on}, expected the {len(classes)} classes of {data}")

    def __call__(self, image: str | Path | Image.Image | Array, protocol: Protocol = ONE_SCALE) -> Array:
        """Label an image: H x W uint8, indices of `classes`, 255 where a void output wins.

        Args:
            image: a file, a PIL image, or an array H x W x 3 of uint8, RGB.
            protocol: over which sizes and mirrored images to average.

        Raises:
            UserError: it is no such image, or does not fit into memory.
        """
        pixels, where = pixels_of(image)
        return self.label_photo(pixels, protocol, where)

    def under_protocols(self, image: Array, protocols: Mapping[str, Protocol]) -> dict[str, Array]:
        """Label H x W x 3 uint8: for each protocol H x W uint8, classes or, where void wins, their number."""
        (labels,) = self.many([image], protocols)
        return {name: label.cpu().numpy() for name, label in labels.items()}

    def many(
        self,
        images: Sequence[Array],
        protocols: Mapping[str, Protocol],
        resizing: Resizing | None = None,
        tile: int | None = None,
    ) -> list[dict[str, Tensor]]:
        """Label each of `images` (H x W x 3 uint8) as `predict_many`; the maps stay on `device`."""
        how = resizing or self.resizing
        return predict_many(self._net, images, protocols, how, self._average, self.precision, tile or self._tile)

    def stream(
        self, batches: Iterable[Sequence[Array]], protocols: Mapping[str, Protocol], crf: CRFProcesses
    ) -> Iterator[list[dict[str, Tensor]]]:
        """Label batch after batch as `many`, while dense CRFs are computed in processes, as in `predict_stream`."""
        settings = self.resizing, self._average, self.precision, self._tile
        return predict_stream(self._net, batches, protocols, *settings, crf)

    def label_photo(self, image: Array, protocol: Protocol, where: str) -> Array:
        """Label a photograph of any shape: H x W x 3 uint8 -> H x W class indices, 255 where a void output wins.

        A panorama or strip is scaled down to the pixels and the long edge of a photograph of 4 : 1 (`ASPECT`) and
        computed in tiles. Raises UserError, which begins with `where`, for an image that does not fit into memory.
        """
        height, width = image.shape[:2]
        factor = self.resizing.factor(height, width)
        tile = None
        if self.resizing.short_edge is not None:
            edge = self.resizing.short_edge[1] * self.resizing.input_scale
            factor = min(
                factor, math.sqrt(ASPECT / (height * width)) * edge, max(1.0, ASPECT * edge / max(height, width))
            )
            tile = TILE if max(height, width) * factor * max(protocol.scales) > max(2 * edge, TILE) else None
        try:
            (labels,) = self.many([image], {"label": protocol}, Resizing(factor), tile)
        except (RuntimeError, MemoryError) as error:
            # On a CPU PyTorch raises a plain RuntimeError.
            if not isinstance(error, (torch.OutOfMemoryError, MemoryError)) and "allocate memory" not in str(error):
                raise
            raise UserError(
                f"{where}: {width} x {height} pixels do not fit into memory; try a smaller --short-edge"
            ) from None
        label = labels["label"].cpu().numpy()
        return np.where(label < len(self.classes), label, np.uint8(IGNORE_INDEX))
