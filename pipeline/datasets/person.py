"""PASCAL Person-Part: seven classes on images of VOC 2010.

    VOCtrainval_03-May-2010.tar   VOCdevkit/VOC2010/JPEGImages
    pascal_person_part.zip        pascal_person_part/pascal_person_part_{gt,trainval_list}

The labels are the ready-made ones (Chen et al.): index PNGs, 0 to 6, 255 = void; the lists are {train,val}_id.txt.
The paper prints 1717 and 1818 images; the released lists have 1716 and 1817 (the latter unverified).
"""

from __future__ import annotations

from pathlib import Path

from pipeline import datasets
from pipeline.datasets import decode
from refinenet.data import Array

TITLE = "PASCAL Person-Part"
CLASSES = ("background", "head", "torso", "upper arms", "lower arms", "upper legs", "lower legs")
PALETTE = datasets.colour_map(len(CLASSES))
COUNTS = {"train": 1716, "val": 1817}

_ROOT = "pascal_person_part"


class Reader(datasets.Reader):
    def __init__(self, raw: Path) -> None:
        super().__init__(raw)
        self._voc = self.archive("VOCtrainval_03-May-2010.tar")
        self._parts = self.archive("pascal_person_part.zip")

    def names(self, split: str) -> list[str]:
        return decode.image_list(*self._parts.named(f"{_ROOT}/pascal_person_part_trainval_list/{split}_id.txt"))

    def _label(self, name: str) -> str:
        return f"{_ROOT}/pascal_person_part_gt/{name}.png"

    def where(self, split: str, name: str) -> str:
        return self._parts.where(self._label(name))

    def read(self, split: str, name: str) -> tuple[Array, Array | None]:
        return (
            decode.photo(*self._voc.named(f"VOCdevkit/VOC2010/JPEGImages/{name}.jpg")),
            decode.index_png(*self._parts.named(self._label(name)), modes="PL"),
        )
