"""MS COCO 2014 in the layout of its archives: photographs of train2014, and the instances on them as JSON."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.measure import regionprops

from pipeline.config.schema import Rendered
from pipeline.datasets import coco
from pipeline.formats.encode import in_folders, jpeg, write_zip
from pipeline.synthetic import polygons
from pipeline.synthetic.album import Picture, paint

_OTHER = (13, "stop sign")  # a category that VOC does not have
_LEAST = 12  # pixels of a region that is worth a polygon
_PERSON = coco.CLASSES.index("person")


def render(settings: Rendered, folder: Path) -> None:
    """Draw `train` images with their objects, and one more with nothing of VOC's on it, which no reader keeps.

    The first group of people is a crowd: one region of run lengths for all of them. COCO's own val is left out.
    """
    pictures = [p for p in paint("coco", coco.CLASSES, replace(settings, val=1), "objects") if p.split == "train"]
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    photos = []
    crowd = next((p.number for p in pictures if (p.label == _PERSON).any()), None)
    for place, p in enumerate([*pictures, pictures[0]]):
        number, (height, width) = 9 + 16 * place, p.label.shape
        file = f"COCO_train2014_{number:012d}.jpg"
        # Some photographs of COCO are grey, in JPEGs of one channel; here the second.
        photos.append((f"train2014/{file}", jpeg(p.image[:, :, 1] if place == 1 else p.image)))
        images.append({"license": 1, "file_name": file, "height": height, "width": width, "id": number})
        found = _objects(p, p.number == crowd) if place < len(pictures) else [_other(height, width)]
        objects += [{**item, "image_id": number, "id": 1000 + len(objects) + i} for i, item in enumerate(found)]
    named = [(number, name) for number, name in zip(coco.CATEGORIES, coco.NAMES, strict=True) if number]
    record = {
        "info": {"description": "drawn scenes", "year": 2014},
        "images": images,
        "licenses": [{"id": 1, "name": "none: drawn"}],
        "annotations": objects,
        "categories": [{"supercategory": "thing", "id": n, "name": name} for n, name in sorted([*named, _OTHER])],
    }
    write_zip(folder / "train2014.zip", in_folders(photos))
    members = [("annotations/instances_train2014.json", json.dumps(record).encode())]
    write_zip(folder / "annotations_trainval2014.zip", in_folders(members))


def _annotation(category: int, segmentation: Any, area: float, box: tuple[int, ...], crowd: int = 0) -> dict[str, Any]:
    """Put together what COCO says of one object; `box` is that of skimage's regions: top, left, bottom, right."""
    top, left, bottom, right = box
    shape = {"segmentation": segmentation, "area": area, "bbox": [left, top, right - left, bottom - top]}
    return {**shape, "iscrowd": crowd, "category_id": category}


def _other(height: int, width: int) -> dict[str, Any]:
    """Describe a triangle over nearly all of the image, of a category that VOC does not have."""
    corners = [1.5, 2.0, width - 2.25, 2.0, width / 2, height - 3.0]
    return _annotation(_OTHER[0], [corners], (width - 3.75) * (height - 5) / 2, (2, 1, height - 3, width - 2))


def _objects(p: Picture, crowd: bool) -> Iterator[dict[str, Any]]:
    """Describe each object; `crowd`: all people together by run lengths instead of by polygons."""
    if crowd:
        mask = p.label == _PERSON
        (people,) = regionprops(mask.astype(np.uint8))
        yield _annotation(coco.CATEGORIES[_PERSON], _run_lengths(mask), float(people.area), people.bbox, 1)
    parts = np.where((p.instances > 0) & (p.label > 0), p.instances.astype(int) * len(coco.CLASSES) + p.label, 0)
    for region in regionprops(parts):
        klass = region.label % len(coco.CLASSES)
        if region.area >= _LEAST and not (crowd and klass == _PERSON):
            # Outlines run through pixel centres, which COCO counts from the pixels' corners; a hole is filled.
            origin = (region.bbox[1] + 0.5, region.bbox[0] + 0.5)
            traced = [outline for value, outline in polygons.outlines(region.image.astype(np.int64)) if value]
            corners = [(np.array(outline) + origin).ravel().tolist() for outline in traced]
            yield _annotation(coco.CATEGORIES[klass], corners, float(region.area), region.bbox)


def _run_lengths(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Count the pixels of each run, column by column, first of a run outside the mask: COCO's uncompressed RLE."""
    runs = [(inside, sum(1 for _ in run)) for inside, run in itertools.groupby(mask.ravel(order="F").tolist())]
    return {"counts": [0] * runs[0][0] + [length for _, length in runs], "size": list(mask.shape)}
