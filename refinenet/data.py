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
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from refinenet.atomic import whole_file
from refinenet.errors import UserError

IGNORE_INDEX = 255  # void: neither trained on nor scored, in every data set

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


class Facts(NamedTuple):
    """What a split says of an image beside its pixels: the columns of those names, as bytes where they are binary."""

    name: str
    height: int
    width: int
    present: bytes
    counts: bytes | None


def examine(schema: Schema, name: str, image: Array, label: Array | None) -> Facts:
    """The facts of an image (H x W x 3 uint8) and its label (H x W uint8, or None).

    Raises UserError where the two differ in size or the label has a value that is neither a class nor void.
    """
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
        raise UserError(f"{name}: image is {image.dtype} {image.shape}, expected uint8 height x width x 3")
    height, width, _ = image.shape
    if label is None:
        return Facts(name, height, width, b"", None)
    if label.dtype != np.uint8 or label.shape != (height, width):
        raise UserError(f"{name}: label is {label.dtype} {label.shape}, expected uint8 {height, width} as its image")
    from PIL import Image

    # np.bincount makes each byte eight first, and takes twice the time.
    counts = np.array(Image.fromarray(label).histogram()[:IGNORE_INDEX], np.int64)
    present = np.flatnonzero(counts)
    if present.size and present[-1] >= len(schema.classes):
        wrong = present[present >= len(schema.classes)][0]
        raise UserError(
            f"{name}: label {wrong} is outside the {len(schema.classes)} classes of "
            f"{schema.dataset} (0 to {len(schema.classes) - 1}, or 255 for void)"
        )
    return Facts(name, height, width, present.astype(np.uint8).tobytes(), counts[present].tobytes())


class Layout(NamedTuple):
    """Bytes that begin at `place` in the file; the first None among `parts` stands for the image, another its label."""

    place: int
    parts: tuple[bytes | None, ...]


def fill(descriptor: int, layout: Layout, image: Array, label: Array | None) -> None:
    """Write `layout` with the pixels of an image and its label to the open file `descriptor`, whose position moves."""
    pixels = (np.ascontiguousarray(values).reshape(-1).data for values in (image, label) if values is not None)
    rest = [memoryview(next(pixels) if part is None else part) for part in layout.parts]
    size = sum(map(len, rest))
    os.lseek(descriptor, layout.place, os.SEEK_SET)
    while rest:
        done = os.writev(descriptor, rest)  # 2 GiB at most
        while rest and done >= len(rest[0]):
            done -= len(rest.pop(0))
        if rest:
            rest[0] = rest[0][done:]
    if hasattr(os, "posix_fadvise"):  # the disk may begin with it: fsync would have to wait for all at the end
        os.posix_fadvise(descriptor, layout.place, size, os.POSIX_FADV_DONTNEED)


class _Sink:
    """What pyarrow takes for the file. It keeps what should be written, but of `pixels` only that it was their turn."""

    def __init__(self) -> None:
        self.pixels: tuple[int, ...] = ()  # addresses
        self.closed = False
        self._begin = self._end = 0
        self._parts: list[bytes | None] = []

    def write(self, data: Any) -> None:
        if isinstance(data, bytes):
            self._parts.append(data)
        else:
            self._parts.append(None if data.address in self.pixels else data.to_pybytes())
        self._end += len(data)

    def tell(self) -> int:
        return self._end

    def flush(self) -> None: ...

    def close(self) -> None: ...

    def take(self) -> Layout:
        """What came since the last call."""
        layout = Layout(self._begin, tuple(self._parts))
        self._begin, self._parts = self._end, []
        return layout


# A column of one cell each. pa.array() would first import pandas, half a second, and copies a memoryview that it is
# given, which it then keeps for ever.
def _number(value: int) -> Any:
    return pa.Array.from_buffers(pa.int32(), 1, [None, pa.py_buffer(struct.pack("=i", value))])


def _bytes(values: Any, kind: Any = None) -> Any:
    offsets = pa.py_buffer(struct.pack("=ii", 0, len(values)))
    return pa.Array.from_buffers(kind or pa.binary(), 1, [None, offsets, pa.py_buffer(values)])


class SplitWriter:
    """Appends samples to a split; see `write_split`.

    `add` does it. To have it written by whoever has the pixels, in any order: `reserve` image after image, and `fill`.
    The bytes of the file are the same.
    """

    def __init__(self, path: Path, schema: Schema) -> None:
        self.path = path  # while it is being written
        self.schema = schema
        self._file = path.open("wb", buffering=0)
        self._sink = _Sink()
        columns = _COLUMNS.with_metadata({"refinenet": json.dumps(asdict(schema))})
        self._writer = pa.ipc.new_file(pa.PythonFile(self._sink, "w"), columns)

    def add(self, name: str, image: Array, label: Array | None) -> None:
        """Append one image (H x W x 3 uint8) and its label (H x W uint8, or None). UserError as of `examine`."""
        self.put(examine(self.schema, name, image, label), image, label)

    def put(self, facts: Facts, image: Array, label: Array | None) -> None:
        """Append an image that has been examined."""
        fill(self._file.fileno(), self.reserve(facts), image, label)

    def reserve(self, facts: Facts) -> Layout:
        """Append an image but for writing it; where and how that is to be done."""
        pixels = facts.height * facts.width
        memory = pa.py_buffer(np.empty(4 * pixels, np.uint8))  # that nobody touches: address and size are looked at
        image, label = memory.slice(0, 3 * pixels), memory.slice(3 * pixels)
        self._sink.pixels = (image.address, label.address)
        null = pa.nulls(1, pa.binary())
        columns = [
            _bytes(facts.name.encode(), pa.string()),
            _number(facts.height),
            _number(facts.width),
            _bytes(facts.present),
            null if facts.counts is None else _bytes(facts.counts),
            _bytes(image),
            null if facts.counts is None else _bytes(label),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=_COLUMNS))
        layout = self._sink.take()
        assert layout.parts.count(None) == 1 + (facts.counts is not None), "pyarrow wrote a copy of a buffer"
        return layout

    def close(self, whole: bool) -> None:
        """End the file, with its footer if it is `whole`."""
        with self._file:
            if whole:
                self._writer.close()
                layout = self._sink.take()
                self._file.seek(layout.place)
                self._file.write(b"".join(part or b"" for part in layout.parts))


@contextmanager
def write_split(path: Path, schema: Schema) -> Iterator[SplitWriter]:
    """Write a split under `path`; the name appears when the block has ended without an error."""
    with whole_file(path) as part:
        writer = SplitWriter(part, schema)
        try:
            yield writer
        except BaseException:
            writer.close(whole=False)
            raise
        writer.close(whole=True)


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
