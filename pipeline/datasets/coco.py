"""MS COCO 2014 with the 21 classes of PASCAL VOC, which the paper's VOC models are trained on first.

    train2014.zip                    train2014/<image>.jpg
    annotations_trainval2014.zip     annotations/instances_train2014.json

The paper does not say how objects become labels. These rules are ours, after torchvision's references/segmentation:

- Kept are images with more than 1,000 labelled pixels, by the sum of the annotations' own `area` (the usual filter,
  UNVERIFIED for the paper). So many images are left out; COUNTS counts what the release has.
- Objects of the 60 categories that VOC does not have are background.
- Void are regions of crowds (`iscrowd`) of a VOC class, which are labelled as a whole, and pixels that two objects of
  different classes claim. (torchvision's code: crowds are objects, and what any two objects claim is void.)
- Polygons of fewer than three points are no area: they are left out, with one line that counts them, as detectron2
  (data/datasets/coco.py) does; so are objects that have no other. Whether train2014 has one is not known.

Masks are what pycocotools makes of polygons. The JSON has 300 MB: it is read once, piece by piece; what is needed of
it goes to a file without a name, from which `read` takes the objects of its image.
"""

from __future__ import annotations

import json
import math
import os
import sys
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipeline import datasets
from pipeline.formats import decode, json_stream, label_images
from pipeline.formats.anonymous_file import anonymous_file
from pipeline.formats.archive import printable
from refinenet.data import IGNORE_INDEX
from refinenet.data.split import Array
from refinenet.errors import UserError

TITLE = "MS COCO, VOC's classes"
CLASSES = datasets.VOC_CLASSES
PALETTE = label_images.colour_map(len(CLASSES))
COUNTS = {"train": 82783}
TYPICAL_SIZE = (480, 640)  # as large as they get

