"""The one format of prepared data: a split is one memory-mapped Arrow file of decoded images and labels.

A record batch is one image, so that a file is written in bounded memory, and each image and label is a view
into the mapped file: reading a crop touches the pages of that crop and copies nothing else.

| column        | type   |                                                                              |
|---------------|--------|------------------------------------------------------------------------------|
| name          | string | the image's name in its data set, "2007_000033"                              |
| height, width | int32  | pixels                                                                       |
| present       | binary | uint8, ascending: the classes that occur in the label; empty without a label |
| counts        | binary | int64: the pixels of each class in `present`; null without a label           |
| image         | binary | height x width x 3, uint8, RGB                                               |
| label         | binary | height x width, uint8: class index, 255 = void; null in a test set           |

What is small comes first: all of it that is known of an image lies in one page. The schema's metadata holds what a
label means: data set, split, class names, palette.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from refinenet.data import IGNORE_INDEX
from refinenet.errors import UserError

Array = npt.NDArray[np.uint8]
Integers = npt.NDArray[np.int64]
RGB = tuple[int, int, int]

_COLUMNS = pa.schema(
    [
        ("name", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("present", pa.binary()),
        ("counts", pa.binary()),
        ("image", pa.binary()),
        ("label", pa.binary()),
    ]
)


@dataclass(frozen=True)
class Schema:
    """What the labels of a split mean. `palette` has one colour for each class."""

    dataset: str
    split: str
    classes: tuple[str, ...]
    palette: tuple[RGB, ...]

    def __post_init__(self) -> None:
        if len(self.classes) != len(self.palette) or not 0 < len(self.classes) < IGNORE_INDEX:
            raise ValueError(f"{len(self.classes)} classes, {len(self.palette)} colours: want as many, 1 to 254")


class Sample(NamedTuple):
    """One image. `image`: H x W x 3 uint8 RGB. `label`: H x W uint8, 255 = void, or None where labels are withheld."""

    name: str
    image: Array
    label: Array | None


class _Place(NamedTuple):
    """Where the pixels of an image are: its size, and the first byte of image and label in the file."""

    name: str
    height: int
    width: int
    image: int
    label: int | None


class Split:
    """A prepared split: `len(split)`, `split[i]`. Samples are read-only views into the memory-mapped file.

    Opening costs the footer only, whatever the size; processes that map the same file share its pages.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            file = pa.memory_map(str(path))
            self._reader = pa.ipc.open_file(file)
            metadata = json.loads(self._reader.schema.metadata[b"refinenet"])
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; `prepare` makes it") from None
        except (pa.ArrowInvalid, KeyError, TypeError, OSError) as error:
            raise UserError(f"{path}: not a prepared split, or cut short ({error})") from None
        if "counts" not in self._reader.schema.names:
            raise UserError(f"{path}: prepared by an older version; run prepare again")
        self.schema = Schema(
            metadata["dataset"],
            metadata["split"],
            tuple(metadata["classes"]),
            tuple((r, g, b) for r, g, b in metadata["palette"]),
        )

        file.seek(0)
        self._bytes = np.frombuffer(file.read_buffer(), np.uint8)  # the mapped file
        self._places: dict[int, _Place] = {}  # of the images that were asked for; to find one again takes pyarrow 50 us

    def __len__(self) -> int:
        return int(self._reader.num_record_batches)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        if index not in self._places:
            self._places[index] = self._find(index)
        name, height, width, image, label = self._places[index]
        pixels = height * width
        return Sample(
            name,
            self._bytes[image : image + 3 * pixels].reshape(height, width, 3),
            None if label is None else self._bytes[label : label + pixels].reshape(height, width),
        )

    def _find(self, index: int) -> _Place:
        batch = self._reader.get_batch(index)
        # A column's last buffer lies in the mapped file; of a cell, as_buffer() would make a copy.
        image, label = (
            None if batch[name].null_count else batch[name].buffers()[-1].address - self._bytes.ctypes.data
            for name in ("image", "label")
        )
        return _Place(
            batch["name"][0].as_py(), batch["height"][0].as_py(), batch["width"][0].as_py(), image or 0, label
        )

    def present(self) -> list[Array]:
        """For each image the classes that occur in its label, ascending. Reads no pixel."""
        return [np.frombuffer(self._reader.get_batch(i)["present"][0].as_buffer(), np.uint8) for i in range(len(self))]

    def counts(self) -> Integers:
        """Pixels of each image that have each class, N x (classes + 1); the last column is void. Reads no pixel.

        The row of an image without a label is 0; any other sums to height x width.
        """
        void = len(self.schema.classes)
        counts = np.zeros((len(self), void + 1), np.int64)
        for index, row in enumerate(counts):
            batch = self._reader.get_batch(index)
            if batch["counts"][0].is_valid:
                found = np.frombuffer(batch["counts"][0].as_buffer(), np.int64)
                row[np.frombuffer(batch["present"][0].as_buffer(), np.uint8)] = found
                row[void] = batch["height"][0].as_py() * batch["width"][0].as_py() - found.sum()
        return counts

    def sizes(self) -> Integers:
        """Height and width of each image, N x 2, in pixels. Reads no pixel."""
        batches = (self._reader.get_batch(index) for index in range(len(self)))
        sizes = [(batch["height"][0].as_py(), batch["width"][0].as_py()) for batch in batches]
        return np.array(sizes, np.int64).reshape(-1, 2)

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))
