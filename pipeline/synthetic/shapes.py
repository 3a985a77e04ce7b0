"""Outlines of the things in the rendered scenes: shapes.txt, read, and the curves that its parts are made of."""

from __future__ import annotations

import functools
import math
import re
from pathlib import Path

import numpy as np
from skimage.measure import subdivide_polygon

from pipeline.synthetic.textures import TURN, cosine, sine

Points = list[tuple[float, float]]


class Part(tuple[str, Points]):
    """(role, closed outline)."""


@functools.cache
def shapes() -> dict[str, tuple[int, tuple[Part, ...]]]:
    """Every shape of shapes.txt: its name -> its width (its height is 100) and its parts from back to front."""
    lines = Path(__file__).with_name("shapes.txt").read_text(encoding="ascii").splitlines()
    text = "\n".join(line for line in lines if not line.startswith("#"))
    table: dict[str, tuple[int, tuple[Part, ...]]] = {}
    for entry in re.split(r"\n(?=\S)", text.strip()):
        head, parts = entry.split(":")
        name, width = head.split()
        table[name] = (int(width), tuple(_part(part) for part in parts.split(";")))
    return table


def _part(text: str) -> Part:
    role, kind, *numbers = text.split()
    pairs = [tuple(int(number) for number in piece.split(",")) for piece in numbers if "," in piece]
    points: Points = [(float(x), float(y)) for x, y in pairs]
    if kind == "r":
        (left, top), (right, bottom) = points
        points = [(left, top), (right, top), (right, bottom), (left, bottom)]
    elif kind == "o":
        points = ellipse(*points[0], *points[1])
    elif kind == "d":
        points = ellipse(*points[0], float(numbers[1]), float(numbers[1]))
    elif kind == "l":
        points = line(points[0], points[1], float(numbers[2]))
    elif kind == "s":
        points = smooth(points)
    return Part((role, points))


def ellipse(x: float, y: float, across: float, down: float) -> Points:
    """A 24-gon about (x, y)."""
    return [(x + across * cosine(step), y + down * sine(step)) for step in range(0, TURN, 11)]


def line(start: tuple[float, float], end: tuple[float, float], thickness: float) -> Points:
    """A rectangle around the line between two points, longer by a third of its thickness at either end."""
    across, down = end[0] - start[0], end[1] - start[1]
    length = max(1.0, math.sqrt(across * across + down * down))
    x, y = across / length * thickness / 2, down / length * thickness / 2
    (ax, ay), (bx, by) = (start[0] - x * 0.66, start[1] - y * 0.66), (end[0] + x * 0.66, end[1] + y * 0.66)
    return [(ax - y, ay + x), (bx - y, by + x), (bx + y, by - x), (ax + y, ay - x)]


def smooth(points: Points, rounds: int = 2) -> Points:
    """Cut the corners (Chaikin): a closed curve that follows the control polygon."""
    curve = np.array([*points, points[0]])
    for _ in range(rounds):
        curve = subdivide_polygon(curve, degree=2)
    return [(float(x), float(y)) for x, y in curve[:-1]]
