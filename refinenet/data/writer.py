"""Writing prepared splits, the format of refinenet/data/split.py: whole or not at all, in bounded memory."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from refinenet.atomic import atomic_file
from refinenet.data import IGNORE_INDEX
from refinenet.data.split import _COLUMNS, Array, Schema
from refinenet.errors import UserError


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
    with atomic_file(path) as part:
        writer = SplitWriter(part, schema)
        try:
            yield writer
        except BaseException:
            writer.close(whole=False)
            raise
        writer.close(whole=True)
