"""What a plan is made from, and its rules: sizes, classes and objects of one's own images -> settings with reasons.

After nnU-Net (Isensee et al., Nature Methods 2021): what depends on the data follows from a few measured properties by
fixed rules, and the rest is one recipe for all (profiles/fit.yaml). The rules are ours.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from refinenet.data.split import Array, Split

LOOKED_AT = 200  # images whose objects are measured, evenly spaced
PIXELS = 1 << 20  # of a label whose objects are measured; of a larger one every n-th row and column
SPECKS = 9  # smaller objects, in pixels, are strays of a brush
STEP = 32  # what the sides of a crop are a multiple of, as the network sees it: its coarsest map is 1/32
# Pixels of the input that the finest objects should be wide. The finest map has a cell for every 4; half a cell on each
# side is border.
FINE = 6
SIDE = {"cpu": 256, "cuda": 512}  # of a crop as the network sees it
EDGE = {"cpu": 512, "cuda": 1024}  # the long edge of a whole image as the network sees it
BATCH = {"cpu": 8, "cuda": 16}
MEMORY = 0.5  # share of the memory that a step may take


@dataclass(frozen=True)
class Look:
    """What was seen of the training images.

    Attributes:
        images: how many.
        height, width: median, pixels.
        short_edges: the least and the largest short edge, pixels.
        classes: their names.
        found_in: images that have each class.
        shares: of the labelled pixels, each class.
        widths: typical width of each class's objects, pixels; None where none was measured.
    """

    images: int
    height: int
    width: int
    short_edges: tuple[int, int]
    classes: tuple[str, ...]
    found_in: tuple[int, ...]
    shares: tuple[float, ...]
    widths: tuple[float | None, ...]


@dataclass(frozen=True)
class Value:
    """A value of a plan, and a sentence that says why."""

    value: Any
    reason: str


Plan = dict[str, dict[str, Value]]  # section of a profile -> key -> value


def look(split: Split) -> Look:
    """Measure the training images of a prepared split; reads the labels of LOOKED_AT images at most."""
    counts = split.counts()
    labelled = counts[:, :-1]
    sizes = split.sizes()
    height, width = (int(side) for side in np.median(sizes, axis=0))
    short = sizes.min(axis=1)
    chosen = np.unique(np.linspace(0, len(split) - 1, min(LOOKED_AT, len(split))).astype(int))
    labels = (label for label in (split[int(index)].label for index in chosen) if label is not None)
    return Look(
        images=len(split),
        height=height,
        width=width,
        short_edges=(int(short.min()), int(short.max())),
        classes=split.schema.classes,
        found_in=tuple(int(n) for n in (labelled > 0).sum(0)),
        shares=tuple(float(share) for share in labelled.sum(0) / max(1, labelled.sum())),
        widths=object_widths(labels, len(split.schema.classes)),
    )


def object_widths(labels: Iterable[Array], classes: int) -> tuple[float | None, ...]:
    """Return the typical width of each class's objects in pixels; None for a class without one.

    An object is a connected region of a class, its width twice the largest distance of its pixels from its outside (in
    chessboard moves, at the border of the image there is none). Of all objects the median by area is taken: half of the
    class's pixels lie in objects that are at least so wide.

    Args:
        labels: H x W uint8 each, 255 = void.
        classes: how many there are.
    """
    from scipy import ndimage

    found: list[list[tuple[float, int]]] = [[] for _ in range(classes)]
    for label in labels:
        every = max(1, int(np.ceil((label.size / PIXELS) ** 0.5)))
        small = label[::every, ::every]
        for klass in np.unique(small[small < classes]).tolist():
            mask = small == klass
            regions, count = ndimage.label(mask, np.ones((3, 3)))
            areas = np.bincount(regions.ravel(), minlength=count + 1)[1:]
            # Outside the image the object may go on.
            depth = ndimage.distance_transform_cdt(np.pad(mask, 1, mode="edge"), "chessboard")[1:-1, 1:-1]
            depths = ndimage.maximum(depth, regions, np.arange(1, count + 1))
            for area, deep in zip(areas.tolist(), np.atleast_1d(depths).tolist(), strict=True):
                if area * every**2 >= SPECKS:
                    found[klass].append(((2.0 * deep - 1) * every, area * every**2))
    return tuple(_weighted_median(objects) for objects in found)


def _weighted_median(objects: list[tuple[float, int]]) -> float | None:
    if not objects:
        return None
    widths, areas = (np.array(column, np.float64) for column in zip(*sorted(objects), strict=True))
    return float(widths[np.searchsorted(areas.cumsum(), areas.sum() / 2)])


def plan(seen: Look, device: str, threads: int) -> Plan:
    """Return all of a plan but its length, which needs a measured rate.

    Args:
        seen: the training images.
        device: "cpu" or "cuda".
        threads: of the processor, that a training may use.
    """
    short, long = sorted((seen.height, seen.width))
    scale, why_scale = _scale(seen, long, device)
    side = min(SIDE[device], max(STEP, int(np.ceil(short * scale * 1.3 / STEP)) * STEP))
    crop = max(1, round(side / scale))
    few = min((n for n in seen.found_in if n), default=0)
    many = max(seen.found_in)
    rarest = seen.classes[seen.found_in.index(few)] if few else ""
    if few * 4 >= many:
        power = Value(0.0, f"each class is in {few} to {many} images: all are drawn alike, for a crop's centre")
    else:
        power = Value(
            0.5,
            f"{rarest} is in {few} of {seen.images} images, others in up to {many}: classes are drawn by the square "
            "root of their images, or the few of a rare class would be learnt by heart",
        )
    batch = min(BATCH[device], seen.images)
    where = "this machine has a GPU" if device == "cuda" else "no GPU was found here"
    low, high = seen.short_edges
    edges = Value(
        [low, high],
        f"short edges of the training images, {low} to {high} pixels: other images and photographs are brought there "
        "before they are scaled, or the network would see them in a size it has not learnt",
    )
    return {
        "": {
            "device": Value(device, where),
            "threads": Value(threads, f"cores of this machine: {threads}"),
        },
        "train": {
            "input_scale": Value(scale, why_scale),
            "crop": Value(
                crop,
                f"{side} x {side} pixels for the network at this scale; images are {seen.width} x {seen.height} "
                f"(median), a {'GPU' if device == 'cuda' else 'processor'} gets {SIDE[device]} at most",
            ),
            "batch_size": Value(
                batch, f"{batch} crops a step" + (", as many as there are images" if batch < BATCH[device] else "")
            ),
            "class_sampling_power": power,
            "short_edge": edges,
        },
        "evaluate": {"short_edge": edges},
    }


def _scale(seen: Look, long: int, device: str) -> tuple[float, str]:
    """Return by how much the images are resized for the network, and why."""
    whole = min(1.0, EDGE[device] / long)
    sizes = f"images are {seen.width} x {seen.height} pixels (median)"
    known = [(width, name) for width, name in zip(seen.widths, seen.classes, strict=True) if width]
    finest, name = min(known, default=(float("inf"), ""))
    needed = FINE / finest
    if needed <= whole:
        fine = f"; the finest objects, {name}, are then {finest * whole:.0f} pixels wide" if name else ""
        return _rounded(whole), f"{sizes}, the network sees them {EDGE[device]} long at most{fine}"
    scale = min(1.0, needed, 2 * whole)
    less = "" if scale >= needed else f", of the {FINE} that would be good for them"
    return (
        _rounded(scale),
        f"{sizes}; the finest objects, {name}, are {finest:.0f} pixels wide and at this scale "
        f"{finest * scale:.1f}{less}; the finest map has a cell for every 4",
    )


def _rounded(scale: float) -> float:
    return float(f"{scale:.2g}")


def length(seen: Look, hours: float, passes: float, rate: float, batch: int) -> Value:
    """Return the steps of a training.

    Args:
        seen: the training images.
        hours: the budget.
        passes: over the training images, at most.
        rate: measured images/s.
        batch: crops a step.
    """
    affordable, useful = hours * 3600 * rate / batch, passes * seen.images / batch
    steps = max(1, int(min(affordable, useful)))
    crops = f"{steps * batch:,} crops, {steps * batch / seen.images:.0f} for each of {seen.images:,} images"
    measured = f"{rate:.2f} images/s measured here"
    if affordable <= useful:
        return Value(steps, f"{hours:g} hours at {measured}: {crops}")
    return Value(
        steps,
        f"{crops}, which is enough: about {steps * batch / rate / 60:.0f} minutes at {measured}, of {hours:g} hours",
    )


def warmup(steps: int, usual: int) -> Value:
    """Return over how many steps the rate rises: as usual, of a short training a twentieth."""
    few = min(usual, steps // 20)
    return Value(few, "as in the recipe" if few == usual else f"a twentieth of {steps:,} steps")


def as_settings(made: Mapping[str, Mapping[str, Value]]) -> dict[str, Any]:
    """Return the values of a plan as a profile would have them, without the reasons."""
    found: dict[str, Any] = {section: {key: v.value for key, v in values.items()} for section, values in made.items()}
    flat: dict[str, Any] = found.pop("", {})
    return flat | found
