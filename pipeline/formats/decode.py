"""What the official archives hold, decoded: photographs, index PNGs, MATLAB files, lists.

`where` is always archive!member and opens every error. Nothing here unpickles.
"""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.formats import mat5
from pipeline.formats.archive import printable
from refinenet.data.split import Array
from refinenet.errors import UserError

PIXELS = 1 << 27  # of one image, 400 MB decoded; the largest official one, of Cityscapes, has 2 million


def open_image(data: bytes, where: str, formats: Sequence[str] = ("JPEG", "PNG")) -> Any:
    """Return the decoded Pillow image; UserError where it is cut short, too large or none of `formats`."""
    from PIL import Image, UnidentifiedImageError

    *others, last = formats
    expected = f"{', '.join(others)} or {last}"

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of large images and of odd metadata: what matters here is an error
            image = Image.open(io.BytesIO(data), formats=tuple(formats))
            if image.width * image.height <= PIXELS:
                image.load()
                return image
            reason = f"{image.width} x {image.height} pixels, {PIXELS} at most"
    except UnidentifiedImageError:
        reason = "neither JPEG nor PNG" if len(formats) == 2 else "of no known format"
    except Exception as error:  # besides OSError and SyntaxError, what a broken header leads Pillow's parsers to
        reason = str(error)
    raise UserError(f"{where}: not a whole image ({printable(reason)}), expected {expected}")


def photo(data: bytes, where: str) -> Array:
    """A JPEG or PNG as H x W x 3 uint8 RGB; grey is repeated. No EXIF rotation, as in MATLAB's imread."""
    image = open_image(data, where)
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))  # either would be one more copy


def index_png(data: bytes, where: str, modes: Sequence[str]) -> Array:
    """The indices of a palette ("P") or 8-bit grey ("L") PNG as H x W uint8; never by way of its colours."""
    image = open_image(data, where)
    if image.format != "PNG" or image.mode not in modes:
        raise UserError(f"{where}: {image.format} of mode {image.mode}, expected PNG of mode {' or '.join(modes)}")
    bits = data[24]  # in the header, which is always the first chunk
    if image.mode == "L" and bits != 8:  # Pillow stretches the values of these to 0 to 255
        raise UserError(f"{where}: grey PNG of {bits} bits, expected 8")
    return np.asarray(image)


def relabel(raw: npt.NDArray[Any], table: Array, where: str) -> Array:
    """`table[raw]`; UserError where `raw` has a value that is not whole or that the table has no entry for.

    The values are of any type of number: what MATLAB has computed is double, whatever it counts.
    """
    if raw.ndim != 2 or raw.dtype.kind not in "buif":
        raise UserError(f"{where}: label is {raw.dtype} {raw.shape}, expected height x width numbers")
    raw = np.ascontiguousarray(raw)  # MATLAB's are columns first, in which the rest would take twice the time
    if raw.dtype.kind == "f" and not (whole := raw == np.floor(raw)).all():  # NaN is not equal to itself
        raise UserError(f"{where}: label {raw[~whole][0]:g}, expected whole numbers, 0 to {len(table) - 1}")
    low, high = (raw.min(), raw.max()) if raw.size else (0, 0)
    if low < 0 or high >= len(table):
        raise UserError(f"{where}: label {low if low < 0 else high:.15g}, expected 0 to {len(table) - 1}")
    if raw.dtype.kind in "bf":
        raw = raw.astype(np.uint16 if len(table) > 256 else np.uint8)
    if raw.dtype == np.uint8 and np.array_equal(table, np.arange(len(table))):
        return raw
    return table.take(raw, mode="clip")  # clips nothing here, and takes half the time of table[raw]


def matlab(data: bytes, where: str, variable: str, limit: int = mat5.LIMIT) -> npt.NDArray[Any]:
    """The variable `variable` of a MATLAB 5 to 7.2 file, which unpacks to `limit` bytes at most."""
    return mat5.read(data, where, variable, limit)


def strings(cells: npt.NDArray[Any], where: str) -> list[str]:
    """The texts of a cell array as `matlab` returns it."""
    texts = [np.asarray(cell).ravel() for cell in cells.ravel()] if cells.dtype.kind in "OU" else [cells]
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
    (name, times), *_ = Counter(names).most_common(1)
    if times > 1:
        raise UserError(f"{where}: {printable(name)} is listed {'twice' if times == 2 else f'{times} times'}")
    return names


def check_classes(found: Sequence[str], expected: Sequence[str], where: str) -> None:
    """UserError unless the archive's own class list is the one that the code knows."""
    if len(found) != len(expected):
        raise UserError(f"{where}: {len(found)} classes, expected {len(expected)}")
    for index, (one, other) in enumerate(zip(found, expected, strict=True), 1):
        if one != other:
            raise UserError(f"{where}: class {index} is {one!r}, expected {other!r}")
