"""PASCAL-Context: 59 classes and background on images of VOC 2010.

    VOCtrainval_03-May-2010.tar   VOCdevkit/VOC2010/{JPEGImages,ImageSets/Main}
    trainval.tar.gz               trainval/<image>.mat with `LabelMap`: 1-based ids of the 459 labels
                                  trainval/labels.txt: the 459, "id: name", a line each
    59_labels.txt                 those that count, in the same way

A label named in 59_labels.txt is that class; every other one of the 459 is background, class 0, which is scored.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline import datasets
from pipeline.formats import decode, label_images
from refinenet.data.split import Array
from refinenet.errors import UserError

TITLE = "PASCAL-Context"
CLASSES = (
    "background",
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("table", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
    *("bag", "bed", "bench", "book", "building", "cabinet", "ceiling", "cloth", "computer", "cup"),
    *("door", "fence", "floor", "flower", "food", "grass", "ground", "keyboard", "light", "mountain"),
    *("mouse", "curtain", "platform", "sign", "plate", "road", "rock", "shelves", "sidewalk", "sky"),
    *("snow", "bedclothes", "track", "tree", "truck", "wall", "water", "window", "wood"),
)
PALETTE = label_images.colour_map(len(CLASSES))
COUNTS = {"train": 4998, "val": 5105}
TYPICAL_SIZE = (375, 500)  # images of VOC 2010

LABELS = 459
ALIASES = {"diningtable": "table", "bedcloth": "bedclothes", "clothes": "cloth"}  # the two lists differ in these

_VOC = "VOCdevkit/VOC2010"


class Reader(datasets.Reader):
    def __init__(self, raw: Path) -> None:
        super().__init__(raw)
        self._voc = self.archive("VOCtrainval_03-May-2010.tar")
        self._labels = self.archive("trainval.tar.gz")
        path = self.file("59_labels.txt")
        classes = _numbered(path.read_bytes(), str(path), len(CLASSES) - 1)
        decode.check_classes(classes, CLASSES[1:], str(path))
        data, where = self._labels.read_named("trainval/labels.txt")
        names = _numbered(data, where, LABELS)
        missing = set(CLASSES[1:]).difference(names)
        if missing:
            raise UserError(f"{where}: no label {min(missing)!r}, expected all of 59_labels.txt")
        ids = {name: index for index, name in enumerate(CLASSES)}
        self._table = np.array([0] + [ids.get(name, 0) for name in names], np.uint8)

    def names(self, split: str) -> list[str]:
        return decode.image_list(*self._voc.read_named(f"{_VOC}/ImageSets/Main/{split}.txt"))

    def where(self, split: str, name: str) -> str:
        return self._labels.where(f"trainval/{name}.mat")

    def read(self, split: str, name: str) -> tuple[Array, Array | None]:
        image = decode.photo(*self._voc.read_named(f"{_VOC}/JPEGImages/{name}.jpg"))
        data, where = self._labels.read_named(f"trainval/{name}.mat")
        return image, decode.relabel(decode.matlab(data, where, "LabelMap"), self._table, where)


def _numbered(data: bytes, where: str, count: int) -> list[str]:
    """Return the names of an "id: name" list, in the spelling of CLASSES; the ids must be 1 to `count`, in order."""
    names = []
    for number, line in enumerate(decode.text(data, where), 1):
        index, colon, name = line.partition(":")
        if not colon or index.strip() != str(number):
            raise UserError(f"{where}: line {line[:60]!r}, expected '{number}: name'")
        names.append(ALIASES.get(name.strip(), name.strip()))
    if len(names) != count:
        raise UserError(f"{where}: {len(names)} labels, expected {count}")
    return names
