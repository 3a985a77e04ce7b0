"""SUN RGB-D, 37 classes, colour images only.

    SUNRGBD.zip          SUNRGBD/<directory>/image/<file>.jpg
    SUNRGBDtoolbox.zip   SUNRGBDtoolbox/Metadata/SUNRGBDMeta.mat     an image each: rgbpath, rgbname
                         SUNRGBDtoolbox/Metadata/SUNRGBD2Dseg.mat    HDF5; seglabel: a reference each, W x H, 0 to 37
                         SUNRGBDtoolbox/Metadata/seg37list.mat       the classes
                         SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat   alltrain, alltest: directories

Directories are written as on the authors' machine, "/n/fs/sun3d/data/SUNRGBD/kv2/..."; what follows "SUNRGBD/" counts.
Two thirds of them end in a slash, and the paths of their images have a doubled one ("<directory>//image/<file>.jpg"),
which the zip presumably has not: all are compared, and the zip is searched, as if slashes were single. "val" is the
test split, which the paper scores. Label 0 is void. Labels may be of any type of number: as doubles, which they most
likely are, they take 52 GB, and public code says that one needs 64 GB of memory for them. An image's name is its
1-based place in SUNRGBDMeta.
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

TITLE = "SUN RGB-D"
CLASSES = (
    *("wall", "floor", "cabinet", "bed", "chair", "sofa", "table", "door", "window", "bookshelf"),
    *("picture", "counter", "blinds", "desk", "shelves", "curtain", "dresser", "pillow", "mirror", "floor_mat"),
    *("clothes", "ceiling", "books", "fridge", "tv", "paper", "towel", "shower_curtain", "box", "whiteboard"),
    *("person", "night_stand", "toilet", "sink", "lamp", "bathtub", "bag"),
)
PALETTE = label_images.colour_map(len(CLASSES), start=1)
COUNTS = {"train": 5285, "val": 5050}
TYPICAL_SIZE = (487, 645)  # assumed: the mean over its four cameras

_SPLITS = {"train": "alltrain", "val": "alltest"}
_META = "SUNRGBDtoolbox/Metadata/SUNRGBDMeta.mat"
_SEG = "SUNRGBDtoolbox/Metadata/SUNRGBD2Dseg.mat"
_SEG37 = "SUNRGBDtoolbox/Metadata/seg37list.mat"
_ALLSPLIT = "SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat"
_META_LIMIT = 1 << 32  # bytes; it has the 3-D boxes of all images, too
_IMAGES_LIMIT = 1_000_000
_SPELT = {name.replace("_", ""): name for name in CLASSES}
_TABLE = np.array([IGNORE_INDEX, *range(len(CLASSES))], np.uint8)


class Reader(datasets.Reader):
    def __init__(self, raw: Path) -> None:
        super().__init__(raw)
        self._pictures = self.archive("SUNRGBD.zip")
        self._members = {_relative(member): member for member in self._pictures if member.endswith((".jpg", ".png"))}
        self._toolbox = self.archive("SUNRGBDtoolbox.zip")
        data, where = self._toolbox.read_named(_SEG37)
        found = decode.strings(decode.matlab(data, where, "seg37list"), where)
        decode.check_classes([_SPELT.get(_bare(text), text) for text in found], CLASSES, where)
        self._paths = self._read_paths()
        if len(self._references) != len(self._paths):
            where = self._toolbox.where(_SEG)
            raise UserError(f"{where}: {len(self._references)} labels, {_META} has {len(self._paths)} images")

    @cached_property
    def _data(self) -> hdf5.File:
        # Half a gigabyte; compressed in its zip, HDF5 wants to seek in it.
        file = hdf5.File(self._toolbox.scratch(_SEG), self._toolbox.where(_SEG))
        return self.resources.enter_context(closing(file))

    @cached_property
    def _references(self) -> Any:
        """A reference to each label."""
        found = self._data.dataset("SUNRGBD2Dseg/seglabel", "O")
        return self._data.read(found, (), ": SUNRGBD2Dseg/seglabel", _IMAGES_LIMIT).ravel()

    def _read_paths(self) -> list[tuple[str, str]]:
        """Directory and file name of each image, in the order of SUNRGBDMeta."""
        where = self._toolbox.where(_META)
        meta = decode.matlab(self._toolbox.read(_META, _META_LIMIT), where, "SUNRGBDMeta", _META_LIMIT).ravel()
        if meta.dtype.names is None or not {"rgbpath", "rgbname"} <= set(meta.dtype.names) or not meta.size:
            raise UserError(f"{where}: SUNRGBDMeta is {meta.dtype.names}, expected structs with rgbpath and rgbname")
        paths = decode.strings(meta["rgbpath"], where)
        files = decode.strings(meta["rgbname"], where)
        # rgbpath ends in /image/<rgbname>; the split names what is before that
        return [(_relative(path).rpartition("/image/")[0], file) for path, file in zip(paths, files, strict=True)]

    def names(self, split: str) -> list[str]:
        data, where = self._toolbox.read_named(_ALLSPLIT)
        wanted = [_relative(path) for path in decode.strings(decode.matlab(data, where, _SPLITS[split]), where)]
        if not wanted:
            raise UserError(f"{where}: {_SPLITS[split]} is empty")
        places = {directory: index for index, (directory, _) in enumerate(self._paths)}
        missing = next((directory for directory in wanted if directory not in places), None)
        if missing is not None:
            raise UserError(f"{where}: {_SPLITS[split]} names {printable(missing)}, which SUNRGBDMeta has no image of")
        if len(set(wanted)) < len(wanted):
            raise UserError(f"{where}: {_SPLITS[split]} names a directory twice")
        return [f"{places[directory] + 1:05d}" for directory in wanted]

    def where(self, split: str, name: str) -> str:
        return f"{self._toolbox.where(_SEG)}[{name}]"

    def read(self, split: str, name: str) -> tuple[Array, Array | None]:
        index = int(name) - 1
        directory, file = self._paths[index]
        path = f"{directory}/image/{file}"
        image = decode.photo(*self._pictures.read_named(self._members.get(path, f"SUNRGBD/{path}")))
        found = self._data.referenced(self._references[index], f"[{name}]")
        label = self._data.read(found, (), f"[{name}]", decode.PIXELS)
        return image, decode.relabel(label.T, _TABLE, self.where(split, name))


def _bare(text: str) -> str:
    """Return a class's name without what its writers differ in: "floor_mat", "floor mat", "Floor-mat"."""
    return text.lower().translate(str.maketrans("", "", " _-"))


def _relative(path: str) -> str:
    """What follows "SUNRGBD/", without doubled or final slashes."""
    parts = [part for part in path.split("/") if part]
    return "/".join(parts[parts.index("SUNRGBD") + 1 :] if "SUNRGBD" in parts else parts)
