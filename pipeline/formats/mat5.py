"""MATLAB files of versions 5 to 7.2: looked over first, then read by scipy.

scipy's reader believes a file: it takes as much memory as the file says, follows arrays in arrays until the stack is
used up, and indexes with what is written there; broken files end the process (scipy 1.17: 20,000 arrays in arrays, a
text without dimensions). Here each variable is unpacked within a limit, and its arrays are followed as scipy will
follow them; what is not as MathWorks' description of the format has it stops here. So do objects and functions, which
scipy would read as data (nothing in these files is ever executed) and no data set has.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
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

    if data[124:128] in (b"\x00\x02IM", b"\x02\x00MI"):
        raise UserError(f"{where}: a MATLAB 7.3 file, expected MATLAB 5 to 7.2")
    try:
        plain: Any = io.BytesIO(_looked_over(data, limit))
        content = loadmat(plain, variable_names=[variable])
    except Exception as error:  # scipy's reader has no error type of its own: a broken file raises nearly anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: not a whole MATLAB file ({type(error).__name__}: {reason})") from None
    if variable not in content:
        raise UserError(f"{where}: no variable {variable}")
    return np.asarray(content[variable])


def _looked_over(data: bytes, limit: int) -> bytes:
    """The same file without compression; ValueError or struct.error where scipy should not see it."""
    order = {b"IM": "<", b"MI": ">"}.get(data[126:_HEADER])
    if order is None:
        raise ValueError("no MATLAB 5 header")
    parts, at, total = [data[:_HEADER]], _HEADER, 0
    while at < len(data):
        kind, size = struct.unpack_from(f"{order}II", data, at)
        variable = data[at : at + 8 + size]
        at += 8 + size
        if len(variable) < 8 + size:
            raise ValueError(f"cut short by {8 + size - len(variable)} bytes")
        if kind == _COMPRESSED:
            inflate = zlib.decompressobj()
            variable = inflate.decompress(variable[8:], limit - total)
            if not inflate.eof:
                raise ValueError(f"unpacks to more than {limit} bytes" if inflate.unconsumed_tail else "cut short")
            kind, size = struct.unpack_from(f"{order}II", variable)
            if len(variable) < 8 + size:
                raise ValueError(f"cut short by {8 + size - len(variable)} bytes")
        if kind != _MATRIX:
            raise ValueError(f"a variable of type {kind}")
        total += 8 + size
        if total >= limit:
            raise ValueError(f"unpacks to more than {limit} bytes")
        parts.append(variable[: 8 + size])
    plain = b"".join(parts)
    if len(plain) % 4:
        raise ValueError(f"{len(plain)} bytes, expected a multiple of 4")
    numbers: Any = np.frombuffer(plain, f"{order}u4").astype(np.uint32, copy=False)
    _follow(memoryview(numbers), memoryview(numbers.view(np.int32)))
    return plain


def _follow(words: memoryview[int], ints: memoryview[int]) -> None:
    """ValueError where scipy should not go: `words` is the file in numbers of 4 bytes, `ints` the same with a sign."""
    at = _HEADER // 4
    while at < len(words):
        left = [1]  # arrays still to come at each depth
        while left:
            if not left[-1]:
                left.pop()
                continue
            left[-1] -= 1
            inside, at = _array(words, ints, at)
            if inside:
                if inside > (len(words) - at) // 2:
                    raise ValueError(f"an array of {inside} arrays in {4 * (len(words) - at)} bytes")
                left.append(inside)
                if len(left) > DEPTH:
                    raise ValueError(f"arrays in arrays, more than {DEPTH} deep")


def _element(words: memoryview[int], at: int) -> tuple[int, int, int, int]:
    """Type of an element, size in bytes, where its data are and where the next one is."""
    kind = words[at]
    if kind >> 16:  # a small one: size and type in one word, the data in the next
        kind, size, start, after = kind & 0xFFFF, kind >> 16, at + 1, at + 2
        if size > 4:
            raise ValueError(f"a small element of {size} bytes")
    else:
        size, start = words[at + 1], at + 2
        after = start + (size + 7) // 8 * 2
    if after > len(words):
        raise ValueError(f"an element of {size} bytes at byte {4 * at}")
    return kind, size, start, after


def _array(words: memoryview[int], ints: memoryview[int], at: int) -> tuple[int, int]:
    """How many arrays are in the one that begins at `at`, and where the first of them does, or what follows it."""
    if words[at] != _MATRIX:
        raise ValueError(f"type {words[at]} where an array begins")
    if not words[at + 1]:
        return 0, at + 2
    flags = words[at + 4]
    matlab_class, parts = flags & 0xFF, 1 + (flags >> 11 & 1)  # of complex numbers two
    if (words[at + 2], words[at + 3]) != (_UINT32, 8) or matlab_class not in _CLASSES:
        raise ValueError(f"an array of class {matlab_class}, expected numbers, a text, cells or structs")
    kind, size, start, at = _element(words, at + 6)
    dimensions = ints[start : start + size // 4].tolist()
    if kind != _INT32 or size % 4 or not 2 <= len(dimensions) <= 32 or min(dimensions) < 0:
        raise ValueError(f"dimensions {dimensions[:9]}")
    kind, _, _, at = _element(words, at)
    if kind != _INT8:
        raise ValueError(f"a name of type {kind}")
    count = math.prod(dimensions)
    if matlab_class == _CELL:
        return count, at
    if matlab_class == _STRUCT:
        kind, size, start, at = _element(words, at)
        names, all_names, _, at = _element(words, at)
        length = ints[start]
        if (kind, size, names) != (_INT32, 4, _INT8) or length < 1 or all_names % length:
            raise ValueError(f"names of fields in {all_names} bytes, {length} each")
        return count * (all_names // length), at
    if matlab_class == _SPARSE:
        if len(dimensions) != 2:
            raise ValueError(f"dimensions {dimensions[:9]} of a sparse array")
        parts += 2
    for _ in range(parts if matlab_class != _CHAR else 1):
        kind, size, _, at = _element(words, at)
        if matlab_class == _CHAR:
            if kind not in _TEXTS:
                raise ValueError(f"a text of type {kind}")
        elif kind not in _SIZES or (matlab_class != _SPARSE and size != count * _SIZES[kind]):
            raise ValueError(f"{size} bytes of type {kind} for {count} numbers")
    return 0, at
