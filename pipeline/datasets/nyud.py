"""NYUDv2, 40 classes.

    nyu_depth_v2_labeled.mat   HDF5: images N x 3 x W x H uint8, labels N x W x H (0 = none, 1 to 894)
    splits.mat                 trainNdxs, testNdxs: 1-based; "val" here is the test split, which the paper scores
    classMapping40.mat         mapClass: 894 labels -> 1 to 40, className

The white frame around each image is removed, as the authors' code asks: it is left over from the undistortion of the
photograph, and its labels are mostly 0. What is kept of the 480 x 640 pixels are rows 6 to 473 and columns 7 to 631,
of every image: the three images in the authors' repository have the 468 x 625 pixels that this leaves. The white itself
is not looked for, so that neither a white wall nor a copy that went through JPEG changes the box. Drawn images of
another size are cut at the same share of their sides.
"""

from __future__ import annotations

from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import datasets
from pipeline.formats import decode, hdf5, label_images
from pipeline.formats.archive import printable
from refinenet.data import IGNORE_INDEX
from refinenet.data.split import Array
from refinenet.errors import UserError

TITLE = "NYUDv2"
CLASSES = (
    *("wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf"),
    *("picture", "counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor mat"),
    *("clothes", "ceiling", "books", "refridgerator", "television", "paper", "towel", "shower curtain", "box"),
    *("whiteboard", "person", "night stand", "toilet", "sink", "lamp", "bathtub", "bag", "otherstructure"),
    *("otherfurniture", "otherprop"),
)
PALETTE = label_images.colour_map(len(CLASSES), start=1)
COUNTS = {"train": 795, "val": 654}
TYPICAL_SIZE = (480, 640)  # all are
BOX = ((6, 474), (7, 632))  # the first row that is kept, the first that is not; columns

LABELS = 894

_SPLITS = {"train": "trainNdxs", "val": "testNdxs"}
_DATA = "nyu_depth_v2_labeled.mat"


class Reader(datasets.Reader):
    def __init__(self, raw: Path) -> None:
        super().__init__(raw)
        self._table = self._mapping()
        if self._images.shape[::2] + self._images.shape[3:] != self._labels.shape:
            raise UserError(
                f"{self.raw / _DATA}: images {self._images.shape} and labels {self._labels.shape} do not match"
            )

    @cached_property
    def _data(self) -> hdf5.File:
        path = self.file(_DATA)
        return self.resources.enter_context(closing(hdf5.File(path, str(path))))

    @cached_property
    def _images(self) -> Any:
        return self._variable("images", (3,))

    @cached_property
    def _labels(self) -> Any:
        return self._variable("labels", ())

    def _mapping(self) -> Array:
        path = self.file("classMapping40.mat")
        data = path.read_bytes()
        names = decode.strings(decode.matlab(data, str(path), "className"), str(path))
        decode.check_classes(names, CLASSES, str(path))
        mapping = decode.matlab(data, str(path), "mapClass").ravel()
        if len(mapping) != LABELS or mapping.dtype.kind not in "uif" or not np.isin(mapping, range(1, 41)).all():
            raise UserError(f"{path}: mapClass has {len(mapping)} entries, expected {LABELS} of 1 to {len(CLASSES)}")
        return np.concatenate([[IGNORE_INDEX], mapping.astype(np.int64) - 1]).astype(np.uint8)

    def _variable(self, name: str, inner: tuple[int, ...]) -> Any:
        """A variable of the HDF5 file: N x `inner` x W x H."""
        found = self._data.dataset(name)
        if len(found.shape) != 3 + len(inner) or found.shape[1:-2] != inner:
            raise UserError(f"{self.raw / _DATA}: {name} is {found.shape}, expected N x {'3 x ' if inner else ''}W x H")
        return found

    def names(self, split: str) -> list[str]:
        path = self.file("splits.mat")
        indices = decode.matlab(path.read_bytes(), str(path), _SPLITS[split]).ravel()
        if not indices.size:
            raise UserError(f"{path}: {_SPLITS[split]} is empty")
        whole = np.isin(indices, np.arange(1, len(self._images) + 1)) if indices.dtype.kind in "uif" else np.zeros(1)
        if not whole.all():
            wrong = printable(str(indices[np.argmin(whole)]))
            raise UserError(f"{path}: {_SPLITS[split]} names image {wrong}, {_DATA} has 1 to {len(self._images)}")
        if len(np.unique(indices)) < len(indices):
            raise UserError(f"{path}: {_SPLITS[split]} names an image twice")
        return [f"{int(index):04d}" for index in indices]

    def where(self, split: str, name: str) -> str:
        return f"{self.raw / _DATA}!labels[{name}]"

    def read(self, split: str, name: str) -> tuple[Array, Array | None]:
        index = int(name) - 1
        image = self._data.read(self._images, index, f"!images[{name}]", 3 * decode.PIXELS)
        label = self._data.read(self._labels, index, f"!labels[{name}]", decode.PIXELS)
        if image.dtype != np.uint8:
            raise UserError(f"{self.raw / _DATA}: images are {image.dtype}, expected uint8")
        image = image.transpose(2, 1, 0)  # MATLAB's columns first: 3 x W x H -> H x W x 3
        box = inside_frame(image.shape[0], image.shape[1])
        return np.ascontiguousarray(image[box]), decode.relabel(label.T[box], self._table, self.where(split, name))


def inside_frame(height: int, width: int) -> tuple[slice, slice]:
    """Return the box that is kept of an image: rows, columns. See the module's text."""
    rows, columns = (
        slice(*((2 * edge * side + whole) // (2 * whole) for edge in edges))  # rounded, half up
        for edges, side, whole in zip(BOX, (height, width), TYPICAL_SIZE, strict=True)
    )
    return rows, columns
