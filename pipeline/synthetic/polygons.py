"""Label maps as polygons and back, as Cityscapes keeps them: drawn one over the other they give the label image."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

Polygon = list[tuple[int, int]]  # corners as (x, y), pixel centres

# The eight neighbours in clockwise order, from the east; y points down.
_RING = ((1, 0), (1, 1), (0, 1), (-1, 1), (-1, 0), (-1, -1), (0, -1), (1, -1))


def outlines(parts: NDArray[np.int64]) -> list[tuple[int, Polygon]]:
    """The connected regions of equal value of `parts` (H x W) as (value, outline), in an order to draw them in.

    What lies in a hole of another region comes after it, so that drawing the outlines filled gives `parts` again.
    """
    from scipy.ndimage import find_objects, label

    regions = []
    for value in np.unique(parts):
        numbered, _ = label(parts == value)
        for number, box in enumerate(find_objects(numbered), 1):
            outline = _trace(numbered[box] == number)
            rows, columns = box
            # A region inside a hole of another has the smaller bounding box.
            area = (rows.stop - rows.start) * (columns.stop - columns.start)
            regions.append((-area, int(value), [(x + columns.start, y + rows.start) for x, y in outline]))
    regions.sort()
    return [(value, outline) for _, value, outline in regions]


def _trace(mask: NDArray[np.bool_]) -> Polygon:
    """The outer outline of the one region in `mask`, clockwise (Moore's neighbour tracing), corners only."""
    inside = np.pad(mask, 1).tolist()
    x = first = inside[1].index(True)
    y, heading, corners = 1, 0, []
    begin: tuple[int, int, int] | None = None
    while True:
        # Start left of where we came from; the start pixel lies in the top row, with nothing above it.
        for turn in range(6, 14):
            direction = (heading + turn) % 8
            dx, dy = _RING[direction]
            if inside[y + dy][x + dx]:
                break
        else:
            return [(first - 1, 0)] * 3  # a single pixel
        if begin == (x, y, direction):
            break
        if begin is None:
            begin, heading = (x, y, direction), direction
            corners.append((x - 1, y - 1))
        elif direction != heading:
            corners.append((x - 1, y - 1))
            heading = direction
        x, y = x + dx, y + dy
    return corners if len(corners) > 2 else corners + corners[-1:] * (3 - len(corners))


def draw(objects: list[tuple[Any, Polygon]], size: tuple[int, int], mode: str, background: Any) -> NDArray[Any]:
    """Filled polygons, one over the other, as an array; `size` is (height, width).

    The same calls as in cityscapesScripts' json2labelImg.py and json2instanceImg.py.
    """
    image = Image.new(mode, size[::-1], background)
    pen = ImageDraw.Draw(image)
    for value, polygon in objects:
        pen.polygon(polygon, fill=value)
    return np.asarray(image)
