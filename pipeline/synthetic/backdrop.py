"""The stage: a landscape, a room or a street, painted in the surfaces that a data set has classes for."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from pipeline.synthetic.canvas import SCALE, Canvas, Piece, material
from pipeline.synthetic.catalogue import Look, look
from pipeline.synthetic.shapes import Points, ellipse, smooth
from pipeline.synthetic.textures import Dice


@dataclass(frozen=True)
class Cast:
    """The classes of a data set and how they look. `background`: index of the class for all that has no class."""

    names: tuple[str, ...]
    looks: tuple[Look, ...]
    background: int | None
    kind: str
    void_border: bool


class Backdrop:
    """A canvas and its surfaces. Lengths are in enlarged pixels unless they say otherwise."""

    def __init__(self, cast: Cast, dice: Dice, height: int, width: int, wanted: Sequence[int]) -> None:
        self.cast, self.dice, self.wanted = cast, dice, list(wanted)
        self.canvas = Canvas(height, width, max(len(cast.names), 1))
        self.h, self.w = height * SCALE, width * SCALE
        self.horizon = self.h * dice.integer(34, 46) // 100
        self.ceiling = 0
        self.done: set[int] = set()

    def pick(self, name: str) -> tuple[int, Look, bool]:
        """Class, look and mutedness of a surface: the class of that look, or the background, or a near relation."""
        target = look(name)
        for klass, own in enumerate(self.cast.looks):
            if own == target and klass != self.cast.background:
                return klass, own, False
        if self.cast.background is not None:
            return self.cast.background, target, True
        related = [k for k, own in enumerate(self.cast.looks) if own.place == target.place]
        klass = self.dice.choice(related) if related else (self.wanted or [0])[0]
        return klass, self.cast.looks[klass], False

    def needed(self, *places: str) -> list[int]:
        """Wanted classes of those places that are not drawn yet, in a random order."""
        found = [k for k in self.wanted if self.cast.looks[k].place in places and k not in self.done]
        self.dice.shuffle(found)
        return found

    def surface(
        self, choice: tuple[int, Look, bool], outlines: Iterable[tuple[str, Points]], **changes: object
    ) -> None:
        """Paint outlines in one class and one material, without an instance."""
        klass, own, muted = choice
        paint = replace(material(own, self.dice, muted), **changes)  # type: ignore[arg-type]
        stamp = self.canvas.cut([Piece(points, role, paint, klass) for role, points in outlines])
        if stamp is not None:
            self.canvas.paint(stamp, thing=False)
            self.done.add(klass)

    def own(self, klass: int) -> tuple[int, Look, bool]:
        """A class of the cast as a surface."""
        return klass, self.cast.looks[klass], False

    def ridge(self, left: float, right: float, base: float, height: float, shape: str) -> Points:
        """The outline of something on the horizon between two x: roofs, peaks or bumps."""
        steps = max(2, int((right - left) / (self.w * 0.11)))
        width = (right - left) / steps
        top: Points = []
        for step in range(steps):
            x, y = left + step * width, base - height * self.dice.integer(45, 100) / 100
            if shape == "skyline":
                top += [(x, y), (x + width, y)]
            elif shape == "peaks":
                top += [(x, base - height * self.dice.integer(20, 45) / 100), (x + width * 0.5, y)]
            else:
                top += [(x, base - height * 0.4), (x + width * 0.25, y), (x + width * 0.75, y)]
        closed: Points = [
            (left, base),
            *top,
            (right, base - height * 0.4),
            (right, base),
            (right, base + 9),
            (left, base + 9),
        ]
        return smooth(closed) if shape == "bumps" else closed

    def backdrop(self) -> None:
        """Sky, what stands on the horizon, and the lowest ground."""
        dice, w = self.dice, self.w
        sky = self.pick("sky")
        sun = ellipse(w * dice.integer(10, 90) / 100, self.horizon * dice.integer(15, 60) / 100, 20, 20)
        self.surface(sky, [("b", _box(0, 0, w, self.horizon + 6)), ("l", sun)], period=30)

    def skyline(self) -> None:
        """Mountains, hills, woods and buildings side by side along the horizon."""
        dice, far = self.dice, self.needed("far")
        others = [k for k, own in enumerate(self.cast.looks) if own.place == "far" and k not in far]
        choices = [self.own(k) for k in far]
        if len(choices) < 2 and others and dice.chance(70):
            choices.append(self.own(dice.choice(others)))
        if not others and not far and self.cast.background is not None:
            choices = [self.pick(dice.choice(("hill", "mountain", "vegetation")))]
        left = 0.0
        for number, choice in enumerate(choices):
            right = self.w if number == len(choices) - 1 else self.w * (number + 1) / len(choices)
            height = self.horizon * dice.integer(45, 85) / 100
            ridge = self.ridge(left - 6, right + 6, self.horizon, height, choice[1].shape)
            self.surface(choice, [("b", ridge)], fade=dice.integer(0, 22))
            left = right

    def air(self) -> None:
        """A landscape."""
        self.backdrop()
        self.skyline()
        self.grounds("o", "grass")

    def grounds(self, setting: str, usual: str) -> None:
        """All wanted grounds: bands one behind the other, ways that run to the horizon, pools."""
        dice, h, w = self.dice, self.h, self.w
        needed = self.needed("ground")
        same = [k for k, own in enumerate(self.cast.looks) if own.place == "ground" and own.setting == setting]
        bands = [self.own(k) for k in needed if self.cast.looks[k].shape == "band"]
        spare = [k for k in same if self.cast.looks[k].shape == "band" and k not in needed]
        if not bands:
            usual = dice.choice(("grass", "earth", "sand")) if setting == "o" else usual
            bands = [self.own(dice.choice(spare)) if spare else self.pick(usual)]
        vanishing = (w * dice.integer(30, 70) / 100, float(self.horizon))
        for number, band in enumerate(bands):
            top = self.horizon + (h - self.horizon) * number * (0.8 if number > 1 else 0.7) / len(bands)
            wave = [(w * step / 6, top + (dice.integer(-8, 8) if number else 0)) for step in range(7)]
            self.surface(band, [("b", [*wave, (w, h), (0, h)])], vanishing=vanishing)
        ways = [self.own(k) for k in needed if self.cast.looks[k].shape == "wedge"]
        for number, way in enumerate(ways):
            middle = w * (number * 2 + 1) / (len(ways) * 2) + w * dice.integer(-8, 8) / 100
            half = w * min(20, 52 // len(ways)) / 100
            x = vanishing[0] + (middle - vanishing[0]) * 0.12
            bend = w * dice.integer(-7, 7) / 100
            mid = ((x + middle) / 2 + bend, (self.horizon + h) / 2)
            points = [(x - 3, self.horizon), (x + 3, self.horizon), (mid[0] + half * 0.42, mid[1]), (middle + half, h)]
            self.surface(
                way, [("b", [*points, (middle - half, h), (mid[0] - half * 0.42, mid[1])])], vanishing=vanishing
            )
        pools = [self.own(k) for k in needed if self.cast.looks[k].shape == "pool"]
        for number, pool in enumerate(pools):
            x = w * (number * 2 + 1) / (len(pools) * 2) + w * dice.integer(-10, 10) / 100
            y = self.horizon + (h - self.horizon) * dice.integer(28, 70) / 100
            across, down = w * dice.integer(22, 34) / 100 / len(pools) + w * 0.06, h * dice.integer(9, 13) / 100
            rim = smooth(ellipse(x + dice.integer(-9, 9), y, across, down)[::3])
            self.surface(
                pool, [("l", smooth(ellipse(x, y, across + 7, down + 5)[::3])), ("b", rim)], vanishing=vanishing
            )

    def room(self) -> None:
        """A room seen from inside: back wall, a side wall, floor, ceiling."""
        dice, h, w = self.dice, self.h, self.w
        floor = h * dice.integer(54, 64) // 100
        self.horizon, self.ceiling = floor, h * dice.integer(7, 14) // 100
        corner = w * dice.integer(12, 24) // 100
        drop, rise = (h - floor) * dice.integer(50, 90) // 100, self.ceiling
        right = dice.chance(50)

        def turn(points: Points) -> Points:
            return [(w - x, y) for x, y in points] if right else points

        wall, ceiling = self.pick("wall"), self.pick("ceiling")
        self.surface(wall, [("b", _box(0, 0, w, h))])
        self.grounds("i", "floor")
        side: Points = [(0.0, self.ceiling - rise), (corner, self.ceiling), (corner, floor), (0.0, floor + drop)]
        self.surface(wall, [("d", turn(side))], origin=(0, 0))
        trim: Points = [
            (0.0, floor + drop),
            (corner, floor),
            (w, floor),
            (w, floor - 5),
            (corner, floor - 5),
            (0.0, floor + drop - 7),
        ]
        self.surface(wall, [("w" if wall[2] else "l", turn(trim))])
        if ceiling[1].place == "ceiling":
            self.surface(ceiling, [("b", turn([(0.0, 0.0), (w, 0.0), (w, self.ceiling), (corner, self.ceiling)]))])

    def street(self) -> None:
        """A road between buildings, with whatever else of the class list lines a street."""
        dice, h, w = self.dice, self.h, self.w
        self.backdrop()
        vx, vy = w * dice.integer(40, 60) / 100, float(self.horizon)
        distant = [self.own(k) for k in self.needed("far") if self.cast.looks[k] != look("building")]
        behind = [*distant, self.pick("vegetation" if dice.chance(70) else "building")]
        for number, choice in enumerate(behind[::-1]):
            ridge = self.ridge(-6, w + 6, vy, vy * (30 + number * 14) / 100, choice[1].shape)
            self.surface(choice, [("b", ridge)], fade=15)
        house = self.pick("building")
        walk, road = self.pick("sidewalk"), self.pick("road")
        self.surface(walk, [("b", _box(0, vy, w, h))], vanishing=(vx, vy))
        for side in (-1, 1):
            edge = 0.0 if side < 0 else float(w)
            near, x = 0.0, edge
            for _ in range(dice.integer(2, 3)):  # facades from near to far
                far = near + dice.integer(22, 36) / 100
                top = -0.65 - dice.integer(0, 55) / 100
                a, b = x, edge + (vx - edge) * far
                ya, yb = (vy + vy * top * (1 - near), vy + vy * top * (1 - far))
                ga, gb = (vy + (h - vy) * 0.5 * (1 - near), vy + (h - vy) * 0.5 * (1 - far))
                outline = [(a, ya), (b, yb), (b, gb), (a, ga)]
                if dice.chance(86):
                    self.surface(house, [("b", outline), ("l", [(a, ya), (b, yb), (b, yb + 7), (a, ya + 9)])])
                x, near = b, far
        for number, strip in enumerate(("terrain", "wall", "fence")):
            choice = self.pick(strip)
            if choice[2] or look(strip) != choice[1] or not (choice[0] in self.wanted or dice.chance(40)):
                continue
            edge = (0.0, float(w), float(w))[number] if dice.chance(70) else 0.0
            far, tall = edge + (vx - edge) * 0.72, (0.0, 0.36, 0.28)[number]
            foot, end = vy + (h - vy) * 0.56, vy + (h - vy) * 0.18
            up, end_up = foot - h * tall, end - h * tall * 0.3
            if strip == "terrain":
                up, end_up, foot, end = vy + (h - vy) * 0.3, vy + 4, h, vy + (h - vy) * 0.2
            self.surface(choice, [("b", [(edge, up), (far, end_up), (far, end), (edge, foot)])])
        vanishing = (vx, vy)
        left, right = -w * dice.integer(2, 18) / 100, w * (1 + dice.integer(2, 18) / 100)
        green = look("terrain") in self.cast.looks and self.pick("terrain")[0] in self.wanted
        for side in (-1, 1):
            if green and side == -1:
                lawn = [(vx, vy), (vx, vy + 3), (w * 0.06, h), (0.0, h), (0.0, vy + (h - vy) * 0.42)]
                self.surface(self.pick("terrain"), [("b", lawn)], vanishing=vanishing)
        kerb = [(vx - 6, vy), (vx + 6, vy), (right - w * 0.1, h), (left + w * 0.1, h)]
        self.surface(walk, [("l", kerb)], vanishing=vanishing)
        lane = [(vx - 4, vy), (vx + 4, vy), (right - w * 0.13, h), (left + w * 0.13, h)]
        self.surface(road, [("b", lane)], vanishing=vanishing)
        for step in (8, 30, 62):
            a, b = step / 100, (step + 12 + step * 0.2) / 100
            ya, yb = vy + (h - vy) * a, vy + (h - vy) * b
            self.surface(road, [("s", [(vx - 5 * a, ya), (vx + 5 * a, ya), (vx + 7 * b, yb), (vx - 7 * b, yb)])])


def _box(left: float, top: float, right: float, bottom: float) -> Points:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]
