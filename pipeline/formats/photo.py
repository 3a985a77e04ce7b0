"""A picture as it is meant to be seen, as the 8-bit RGB that a network takes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from refinenet.data.split import Array
from refinenet.errors import UserError


class PixelsError(UserError):
    """An image of more pixels than are taken."""


def decoded(source: Path | BinaryIO, where: str, most_pixels: int | None = None) -> Array:
    """Read an image file as it is meant to be seen: H x W x 3 uint8 RGB.

    Args:
        source: the file, or one that is open.
        where: its name, for errors.
        most_pixels: of the image; None: Pillow's limit, 179 million.

    Raises:
        PixelsError: it has more pixels, which its header says.
        UserError: it is not a whole image.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about size (twice that is an error) and odd metadata
            with Image.open(source) as picture:
                width, height = picture.size
                if most_pixels is not None and width * height > most_pixels:
                    raise PixelsError(f"{where}: {width} x {height} pixels, expected {most_pixels} at most")
                return as_seen(picture)
    except UserError:
        raise
    except UnidentifiedImageError:
        raise UserError(f"{where}: not an image of a kind that Pillow reads") from None
    except Exception as error:  # Pillow's readers have no error type of their own: a broken file raises nearly anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{where}: cannot be read ({' '.join(reason.split())})") from None


def as_seen(picture: Image.Image) -> Array:
    """The picture as H x W x 3 uint8 RGB, turned as its EXIF data say, on white where it is transparent.

    16-bit grey is rounded to 8 bits. ValueError for more bits and for floating-point values, whose range nobody knows.
    """
    picture = ImageOps.exif_transpose(picture)
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        # Pillow's own conversion cuts 16 bits off at 255.
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("grey values of more than 16 bits, expected 8 or 16")
        return np.array(Image.fromarray(((values + 128) // 257).astype(np.uint8)).convert("RGB"))
    if picture.mode == "F":
        raise ValueError("floating-point grey values, expected 8 or 16 bits")
    if picture.has_transparency_data:
        # What is under a transparent pixel nobody has seen and may be anything; viewers show the page, which is white.
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return np.array(picture.convert("RGB"))


def is_plain(picture: Image.Image) -> bool:
    """Whether `picture.convert("RGB")` already is the picture as seen; asks its header only."""
    upright = picture.getexif().get(0x0112, 1) == 1  # 0x0112: orientation
    return upright and not picture.has_transparency_data and picture.mode not in ("I", "F") and "16" not in picture.mode
