"""Pictures of the report as data: URIs of WebP and PNG, the same bytes every time."""

from __future__ import annotations

import io
from base64 import b64encode
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image

from pipeline.formats.label_images import colour
from refinenet.data.split import RGB, Array


@dataclass(frozen=True)
class Picture:
    """An image of the page. Sizes in pixels of the file; the page scales it."""

    uri: str
    alt: str
    width: int
    height: int


def photo(image: Array, alt: str, width: int, quality: int) -> Picture:
    """An H x W x 3 uint8 image, at most `width` pixels wide, as WebP."""
    picture = Image.fromarray(image)
    picture.thumbnail((width, 2 * width), Image.Resampling.LANCZOS)
    return _encode(picture, "webp", alt, quality=quality, method=6)


def label_map(label: Array, palette: Sequence[RGB], alt: str, width: int) -> Picture:
    """H x W class indices in the colours of the data set, void pale, at most `width` pixels wide."""
    return flat(colour(label, palette), alt, width)


def flat(image: Array, alt: str, width: int) -> Picture:
    """An H x W x 3 uint8 picture of few colours, which it keeps (nearest pixels), as palette PNG."""
    picture = Image.fromarray(image)
    picture.thumbnail((width, 2 * width), Image.Resampling.NEAREST)
    pixels = np.asarray(picture).reshape(-1, 3)
    colours, indices = np.unique(pixels @ np.array([1 << 16, 1 << 8, 1]), return_inverse=True)
    if len(colours) > 256:  # not a label map after all
        return _encode(picture.quantize(256), "png", alt, optimize=True)
    indexed = Image.fromarray(indices.reshape(picture.height, picture.width).astype(np.uint8), "P")
    indexed.putpalette(np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=1).astype(np.uint8).tobytes())
    return _encode(indexed, "png", alt, optimize=True)


def _encode(picture: Image.Image, kind: str, alt: str, **options: object) -> Picture:
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return Picture(f"data:image/{kind};base64,{b64encode(data.getvalue()).decode()}", alt, *picture.size)
