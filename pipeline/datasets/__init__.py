"""The paper's seven data sets, COCO and CamVid: one module each, from its official archives to (image, label) samples.

A module gives what `Dataset` lists and nothing else, so that the stages need no knowledge of any data set.
Labels are class indices 0..K-1 in the order of CLASSES; 255 is void (refinenet/data/split.py).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self, cast

from pipeline.formats.archive import Archive
from refinenet.data.split import RGB, Array
from refinenet.errors import UserError

NAMES = ("voc", "context", "person", "nyud", "sunrgbd", "cityscapes", "ade20k", "coco", "camvid")

# Of VOC 2012, which COCO is mapped to.
VOC_CLASSES = (
    "background",
    *("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
)


class Reader(ABC):
    """Reads one data set from the folder `raw`, which holds its archives under their official names.

    Samples are read one at a time and in any order, so memory stays bounded. Reading raises UserError, naming
    archive!member, for whatever the archives have wrong.

    Processes that `prepare` forks read with the same open files, whose positions they share: read by os.pread, as
    Archive and HDF5 do, and never seek.
    """

    def __init__(self, raw: Path) -> None:
        self.raw = raw
        self.resources = ExitStack()

    @abstractmethod
    def names(self, split: str) -> list[str]:
        """The images of "train", "val" or, where COUNTS has it, "test", in the order of the official list.

        Empty where the archive of test images is not in `raw`, which nothing else needs.
        """

    def released(self, split: str) -> int:
        """How many images the archives have of `split`, which is what COUNTS counts: also those that are not used."""
        return len(self.names(split))

    def is_verified(self, split: str) -> bool:
        """Say whether a source confirms what COUNTS has for `split`; where none does, another number is no error."""
        return True

    def check_release(self) -> bool:
        """Compare the archives with the project's own list of what is in them; return whether there is such a list.

        One is kept where no checksum of them is published. Asked together with COUNTS, so never of drawn archives.
        Raises UserError where they differ.
        """
        return False

    @abstractmethod
    def read(self, split: str, name: str) -> tuple[Array, Array | None]:
        """One image (H x W x 3, uint8, RGB) and its label (H x W, uint8: class index, 255 = void; "test": None)."""

    @abstractmethod
    def where(self, split: str, name: str) -> str:
        """Where the label of `name` comes from (without one, its image), as archive!member: what errors name."""

    def fingerprint(self, image: Array) -> bytes:
        """What near-duplicates of an image (H x W x 3, uint8) are found by; nothing where nobody looks for them."""
        return b""

    def archive(self, name: str) -> Archive:
        """Open the archive `name` until this reader is closed."""
        return self.resources.enter_context(Archive(self.file(name)))

    def has(self, name: str) -> bool:
        """Whether the official file `name` is there: asked of those that may be missing."""
        return (self.raw / name).is_file()

    def file(self, name: str) -> Path:
        """The path of the official file `name`; UserError where it is missing."""
        path = self.raw / name
        if not path.is_file():
            raise UserError(f"{path}: no such file; `download` gets it")
        return path

    def close(self) -> None:
        self.resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Dataset(Protocol):
    """What a data set's module has.

    `TITLE`: its name in print. `CLASSES`: their names in the official order. `PALETTE`: a colour for each.
    `COUNTS`: images of the official release per split, in the order in which `prepare` writes them; images of "test"
    have no labels, unless it is `EVALUATED`. `TYPICAL_SIZE`: height and width of an image in pixels, by which
    `pipeline.cost` estimates disk and hours; a user's own folders have none. A data set that is not evaluated on "val"
    also has `EVALUATED`, the split that is.
    """

    TITLE: str
    CLASSES: tuple[str, ...]
    PALETTE: tuple[RGB, ...]
    COUNTS: Mapping[str, int]
    TYPICAL_SIZE: tuple[int, int]
    Reader: Callable[[Path], Reader]


def load(name: str) -> Dataset:
    """The module of the data set `name`; UserError for an unknown one."""
    if name not in NAMES:
        raise UserError(f"no data set {name!r}; there are {', '.join(NAMES)}")
    return cast(Dataset, import_module(f"{__name__}.{name}"))


def evaluated(name: str) -> str:
    """Return the split on which the data set `name` is evaluated: "val", or what its module has as EVALUATED."""
    return str(getattr(load(name), "EVALUATED", "val"))
