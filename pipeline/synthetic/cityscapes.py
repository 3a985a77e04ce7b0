"""Cityscapes with fine labels in the layout of its two archives (ids: cityscapesScripts labels.py)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pipeline.config.schema import Rendered
from pipeline.datasets import cityscapes
from pipeline.formats.encode import Member, in_folders, png, write_zip
from pipeline.synthetic import polygons
from pipeline.synthetic.album import paint
from pipeline.synthetic.scene import World

_VOID_IDS = {"ego vehicle": 1, "rectification border": 2, "out of roi": 3}
_ID_OF = {**_VOID_IDS, **dict(zip(cityscapes.CLASSES, cityscapes.LABEL_IDS, strict=True))}
_COLOUR_OF = {**dict.fromkeys(_VOID_IDS, (0, 0, 0)), **dict(zip(cityscapes.CLASSES, cityscapes.PALETTE, strict=True))}
_HAVE_INSTANCES = 24  # and above: people and vehicles are told apart
_TEST = 3  # images whose labels are withheld

_PAPERS = (("README", b"drawn scenes\n"), ("license.txt", b"none: drawn\n"))  # beside the folder in both archives

_CITIES = {
    "train": ("aachen", "bochum", "bremen", "cologne", "darmstadt", "dusseldorf", "erfurt", "hamburg", "hanover"),
    "val": ("frankfurt", "lindau", "munster"),
    "test": ("berlin", "bielefeld", "bonn"),
}


@dataclass(frozen=True)
class _Frame:
    split: str
    name: str  # city_sequence_frame
    image: NDArray[np.uint8]  # H x W x 3
    objects: list[tuple[str, polygons.Polygon]]  # label and outline, in drawing order

    @property
    def place(self) -> str:
        return f"{self.split}/{self.name.partition('_')[0]}/{self.name}"


def render(settings: Rendered, folder: Path) -> None:
    """Images and labels of train, val and, without their labels, test; all of one size, twice as wide as high."""
    frames = list(_frames(settings))
    images = ((f"leftImg8bit/{frame.place}_leftImg8bit.png", png(frame.image)) for frame in frames)
    labels = (member for frame in frames for member in _labels(frame))
    for name, members in (("leftImg8bit", images), ("gtFine", labels)):
        write_zip(folder / f"{name}_trainvaltest.zip", chain(_PAPERS, in_folders(members)))


def _frames(settings: Rendered) -> Iterator[_Frame]:
    height, width = settings.height, 2 * settings.height
    margin, hood = max(1, height // 100), max(2, height // 16)
    size = (height - 2 * margin - hood, width - 2 * margin)

    def frame(split: str, number: int, image: NDArray[np.uint8], objects: list[tuple[str, polygons.Polygon]]) -> _Frame:
        cities = _CITIES[split]
        # The scene ends above the bonnet, so that no small object is lost under it.
        full = np.pad(image, ((margin, margin + hood), (margin, margin), (0, 0)), mode="edge")
        bonnet, void = _surround(height, width, margin, hood)
        full[bonnet] = (34, 36, 40)
        moved = [(label, [(x + margin, y + margin) for x, y in outline]) for label, outline in objects]
        name = f"{cities[number % len(cities)]}_{number // len(cities):06d}_000019"
        return _Frame(split, name, full, moved + void)

    counts = {"train": 0, "val": 0}
    for p in paint("cityscapes", cityscapes.CLASSES, settings, "street", size=size):
        parts = p.label.astype(np.int64) << 16 | p.instances
        objects = [(cityscapes.CLASSES[value >> 16], outline) for value, outline in polygons.outlines(parts)]
        yield frame(p.split, counts[p.split], p.image, objects)
        counts[p.split] += 1
    world = World("cityscapes", cityscapes.CLASSES, settings.seed, "street")
    for number, required in enumerate(world.plan(_TEST)):
        drawn = world.draw(sum(counts.values()) + number, required, *size)
        yield frame("test", number, drawn.image, [])


def _surround(
    height: int, width: int, margin: int, hood: int
) -> tuple[NDArray[np.bool_], list[tuple[str, polygons.Polygon]]]:
    """Where the bonnet of the camera's car is, and the polygons of what is never scored."""
    right, bottom = width - 1, height - 1
    car = [(0, bottom), (0, bottom - margin), (width // 5, bottom - margin - hood + 1)]
    car += [(right - x, y) for x, y in reversed(car)]
    void: list[tuple[str, polygons.Polygon]] = [("ego vehicle", car)]
    edges = (
        ("rectification border", (0, 0, margin - 1, bottom)),
        ("rectification border", (width - margin, 0, right, bottom)),
        ("out of roi", (0, 0, right, margin - 1)),
        ("out of roi", (0, height - margin, right, bottom)),
    )
    for label, (x0, y0, x1, y1) in edges:
        void.append((label, [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]))
    return polygons.draw([(1, car)], (height, width), "L", 0).astype(bool), void


def _labels(frame: _Frame) -> Iterator[Member]:
    """The four files of one image, as cityscapesScripts makes the other three from the polygons."""
    size = (frame.image.shape[0], frame.image.shape[1])
    seen: dict[str, int] = {}
    instances = []
    for label, outline in frame.objects:
        value = _ID_OF[label]
        if value >= _HAVE_INSTANCES:
            number = seen[label] = seen.get(label, -1) + 1
            value = value * 1000 + number
        instances.append((value, outline))
    colours = [((*_COLOUR_OF[label], 255), outline) for label, outline in frame.objects]
    ids = [(_ID_OF[label], outline) for label, outline in frame.objects]
    record = {
        "imgHeight": size[0],
        "imgWidth": size[1],
        "objects": [{"label": label, "polygon": [list(xy) for xy in outline]} for label, outline in frame.objects],
    }
    start = f"gtFine/{frame.place}_gtFine"
    yield f"{start}_color.png", png(polygons.draw(colours, size, "RGBA", (0, 0, 0, 255)))
    yield f"{start}_instanceIds.png", png(polygons.draw(instances, size, "I", 0).astype(np.uint16))
    yield f"{start}_labelIds.png", png(polygons.draw(ids, size, "L", 0))
    yield f"{start}_polygons.json", json.dumps(record).encode()
