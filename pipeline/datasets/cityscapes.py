"""Cityscapes, fine annotations, 19 classes. Both archives need an account.

    leftImg8bit_trainvaltest.zip   leftImg8bit/<split>/<city>/<name>_leftImg8bit.png
    gtFine_trainvaltest.zip        gtFine/<split>/<city>/<name>_gtFine_labelIds.png

Labels of the split "test" are withheld: the files of that name in gtFine hold void only, and are not read.
Label ids become train ids as in cityscapesScripts (labels.py); ids that are not trained are void.
"""

from __future__ import annotations

from pathlib import Path, PurePosixPath

import numpy as np

from pipeline import datasets
from pipeline.formats import decode
from refinenet.data import IGNORE_INDEX
from refinenet.data.split import Array
from refinenet.errors import UserError

TITLE = "Cityscapes"
CLASSES = (
    *("road", "sidewalk", "building", "wall", "fence", "pole", "traffic light", "traffic sign", "vegetation"),
    *("terrain", "sky", "person", "rider", "car", "truck", "bus", "train", "motorcycle", "bicycle"),
)
PALETTE = (
    *((128, 64, 128), (244, 35, 232), (70, 70, 70), (102, 102, 156), (190, 153, 153), (153, 153, 153)),
    *((250, 170, 30), (220, 220, 0), (107, 142, 35), (152, 251, 152), (70, 130, 180), (220, 20, 60)),
    *((255, 0, 0), (0, 0, 142), (0, 0, 70), (0, 60, 100), (0, 80, 100), (0, 0, 230), (119, 11, 32)),
)
COUNTS = {"train": 2975, "val": 500, "test": 1525}
TYPICAL_SIZE = (1024, 2048)  # all are

LABEL_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)  # of the classes, in order
HIGHEST_ID = 33

_TABLE = np.full(HIGHEST_ID + 1, IGNORE_INDEX, np.uint8)
_TABLE[list(LABEL_IDS)] = range(len(CLASSES))


class Reader(datasets.Reader):
    def __init__(self, raw: Path) -> None:
        super().__init__(raw)
        self._images = self.archive("leftImg8bit_trainvaltest.zip")
        self._labels = self.archive("gtFine_trainvaltest.zip")

    def names(self, split: str) -> list[str]:
        suffix = "_leftImg8bit.png"
        paths = [PurePosixPath(member) for member in self._images if member.endswith(suffix)]
        names = [path.name.removesuffix(suffix) for path in paths if path.parts[:2] == ("leftImg8bit", split)]
        if not names:
            raise UserError(f"{self._images.where(f'leftImg8bit/{split}')}: no image")
        return sorted(names)

    def where(self, split: str, name: str) -> str:
        if split == "test":
            return self._images.where(_member("leftImg8bit", split, name, "leftImg8bit"))
        return self._labels.where(_member("gtFine", split, name, "gtFine_labelIds"))

    def read(self, split: str, name: str) -> tuple[Array, Array | None]:
        image = decode.photo(*self._images.read_named(_member("leftImg8bit", split, name, "leftImg8bit")))
        if split == "test":
            return image, None
        data, where = self._labels.read_named(_member("gtFine", split, name, "gtFine_labelIds"))
        return image, decode.relabel(decode.index_png(data, where, modes="L"), _TABLE, where)


def _member(root: str, split: str, name: str, kind: str) -> str:
    return f"{root}/{split}/{name.partition('_')[0]}/{name}_{kind}.png"
