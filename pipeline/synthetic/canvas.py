"""Painting: outlines with a class and a material onto an enlarged picture, a crisp label map and an instance map."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from scipy.ndimage import binary_erosion

from pipeline.synthetic.catalogue import Look
from pipeline.synthetic.shapes import Points
from pipeline.synthetic.textures import TEXTURES, Colour, Dice, Field, bright, cosine, jittered, mixed, sine

SCALE = 3  # colours are painted at three times the size and averaged; labels are taken at pixel centres
VOID = 255
BLACK, WHITE, GLASS = (44, 42, 52), (246, 244, 236), (178, 214, 232)
BUILT = ("bricks", "tiles", "planks", "boards", "books", "windows", "lines", "bars", "grain")  # level and upright
SKINS = ((244, 200, 164), (224, 168, 128), (176, 120, 84), (124, 80, 56))


@dataclass(frozen=True)
class Paint:
    """What one individual of a class is made of. `period`, `origin` and `vanishing` are in enlarged pixels."""

    look: Look
    base: Colour
    accent: Colour
    tone: Colour
    skin: Colour
    period: int = 18
    angle: int = 0
    origin: tuple[float, float] = (0, 0)
    vanishing: tuple[float, float] | None = None  # textures of the ground run to this point
    fade: int = 0  # percent towards sky colour: far away

    def colours(self, role: str) -> tuple[Colour, Colour, str]:
        """Colour, the texture's second colour and the texture of a part in that role."""
        texture = self.look.texture
        if role in "bdl":
            base, tone = self.base, self.tone
            if role == "d":
                base, tone = bright(base, 72), bright(tone, 72)
            elif role == "l":
                base, tone = mixed(base, WHITE, 32), mixed(tone, WHITE, 32)
        else:
            base = {"s": self.accent, "k": BLACK, "w": WHITE, "g": GLASS, "y": self.skin}[role]
            tone, texture = bright(base, 84), "diagonal" if role == "g" else "plain"
        if self.fade:
            base, tone = mixed(base, (186, 206, 226), self.fade), mixed(tone, (186, 206, 226), self.fade)
        return base, tone, texture


@dataclass(frozen=True)
class Piece:
    """One outline, in enlarged pixels, with its material and class."""

    points: Points
    role: str
    paint: Paint
    klass: int


def material(look: Look, dice: Dice, muted: bool = False) -> Paint:
    """The look as one individual has it: its own brightness, tint, texture width and direction."""
    amount = 20 if look.size or look.place == "wall" else 14
    base, tone = jittered(look.base, dice, amount), look.tone
    tone = (tone[0] + base[0] - look.base[0], tone[1] + base[1] - look.base[1], tone[2] + base[2] - look.base[2])
    red, green, blue = (min(255, max(0, channel)) for channel in tone)
    tone, accent = (red, green, blue), jittered(look.accent, dice, 16)
    if muted:
        base, accent, tone = (mixed(mixed(c, _grey(c), 55), (214, 214, 206), 22) for c in (base, accent, tone))
    origin = (dice.integer(0, 250), dice.integer(0, 250))
    return Paint(
        look,
        base,
        accent,
        tone,
        dice.choice(SKINS),
        period=9 if look.texture == "books" else dice.integer(12, 28 if look.place == "wall" else 24),
        angle=0 if look.texture in BUILT else dice.integer(-7, 7),
        origin=origin,
    )


def _grey(colour: Colour) -> Colour:
    level = sum(colour) // 3
    return level, level, level


def raster(points: Points, top: int, left: int, height: int, width: int) -> NDArray[np.bool_]:
    """Return a window of enlarged pixels (height x width, bool) in which a closed outline is filled.

    By Pillow: skimage.draw.polygon asks for every pixel whether it is inside, which makes drawing 2.5 times as slow.
    """
    image = Image.new("1", (width, height))
    ImageDraw.Draw(image).polygon([(x - left, y - top) for x, y in points], fill=1)
    return np.asarray(image)


