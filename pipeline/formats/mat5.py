"""MATLAB files of versions 5 to 7.2: looked over first, then read by scipy.

scipy's reader believes a file: it takes as much memory as the file says, follows arrays in arrays until the stack is
used up, and reads past the end of what is there. Of files with a few changed bytes, one in 200 ends the process
(scipy 1.17): numbers of an unknown type, a text without dimensions, a variable that is cut short. Therefore each
variable is unpacked within a limit here, and its arrays are followed as scipy will follow them. Objects and functions,
which scipy would read as data (nothing in these files is ever executed), are refused: no data set has them.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

from refinenet.errors import UserError

LIMIT = 1 << 27  # bytes of all variables, unpacked; an official label has less than a million
DEPTH = 32  # arrays in arrays; the deepest official file, Annotations_Part, has 5

_HEADER = 128
_INT8, _INT32, _UINT32, _MATRIX, _COMPRESSED = 1, 5, 6, 14, 15
_SIZES = {1: 1, 2: 1, 3: 2, 4: 2, 5: 4, 6: 4, 7: 4, 9: 8, 12: 8, 13: 8}  # of the types of numbers, in bytes
_TEXTS = (1, 2, 3, 4, 16, 17, 18)  # types of characters, the last three in Unicode
_CELL, _STRUCT, _CHAR, _SPARSE = 1, 2, 4, 5
_CLASSES = (_CELL, _STRUCT, _CHAR, _SPARSE, *range(6, 16))  # the last are numbers


def read(data: bytes, where: str, variable: str, limit: int = LIMIT) -> npt.NDArray[Any]:
    """The variable `variable` of a file of `data`; UserError, which opens with `where`, for anything else."""
    from scipy.io import loadmat

    if data[124:_HEADER] in (b"\x00\x02IM", b"\x02\x00MI"):
        raise UserError(f"{where}: a MATLAB 7.3 file, expected MATLAB 5 to 7.2")
    try:
        order = {b"IM": "<", b"MI": ">"}[data[126:_HEADER]]
        plain: Any = io.BytesIO()
        plain.write(data[:_HEADER])
        for one in _unpacked(data, order, limit):
            words: Any = np.frombuffer(one, f"{order}u4").astype(np.uint32, copy=False)
            if _end(memoryview(words), memoryview(words.view(np.int32)), 0, 1) != len(words):
                raise ValueError(f"a variable of {len(one)} bytes, with more than an array in it")
            plain.write(one)
        plain.seek(0)
        content = loadmat(plain, variable_names=[variable])
    except Exception as error:  # scipy's reader has no error type of its own: a broken file raises nearly anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: not a whole MATLAB file ({type(error).__name__}: {reason})") from None
    if variable not in content:
        raise UserError(f"{where}: no variable {variable}")
    return np.asarray(content[variable])


def _unpacked(data: bytes, order: str, limit: int) -> Iterator[bytes]:
    """Yield the file's variables, without compression; ValueError past `limit` bytes of all of them."""
    at, total = _HEADER, 0
    while at < len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        variable = data[at : at + 8 + size]
        at += 8 + size
        if kind == _COMPRESSED and len(variable) == 8 + size:
            inflate = zlib.decompressobj()
            variable = inflate.decompress(variable[8:], limit - total + 1)
            if not inflate.eof:
                more = len(variable) > limit - total
                raise ValueError(f"unpacks to more than {limit} bytes" if more else "cut short")
            kind, size = struct.unpack_from(f"{order}II", variable)
        total += len(variable)
        if total > limit:
            raise ValueError(f"unpacks to more than {limit} bytes")
        if len(variable) < 8 + size:
            raise ValueError(f"cut short by {8 + size - len(variable)} bytes")
        yield variable[: 8 + size]


def _element(words: memoryview[int], at: int, kinds: Collection[int]) -> tuple[int, int, int, int]:
    """Type of the element at word `at`, its size in bytes, at which word its data begin and the next element does."""
    kind = words[at]
    if kind >> 16:  # a small one: size and type in one word, the data in the next
        kind, size, start, after = kind & 0xFFFF, kind >> 16, at + 1, at + 2
        if size > 4:
            raise ValueError(f"a small element of {size} bytes")
    else:
        size, start = words[at + 1], at + 2
        after = start + (size + 7) // 8 * 2
    if after > len(words):
        raise ValueError(f"an element of {size} bytes at byte {4 * at} of {4 * len(words)}")
    if kind not in kinds:
        raise ValueError(f"an element of type {kind} at byte {4 * at}, expected {', '.join(map(str, kinds))}")
    return kind, size, start, after


def _end(words: memoryview[int], ints: memoryview[int], at: int, depth: int) -> int:
    """Where the array at word `at` ends; ValueError where scipy should not read it.

    Args:
        words: The variable in numbers of 4 bytes.
        ints: The same, with a sign.
        at: Which of them is the array's first.
        depth: 1 for the variable itself, one more for what is in it, and so on.
    """
    if depth > DEPTH:
        raise ValueError(f"arrays in arrays, more than {DEPTH} deep")
    if words[at] != _MATRIX:
        raise ValueError(f"type {words[at]} where an array begins")
    if not words[at + 1]:
        return at + 2
    flags = words[at + 4]
    matlab_class, parts = flags & 0xFF, 1 + (flags >> 11 & 1)  # of complex numbers two
    if (words[at + 2], words[at + 3]) != (_UINT32, 8) or matlab_class not in _CLASSES:
        raise ValueError(f"an array of class {matlab_class}, expected numbers, a text, cells or structs")
    _, size, start, at = _element(words, at + 6, [_INT32])
    dimensions = ints[start : start + size // 4].tolist()
    if size % 4 or not 2 <= len(dimensions) <= 32 or min(dimensions) < 0:
        raise ValueError(f"dimensions {dimensions[:9]}")
    _, _, _, at = _element(words, at, [_INT8])  # its name
    count = math.prod(dimensions)
    if matlab_class in (_CELL, _STRUCT):
        if matlab_class == _STRUCT:
            _, size, start, at = _element(words, at, [_INT32])
            _, names, _, at = _element(words, at, [_INT8])
            if size != 4 or ints[start] < 1 or names % ints[start]:
                raise ValueError(f"names of fields in {names} bytes, {ints[start]} each")
            count *= names // ints[start]
        if count > (len(words) - at) // 2:
            raise ValueError(f"an array of {count} arrays in {4 * (len(words) - at)} bytes")
        for _ in range(count):
            at = _end(words, ints, at, depth + 1)
        return at
    if matlab_class == _SPARSE:
        if len(dimensions) != 2:
            raise ValueError(f"dimensions {dimensions[:9]} of a sparse array")
        parts += 2
    for _ in range(1 if matlab_class == _CHAR else parts):
        kind, size, _, at = _element(words, at, _TEXTS if matlab_class == _CHAR else _SIZES)
        if matlab_class not in (_CHAR, _SPARSE) and size != count * _SIZES[kind]:
            raise ValueError(f"{size} bytes of type {kind} for {count} numbers")
    return at
