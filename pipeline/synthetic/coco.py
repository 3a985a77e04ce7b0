"""MS COCO 2014 in the layout of its archives: photographs of train2014, and the instances on them as JSON."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config.schema import Rendered
from pipeline.datasets import coco
from pipeline.formats.encode import jpeg, write_zip
from pipeline.synthetic import polygons
from pipeline.synthetic.album import Picture, paint

_OTHER = (13, "stop sign")  # a category that VOC does not have
_LEAST = 12  # pixels of a region that is worth a polygon
_PERSON = coco.CLASSES.index("person")


def render(settings: Rendered, folder: Path) -> None:
    """`train` images with their objects, and one more with nothing of VOC's on it, which no reader keeps.

    The first group of people is a crowd: one region of run lengths, not told apart. COCO's own val is left out.
    """
    pictures = [p for p in paint("coco", coco.CLASSES, replace(settings, val=1), "objects") if p.split == "train"]
    images: list[dict[str, Any]] = []
    objects: list[dict[str, Any]] = []
    photos = []
    crowd = next((p.number for p in pictures if (p.label == _PERSON).any()), None)
    for place, p in enumerate([*pictures, pictures[0]]):
        number, (height, width) = 9 + 16 * place, p.label.shape
        file = f"COCO_train2014_{number:012d}.jpg"
        photos.append((f"train2014/{file}", jpeg(p.image)))
        images.append({"license": 1, "file_name": file, "height": height, "width": width, "id": number})
        if place == len(pictures):
            corners = [1.5, 2.0, width - 2.25, 2.0, width / 2, height - 3.0]
            found = [(_OTHER[0], 0, [corners], (width - 3.75) * (height - 5) / 2, [1, 2, width - 3, height - 5])]
        else:
            found = _objects(p, p.number == crowd)
        for category, is_crowd, segmentation, area, box in found:
            objects.append(
                {
                    **{"segmentation": segmentation, "area": area, "iscrowd": is_crowd, "image_id": number},
                    **{"bbox": box, "category_id": category, "id": 1000 + len(objects)},
                }
            )
    named = [(number, name) for number, name in zip(coco.CATEGORIES, coco.NAMES, strict=True) if number]
    record = {
        "info": {"description": "drawn scenes", "year": 2014},
        "images": images,
        "licenses": [{"id": 1, "name": "none: drawn"}],
        "annotations": objects,
        "categories": [{"supercategory": "thing", "id": n, "name": name} for n, name in sorted([*named, _OTHER])],
    }
    write_zip(folder / "train2014.zip", photos)
    members = [("annotations/instances_train2014.json", json.dumps(record).encode())]
    write_zip(folder / "annotations_trainval2014.zip", members)


def _objects(p: Picture, crowd: bool) -> list[tuple[int, int, Any, float, list[int]]]:
    """Category, crowd, segmentation, area and box of each object."""
    found: list[tuple[int, int, Any, float, list[int]]] = []
    if crowd:
        mask = p.label == _PERSON
        found.append((coco.CATEGORIES[_PERSON], 1, _runs(mask), float(mask.sum()), _box(mask)))
    for number in np.unique(p.instances[p.instances > 0]):
        mask = (p.instances == number) & (p.label > 0)
        for klass in np.unique(p.label[mask]):
            if crowd and klass == _PERSON:
                continue
            part = mask & (p.label == klass)
            # Outlines run through pixel centres, which COCO counts from the pixels' corners; a hole is filled.
            regions = [outline for value, outline in polygons.outlines(part.astype(np.int64)) if value]
            corners = [[c + 0.5 for xy in outline for c in xy] for outline in regions]
            if part.sum() >= _LEAST:
                found.append((coco.CATEGORIES[klass], 0, corners, float(part.sum()), _box(part)))
    return found


def _runs(mask: NDArray[np.bool_]) -> dict[str, Any]:
    """Uncompressed run lengths, column by column, the first of pixels outside."""
    flat = np.concatenate([[False], mask.T.ravel()])
    ends = [*(np.flatnonzero(flat[1:] != flat[:-1])).tolist(), mask.size]
    counts = [end - start for start, end in zip([0, *ends[:-1]], ends, strict=True)]
    return {"counts": counts, "size": list(mask.shape)}


def _box(mask: NDArray[np.bool_]) -> list[int]:
    """x, y, width, height."""
    ys, xs = np.nonzero(mask)
    return [int(xs.min()), int(ys.min()), int(xs.max() - xs.min()) + 1, int(ys.max() - ys.min()) + 1]
