"""Writing prepared splits, the format of refinenet/data/split.py: whole or not at all, in bounded memory."""

from __future__ import annotations

import json
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


# A column of one cell each. pa.array() would first import pandas, half a second, and copies a memoryview that it is
# given, which it then keeps for ever.
def _number(value: int) -> Any:
    return pa.Array.from_buffers(pa.int32(), 1, [None, pa.py_buffer(struct.pack("=i", value))])


def _bytes(values: bytes | Array | None, kind: Any = None) -> Any:
    if values is None:
        return pa.nulls(1, pa.binary())
    data = pa.py_buffer(values if isinstance(values, bytes) else np.ascontiguousarray(values))
    offsets = pa.py_buffer(struct.pack("=ii", 0, data.size))
    return pa.Array.from_buffers(kind or pa.binary(), 1, [None, offsets, data])


class SplitWriter:
    """Appends samples to a split; see `write_split`."""

    def __init__(self, path: Path, schema: Schema) -> None:
        self._schema = schema
        self._file = path.open("wb")
        columns = _COLUMNS.with_metadata({"refinenet": json.dumps(asdict(schema))})
        self._writer = pa.ipc.new_file(self._file, columns)

    def add(self, name: str, image: Array, label: Array | None) -> None:
        """Append one image (H x W x 3 uint8) and its label (H x W uint8, or None). UserError as of `examine`."""
        self.put(examine(self._schema, name, image, label), image, label)

    def put(self, facts: Facts, image: Array, label: Array | None) -> None:
        """Append an image that has been examined."""
        columns = [
            _bytes(facts.name.encode(), pa.string()),
            _number(facts.height),
            _number(facts.width),
            _bytes(facts.present),
            _bytes(facts.counts),
            _bytes(image),
            _bytes(label),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=_COLUMNS))

    def close(self, whole: bool) -> None:
        """End the file, with its footer if it is `whole`."""
        with self._file:
            if whole:
                self._writer.close()


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
