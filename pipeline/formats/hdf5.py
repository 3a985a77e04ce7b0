"""HDF5 files (MATLAB 7.3), of which only plain data sets of the file itself are read.

HDF5 can lead elsewhere: links to other files, data sets whose bytes lie in any file of this machine or are put
together from several. Those are refused before they are opened.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from mmap import mmap
from pathlib import Path
from typing import Any

from pipeline.formats.archive import printable
from refinenet.errors import UserError

NUMBERS = "uif"  # NumPy's kinds: MATLAB keeps a variable in the type in which it was computed, mostly double
_KINDS = {NUMBERS: "numbers", "O": "references"}


@contextmanager
def _one_line(what: str) -> Iterator[None]:
    """Turn what h5py raises, which by the damage is nearly anything, into a UserError that begins with `what`."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} ({printable(str(error))})") from None


class File:
    """An HDF5 file open for reading. `where` opens every error."""

    def __init__(self, file: Path | mmap, where: str) -> None:
        import h5py

        self.where = where
        with _one_line(f"{where}: not a whole HDF5 file"):
            self._file = h5py.File(file, "r")

    def close(self) -> None:
        self._file.close()

    def dataset(self, name: str, kinds: str = NUMBERS) -> Any:
        """The data set "group/name" of a NumPy kind in `kinds`: NUMBERS, or "O" references."""
        import h5py

        found: Any = self._file
        with _one_line(f"{self.where}: {name} cannot be read"):
            for part in name.split("/"):
                if not isinstance(found, h5py.Group) or part not in found:
                    raise UserError(f"{self.where}: no {name}")
                if not isinstance(found.get(part, getlink=True), h5py.HardLink):
                    raise UserError(f"{self.where}: {name} is a link, expected a data set of this file")
                found = found[part]
            return self._plain(found, name, kinds)

    def referenced(self, reference: Any, name: str) -> Any:
        """The data set of numbers that `reference` leads to; `name` is what errors call it."""
        with _one_line(f"{self.where}{name}: cannot be read"):
            return self._plain(self._file[reference], name, NUMBERS)

    def read(self, dataset: Any, index: int | tuple[()], name: str, limit: int) -> Any:
        """`dataset[index]`; UserError where that is damaged or more than `limit` numbers."""
        shape = dataset.shape[1:] if isinstance(index, int) else dataset.shape
        if math.prod(shape) > limit:
            raise UserError(f"{self.where}{name}: {' x '.join(map(str, shape))}, expected {limit} numbers at most")
        with _one_line(f"{self.where}{name}: cannot be read"):
            return dataset[index]

    def _plain(self, found: Any, name: str, kinds: str) -> Any:
        import h5py

        if not isinstance(found, h5py.Dataset):
            raise UserError(f"{self.where}: {name} is no data set")
        if found.external or found.is_virtual:
            raise UserError(f"{self.where}: the bytes of {name} lie in other files")
        if found.dtype.kind not in kinds or (found.dtype.kind == "O" and h5py.check_ref_dtype(found.dtype) is None):
            raise UserError(f"{self.where}: {name} is {found.dtype}, expected {_KINDS[kinds]}")
        return found
