"""Which scenes a data set's archives hold: how many for each split, of which sizes, with which classes."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from skimage.measure import label

from pipeline.config.schema import Rendered
from pipeline.synthetic.scene import Kind, World
from refinenet.data import IGNORE_INDEX

Split = Literal["train", "val"]


@dataclass(frozen=True)
class Picture:
    """A scene and the split it belongs to. `number` counts over both splits, which lie mixed as in the official ids."""

    number: int
    split: Split
    image: NDArray[np.uint8]  # H x W x 3, RGB
    label: NDArray[np.uint8]  # H x W, class index, 255 = void
    instances: NDArray[np.uint16]  # H x W, 0 = no object


def splits(train: int, val: int) -> list[Split]:
    """The split of each picture, the val ones spread evenly over the train ones."""
    order: list[Split] = ["train"] * (train + val)
    for i in range(val):
        order[(2 * i + 1) * (train + val) // (2 * val)] = "val"
    return order


def paint(
    name: str,
    classes: Sequence[str],
    settings: Rendered,
    kind: Kind,
    void: Literal["border", "seams", "none"] = "none",
    size: tuple[int, int] | None = None,
) -> list[Picture]:
    """The pictures of the data set `name`. With settings like the default ones every class occurs in both splits.

    Sizes lie up to 25 % above the settings' and some pictures stand upright, unless all have the same `size`
    (height, width in pixels). `void`: a broad border around every object, as VOC has; the thin seams that labelling
    with polygons leaves between objects, as the indoor sets and ADE20K have; or none.
    """
    world = World(name, classes, settings.seed, kind, void_border=void == "border")
    plans = {
        "train": iter(world.plan(settings.train)),
        "val": iter(world.plan(settings.val)),
    }
    pictures = []
    for number, split in enumerate(splits(settings.train, settings.val)):
        height, width = size or _size(f"{name} {settings.seed} {number}", settings)
        drawn = world.draw(number, next(plans[split]), height, width)
        label = _unstitched(drawn.label, drawn.instances) if void == "seams" else drawn.label
        pictures.append(Picture(number, split, drawn.image, label, drawn.instances))
    return pictures


def _unstitched(label: NDArray[np.uint8], instances: NDArray[np.uint16]) -> NDArray[np.uint8]:
    """The label with void where an object touches another, or stuff, to its right or below."""
    seam = np.zeros(label.shape, bool)
    seam[:, :-1] |= instances[:, :-1] != instances[:, 1:]
    seam[:-1] |= instances[:-1] != instances[1:]
    return np.where(seam, IGNORE_INDEX, label).astype(np.uint8)


def _size(key: str, settings: Rendered) -> tuple[int, int]:
    # Seeded with text, Python's own generator gives the same numbers on every version and platform.
    chance = random.Random(key)
    height = settings.height * chance.randint(95, 125) // 100
    width = settings.width * chance.randint(95, 125) // 100
    return (width, height) if chance.randint(1, 6) == 1 else (height, width)


def shifted(label: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Labels as the sets have them that count from 1: 0 = void, class + 1 otherwise."""
    return np.where(label == IGNORE_INDEX, 0, label + 1).astype(np.uint8)


def variant(picture: Picture, mask: NDArray[np.bool_], options: Sequence[int]) -> NDArray[np.uint16]:
    """One of `options` for each object, or each connected region of stuff, inside `mask`; 0 outside. H x W."""
    parts = label(mask & (picture.instances == 0), connectivity=1)
    parts = np.where(picture.instances > 0, picture.instances.astype(np.int64) + parts.max(), parts)
    # Steps that share no factor with the usual counts of options: neighbours in number differ.
    chosen = np.asarray(options, np.uint16)[(parts * 17 + picture.number * 31) % len(options)]
    return np.where(mask, chosen, 0).astype(np.uint16)