@dataclass(frozen=True)
class Stamp:
    """Pieces cut out and ready to paint: a window of the label map and each piece's enlarged pixels in it."""

    pieces: Sequence[Piece]
    masks: list[NDArray[np.bool_]]
    window: tuple[slice, slice]

    def labels(self) -> list[NDArray[np.bool_]]:
        """Return each piece's pixels in the label map: those whose centre it covers."""
        return [mask[SCALE // 2 :: SCALE, SCALE // 2 :: SCALE] for mask in self.masks]

    def union(self) -> NDArray[np.bool_]:
        """Return all pixels of the stamp in the label map."""
        pixels: NDArray[np.bool_] = np.logical_or.reduce(self.labels())
        return pixels


class Canvas:
    """The picture in the making. `label` and `instances` have the final size, `pixels` SCALE times that."""

    def __init__(self, height: int, width: int, classes: int) -> None:
        self.height, self.width, self.classes = height, width, classes
        self.pixels = np.zeros((height * SCALE, width * SCALE, 3), np.float32)
        self.label = np.zeros((height, width), np.uint8)
        self.instances = np.zeros((height, width), np.uint16)
        self.count = 0  # objects so far

    def cut(self, pieces: Sequence[Piece]) -> Stamp | None:
        """Rasterise; None if nothing lies inside the picture."""
        xs = [x for piece in pieces for x, _ in piece.points]
        ys = [y for piece in pieces for _, y in piece.points]
        left, right = max(0, int(min(xs) // SCALE)), min(self.width, int(max(xs) // SCALE) + 1)
        top, bottom = max(0, int(min(ys) // SCALE)), min(self.height, int(max(ys) // SCALE) + 1)
        if left >= right or top >= bottom:
            return None
        size = (bottom - top) * SCALE, (right - left) * SCALE
        masks = [raster(piece.points, top * SCALE, left * SCALE, *size) for piece in pieces]
        return Stamp(pieces, masks, (slice(top, bottom), slice(left, right)))

    def labelled(self, stamp: Stamp) -> NDArray[np.uint8]:
        """The label map in the stamp's window as it would be with the stamp."""
        label = self.label[stamp.window].copy()
        for piece, mask in zip(stamp.pieces, stamp.labels(), strict=True):
            label[mask] = piece.klass
        return label

    def counts(self, label: NDArray[np.uint8] | None = None) -> NDArray[np.int64]:
        """Pixels per class of the label map, or of a part of one."""
        return np.bincount((self.label if label is None else label).ravel(), minlength=self.classes)

    def paint(self, stamp: Stamp, thing: bool = True, shadow: int = 0) -> None:
        """Put the stamp on the picture; `thing`: as an object, else as stuff.

        `shadow`: by how many enlarged pixels its soft shadow falls to the right.
        """
        rows, columns = stamp.window
        self.label[stamp.window] = self.labelled(stamp)
        if thing:
            self.count += 1
        self.instances[stamp.window][stamp.union()] = self.count if thing else 0
        top, left = rows.start * SCALE, columns.start * SCALE
        view = self.pixels[top : rows.stop * SCALE, left : columns.stop * SCALE]
        if shadow:
            self._shadow(np.logical_or.reduce(stamp.masks), top, left, shadow)
        for piece, mask in zip(stamp.pieces, stamp.masks, strict=True):
            _fill(view, mask, piece, top, left, shadow > 0)

    def _shadow(self, union: NDArray[np.bool_], top: int, left: int, shift: int) -> None:
        for step in (shift, shift * 2):
            down, right = top + step // 2, left + step
            target = self.pixels[down : down + union.shape[0], right : right + union.shape[1]]
            where = union[: target.shape[0], : target.shape[1], None]
            np.multiply(target, 0.86, out=target, where=where)

    def finish(self, dice: Dice, night: int) -> NDArray[np.uint8]:
        """Light from one side, averaging to the final size, sensor noise. `night`: percent of light taken away."""
        height, width = self.height * SCALE, self.width * SCALE
        slope = dice.integer(-12, 12)
        across = (np.arange(width, dtype=np.float32) / np.float32(width) - 0.5) * np.float32(slope / 50)
        down = (np.arange(height, dtype=np.float32) / np.float32(height) - 0.4) * 0.16
        light = (np.float32((108 - night) / 100) - down)[:, None] + across
        scaled = np.clip(self.pixels * light[..., None], 0, 255)
        whole = (scaled * 16).astype(np.uint16)
        rows = whole[0::SCALE] + whole[1::SCALE] + whole[2::SCALE]
        total = (rows[:, 0::SCALE] + rows[:, 1::SCALE] + rows[:, 2::SCALE]).astype(np.int32) // (16 * SCALE * SCALE)
        grain = dice.bytes(2, self.height, self.width, 3).astype(np.int32) % 7
        noisy: NDArray[np.int32] = np.clip(total + grain[0] + grain[1] - 6, 0, 255)
        return noisy.astype(np.uint8)


def _fill(view: Field, mask: NDArray[np.bool_], piece: Piece, top: int, left: int, outlined: bool) -> None:
    """Texture, shade and outline one piece, in its own bounding box to save time."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return
    box = slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)
    mask, view = mask[box], view[box]
    height, width = mask.shape
    base, tone, texture = piece.paint.colours(piece.role)
    y = (np.arange(height, dtype=np.float32) + np.float32(box[0].start + top))[:, None]
    x = (np.arange(width, dtype=np.float32) + np.float32(box[1].start + left))[None, :]
    share = TEXTURES[texture](*_coordinates(piece.paint, x, y))
    if piece.paint.vanishing is not None:
        near: Field = np.clip((y - np.float32(piece.paint.vanishing[1])) * 0.03, 0, 1)
        share = share * near + 0.35 * (1 - near)
    shade: Field = np.ones((1, 1), np.float32)
    if outlined:  # lit from the upper left
        shade = 1.12 - ((y - y[0]) / height * 0.16 + (x - x[:, :1]) / width * 0.1)
    if outlined and min(height, width) > 8:
        inner = binary_erosion(mask, border_value=1)
        shade = shade * np.where(inner, 1, 0.62)
    for channel in range(3):
        colour = np.float32(base[channel]) + share * np.float32(tone[channel] - base[channel])
        np.copyto(view[..., channel], colour * shade, where=mask)


def _coordinates(paint: Paint, x: Field, y: Field) -> tuple[Field, Field]:
    """Texture coordinates of enlarged pixels, in periods."""
    if paint.vanishing is not None:
        depth = 60 / np.maximum(y - np.float32(paint.vanishing[1]) + 36, 6)
        period = np.float32(18 / paint.period)
        return (x - np.float32(paint.vanishing[0])) * depth * 0.11 * period, depth * 14 * period + x * 0
    across, down = x - np.float32(paint.origin[0]), y - np.float32(paint.origin[1])
    cos, sin = np.float32(cosine(paint.angle) / paint.period), np.float32(sine(paint.angle) / paint.period)
    return across * cos + down * sin, down * cos - across * sin
