"""Procedural scenes with exact labels: what the mini profile's archives are filled with.

A World draws the pictures of one data set: rooms, landscapes, streets or people, with the data set's own classes in
them. Every class has an outline (shapes.txt), colours and a texture (catalogue.py); individuals vary, overlap and cast
shadows (backdrop.py, layout.py, canvas.py). The same arguments give the same bits on every machine (textures.py says
how).
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from pipeline.synthetic.backdrop import Cast
from pipeline.synthetic.canvas import VOID as VOID
from pipeline.synthetic.catalogue import SURFACES, look
from pipeline.synthetic.layout import Layout
from pipeline.synthetic.textures import Dice

Kind = Literal["objects", "indoor", "street", "outdoor", "people"]
LEAST = 20  # pixels of each required class
ATTEMPTS = 4


@dataclass(frozen=True)
class Drawn:
    """One scene. Label 255 marks a void border; instance 0 marks stuff and background.

    A void border is not cut out of the instance map: there its pixels keep their object's number.
    """

    image: NDArray[np.uint8]  # H x W x 3, RGB
    label: NDArray[np.uint8]  # H x W, class index
    instances: NDArray[np.uint16]  # H x W, 1.. = objects
    classes: tuple[int, ...]  # class indexes that occur in label, ascending, without void


class World:
    """The scenes of one data set: the same name, classes, seed and kind give the same pictures on every machine.

    `classes` are the data set's own class names; the index in the sequence is the value in the label. A class called
    "background" is what everything without a class of its own is labelled as. `void_border`: a border of 255, two
    pixels wide, around every object, as PASCAL VOC has.
    """

    def __init__(
        self, name: str, classes: Sequence[str], seed: int, kind: Kind = "objects", void_border: bool = False
    ) -> None:
        self.name, self.classes, self.seed, self.kind, self.void_border = name, tuple(classes), seed, kind, void_border
        background = self.classes.index("background") if "background" in self.classes else None
        self.cast = Cast(self.classes, tuple(look(klass) for klass in self.classes), background, kind, void_border)

    def draw(self, index: int, required: Sequence[int], height: int, width: int) -> Drawn:
        """Picture number `index`, in which every class of `required` has at least 20 pixels.

        That holds for what plan() asks at 80 x 96 and more; where it cannot be had, the best of four attempts returns.
        """
        wanted = sorted(set(required) - {self.cast.background})
        best: tuple[int, Drawn] | None = None
        for attempt in range(ATTEMPTS):
            dice = Dice(self.seed, zlib.crc32(self.name.encode()), index, attempt)
            image, label, instances = Layout(self.cast, dice, height, width, wanted).draw()
            counts = np.bincount(label.ravel(), minlength=VOID + 1)
            worst = min((int(counts[klass]) for klass in required), default=LEAST)
            if best is None or worst > best[0]:
                present = tuple(int(klass) for klass in np.flatnonzero(counts[:VOID]))
                best = worst, Drawn(image, label, instances, present)
            if worst >= LEAST:
                break
        assert best is not None
        return best[1]

    def plan(self, count: int) -> list[tuple[int, ...]]:
        """The required classes of `count` pictures, ascending in each.

        Every class occurs, as often and as evenly as pictures with about 3 (21 classes) to 14 (150 classes) required
        ones allow; classes of rooms and of the open air keep to pictures of their own. With very few pictures the
        number in each grows beyond what can be drawn well.
        """
        classes = [klass for klass in range(len(self.classes)) if klass != self.cast.background]
        base = () if self.cast.background is None else (self.cast.background,)
        if self.kind == "people" or count == 0:
            return [(*base, *classes)] * count
        dice = Dice(self.seed, zlib.crc32(self.name.encode()), 1 << 31, count)
        inside = [k for k in classes if self.cast.looks[k].setting == "i" or self.kind == "indoor"]
        outside = [k for k in classes if self.cast.looks[k].setting == "o" and k not in inside]
        either = [k for k in classes if k not in inside and k not in outside]
        rooms = round(count * len(inside) / max(1, len(inside) + len(outside)))
        rooms = min(max(rooms, min(1, len(inside))), count - min(1, len(outside)) if count > 1 else count)
        pictures: list[list[int]] = [[] for _ in range(count)]
        indoors, outdoors = list(range(rooms)), list(range(rooms, count))
        least = -(-len(classes) // count)
        size = max(least, min(14, 3 + len(classes) // 13))
        decks = ((inside, indoors or outdoors), (outside, outdoors or indoors), (either, list(range(count))))
        for lap in range(count):
            for deck, targets in decks:
                order = list(deck)
                dice.shuffle(order)
                for klass in order:
                    free = [p for p in targets if klass not in pictures[p]]
                    if lap > 0:
                        free = [p for p in free if len(pictures[p]) < size]
                    if free:
                        pictures[min(free, key=lambda p: self._burden(pictures[p], klass))].append(klass)
        dice.shuffle(pictures)
        return [tuple(sorted((*base, *picture))) for picture in pictures]

    def _burden(self, picture: Sequence[int], klass: int) -> tuple[int, int]:
        """How badly one more class fits into a picture: surfaces of one place share it, so few of them each."""
        looks = self.cast.looks
        place = looks[klass].place
        rivals = sum(looks[other].place == place for other in picture) if place in SURFACES else 0
        return rivals, len(picture)
