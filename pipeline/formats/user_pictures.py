"""Images and masks in the formats in which people have their own: JPEG, PNG, TIFF, BMP, WebP, GIF.

What Pillow does silently to a mask is undone or refused here: it spreads grey values of 1, 2 and 4 bits over 0 to
255, cuts colours of 16 bits to 8, and reads lossy formats, in which borders have values that nobody drew.
"""

from __future__ import annotations

import io
import warnings
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.formats import decode
from pipeline.formats.archive import printable
from refinenet.data.split import Array
from refinenet.errors import UserError

FORMATS = ("JPEG", "PNG", "TIFF", "BMP", "WEBP", "GIF")
LOSSLESS = "PNG, or TIFF, BMP, GIF or WebP without loss"
_SPREAD = {2: 85, 4: 17}  # by which Pillow multiplies grey values of so many bits
_BITS_PER_SAMPLE = 258  # TIFF's tag


@dataclass(frozen=True)
class Mask:
    """A decoded mask. `values`: H x W uint8, None of colours that are not grey. `bits`: of a pixel's channel.

    `palette`: the colours of the values, N x 3 uint8, where the file has them.
    """

    picture: Any
    values: Array | None
    bits: int
    palette: Array | None = None

    def colours(self) -> Array:
        """Return the mask as it looks, H x W x 3 uint8."""
        if self.bits > 8 and self.values is not None:
            return np.repeat(self.values[..., None], 3, axis=2)
        return np.asarray(self.picture.convert("RGB"))


def photo(data: bytes, where: str) -> Array:
    """Decode an image to H x W x 3 uint8 RGB, upright and on white as people see it.

    Raises UserError where it is broken, has several pages or more than 8 bits a channel.
    """
    from pipeline.formats import photo as seen

    picture = _open(data, where)
    if (bits := _bits(picture, data)) > 8:
        raise UserError(f"{where}: {bits} bits a channel, expected 8: which of the values are seen nobody knows here")
    try:
        return np.asarray(picture.convert("RGB")) if seen.is_plain(picture) else seen.as_seen(picture)
    except ValueError as error:
        raise UserError(f"{where}: {printable(str(error))}") from None


def mask(data: bytes, where: str) -> Mask:
    """Decode a mask. Raises UserError where its values would not be those that were drawn."""
    picture = _open(data, where)
    if (lossy := _lossy(picture, data)) is not None:
        raise UserError(f"{where}: {lossy}, which changes values where it compresses; expected {LOSSLESS}")
    bits = _bits(picture, data)
    if picture.mode == "P":  # what is transparent in it says nothing of the values
        return Mask(picture, np.asarray(picture), bits, np.array(picture.getpalette("RGB"), np.uint8).reshape(-1, 3))
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        wide = np.asarray(picture)
        if wide.min() < 0 or wide.max() > 255:
            raise UserError(f"{where}: values {wide.min()} to {wide.max()} in {bits} bits, expected 0 to 255")
        return Mask(picture, wide.astype(np.uint8), bits)
    if picture.has_transparency_data:
        alpha = np.asarray(picture.convert("RGBA"))[..., 3]
        if see_through := int(np.count_nonzero(alpha != 255)):
            raise UserError(f"{where}: {see_through} transparent pixels, expected none: a pixel has one class")
        picture = picture.convert("L" if picture.mode in ("L", "LA", "La") else "RGB")
    if bits > 8 or picture.mode not in ("1", "L", "RGB"):
        raise UserError(f"{where}: {bits} bits a channel, mode {picture.mode}; expected 8 bits of grey, palette or RGB")
    pixels = np.asarray(picture)
    if picture.mode == "RGB":
        grey = bool((pixels == pixels[..., :1]).all())
        return Mask(picture, np.ascontiguousarray(pixels[..., 0]) if grey else None, bits)
    return Mask(picture, pixels.astype(np.uint8) // np.uint8(_SPREAD.get(bits, 1)), bits)


def _open(data: bytes, where: str) -> Any:
    if (pages := _pages(data, where)) > 1:
        raise UserError(f"{where}: {pages} pages or frames, expected 1")
    return decode.open_image(data, where, FORMATS)


def _pages(data: bytes, where: str) -> int:
    """Return the number of pages or frames; 1 of what cannot be opened, which is told of when it is decoded.

    A JPEG of several pictures is a photograph with its preview. Raises UserError for a broken list of pages.
    """
    from PIL import Image

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of odd metadata
        try:
            picture = Image.open(io.BytesIO(data), formats=("TIFF", "GIF", "WEBP", "PNG"))
        except Exception:  # whatever a broken header leads Pillow's parsers to
            return 1
        try:
            return int(getattr(picture, "n_frames", 1))
        except Exception as error:
            raise UserError(f"{where}: not a whole image ({printable(str(error))}), expected one page") from None


def _bits(picture: Any, data: bytes) -> int:
    """Return the bits of a channel, which Pillow's mode does not tell: PNG's header and TIFF's tag do."""
    if picture.format == "PNG":
        return data[24]
    if picture.format == "TIFF":
        return max(map(int, picture.tag_v2.get(_BITS_PER_SAMPLE, (1,))))
    if picture.mode == "1":
        return 1
    return 8


def _lossy(picture: Any, data: bytes) -> str | None:
    """Return what makes the file lossy, None where nothing does."""
    if picture.format in ("JPEG", "MPO"):
        return "a JPEG"
    if picture.format == "WEBP":
        at = 12  # of the first chunk: four letters, its size, its content, a filling byte where that is odd
        while (kind := data[at : at + 4]) not in (b"VP8 ", b"VP8L", b""):
            at += 8 + (int.from_bytes(data[at + 4 : at + 8], "little") + 1) // 2 * 2
        return "a lossy WebP" if kind == b"VP8 " else None
    if picture.format == "TIFF" and "jpeg" in str(picture.info.get("compression", "")):
        return "a TIFF with JPEG inside"
    return None
