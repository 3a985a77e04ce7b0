"""Label maps as polygons and back, as Cityscapes keeps them: drawn one over the other they give the label map."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from skimage.measure import find_contours, label, regionprops

Polygon = list[tuple[int, int]]  # corners as (x, y), pixel centres


def outlines(parts: NDArray[np.int64]) -> list[tuple[int, Polygon]]:
    """Trace the connected regions of equal value of `parts` (H x W, none negative) as (value, outline).

    A region in a hole of another comes after it, so that drawing the outlines filled, in this order, gives `parts`.
    """
    regions = regionprops(label(parts, background=-1, connectivity=1))
    # A region inside a hole of another has the smaller bounding box.
    regions.sort(key=lambda region: -region.area_bbox)
    return [(int(parts[tuple(region.coords[0])]), _outline(region)) for region in regions]


def _outline(region: Any) -> Polygon:
    """Trace the outer contour of a region through the centres of its outermost pixels; corners only, at least three."""
    # At the level 0.9 a contour runs within 0.1 of the centres of the pixels inside, so that rounding finds them.
    contours = find_contours(np.pad(region.image.astype(float), 1), 0.9)
    outer = max(contours, key=lambda contour: float(np.ptp(contour[:, 0])))  # holes are less high than their region
    top, left = region.bbox[:2]
    points = np.rint(outer[:-1, ::-1]).astype(int) + np.array([left - 1, top - 1])
    points = points[(points != np.roll(points, 1, axis=0)).any(axis=1)]
    turns = (points - np.roll(points, 1, axis=0) != np.roll(points, -1, axis=0) - points).any(axis=1)
    corners = [(x, y) for x, y in points[turns].tolist()] or [(left, top)]
    return corners + corners[-1:] * (3 - len(corners))


def draw(objects: list[tuple[Any, Polygon]], size: tuple[int, int], mode: str, background: Any) -> NDArray[Any]:
    """Draw filled polygons, one over the other, as an array; `size` is (height, width), `mode` one of Pillow's.

    The same calls as in cityscapesScripts' json2labelImg.py and json2instanceImg.py.
    """
    image = Image.new(mode, size[::-1], background)
    pen = ImageDraw.Draw(image)
    for value, polygon in objects:
        pen.polygon(polygon, fill=value)
    return np.asarray(image)
