"""CamVid in the layout of the zip that GitHub makes of SegNet's repository."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.config.schema import Rendered
from pipeline.datasets import camvid
from pipeline.formats.encode import Member, in_folders, lines, png, write_zip
from pipeline.synthetic.album import paint
from pipeline.synthetic.scene import World
from refinenet.data import IGNORE_INDEX

_VAL = 3  # frames of the split that is not evaluated
_VOID = 11
# Frames of the four drives, as they are called, one a second: the first number in a split, and the forms of the names.
_DRIVES = {
    "train": (0, ("0001TP_{:06}", "0006R0_f{:05}", "0016E5_{:05}")),
    "val": (8100, ("0016E5_{:05}",)),
    "test": (9000, ("0001TP_{:06}", "Seq05VD_f{:05}")),
}


def render(settings: Rendered, folder: Path) -> None:
    """One zip: frames and grey PNGs (0 to 10, 11 = void) of train, val and test, all of one size, and the lists.

    What is evaluated, the settings' "val", is "test" here; "val" has a few frames more.
    """
    write_zip(folder / camvid.ARCHIVE, in_folders(_members(settings)))


def _members(settings: Rendered) -> Iterator[Member]:
    size = (settings.height, settings.width)
    pictures = paint("camvid", camvid.CLASSES, settings, "street", void="seams", size=size)
    world = World("camvid", camvid.CLASSES, settings.seed, "street")
    further = [world.draw(len(pictures) + i, required, *size) for i, required in enumerate(world.plan(_VAL))]
    scenes: dict[str, list[tuple[NDArray[np.uint8], NDArray[np.uint8]]]] = {
        "train": [(p.image, p.label) for p in pictures if p.split == "train"],
        "val": [(p.image, p.label) for p in further],
        "test": [(p.image, p.label) for p in pictures if p.split == "val"],
    }
    for split, found in scenes.items():
        (first, drives), listed = _DRIVES[split], []
        for number, (image, label) in enumerate(found):
            name = drives[number % len(drives)].format(first + 30 * (number // len(drives))) + ".png"
            yield f"{camvid.FOLDER}/{split}/{name}", png(image)
            yield f"{camvid.FOLDER}/{split}annot/{name}", png(np.where(label == IGNORE_INDEX, _VOID, label))
            # As the official lists have them: paths of a machine of the authors.
            listed.append(f"/SegNet/CamVid/{split}/{name} /SegNet/CamVid/{split}annot/{name}")
        yield f"{camvid.FOLDER}/{split}.txt", lines(listed)
