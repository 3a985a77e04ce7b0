"""Where things go: objects and people in front of a backdrop, so that every wanted class stays visible."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from skimage.segmentation import find_boundaries

from pipeline.synthetic.backdrop import Backdrop, Cast
from pipeline.synthetic.canvas import SCALE, VOID, Paint, Piece, Stamp, material
from pipeline.synthetic.catalogue import SURFACES, Look, look
from pipeline.synthetic.figure import POSES, figure
from pipeline.synthetic.shapes import shapes
from pipeline.synthetic.textures import Dice, mixed

STREET = ("road", "building", "sky")
VEHICLES = ("car", "bus", "truck", "train", "van", "motorbike", "bicycle", "-")
CLUTTER = tuple(look(f"unnamed thing {letter}") for letter in "abcd")  # background in front of stuff
TABLES = (
    "table",
    "roundtable",
    "desk",
    "counter",
    "countertop",
    "island",
    "dresser",
    "nightstand",
    "cabinet",
    "buffet",
)
LAYERS = ("big", "mount", "back", "flat", "hang", "fly", "stand", "small")
MIDDLE = ("fly", "mount", "hang", "small")  # placed by what is around them, not by where they stand


@dataclass
class Thing:
    """An object to be placed. `depth`: 0 far .. 100 near; `x`: range in percent of the width; `scale` in percent."""

    klass: int
    look: Look
    depth: int
    needed: bool = False
    x: tuple[int, int] = (10, 90)
    scale: int = 100


class Layout(Backdrop):
    """One picture: a backdrop and the things in front of it."""

    def __init__(self, cast: Cast, dice: Dice, height: int, width: int, wanted: Sequence[int]) -> None:
        super().__init__(cast, dice, height, width, wanted)
        self.enough = 56 if cast.void_border else 28  # pixels that later objects leave of every wanted class
        self.tops: list[tuple[float, float]] = []  # where small things can stand

    def draw(self) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.uint16]]:
        """Image, label (with void) and instances."""
        theme = self.theme()
        {"room": self.room, "air": self.air, "street": self.street}[theme]()
        if self.cast.kind == "people":
            self.crowd()
        else:
            self.things(theme)
            self.rescue()
        image = self.canvas.finish(self.dice, self.dice.integer(-4, 14))
        label = self.canvas.label
        return image, self._void(label) if self.cast.void_border else label, self.canvas.instances

    def theme(self) -> str:
        """Indoors, in the open or in a street, whichever suits the classes that must occur."""
        cast, settings = self.cast, [self.cast.looks[klass].setting for klass in self.wanted]
        if cast.kind == "indoor" or cast.kind == "street":
            return "room" if cast.kind == "indoor" else "street"
        inside, outside = settings.count("i"), settings.count("o")
        if inside > outside or (inside == outside and self.dice.chance(50)):
            return "room"
        urban = all(name in cast.names for name in STREET) or any(n.startswith("building") for n in cast.names)
        grounds = [cast.looks[k] for k in self.wanted if cast.looks[k].place == "ground"]
        paved = all(own in (look("road"), look("sidewalk"), look("terrain")) for own in grounds)
        return "street" if urban and paved and self.dice.chance(70) else "air"

    def things(self, theme: str) -> None:
        """Wanted objects and as many others as make a full picture, from back to front."""
        dice, cast = self.dice, self.cast
        waiting = [k for k in self.wanted if k not in self.done]
        things = [Thing(k, self._adapted(k, theme), dice.integer(0, 100), True) for k in waiting]
        setting = "i" if theme == "room" else "o"
        others = [
            k
            for k, own in enumerate(cast.looks)
            if own.place not in SURFACES and own.setting in (setting, "x") and k not in waiting and k != cast.background
        ]
        dice.shuffle(others)
        bare = not any(own.place == "ground" for own in cast.looks)  # all stuff is background
        for klass in others[: max(2, (7 if bare else 8) - len(things))]:
            things.append(Thing(klass, cast.looks[klass], dice.integer(0, 100)))
        if cast.background is not None and not bare:  # what the class list does not name
            self.wanted.append(cast.background)
            things.append(Thing(cast.background, CLUTTER[dice.integer(0, len(CLUTTER) - 1)], dice.integer(0, 60), True))
        for thing in things:
            if theme == "street" and thing.look.place == "stand":
                thing.x = (12, 88) if thing.look.shape in VEHICLES else dice.choice(((4, 24), (76, 96)))
        crowd = 100 if len(things) < 8 else 86 if len(things) < 12 else 74
        bonus = 180 if bare else 122 if len(cast.names) < 100 else 108
        for thing in sorted(things, key=lambda t: (LAYERS.index(t.look.place), t.depth)):
            thing.scale = crowd * bonus // 100
            if thing.needed or self.covered() < (78 if bare else 64):
                self.place(thing, theme)

    def covered(self) -> int:
        """Percent of the picture under objects."""
        return int(np.count_nonzero(self.canvas.instances)) * 100 // self.canvas.instances.size

    def _adapted(self, klass: int, theme: str) -> Look:
        """A surface that the theme has no place for becomes a thing: a panel on the wall, a mat on the floor."""
        own = self.cast.looks[klass]
        if own.place in SURFACES:
            flat = own.place == "ground"
            return replace(own, place="flat" if flat else "mount", shape="rug" if flat else "panel", size=24)
        return own

    def place(self, thing: Thing, theme: str) -> bool:
        """Try some spots and sizes; take the first that hides no wanted class and covers least of other objects."""
        best: tuple[int, Stamp] | None = None
        for attempt in range(9 if thing.needed else 4):
            size = self.h * thing.look.size * thing.scale * self.dice.integer(78, 122) / 1_000_000
            size = max(size * (1 - 0.06 * attempt), self.h * 0.12)
            stamp = self.canvas.cut(self.pieces(thing, self.spot(thing, size, theme), size))
            if stamp is None:
                continue
            cost = self.cost(stamp, thing)
            if cost is not None and (best is None or cost < best[0]):
                best = cost, stamp
            if best is not None and (best[0] < 25 or attempt >= 4):
                break
        if best is None:
            return False
        self.put(best[1], thing)
        return True

    def put(self, stamp: Stamp, thing: Thing) -> None:
        """Paint an object and remember where others can stand on it."""
        shadow = 1 if thing.look.place == "flat" else 2 if thing.look.place in MIDDLE else 4
        for klass in dict.fromkeys(piece.klass for piece in stamp.pieces):  # a rider and a bicycle are two objects
            part = self.canvas.cut([piece for piece in stamp.pieces if piece.klass == klass])
            if part is not None:
                self.canvas.paint(part, thing=klass != self.cast.background, shadow=shadow)
        rows, columns = stamp.window
        if thing.look.shape in TABLES:
            middle = (columns.start + columns.stop) * SCALE / 2
            self.tops.append((middle, rows.start * SCALE + (rows.stop - rows.start) * SCALE * 0.12))
        self.done.add(thing.klass)

    def cost(self, stamp: Stamp, thing: Thing) -> int | None:
        """Percent of the stamp over other objects; None where it would hide a wanted class or be hidden itself."""
        before = self.canvas.counts(self.canvas.label[stamp.window])
        after = self.canvas.counts(self.canvas.labelled(stamp))
        total = self.canvas.counts()
        left = total - before + after
        for klass in self.wanted:
            if left[klass] < self.enough and left[klass] < total[klass]:
                return None
        if after[thing.klass] < self.enough:
            return None
        union = stamp.union()
        under = int(np.count_nonzero(self.canvas.instances[stamp.window][union]))
        return under * 100 // max(1, int(np.count_nonzero(union)))

    def spot(self, thing: Thing, size: float, theme: str) -> tuple[float, float]:
        """The foot point of an object: middle of its lower edge."""
        dice, h, w, ground = self.dice, self.h, self.w, self.horizon
        x = w * dice.integer(*thing.x) / 100
        place = thing.look.place
        if place == "small" and self.tops and dice.chance(75):
            middle, top = dice.choice(self.tops)
            return middle + dice.integer(-24, 24), top + 4
        if place == "fly":
            return x, max(size, ground * dice.integer(35, 105) / 100)
        if place == "hang":
            return x, size * 0.92
        if place == "mount" and theme != "room":
            return x, ground + h * dice.integer(0, 6) / 100
        if place == "mount":
            low, high = self.ceiling + size, max(self.ceiling + size + 1, ground - 4)
            return x, low + (high - low) * dice.integer(10, 90) / 100
        if place == "back":
            return x, ground + h * dice.integer(1, 5) / 100
        if place == "big":
            return x, ground + h * dice.integer(2, 9) / 100
        near = thing.depth if place == "stand" else 60 + thing.depth * 2 // 5
        return x, ground + (h - ground) * (18 + near * 80 // 100) / 100

    def pieces(self, thing: Thing, foot: tuple[float, float], size: float) -> list[Piece]:
        """The object's outlines in the picture: scaled, flipped, stretched, leaned and jittered."""
        dice, own = self.dice, thing.look
        if own.place in ("stand", "big") and self.cast.kind != "people":
            least = 58 if self.cast.kind == "street" else 74
            size = size * (least + thing.depth * (122 - least) // 100) / 100
        if own.place == "stand":
            size = min(size, max(foot[1] * 1.04, self.h * 0.3))  # heads stay in the picture
        paint = material(own, dice, muted=thing.klass == self.cast.background)
        if own.shape == "-":
            return self.person(thing, foot, size, paint)
        width, parts = shapes()[own.shape]
        stretch = dice.integer(84, 118) / 100
        size = min(size, self.w * 0.62 * 100 / (width * stretch))
        lean = dice.integer(-6, 6) / 100 if own.place in ("stand", "small", "fly", "hang") else 0.0
        tilt = dice.integer(-16, 16) / 100 if own.place == "fly" else dice.integer(-3, 3) / 100
        flip = -1 if dice.chance(50) else 1
        if own.shape in ("tradename", "clock", "signboard"):
            flip, lean = 1, 0.0
        unit = size / 100
        paint = replace(paint, period=max(8, int(paint.period * min(1.25, max(0.75, size / 110)))), origin=foot)

        def point(x: float, y: float) -> tuple[float, float]:
            across, up = (x - width / 2) * stretch, y - 100
            return foot[0] + flip * (across + up * lean) * unit, foot[1] + (up + across * tilt) * unit

        return [Piece([point(x, y) for x, y in points], role, paint, thing.klass) for role, points in parts]

    def person(self, thing: Thing, foot: tuple[float, float], size: float, paint: Paint) -> list[Piece]:
        """A figure of one class: clothes in the class's colours."""
        pose = "ride" if thing.look == look("rider") else self.dice.choice(("stand", "walk", "run", "wave", "proud"))
        roles = {"torso": "b", "upperarms": "d", "lowerarms": "y", "upperlegs": "s", "lowerlegs": "s", "head": "y"}
        pieces = []
        for name, (role, points) in figure(self.dice, pose):
            detail = {"head": "k", "lowerlegs": "k"}.get(name, "y")
            shown = role if role == "k" else roles[name] if role == "b" else detail
            placed = [(foot[0] + x * size / 100, foot[1] + (y - 100) * size / 100) for x, y in points]
            pieces.append(Piece(placed, shown, paint, thing.klass))
        cycles = [k for k, own in enumerate(self.cast.looks) if own.shape in ("bicycle", "motorbike")]
        if pose == "ride" and cycles:  # the saddle under the hips, 80 of the bicycle's 100 above the ground
            klass = self.dice.choice(cycles)
            own = self.cast.looks[klass]
            cycle, unit = material(own, self.dice), size * 0.6 / 100
            x, y = foot[0] - 60 * unit, foot[1] - 100 * unit
            for role, points in shapes()[own.shape][1]:
                placed = [(x + across * unit, y + down * unit) for across, down in points]
                pieces.insert(0, Piece(placed, role, cycle, klass))
            count = len(shapes()[own.shape][1])
            pieces[:count] = pieces[:count][::-1]
        return pieces

    def crowd(self) -> None:
        """People in many poses, large, over each other's shoulders; every body part is a class."""
        dice = self.dice
        klass = {"".join(c for c in n.lower() if c.isalpha()): k for k, n in enumerate(self.cast.names)}
        count = dice.integer(3, 5)
        places = [(number * 2 + 1) * 100 // (count * 2) for number in range(count)]
        dice.shuffle(places)
        for number, place in enumerate(places):
            size = self.h * dice.integer(70, 104) / 100
            foot = (
                self.w * (place + dice.integer(-5, 5)) / 100,
                self.h * dice.integer(88 + number * 3, 102 + number * 4) / 100,
            )
            skin = material(look("head"), dice)
            paints = {name: material(look(name), dice) for name in klass}
            tint = skin.skin
            paints["head"] = replace(skin, base=tint)
            arms = paints["lowerarms"]
            paints["lowerarms"] = replace(arms, base=mixed(arms.base, tint, 45), accent=mixed(arms.base, tint, 75))
            pieces = []
            for name, (role, points) in figure(dice, dice.choice([p for p in sorted(POSES) if p != "ride"])):
                placed = [(foot[0] + x * size / 100, foot[1] + (y - 100) * size / 100) for x, y in points]
                pieces.append(Piece(placed, role, paints[name], klass[name]))
            stamp = self.canvas.cut(pieces)
            if stamp is not None:
                self.canvas.paint(stamp, shadow=5)

    def rescue(self) -> None:
        """Wanted classes that still have too few pixels go on top, small, wherever they hide nothing that is wanted."""
        for klass in self.wanted:
            if self.canvas.counts()[klass] >= self.enough:
                continue
            own = self._adapted(klass, "air")
            thing = Thing(klass, own if own.shape != "-" else replace(own, place="small"), 50, True)
            for percent in (30, 24, 18, 14, 11):
                spots = [(x, y) for x in range(8, 100, 12) for y in range(20, 104, 12)]
                self.dice.shuffle(spots)
                best: tuple[int, Stamp] | None = None
                for x, y in spots[:16]:
                    size = self.h * percent / 100
                    stamp = self.canvas.cut(self.pieces(thing, (self.w * x / 100, self.h * y / 100), size))
                    cost = None if stamp is None else self.cost(stamp, thing)
                    if stamp is not None and cost is not None and (best is None or cost < best[0]):
                        best = cost, stamp
                if best is not None:
                    self.put(best[1], thing)
                    break

    def _void(self, label: NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Label with VOID where an object borders on anything else: one pixel on either side."""
        return np.where(find_boundaries(self.canvas.instances), np.uint8(VOID), label)
