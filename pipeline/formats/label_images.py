"""Labels in colour: as palette PNG, over their image with a legend, and as pictures for the report.

Those of the report are data: URIs of WebP and PNG, the same bytes every time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from refinenet.data.split import RGB, Array

VOID_COLOUR = (224, 224, 192)  # as the VOC devkit draws it
GAP = 4  # white pixels between image, truth and prediction


# Of an overlay, in pixels: no larger than a screen can use, no smaller than a legend can be read beside
OVERLAY_AREA = 4_000_000
OVERLAY_EDGES = (320, 32_000)  # its long edge; JPEG ends at 65,535

# Colours of the charts by role: on a light page, on a dark page. Lines and marks have 3:1 and text 4.5:1 against both.
ROLES = {
    "ink": ("#1d2330", "#e6e9ef"),
    "quiet": ("#5b6472", "#a3adbd"),
    "grid": ("#d9dde4", "#343b48"),
}


def colour(label: Array, palette: Sequence[RGB]) -> Array:
    """H x W class indices -> H x W x 3 uint8 in the colours of the data set; void, and what is no class, is pale."""
    table = np.full((256, 3), VOID_COLOUR, np.uint8)
    table[: len(palette)] = palette
    return table[label]


def indexed(label: Array, palette: Sequence[RGB]) -> Image.Image:
    """H x W class indices as a palette image: its values are the indices, its colours those of `colour`."""
    picture = Image.fromarray(label, "P")
    picture.putpalette(colour(np.arange(256, dtype=np.uint8), palette).tobytes())
    return picture


class Entry(NamedTuple):
    """A line of a legend: a class, its colour, its share of the image (0 to 1)."""

    name: str
    colour: RGB
    share: float


def legend(label: Array, classes: Sequence[str], palette: Sequence[RGB]) -> list[Entry]:
    """The classes that occur in `label` (H x W indices), largest first; whatever is no class is one entry, void."""
    counts = Image.fromarray(label).histogram()
    void = sum(counts[len(classes) :])
    found = [*zip(classes, palette, counts[: len(classes)], strict=True), ("void", VOID_COLOUR, void)]
    return sorted((Entry(n, c, k / label.size) for n, c, k in found if k), key=lambda entry: -entry.share)


def overlay(image: Array, label: Array, classes: Sequence[str], palette: Sequence[RGB]) -> Image.Image:
    """An H x W x 3 uint8 image under the colours of its H x W label, with a legend below.

    A picture to look at, of another size than the image where that is too large or too small for it.
    """
    height, width = label.shape
    shrink = min(1.0, (OVERLAY_AREA / label.size) ** 0.5, OVERLAY_EDGES[1] / max(height, width))
    # Enlarged by whole factors, small images show their pixels.
    factor = shrink if shrink < 1 else max(1, OVERLAY_EDGES[0] // max(height, width))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    smooth = Image.Resampling.LANCZOS if factor < 1 else Image.Resampling.NEAREST
    under = Image.fromarray(image).resize(size, smooth, reducing_gap=3.0)
    small = np.asarray(Image.fromarray(label).resize(size, Image.Resampling.NEAREST))
    # torchvision's draw_segmentation_masks gives the same colours from a mask a class, 20 times slower for 20 classes.
    colours = Image.fromarray(colour(small, palette))
    picture = Image.composite(colours, Image.blend(under, colours, 0.5), _outlines(small))
    return _above_legend(picture, legend(label, classes, palette))


def _outlines(label: Array) -> Image.Image:
    """Mask of the pixels within a line's width of another class."""
    from scipy.ndimage import binary_dilation
    from skimage.segmentation import find_boundaries

    mask: npt.NDArray[np.bool_] = find_boundaries(label)  # a pixel on either side
    thickness = max(1, round(label.size**0.5 / 600))
    return Image.fromarray(binary_dilation(mask, iterations=thickness - 1) if thickness > 1 else mask)


def _percent(share: float) -> str:
    return "< 0.1 %" if share < 0.0005 else f"{100 * share:.1f} %"


def _above_legend(picture: Image.Image, entries: Sequence[Entry]) -> Image.Image:
    """The picture, and below it colour, name and share of each class, column by column; wider if that needs it."""
    em = round(min(max((picture.width * picture.height) ** 0.5 / 40, 14), 40))
    font = ImageFont.load_default(em)
    texts = [(" ".join(entry.name.split()), _percent(entry.share)) for entry in entries]
    lengths = [[math.ceil(font.getlength(text)) for text in pair] for pair in texts]
    line = swatch = 3 * em // 2  # an entry's height; its colour and the gap behind it

    def columns(rows: int) -> list[int]:
        """Widths of the columns, each with a gap behind it."""
        parts = [lengths[i : i + rows] for i in range(0, len(lengths), rows)]
        return [swatch + max(n for n, _ in part) + em + max(s for _, s in part) + 2 * em for part in parts]

    def size(rows: int) -> tuple[int, int]:
        return max(picture.width, sum(columns(rows))), picture.height + rows * line + em

    # Small, and no tower or ribbon where many classes stand below a small picture
    rows = min(range(1, len(entries) + 1), key=lambda rows: math.prod(size(rows)) * max(size(rows)))
    page = Image.new("RGB", size(rows), "white")
    page.paste(picture, ((page.width - picture.width) // 2, 0))
    draw = ImageDraw.Draw(page)
    ink, quiet = ROLES["ink"][0], ROLES["quiet"][0]
    rights = [right - em for right in accumulate(columns(rows))]
    lefts = [em, *(right + 2 * em for right in rights)]
    for index, (entry, (name, share)) in enumerate(zip(entries, texts, strict=True)):
        left, right = lefts[index // rows], rights[index // rows]
        middle = picture.height + em // 2 + index % rows * line + line // 2
        draw.rectangle((left, middle - em // 2, left + em, middle + em // 2), entry.colour, quiet, max(1, em // 14))
        draw.text((left + swatch, middle), name, ink, font, "lm")
        draw.text((right, middle), share, quiet, font, "rm")
    return page


def colour_map(count: int, start: int = 0) -> tuple[RGB, ...]:
    """Entries `start` to `start + count - 1` of the VOC devkit's colour map (VOClabelcolormap.m).

    The bits of the index are dealt to red, green and blue, highest bit first: neighbours differ strongly.
    """
    colours = []
    for index in range(start, start + count):
        rgb = [sum((index >> (3 * bit + channel) & 1) << (7 - bit) for bit in range(3)) for channel in range(3)]
        colours.append((rgb[0], rgb[1], rgb[2]))
    return tuple(colours)
