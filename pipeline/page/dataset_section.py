"""What a prepared data set holds, for the report: how much of what, and a sheet of its images.

The numbers are read from what the splits say of their labels, so that no pixel is read but those that are shown.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.page import inline_images
from refinenet.data.split import Array, Split
from refinenet.errors import UserError

PARTS = {"train": "training", "val": "evaluation", "test": "test"}
RAREST = 3  # classes that are named


@dataclass(frozen=True)
class Numbers:
    """Of a split. `sizes`: width and height of its smallest, median and largest image, by area.

    `void`: share of the pixels of labelled images, None without any. `shares`: of each class in the labelled pixels.
    `containing`: how many images each class occurs in.
    """

    images: int
    labelled: int
    sizes: tuple[tuple[int, int], tuple[int, int], tuple[int, int]]
    void: float | None
    shares: tuple[float, ...]
    containing: tuple[int, ...]


def numbers(split: Split) -> Numbers:
    """Count what is in a split, from the counts that it has beside its pixels."""
    counts, sizes = split.counts(), split.sizes()
    by_area = sizes[np.argsort(sizes.prod(axis=1), kind="stable")]
    smallest, median, largest = ((int(w), int(h)) for h, w in by_area[[0, (len(sizes) - 1) // 2, -1]])
    total, void = int(counts.sum()), int(counts[:, -1].sum())
    return Numbers(
        images=len(split),
        labelled=int(np.count_nonzero(counts.any(axis=1))),
        sizes=(smallest, median, largest),
        void=void / total if total else None,
        shares=tuple(float(count) / max(total - void, 1) for count in counts[:, :-1].sum(axis=0)),
        containing=tuple(int(count) for count in np.count_nonzero(counts[:, :-1], axis=0)),
    )


@dataclass(frozen=True)
class DatasetContents:
    """A prepared data set: its splits by name, opened, and their numbers. `val`: what the split `val` is called."""

    splits: dict[str, Split]
    numbers: dict[str, Numbers]
    val: str = PARTS["val"]

    def called(self, part: str) -> str:
        """What a split is called. Where test images have labels they are what is evaluated on, and val is not."""
        if part != "val":
            return PARTS[part]
        return "validation" if "test" in self.numbers and self.numbers["test"].labelled else self.val


def open_dataset(root: Path, name: str, val: str = PARTS["val"]) -> DatasetContents:
    """Open data/<name> under `root`, its split `val` called so; UserError where it is missing or a split is empty."""
    folder = Path("data", name)
    files = {part: root / folder / f"{part}.arrow" for part in PARTS}
    splits = {part: Split(file) for part, file in files.items() if file.exists()}
    if "train" not in splits:
        raise UserError(f"{folder / 'train.arrow'}: no such file; `prepare {name}` makes it")
    for part, split in splits.items():
        if not len(split):
            raise UserError(f"{folder / part}.arrow: no images; `prepare {name}` makes some")
    return DatasetContents(splits, {part: numbers(split) for part, split in splits.items()}, val)


def contents(label: Array, classes: Sequence[str]) -> str:
    """What a label map shows, in words: its five largest classes."""
    counts = np.bincount(label.ravel(), minlength=256)[: len(classes)]
    largest = [classes[i] for i in np.argsort(-counts, kind="stable")[:5] if counts[i]]
    return ", ".join(largest) or "nothing labelled"


def evenly_spaced(count: int, wanted: int) -> list[int]:
    """`wanted` of the numbers below `count`, as far apart as they can be; all where there are fewer."""
    wanted = min(count, wanted)
    return [(2 * i + 1) * count // (2 * wanted) for i in range(wanted)]


def sheet(split: Split, wanted: int, width: int, quality: int) -> list[tuple[inline_images.Picture, ...]]:
    """A contact sheet: images from all over the split, each with its label in colours where it has one."""
    schema, found = split.schema, []
    for sample in (split[index] for index in evenly_spaced(len(split), wanted)):
        tile = [inline_images.photo(sample.image, f"Image {sample.name}", width, quality)]
        if sample.label is not None:
            alt = f"Label of {sample.name}: {contents(sample.label, schema.classes)}"
            tile.append(inline_images.label_map(sample.label, schema.palette, alt, width))
        found.append(tuple(tile))
    return found


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} × {size[1]}"


def _rare(classes: Sequence[str], of: Numbers) -> str:
    """The classes with the fewest pixels, those that never occur first."""
    never = [name for name, share in zip(classes, of.shares, strict=True) if not share]
    order = sorted((share, index) for index, share in enumerate(of.shares) if share)[:RAREST]
    rare = [
        f"{classes[index]} ({percent(share)}, {of.containing[index]} image{'s' if of.containing[index] != 1 else ''})"
        for share, index in order
    ]
    missing = [f"{len(never)} never: {', '.join(never[:RAREST])}{' …' if len(never) > RAREST else ''}"] if never else []
    return "; ".join([*missing, ", ".join(rare)]) if rare else "; ".join(missing)


def percent(share: float) -> str:
    """A share from 0 to 1 in percent; what there is of it does not read as nothing."""
    return "< 0.01 %" if 0 < share < 0.00005 else f"{100 * share:.2f} %"


def facts(holding: DatasetContents) -> dict[str, Any]:
    """A data set's numbers as the page has them: facts by split, and a row for each class."""
    schema = holding.splits["train"].schema
    labelled = {part: of for part, of in holding.numbers.items() if of.labelled}
    facts = []
    for part, of in holding.numbers.items():
        smallest, median, largest = map(_size, of.sizes)
        facts.append(
            {
                "part": holding.called(part),
                "images": of.images,
                "sizes": smallest if smallest == largest else f"{smallest} to {largest}, median {median}",
                "void": "no labels" if of.void is None else percent(of.void),
                "rarest": _rare(schema.classes, of) if of.labelled else "–",
            }
        )
    most = max((share for of in labelled.values() for share in of.shares), default=0) or 1
    rows = [
        {
            "name": name,
            "colour": "#{:02x}{:02x}{:02x}".format(*colour),
            "cells": [
                {
                    "share": percent(of.shares[index]),
                    "bar": round(100 * of.shares[index] / most, 1),
                    "images": of.containing[index],
                    "of": f"{100 * of.containing[index] / of.labelled:.1f} %",
                }
                for of in labelled.values()
            ],
        }
        for index, (name, colour) in enumerate(zip(schema.classes, schema.palette, strict=True))
    ]
    return {"facts": facts, "parts": [holding.called(part) for part in labelled], "rows": rows}
