"""What the official archives hold, decoded: photographs, index PNGs, MATLAB files, lists.

`where` is always archive!member and opens every error. Nothing here unpickles.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from refinenet.data import Array
from refinenet.files import UserError


def _open(data: bytes, where: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG"))
            image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = "neither JPEG nor PNG" if isinstance(error, UnidentifiedImageError) else str(error)
        raise UserError(f"{where}: not a whole image ({reason}), expected JPEG or PNG") from None
    return image


def photo(data: bytes, where: str) -> Array:
    """A JPEG or PNG as H x W x 3 uint8 RGB; grey is repeated. No EXIF rotation, as in MATLAB's imread."""
    return np.array(_open(data, where).convert("RGB"))


def index_png(data: bytes, where: str, modes: Sequence[str]) -> Array:
    """The indices of a palette ("P") or 8-bit grey ("L") PNG as H x W uint8; never by way of its colours."""
    image = _open(data, where)
    if image.format != "PNG" or image.mode not in modes:
        raise UserError(f"{where}: {image.format} of mode {image.mode}, expected PNG of mode {' or '.join(modes)}")
    return np.array(image)


def relabel(raw: npt.NDArray[Any], table: Array, where: str) -> Array:
    """`table[raw]`; UserError where `raw` (any integer type) has a value that the table has no entry for."""
    if raw.ndim != 2 or raw.dtype.kind not in "ui":
        raise UserError(f"{where}: label is {raw.dtype} {raw.shape}, expected height x width integers")
    low, high = (int(raw.min()), int(raw.max())) if raw.size else (0, 0)
    if low < 0 or high >= len(table):
        raise UserError(f"{where}: label {low if low < 0 else high}, expected 0 to {len(table) - 1}")
    found: Array = table[raw]
    return found


def matlab(data: bytes | BinaryIO, where: str, variable: str) -> npt.NDArray[Any]:
    """The variable `variable` of a MATLAB 5 to 7.2 file."""
    from scipy.io import loadmat

    try:
        file: Any = io.BytesIO(data) if isinstance(data, bytes) else data
        content = loadmat(file, variable_names=[variable])
    except NotImplementedError:
        raise UserError(f"{where}: a MATLAB 7.3 file, expected MATLAB 5 to 7.2") from None
    except Exception as error:  # scipy's reader has no error type of its own: a broken file raises nearly anything
        raise UserError(f"{where}: not a whole MATLAB file ({type(error).__name__}: {error})".split("\n")[0]) from None
    if variable not in content:
        raise UserError(f"{where}: no variable {variable}")
    return np.asarray(content[variable])


def strings(cells: npt.NDArray[Any], where: str) -> list[str]:
    """The texts of a cell array as `matlab` returns it."""
    texts = [np.asarray(cell).ravel() for cell in cells.ravel()]
    if any(text.dtype.kind != "U" or text.size > 1 for text in texts):
        raise UserError(f"{where}: {cells.dtype} {cells.shape}, expected a cell array of texts")
    return [str(text[0]) if text.size else "" for text in texts]


def text(data: bytes, where: str) -> list[str]:
    """The lines of a text file that are not empty, without the blanks around them."""
    try:
        lines = [line.strip() for line in data.decode("utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not a text file ({error.reason} at byte {error.start})") from None
    return [line for line in lines if line]


def image_list(data: bytes, where: str) -> list[str]:
    """The image names of a list: one a line, each once, at least one."""
    names = text(data, where)
    if not names:
        raise UserError(f"{where}: an empty list, expected one image name a line")
    for name in names:
        if any(char.isspace() or char in "/\\\0" for char in name):
            raise UserError(f"{where}: line {name[:60]!r}, expected an image name")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{where}: {twice} is listed twice")
    return names


def check_classes(found: Sequence[str], expected: Sequence[str], where: str) -> None:
    """UserError unless the archive's own class list is the one that the code knows."""
    if len(found) != len(expected):
        raise UserError(f"{where}: {len(found)} classes, expected {len(expected)}")
    for index, (one, other) in enumerate(zip(found, expected, strict=True), 1):
        if one != other:
            raise UserError(f"{where}: class {index} is {one!r}, expected {other!r}")
