"""PASCAL Person-Part: seven classes on images of VOC 2010.

    VOCtrainval_03-May-2010.tar     VOCdevkit/VOC2010/{JPEGImages,ImageSets/Main}
    pascal_person_part.zip          pascal_person_part/pascal_person_part_{gt,trainval_list}
    pascal_part_trainval.tar.gz     Annotations_Part/<image>.mat with `anno`; read where the zip is not there

The zip has ready-made labels (Chen et al.): index PNGs, 0 to 6, 255 = void; the lists are {train,val}_id.txt. The paper
prints 1717 and 1818 images; the released lists have 1716 and 1817 (the latter unverified).

The tar.gz has PASCAL-Part's raw annotations (published as trainval.tar.gz), of which the labels are made by merging 24
parts into 6. The rules are those of facebookresearch/astmt (fblib/dataloaders/pascal_context.py) and of a script for
DeepLab's labels, which agree: parts of persons only; each part is drawn over those before it, in the file's order;
pixels of a person that belong to no part are background; there is no void. Images are those of VOC 2010's train and val
lists on which a person's part has a pixel, in the lists' order. UNVERIFIED: that this gives the ready-made labels and
counts.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import datasets
from pipeline.formats import decode, label_images
from pipeline.formats.archive import printable
from refinenet.data.split import Array
from refinenet.errors import UserError

TITLE = "PASCAL Person-Part"
CLASSES = ("background", "head", "torso", "upper arms", "lower arms", "upper legs", "lower legs")
PALETTE = label_images.colour_map(len(CLASSES))
COUNTS = {"train": 1716, "val": 1817}
TYPICAL_SIZE = (375, 500)  # images of VOC 2010

PARTS = {
    **dict.fromkeys(("head", "hair", "lear", "rear", "lebrow", "rebrow", "leye", "reye", "mouth", "nose"), 1),
    **dict.fromkeys(("torso", "neck"), 2),
    **dict.fromkeys(("luarm", "ruarm"), 3),
    **dict.fromkeys(("llarm", "rlarm", "lhand", "rhand"), 4),
    **dict.fromkeys(("luleg", "ruleg"), 5),
    **dict.fromkeys(("llleg", "rlleg", "lfoot", "rfoot"), 6),
}

_VOC = "VOCdevkit/VOC2010"
_ROOT = "pascal_person_part"
_READY, _RAW = "pascal_person_part.zip", "pascal_part_trainval.tar.gz"


class Reader(datasets.Reader):
    def __init__(self, raw: Path) -> None:
        super().__init__(raw)
        self._voc = self.archive("VOCtrainval_03-May-2010.tar")
        self._ready = self.has(_READY) or not self.has(_RAW)
        self._parts = self.archive(_READY if self._ready else _RAW)
        self._found: dict[str, list[str]] = {}

    def names(self, split: str) -> list[str]:
        if self._ready:
            return decode.image_list(
                *self._parts.read_named(f"{_ROOT}/pascal_person_part_trainval_list/{split}_id.txt")
            )
        if split not in self._found:
            self._found[split] = self._search(f"{_VOC}/ImageSets/Main/{split}.txt")
        return list(self._found[split])

    def is_verified(self, split: str) -> bool:
        # 1,716 is told by code that uses the list, 1,817 by nobody; what merging the raw annotations gives, by nobody.
        return self._ready and split == "train"

    def _search(self, member: str) -> list[str]:
        """The images of VOC's list `member` that have a part of a person; every annotation is read for it."""
        listed = decode.image_list(*self._voc.read_named(member))
        found = [name for name in listed if self._label(name) in self._parts and self._merged(name) is not None]
        if not found:
            raise UserError(f"{self._voc.where(member)}: no image with a part of a person in {_RAW}")
        return found

    def _label(self, name: str) -> str:
        return f"{_ROOT}/pascal_person_part_gt/{name}.png" if self._ready else f"Annotations_Part/{name}.mat"

    def where(self, split: str, name: str) -> str:
        return self._parts.where(self._label(name))

    def read(self, split: str, name: str) -> tuple[Array, Array | None]:
        image = decode.photo(*self._voc.read_named(f"{_VOC}/JPEGImages/{name}.jpg"))
        if self._ready:
            return image, decode.index_png(*self._parts.read_named(self._label(name)), modes="PL")
        return image, self._merged(name)

    def _merged(self, name: str) -> Array | None:
        """The label of an image from its raw annotations; None where no part of a person has a pixel."""
        data, where = self._parts.read_named(self._label(name))
        label: Array | None = None
        for anno in _structs(decode.matlab(data, where, "anno"), ("objects",), where):
            for thing in _structs(anno["objects"], ("class", "parts"), where):
                if _text(thing["class"], where) != "person" or not np.size(thing["parts"]):
                    continue
                for part in _structs(thing["parts"], ("part_name", "mask"), where):
                    kind, mask = _text(part["part_name"], where), np.asarray(part["mask"])
                    if kind not in PARTS:
                        raise UserError(f"{where}: part {printable(kind)!r}, expected one of {', '.join(PARTS)}")
                    inside = decode.relabel(mask, np.arange(2, dtype=np.uint8), where) == 1
                    if label is None:
                        label = np.zeros(mask.shape, np.uint8)
                    if label.shape != mask.shape:
                        raise UserError(f"{where}: parts of {label.shape} and {mask.shape} pixels")
                    label[inside] = PARTS[kind]
        return label if label is not None and label.any() else None


def _structs(value: Any, fields: tuple[str, ...], where: str) -> Iterator[Any]:
    """The elements of a struct array with these fields."""
    array = np.asarray(value)
    if array.dtype.names is None or not set(fields) <= set(array.dtype.names):
        raise UserError(f"{where}: {printable(str(array.dtype))}, expected structs with {', '.join(fields)}")
    yield from array.ravel()


def _text(value: Any, where: str) -> str:
    cell = np.empty(1, object)
    cell[0] = value
    return decode.strings(cell, where)[0]
