"""Chance, colour and texture for the rendered scenes, the same bits on every machine.

Two rules give that. Random numbers are raw PCG64 output, taken apart with integers: NumPy guarantees that stream, and
not what its Generator draws from it (NEP 19). Fields are float32 under + - * / floor and comparisons only, which
IEEE 754 fixes to the last bit; sine and cosine come from a table that is rounded to integers.
"""

from __future__ import annotations

import colorsys
import functools
import math
from collections.abc import Callable, MutableSequence, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import map_coordinates

Field = NDArray[np.floating[Any]]  # float32; not so named because NumPy's types do not see that x * 0.5 stays it
Colour = tuple[int, int, int]
Item = TypeVar("Item")

TURN = 256  # angles are integers, 256 to the full circle
SINE = tuple(round(math.sin(2 * math.pi * step / TURN) * 4096) / 4096 for step in range(TURN))


def sine(angle: int) -> float:
    """Sine of `angle` in 1/256 turns, a multiple of 1/4096."""
    return SINE[angle % TURN]


def cosine(angle: int) -> float:
    """Cosine of `angle` in 1/256 turns, a multiple of 1/4096."""
    return SINE[(angle + TURN // 4) % TURN]


class Dice:
    """Integers drawn from a seed; any non-negative integers make one."""

    def __init__(self, *entropy: int) -> None:
        self._bits = np.random.PCG64(np.random.SeedSequence(entropy))

    def integer(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return low + int(self._bits.random_raw()) % (high - low + 1)

    def chance(self, percent: int) -> bool:
        """True `percent` times in a hundred."""
        return self.integer(0, 99) < percent

    def choice(self, items: Sequence[Item]) -> Item:
        """One of `items`."""
        return items[self.integer(0, len(items) - 1)]

    def shuffle(self, items: MutableSequence[Item]) -> None:
        """Put `items` in another order, in place."""
        for last in range(len(items) - 1, 0, -1):
            other = self.integer(0, last)
            items[last], items[other] = items[other], items[last]

    def bytes(self, *shape: int) -> NDArray[np.uint8]:
        """An array of `shape` of bytes 0..255."""
        count = math.prod(shape)
        return self._bits.random_raw(-(-count // 8)).astype("<u8").view(np.uint8)[:count].reshape(shape)


SIZE = 256  # side of a noise tile; it repeats without a seam


@functools.cache
def noise(cell: int, octaves: int = 2) -> Field:
    """SIZE x SIZE value noise, stretched to 0..1; `cell` (a power of two) is the width of its largest bumps."""
    dice = Dice(cell, octaves)
    total = np.zeros((SIZE, SIZE))
    for octave in range(octaves):
        step = max(1, cell >> octave)
        grid = dice.bytes(SIZE // step, SIZE // step).astype(np.float64)
        # Exact: a byte times multiples of 1 / step, a power of two.
        total += map_coordinates(grid, np.mgrid[:SIZE, :SIZE] / step, order=1, mode="grid-wrap") / 2**octave
    tile: Field = ((total - total.min()) / np.ptp(total)).astype(np.float32)
    return tile


def _floor(t: Field) -> Field:
    whole: Field = np.floor(t)
    return whole


def _unit(t: Field) -> Field:
    """Clipped to 0..1."""
    clipped: Field = np.clip(t, 0, 1)
    return clipped


def _tile(tile: Field, x: Field, y: Field) -> Field:
    values: Field = tile[_floor(y).astype(np.int32) & (SIZE - 1), _floor(x).astype(np.int32) & (SIZE - 1)]
    return values


def _fraction(t: Field) -> Field:
    return t - _floor(t)


def _wave(t: Field) -> Field:
    """A triangle between 0 and 1, period 1."""
    return np.abs(2 * _fraction(t) - 1)


def _sharp(t: Field, gain: int = 5) -> Field:
    """The same wave with steep flanks: soft-edged bars."""
    return _unit((_wave(t) - 0.5) * gain + 0.5)


def _yes(condition: NDArray[np.bool_]) -> Field:
    return condition.astype(np.float32)


def _parity(t: Field) -> Field:
    return _floor(t) - 2 * _floor(t * 0.5)


def _checks(u: Field, v: Field) -> Field:
    return _parity(_floor(u) + _floor(v))


def _bricks(u: Field, v: Field) -> Field:
    along = u * 0.5 + 0.5 * _parity(v)
    return np.maximum(_yes(_fraction(v) < 0.2), _yes(_fraction(along) < 0.1))


def _planks(u: Field, v: Field) -> Field:
    row = _floor(v)
    seam = np.maximum(_yes(_fraction(v) < 0.14), _yes(_fraction(u * 0.2 + row * 0.375) < 0.04))
    shares: Field = np.maximum(seam, 0.6 * _fraction(row * 0.625))
    return shares


def _books(u: Field, v: Field) -> Field:
    row = _floor(v * 0.35)
    return np.maximum(_fraction((_floor(u) + 3 * row) * 0.6181640625), _yes(_fraction(v * 0.35) < 0.16))


def _scales(u: Field, v: Field) -> Field:
    across = _fraction(u + 0.5 * _parity(v)) - 0.5
    return _unit(_fraction(v) * 0.7 + across * across * 2)


def _windows(u: Field, v: Field) -> Field:
    across, down = _fraction(u * 0.7), _fraction(v * 0.6)
    return _yes((across > 0.28) & (across < 0.78) & (down > 0.25) & (down < 0.75))


def _dots(u: Field, v: Field) -> Field:
    across, down = _fraction(u) - 0.5, _fraction(v) - 0.5
    return _unit((0.13 - across * across - down * down) * 16 + 0.5)


def _rings(u: Field, v: Field) -> Field:
    return _sharp(np.sqrt(u * u + v * v) * 0.8, 3)


def _weave(u: Field, v: Field) -> Field:
    across = _parity(_floor(u * 1.5) + _floor(v * 1.5))
    return across * _wave(u * 1.5) + (1 - across) * _wave(v * 1.5)


# From texture coordinates (one period each) to how much of the class's second colour shows there, 0..1.
TEXTURES: dict[str, Callable[[Field, Field], Field]] = {
    "plain": lambda u, v: _tile(noise(64), u * 12, v * 12) * 0.3,
    "clouds": lambda u, v: _unit(_tile(noise(64, 4), u * 8, v * 16) * 2 - 0.7),
    "speckle": lambda u, v: _tile(noise(4), u * 9, v * 9),
    "grass": lambda u, v: _tile(noise(8), u * 16, v * 5),
    "fur": lambda u, v: _tile(noise(8), (u + v) * 5, (v - u) * 15),
    "blotch": lambda u, v: _unit(_tile(noise(32), u * 13, v * 13) * 8 - 4),
    "leaves": lambda u, v: _floor(_tile(noise(8), u * 7, v * 7) * 3.99) / 3,
    "lines": lambda u, v: _sharp(v) + u * 0,
    "bars": lambda u, v: _sharp(u) + v * 0,
    "diagonal": lambda u, v: _sharp((u + v) * 0.7),
    "checks": _checks,
    "plaid": lambda u, v: (_sharp(u) + _sharp(v)) * 0.5,
    "dots": _dots,
    "bricks": _bricks,
    "tiles": lambda u, v: np.maximum(_yes(_fraction(u) < 0.15), _yes(_fraction(v) < 0.15)),
    "mesh": lambda u, v: np.maximum(_yes(_fraction(u + v) < 0.25), _yes(_fraction(u - v) < 0.25)),
    "grain": lambda u, v: _wave(v * 0.8 + _tile(noise(64), u * 6, v * 9) * 2) * 0.8,
    "waves": lambda u, v: _sharp(v + _wave(u * 0.6) * 0.6, 3),
    "zigzag": lambda u, v: _sharp(v + _wave(u) * 0.9),
    "planks": _planks,
    "boards": lambda u, v: _planks(v, u),
    "books": _books,
    "scales": _scales,
    "windows": _windows,
    "rings": _rings,
    "weave": _weave,
    "rough": lambda u, v: _tile(noise(32, 4), (u + v) * 7, (v - u) * 12),
}


def parse_colour(code: str) -> Colour:
    """Read `rrggbb` in hexadecimal."""
    red, green, blue = bytes.fromhex(code)
    return red, green, blue


def mixed(one: Colour, other: Colour, percent: int) -> Colour:
    """`percent` of the way from one colour to the other."""
    red, green, blue = ((a * (100 - percent) + b * percent) // 100 for a, b in zip(one, other, strict=True))
    return red, green, blue


def bright(colour: Colour, percent: int) -> Colour:
    """The colour times percent / 100, clipped."""
    red, green, blue = (min(255, channel * percent // 100) for channel in colour)
    return red, green, blue


def jittered(colour: Colour, dice: Dice, amount: int) -> Colour:
    """The colour of one individual: brighter or darker by up to `amount`, each channel by a third more or less."""
    common = dice.integer(-amount, amount)
    third = amount // 3
    red, green, blue = (min(255, max(0, c + common + dice.integer(-third, third))) for c in colour)
    return red, green, blue


def hsv(hue: int, saturation: int, value: int) -> Colour:
    """Return the RGB of a hue in 1/1536 turns, a saturation and a value in 0..255."""
    red, green, blue = (round(c * 255) for c in colorsys.hsv_to_rgb(hue / 1536, saturation / 255, value / 255))
    return red, green, blue