# COCO's category of each class, and what COCO calls it; of background there is none.
CATEGORIES = (0, 5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72)
NAMES = (
    *("", "airplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("dining table", "dog", "horse", "motorcycle", "person", "potted plant", "sheep", "couch", "train", "tv"),
)
LEAST = 1000  # labelled pixels of an image, exclusive

_JSON = "annotations/instances_train2014.json"
_OBJECTS_LIMIT = 1 << 26  # bytes of one image's objects
_CLASS_OF = {category: index for index, category in enumerate(CATEGORIES) if index}


class Reader(datasets.Reader):
    def __init__(self, raw: Path) -> None:
        super().__init__(raw)
        self._images = self.archive("train2014.zip")
        self._annotations = self.archive("annotations_trainval2014.zip")
        self._released = 0
        self._names: dict[str, int] = {}  # of the images that are kept -> their row in the following
        self._sizes: list[tuple[int, int]] = []  # height, width
        self._starts = np.zeros(1, np.int64)  # where a row's objects begin in _offsets; one more at the end
        self._offsets = self._lengths = np.zeros(0, np.int64)
        self._flat = [0, 0]  # polygons of fewer than three points, and objects without any other
        self._objects = self._index()
        if any(self._flat):
            polygons, alone = self._flat
            print(
                f"warning: {self._annotations.where(_JSON)}: left out {polygons} polygon{'s' * (polygons != 1)} of "
                f"fewer than three points and {alone} object{'s' * (alone != 1)} without any other",
                file=sys.stderr,
            )

    def names(self, split: str) -> list[str]:
        return list(self._names)

    def released(self, split: str) -> int:
        return self._released

    def where(self, split: str, name: str) -> str:
        return f"{self._annotations.where(_JSON)}[{printable(name)}]"

    def read(self, split: str, name: str) -> tuple[Array, Array | None]:
        image = decode.photo(*self._images.read_named(f"train2014/{name}.jpg"))
        row, where = self._names[name], self.where(split, name)
        size = self._sizes[row]
        if image.shape[:2] != size:
            raise UserError(f"{where}: {size[0]} x {size[1]} pixels, its image has {image.shape[0]} x {image.shape[1]}")
        label, void = np.zeros(size, np.uint8), np.zeros(size, np.bool_)
        for klass, crowd, segmentation in self._objects_of(row):
            inside = _mask(segmentation, size, where)
            if crowd:
                void |= inside
            else:
                void |= inside & (label != 0) & (label != klass)
                label[inside] = klass
        label[void] = IGNORE_INDEX
        return image, label

    def _objects_of(self, row: int) -> Iterator[Any]:
        for at in range(self._starts[row], self._starts[row + 1]):
            data = os.pread(self._objects.fileno(), int(self._lengths[at]), int(self._offsets[at]))
            yield json.loads(data)

    def _index(self) -> IO[bytes]:
        """Go through the JSON once: which images there are, which are kept, and the objects of each."""
        where = self._annotations.where(_JSON)
        images: dict[int, tuple[str, int, int]] = {}
        areas: dict[int, float] = {}
        categories: dict[int, str] = {}
        owners, offsets, lengths = array("q"), array("q"), array("q")

        def objects() -> Iterator[bytes]:
            offset = 0
            for key, item in json_stream.read(self._annotations.chunks(_JSON), where):
                if key == "images":
                    number, image = _image(item, where)
                    if number in images:
                        raise UserError(f"{where}: image {number} twice")
                    images[number] = image
                elif key == "categories":
                    number = _whole(item, "id", where)
                    categories[number] = str(item.get("name"))
                elif key == "annotations":
                    klass = _CLASS_OF.get(_whole(item, "category_id", where))
                    if klass is None:
                        continue
                    owner, crowd = _whole(item, "image_id", where), bool(item.get("iscrowd"))
                    segmentation = item.get("segmentation")
                    if isinstance(segmentation, list):
                        segmentation, given = [p for p in segmentation if not _is_flat(p)], len(segmentation)
                        self._flat[0] += given - len(segmentation)
                        if not segmentation:
                            self._flat[1] += 1
                            continue
                    if not crowd:
                        areas[owner] = areas.get(owner, 0.0) + _number(item, "area", where)
                    data = json.dumps([klass, crowd, segmentation]).encode()
                    owners.append(owner)
                    offsets.append(offset)
                    lengths.append(len(data))
                    offset += len(data)
                    yield data

        try:
            file = self.resources.enter_context(anonymous_file(self._annotations.path, objects()))
        except (OverflowError, RecursionError, TypeError) as error:
            raise UserError(f"{where}: not as COCO has it ({printable(str(error))})") from None
        for category, name in zip(CATEGORIES[1:], NAMES[1:], strict=True):
            if categories.get(category) != name:
                found = printable(repr(categories.get(category)))
                raise UserError(f"{where}: category {category} is {found}, expected {name!r}")
        if not images:
            raise UserError(f"{where}: no images")
        missing = next((owner for owner in owners if owner not in images), None)
        if missing is not None:
            raise UserError(f"{where}: an object of image {missing}, which is not in the list of images")
        kept = [number for number in images if areas.get(number, 0.0) > LEAST]
        if not kept:
            raise UserError(f"{where}: no image with more than {LEAST} labelled pixels")
        row = {number: index for index, number in enumerate(kept)}
        rows = np.array([row.get(owner, len(row)) for owner in owners], np.int64)
        order = np.argsort(rows, kind="stable")
        self._released = len(images)
        self._names = {images[number][0]: index for index, number in enumerate(kept)}
        self._sizes = [images[number][1:] for number in kept]
        self._starts = np.searchsorted(rows[order], np.arange(len(kept) + 1))
        self._offsets, self._lengths = np.array(offsets)[order], np.array(lengths)[order]
        if len(self._names) < len(kept):
            raise UserError(f"{where}: two images of one name")
        totals = np.add.reduceat(np.append(self._lengths, 0), self._starts[:-1])
        if totals.max() > _OBJECTS_LIMIT:
            raise UserError(f"{where}: {totals.max()} bytes of objects in one image, expected {_OBJECTS_LIMIT} at most")
        return file


def _image(item: Any, where: str) -> tuple[int, tuple[str, int, int]]:
    """An image's number; its name, height and width."""
    number = _whole(item, "id", where)
    file, height, width = item.get("file_name"), _whole(item, "height", where), _whole(item, "width", where)
    if not isinstance(file, str) or not file.endswith(".jpg") or "/" in file or not file.isprintable():
        raise UserError(f"{where}: image {number}: file_name is {printable(repr(file))}, expected <name>.jpg")
    if height < 1 or width < 1 or height * width > decode.PIXELS:
        raise UserError(f"{where}: image {number}: {height} x {width}, expected {decode.PIXELS} pixels at most")
    return number, (file.removesuffix(".jpg"), height, width)


def _number(item: Any, key: str, where: str) -> float:
    value = item.get(key) if isinstance(item, dict) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError(f"{where}: {key} is {printable(repr(value))}, expected a number: {printable(repr(item))}")
    return value


def _whole(item: Any, key: str, where: str) -> int:
    value = _number(item, key, where)
    if int(value) != value or not abs(value) < 1 << 62:
        raise UserError(f"{where}: {key} is {printable(repr(value))}, expected a whole number")
    return int(value)


def _mask(segmentation: Any, size: tuple[int, int], where: str) -> Any:
    """The pixels of one object, H x W bool, of polygons or of run lengths, plain or packed as pycocotools does it.

    All numbers are checked here: pycocotools' C code believes them.
    """
    from pycocotools import mask  # type: ignore[import-untyped]

    height, width = size
    if isinstance(segmentation, dict):
        counts, of = segmentation.get("counts"), segmentation.get("size")
        if of != [height, width]:
            raise UserError(f"{where}: run lengths of size {printable(repr(of))}, expected [{height}, {width}]")
        counts = _unpacked(counts) if isinstance(counts, str) else counts if isinstance(counts, list) else []
        if any(type(count) is not int or count < 0 for count in counts) or sum(counts) != height * width:
            raise UserError(f"{where}: run lengths that are not {height * width} pixels in all")
        runs = mask.frPyObjects({"counts": counts, "size": [height, width]}, height, width)
    else:
        polygons = segmentation if isinstance(segmentation, list) else []
        for polygon in polygons:
            _check_polygon(polygon, size, where)
        if not polygons:
            raise UserError(
                f"{where}: segmentation is {printable(repr(segmentation))}, expected polygons or run lengths"
            )
        runs = mask.merge(mask.frPyObjects(polygons, height, width))
    return mask.decode(runs).astype(np.bool_)


def _is_flat(polygon: Any) -> bool:
    """Say whether it is a list of numbers, x and y of fewer than three points."""
    return isinstance(polygon, list) and len(polygon) < 6


def _check_polygon(polygon: Any, size: tuple[int, int], where: str) -> None:
    """UserError unless it has three corners or more, none further outside the image than the image is large."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        raise UserError(f"{where}: polygon {printable(repr(polygon))}, expected x, y of three corners or more")
    for numbers, side in ((polygon[::2], size[1]), (polygon[1::2], size[0])):
        for number in numbers:
            if type(number) not in (int, float) or not -side <= number <= 2 * side:
                raise UserError(f"{where}: a corner at {printable(repr(number))} of {side} pixels")


def _unpacked(text: str) -> list[int]:
    """The run lengths in pycocotools' text (rleToString): 5 bits a character, each run less the one before the last."""
    counts: list[int] = []
    value = bits = 0
    for character in text:
        code = ord(character) - 48
        if not 0 <= code < 64 or bits > 60:
            return []
        value |= (code & 31) << bits
        bits += 5
        if not code & 32:
            if code & 16:
                value -= 1 << bits
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = bits = 0
    return counts
