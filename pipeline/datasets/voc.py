"""PASCAL VOC 2012 segmentation, with SBD's labels added to its training set.

    VOCtrainval_11-May-2012.tar   VOCdevkit/VOC2012/{JPEGImages,SegmentationClass,ImageSets/Segmentation}
    VOC2012test.tar               VOCdevkit/VOC2012/{JPEGImages,ImageSets/Segmentation/test.txt}; may be missing
    benchmark.tgz                 benchmark_RELEASE/dataset/{img,cls,train.txt,val.txt}  (SBD, Hariharan et al. 2011)

train = (VOC train + SBD train + SBD val) - VOC val: "trainaug", 10,582 images; train_voc = VOC train, which the last
stage of the paper's training is on; val = VOC val.
An image of VOC's own train keeps VOC's label, which is the finer one and has void borders; SBD's labels have none.
Label PNGs are palette images whose indices are the classes, 255 = void.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline import datasets
from pipeline.formats import decode, label_images
from refinenet.data.split import Array
from refinenet.errors import UserError

TITLE = "PASCAL VOC 2012"
CLASSES = datasets.VOC_CLASSES
PALETTE = label_images.colour_map(len(CLASSES))
COUNTS = {"train": 10582, "train_voc": 1464, "val": 1449, "test": 1456}
TYPICAL_SIZE = (375, 500)  # measured: 0.75 MB an image in benchmarks/prepare.md

_VOC = "VOCdevkit/VOC2012"
_SBD = "benchmark_RELEASE/dataset"


class Reader(datasets.Reader):
    def __init__(self, raw: Path) -> None:
        super().__init__(raw)
        self._voc = self.archive("VOCtrainval_11-May-2012.tar")
        self._sbd = self.archive("benchmark.tgz")
        self._test = self.archive("VOC2012test.tar") if self.has("VOC2012test.tar") else None
        self._voc_train, self._val = (
            decode.image_list(*self._voc.read_named(f"{_VOC}/ImageSets/Segmentation/{split}.txt"))
            for split in ("train", "val")
        )
        self._own = set(self._voc_train) | set(self._val)
        sbd = [
            name
            for split in ("train", "val")
            for name in decode.image_list(*self._sbd.read_named(f"{_SBD}/{split}.txt"))
        ]
        val = set(self._val)
        self._trainaug = [name for name in dict.fromkeys(self._voc_train + sbd) if name not in val]

    def names(self, split: str) -> list[str]:
        if split == "test":
            member = f"{_VOC}/ImageSets/Segmentation/test.txt"
            return [] if self._test is None else decode.image_list(*self._test.read_named(member))
        return list({"train": self._trainaug, "train_voc": self._voc_train, "val": self._val}[split])

    def where(self, split: str, name: str) -> str:
        if split == "test" and self._test is not None:
            return self._test.where(f"{_VOC}/JPEGImages/{name}.jpg")
        if name in self._own:
            return self._voc.where(f"{_VOC}/SegmentationClass/{name}.png")
        return self._sbd.where(f"{_SBD}/cls/{name}.mat")

    def read(self, split: str, name: str) -> tuple[Array, Array | None]:
        if split == "test" and self._test is not None:
            return decode.photo(*self._test.read_named(f"{_VOC}/JPEGImages/{name}.jpg")), None
        if name in self._own:
            return (
                decode.photo(*self._voc.read_named(f"{_VOC}/JPEGImages/{name}.jpg")),
                decode.index_png(*self._voc.read_named(f"{_VOC}/SegmentationClass/{name}.png"), modes="P"),
            )
        image = decode.photo(*self._sbd.read_named(f"{_SBD}/img/{name}.jpg"))
        data, where = self._sbd.read_named(f"{_SBD}/cls/{name}.mat")
        return image, _segmentation(decode.matlab(data, where, "GTcls"), where)


def _segmentation(record: npt.NDArray[Any], where: str) -> Array:
    """`GTcls.Segmentation`, a 1 x 1 struct's field: H x W uint8, 0 to 20."""
    if record.size != 1 or record.dtype.names is None or "Segmentation" not in record.dtype.names:
        raise UserError(f"{where}: GTcls is {record.dtype} {record.shape}, expected a struct with Segmentation")
    label = np.asarray(record["Segmentation"].ravel()[0])
    return decode.relabel(label, np.arange(len(CLASSES), dtype=np.uint8), where)
