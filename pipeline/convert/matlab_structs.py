"""Find structs in MATLAB files: v5 to v7.2 by scipy, v7.3 (HDF5) by h5py.

MATLAB stores the properties of an object apart from the variable: in the file's subsystem (v5 to v7.2), or in #refs#
(v7.3), like the structs of a cell array. Objects are not followed here: structs are found by their fields, anywhere in
the file.
"""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from refinenet.errors import UserError

Struct = Mapping[str, Any]


def is_matlab(start: bytes) -> bool:
    """Return whether a file that starts with these bytes is a MATLAB file of version 5 or later."""
    return start.startswith((b"MATLAB ", b"\x89HDF\r\n\x1a\n"))


def structs(path: Path, *kinds: set[str]) -> list[Struct]:
    """Return all structs of the file that have every field of one of `kinds`. Raises UserError for a broken file.

    A struct becomes a dict, a struct array or cell array a list (with one element possibly the element itself), text a
    str, numbers an array with MATLAB's dimensions, and what is empty an empty list or array.
    """
    import h5py

    try:
        # Not decided by the header: both kinds begin with MATLAB's, whose text differs between versions.
        return list(_of_hdf5(path, kinds) if h5py.is_hdf5(path) else _of_mat5(path, kinds))
    except Exception as error:  # neither reader has an error type of its own: a broken file raises nearly anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: not a whole MATLAB file ({type(error).__name__}: {reason})") from None


def many(value: Any) -> Sequence[Any]:
    """Return the elements of a cell or struct array, also of one with one element or none."""
    if isinstance(value, np.ndarray):
        return list(value.ravel())
    return value if isinstance(value, list) else [value]


def _of_mat5(path: Path, kinds: Sequence[set[str]]) -> Iterator[Struct]:
    from scipy.io import loadmat

    content = loadmat(path)
    subsystem = content.pop("__function_workspace__", None)
    yield from _among({name: _plain(value) for name, value in content.items() if not name.startswith("__")}, kinds)
    if subsystem is not None:
        # A file in the file. Its header has 8 bytes instead of 128, of which the first 4 are the last of a usual one.
        inner = subsystem.tobytes()
        again: Any = io.BytesIO(b" " * 124 + inner[:4] + inner[8:])
        content = loadmat(again)
        yield from _among({name: _plain(value) for name, value in content.items()}, kinds)


def _among(value: Any, kinds: Sequence[set[str]]) -> Iterator[Struct]:
    if isinstance(value, Mapping):
        if any(value.keys() >= kind for kind in kinds):
            yield value
        value = list(value.values())
    if isinstance(value, list):
        for inner in value:
            yield from _among(inner, kinds)


def _plain(value: Any) -> Any:
    """Convert scipy's struct, struct array, cell array and text to dict, list of dicts, list and str."""
    if not isinstance(value, np.ndarray):
        return value
    if value.dtype.names is not None:
        structs = [{name: _plain(one[name]) for name in value.dtype.names} for one in value.ravel(order="F")]
        return structs[0] if len(structs) == 1 else structs
    if value.dtype == object:
        return [_plain(one) for one in value.ravel(order="F")]
    if value.dtype.kind == "U":
        return str(value.ravel()[0]) if value.size else ""
    return value


def _of_hdf5(path: Path, kinds: Sequence[set[str]]) -> Iterator[Struct]:
    import h5py

    with h5py.File(path, "r") as file:
        groups = [file]
        file.visititems(lambda _, item: groups.append(item) if isinstance(item, h5py.Group) else None)
        for group in groups:
            if any(group.keys() >= kind for kind in kinds):
                yield {name: _value(file, group[name]) for name in group if not name.startswith("#")}


def _value(file: Any, item: Any) -> Any:
    """Convert a variable of a MATLAB 7.3 file as `_plain`. HDF5 has the dimensions in reversed order."""
    if hasattr(item, "keys"):
        fields = {name: item[name] for name in item}
        if not any(map(_of_struct_array, fields.values())):
            return {name: _value(file, field) for name, field in fields.items()}
        columns = [[_value(file, file[reference]) for reference in field[()].ravel()] for field in fields.values()]
        return [dict(zip(fields, row, strict=True)) for row in zip(*columns, strict=True)]
    if item.attrs.get("MATLAB_empty"):  # its content is its dimensions
        return []
    if item.dtype.kind == "O":
        return [_value(file, file[reference]) for reference in item[()].ravel()]
    if item.attrs.get("MATLAB_class") == b"char":
        return "".join(map(chr, item[()].ravel()))
    return np.asarray(item[()]).T


def _of_struct_array(field: Any) -> bool:
    """Return whether a field is that of a struct array: references, one an element, without a MATLAB class."""
    return hasattr(field, "dtype") and field.dtype.kind == "O" and "MATLAB_class" not in field.attrs
