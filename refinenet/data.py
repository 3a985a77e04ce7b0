"""The one format of prepared data: a split is one memory-mapped Arrow file of decoded images and labels.

A record batch is one image, so that a file is written in bounded memory, and each image and label is a view
into the mapped file: reading a crop touches the pages of that crop and copies nothing else.

| column        | type   |                                                                    |
|---------------|--------|--------------------------------------------------------------------|
| name          | string | the image's name in its data set, "2007_000033"                    |
| height, width | int32  | pixels                                                             |
| image         | binary | height x width x 3, uint8, RGB                                     |
| label         | binary | height x width, uint8: class index, 255 = void; null in a test set |
| present       | binary | uint8, ascending: the classes that occur in the label              |

The schema's metadata holds what a label means: data set, split, class names, palette.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from refinenet.files import UserError, whole_file

IGNORE_INDEX = 255  # void: neither trained on nor scored, in every data set

Array = npt.NDArray[np.uint8]
RGB = tuple[int, int, int]

_COLUMNS = pa.schema(
    [
        ("name", pa.string()),
        ("height", pa.int32()),
        ("width", pa.int32()),
        ("image", pa.binary()),
        ("label", pa.binary()),
        ("present", pa.binary()),
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


def _binary(values: Array) -> Any:
    """One cell of a binary column, without a copy. `pa.array([values.data])` would copy, and keep `values` for ever."""
    flat = np.ascontiguousarray(values).reshape(-1)
    offsets = np.array([0, flat.size], np.int32)
    return pa.Array.from_buffers(pa.binary(), 1, [None, pa.py_buffer(offsets), pa.py_buffer(flat)])


class SplitWriter:
    """Appends samples to a split; see `write_split`."""

    def __init__(self, writer: Any, schema: Schema) -> None:
        self._writer = writer
        self._schema = schema
        self.count = 0

    def add(self, name: str, image: Array, label: Array | None) -> None:
        """Append one image (H x W x 3 uint8) and its label (H x W uint8, or None).

        Raises UserError where the two differ in size or the label has a value that is neither a class nor void.
        """
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or 0 in image.shape:
            raise UserError(f"{name}: image is {image.dtype} {image.shape}, expected uint8 height x width x 3")
        present = np.zeros(0, np.intp)
        if label is not None:
            if label.dtype != np.uint8 or label.shape != image.shape[:2]:
                raise UserError(
                    f"{name}: label is {label.dtype} {label.shape}, expected uint8 {image.shape[:2]} as its image"
                )
            present = np.flatnonzero(np.bincount(label.ravel(), minlength=256))
            wrong = present[(present >= len(self._schema.classes)) & (present != IGNORE_INDEX)]
            if wrong.size:
                raise UserError(
                    f"{name}: label {wrong[0]} is outside the {len(self._schema.classes)} classes of "
                    f"{self._schema.dataset} (0 to {len(self._schema.classes) - 1}, or 255 for void)"
                )
        height, width = image.shape[:2]
        columns = [
            pa.array([name], pa.string()),
            pa.array([height], pa.int32()),
            pa.array([width], pa.int32()),
            _binary(image),
            pa.array([None], pa.binary()) if label is None else _binary(label),
            _binary(present[present != IGNORE_INDEX].astype(np.uint8)),
        ]
        self._writer.write_batch(pa.record_batch(columns, schema=_COLUMNS))
        self.count += 1


@contextmanager
def write_split(path: Path, schema: Schema) -> Iterator[SplitWriter]:
    """Write a split under `path`; the name appears when the block has ended without an error."""
    columns = _COLUMNS.with_metadata({"refinenet": json.dumps(asdict(schema))})
    with whole_file(path) as part, pa.OSFile(str(part), "wb") as sink, pa.ipc.new_file(sink, columns) as writer:
        yield SplitWriter(writer, schema)


class Split:
    """A prepared split: `len(split)`, `split[i]`. Samples are read-only views into the memory-mapped file.

    Opening costs the footer only, whatever the size; processes that map the same file share its pages.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            self._reader = pa.ipc.open_file(pa.memory_map(str(path)))
            metadata = json.loads(self._reader.schema.metadata[b"refinenet"])
        except FileNotFoundError:
            raise UserError(f"{path}: no such file; `prepare` makes it") from None
        except (pa.ArrowInvalid, KeyError, TypeError, OSError) as error:
            raise UserError(f"{path}: not a prepared split, or cut short ({error})") from None
        self.schema = Schema(
            metadata["dataset"],
            metadata["split"],
            tuple(metadata["classes"]),
            tuple((r, g, b) for r, g, b in metadata["palette"]),
        )

    def __len__(self) -> int:
        return int(self._reader.num_record_batches)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        batch = self._reader.get_batch(index)
        height, width = batch["height"][0].as_py(), batch["width"][0].as_py()
        image = np.frombuffer(batch["image"][0].as_buffer(), np.uint8).reshape(height, width, 3)
        label = batch["label"][0]
        return Sample(
            batch["name"][0].as_py(),
            image,
            np.frombuffer(label.as_buffer(), np.uint8).reshape(height, width) if label.is_valid else None,
        )

    def present(self) -> list[Array]:
        """For each image the classes that occur in its label, ascending. Reads no pixel."""
        return [np.frombuffer(self._reader.get_batch(i)["present"][0].as_buffer(), np.uint8) for i in range(len(self))]

    def __iter__(self) -> Iterator[Sample]:
        return (self[i] for i in range(len(self)))
