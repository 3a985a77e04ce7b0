"""PASCAL VOC 2012 with SBD, PASCAL-Context, Person-Part, in the layouts of their archives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion
from scipy.sparse import csc_matrix

from pipeline.config.schema import Rendered
from pipeline.datasets import context, person, voc
from pipeline.formats.encode import Member, in_folders, jpeg, lines, mat, png, voc_palette, write, write_tar, write_zip
from pipeline.synthetic.album import Picture, paint, variant
from pipeline.synthetic.scene import World
from refinenet.data import IGNORE_INDEX

_VOC2010 = "VOCtrainval_03-May-2010.tar"
_TEST = 3  # images of VOC 2012 whose labels are withheld


def _ids(pictures: Sequence[Picture], first: int, last: int) -> dict[int, str]:
    """VOC's ids, year and number, ascending: picture number -> id. Years from `first` to `last`."""
    years = {p.number: first + (last - first + 1) * p.number // len(pictures) for p in pictures}
    return {p.number: f"{years[p.number]}_{7 + 29 * p.number:06d}" for p in pictures}


def render_voc(settings: Rendered, folder: Path) -> None:
    """VOC 2012 and SBD. Every fourth training picture is VOC's alone, every fourth in both, the rest SBD's alone.

    As in the official lists, SBD's train and val both hold images of VOC's val, which trainaug must leave out.
    """
    pictures = paint("voc", voc.CLASSES, settings, "objects", void="border")
    ids = _ids(pictures, 2008, 2011)
    lists: dict[str, list[Picture]] = {"voc train": [], "voc val": [], "sbd train": [], "sbd val": []}
    counts = {"train": 0, "val": 0}
    places = {
        "train": (("voc train",), ("sbd train",), ("voc train", "sbd train"), ("sbd val",)),
        "val": (("voc val",), ("voc val", "sbd val"), ("voc val", "sbd train")),
    }
    for picture in pictures:
        options = places[picture.split]
        for place in options[counts[picture.split] % len(options)]:
            lists[place].append(picture)
        counts[picture.split] += 1
    own = sorted(lists["voc train"] + lists["voc val"], key=lambda p: p.number)
    boundaries = sorted(lists["sbd train"] + lists["sbd val"], key=lambda p: p.number)
    photos = {p.number: jpeg(p.image) for p in pictures}

    def voc_members() -> Iterator[Member]:
        root, palette = "VOCdevkit/VOC2012", voc_palette()
        for p in own:
            yield f"{root}/JPEGImages/{ids[p.number]}.jpg", photos[p.number]
            yield f"{root}/SegmentationClass/{ids[p.number]}.png", png(p.label, palette)
        for name, listed in (("train", lists["voc train"]), ("val", lists["voc val"]), ("trainval", own)):
            yield f"{root}/ImageSets/Segmentation/{name}.txt", lines(ids[p.number] for p in listed)

    def sbd_members() -> Iterator[Member]:
        root = "benchmark_RELEASE/dataset"
        for p in boundaries:
            yield f"{root}/img/{ids[p.number]}.jpg", photos[p.number]
            yield f"{root}/cls/{ids[p.number]}.mat", mat({"GTcls": _gtcls(p.label)})
        for name in ("train", "val"):
            yield f"{root}/{name}.txt", lines(ids[p.number] for p in lists[f"sbd {name}"])

    def test_members() -> Iterator[Member]:
        root = "VOCdevkit/VOC2012"
        world = World("voc", voc.CLASSES, settings.seed)
        names = []
        for number, required in enumerate(world.plan(_TEST)):
            names.append(f"2012_{6 + 29 * number:06d}")
            drawn = world.draw(len(pictures) + number, required, settings.height, settings.width)
            yield f"{root}/JPEGImages/{names[-1]}.jpg", jpeg(drawn.image)
        yield f"{root}/ImageSets/Segmentation/test.txt", lines(names)

    write_tar(folder / "VOCtrainval_11-May-2012.tar", in_folders(voc_members()))
    write_tar(folder / "VOC2012test.tar", in_folders(test_members()))
    write_tar(folder / "benchmark.tgz", in_folders(sbd_members()))


def _gtcls(label: NDArray[np.uint8]) -> NDArray[Any]:
    """SBD's struct of one image; it knows no void, so borders are background (0)."""
    segmentation = np.where(label == IGNORE_INDEX, 0, label).astype(np.uint8)
    count = len(voc.CLASSES) - 1
    boundaries = np.empty((count, 1), object)
    present = np.zeros((count, 1), np.uint8)
    for klass in range(1, count + 1):
        mask = segmentation == klass
        boundaries[klass - 1, 0] = csc_matrix(mask & ~binary_erosion(mask))
        present[klass - 1, 0] = mask.any()
    struct = np.empty((1, 1), [("Boundaries", "O"), ("Segmentation", "O"), ("CategoriesPresent", "O")])
    struct[0, 0] = (boundaries, segmentation, present)
    return struct


def _voc2010(pictures: Sequence[Picture], ids: Mapping[int, str]) -> Iterator[Member]:
    root = "VOCdevkit/VOC2010"
    for p in pictures:
        yield f"{root}/JPEGImages/{ids[p.number]}.jpg", jpeg(p.image)
    for split in ("train", "val"):
        yield f"{root}/ImageSets/Main/{split}.txt", lines(ids[p.number] for p in pictures if p.split == split)


def render_context(settings: Rendered, folder: Path) -> None:
    """PASCAL-Context: labels 1 to 459 of a list among them, of which 59 count and the rest is background."""
    names = Path(__file__).with_name("context_labels.txt").read_text(encoding="utf-8").split()
    frequent = context.CLASSES[1:]
    raw = np.array([0] + [names.index(name) + 1 for name in frequent], np.uint16)
    others = [number for number in range(1, len(names) + 1) if number not in raw]
    pictures = paint("context", context.CLASSES, settings, "outdoor")
    ids = _ids(pictures, 2007, 2010)

    def labels() -> Iterator[Member]:
        for p in pictures:
            label = raw[p.label] + variant(p, p.label == 0, others)
            yield f"trainval/{ids[p.number]}.mat", mat({"LabelMap": label})
        yield "trainval/labels.txt", lines(f"{i}: {name}" for i, name in enumerate(names, 1))

    write_tar(folder / _VOC2010, in_folders(_voc2010(pictures, ids)))
    write_tar(folder / "trainval.tar.gz", in_folders(labels()))
    write(folder / "59_labels.txt", lines(f"{i}: {name}" for i, name in enumerate(frequent, 1)))


def render_person(settings: Rendered, folder: Path) -> None:
    """Person-Part: palette PNGs and lists of its own, images in the VOC 2010 archive."""
    pictures = paint("person", person.CLASSES, settings, "people")
    ids = _ids(pictures, 2007, 2010)

    def members() -> Iterator[Member]:
        root, palette = "pascal_person_part", voc_palette()
        for p in pictures:
            yield f"{root}/pascal_person_part_gt/{ids[p.number]}.png", png(p.label, palette)
        for name, chosen in (("train", ("train",)), ("val", ("val",)), ("trainval", ("train", "val"))):
            listed = [ids[p.number] for p in pictures if p.split in chosen]
            pairs = (f"/JPEGImages/{i}.jpg /pascal_person_part_gt/{i}.png" for i in listed)
            yield f"{root}/pascal_person_part_trainval_list/{name}_id.txt", lines(listed)
            yield f"{root}/pascal_person_part_trainval_list/{name}.txt", lines(pairs)

    write_tar(folder / _VOC2010, in_folders(_voc2010(pictures, ids)))
    write_zip(folder / "pascal_person_part.zip", in_folders(members()))
