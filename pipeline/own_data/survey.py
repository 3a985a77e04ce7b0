"""Every image and mask of a user's folders looked at once: sizes, formats, the masks' values, and what is broken."""

from __future__ import annotations

import multiprocessing
import signal
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np

from pipeline.datasets import near_duplicates
from pipeline.formats import user_pictures
from pipeline.runtime import progress
from pipeline.runtime.machine import cores
from refinenet.data.split import RGB
from refinenet.errors import UserError, several

MOST_COLOURS = 254
_TOGETHER = 4  # files of a task


@dataclass(frozen=True)
class Seen:
    """One image with its mask. `counts`: pixels of each value, or of each colour as red << 16 | green << 8 | blue.

    `kind`: of the mask: values, or colours that are not grey. `palette`: the colours of the values, where it has them.
    """

    name: str
    width: int
    height: int
    formats: tuple[str, str]
    kind: Literal["values", "colours"]
    bits: int
    counts: Mapping[int, int]
    palette: tuple[RGB, ...] | None
    fingerprint: bytes


def key(colour: RGB) -> int:
    """Return a colour as one number."""
    return colour[0] << 16 | colour[1] << 8 | colour[2]


def colour(number: int) -> RGB:
    """Return the colour of a number, red << 16 | green << 8 | blue."""
    return number >> 16, number >> 8 & 255, number & 255


def look(name: str, image: Path, mask: Path) -> Seen:
    """Decode an image and its mask. Raises UserError, naming the file, for what cannot be used."""
    pixels = user_pictures.photo(image.read_bytes(), str(image))
    found = user_pictures.mask(mask.read_bytes(), str(mask))
    height, width = pixels.shape[:2]
    if (found.picture.height, found.picture.width) != (height, width):
        size = f"{found.picture.width} x {found.picture.height}"
        raise UserError(f"{mask}: {size} pixels, expected {width} x {height} as its image has upright")
    if found.values is not None:
        numbers = np.bincount(found.values.ravel(), minlength=256)
        counts = {value: int(numbers[value]) for value in np.flatnonzero(numbers).tolist()}
    else:
        rgb = found.colours().astype(np.uint32)
        values, times = np.unique(rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2], return_counts=True)
        if len(values) > MOST_COLOURS:
            raise UserError(f"{mask}: {len(values)} colours, expected {MOST_COLOURS} at most: smoothed edges?")
        counts = dict(zip(values.tolist(), times.tolist(), strict=True))
    palette = None if found.palette is None else tuple((int(r), int(g), int(b)) for r, g, b in found.palette)
    return Seen(
        name,
        width,
        height,
        (image.suffix.lower(), mask.suffix.lower()),
        "values" if found.values is not None else "colours",
        found.bits,
        counts,
        palette,
        near_duplicates.fingerprint(pixels),
    )


@dataclass
class Survey:
    """All of them, in the order of their names; `images`, `pixels`: how many have each value or colour.

    `kind`: "colours" where a mask has some that are not grey, else "values", or "1 bit" where no mask has more.
    """

    seen: list[Seen]
    kind: Literal["values", "colours", "1 bit"]
    palette: tuple[RGB, ...] | None
    images: Counter[int] = field(default_factory=Counter)
    pixels: Counter[int] = field(default_factory=Counter)


def _look_at(files: Sequence[tuple[str, Path, Path]]) -> list[Seen | str]:
    found: list[Seen | str] = []
    for one in files:
        try:
            found.append(look(*one))
        except UserError as error:
            found.append(str(error))
        except OSError as error:
            found.append(f"{error.filename}: {error.strerror}")
    return found


def survey(pairs: Sequence[tuple[str, Path, Path]]) -> Survey:
    """Look at each (name, image, mask), on all cores. Raises UserError for all that cannot be used at once."""
    tasks = [pairs[start : start + _TOGETHER] for start in range(0, len(pairs), _TOGETHER)]
    found: list[Seen | str] = []
    # Ctrl-C goes to all processes of a terminal; this one ends the others.
    ignore = (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(cores(), multiprocessing.get_context("fork"), signal.signal, ignore)
    try:
        with progress.bar("look", "image", total=len(pairs)) as bar:
            for part in pool.map(_look_at, tasks):
                found += part
                bar.update(len(part))
    except BrokenProcessPool:
        raise UserError(
            f"{pairs[len(found)][1]}: a process that read it or one soon after was killed or crashed; if memory ran "
            "out: PIPELINE_CORES=1 needs the least"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
    problems = [one for one in found if isinstance(one, str)]
    if problems:
        raise several(f"{len(problems)} of {len(pairs)} images or their masks cannot be used", problems)
    return summary([one for one in found if isinstance(one, Seen)])


def summary(seen: list[Seen]) -> Survey:
    """Return what the masks have in common: their kind, their palette, and how often which value occurs."""
    colours = any(one.kind == "colours" for one in seen)
    palettes = [one.palette for one in seen if one.palette is not None]
    made = Survey(
        seen,
        "colours" if colours else "1 bit" if all(one.bits == 1 for one in seen) else "values",
        palettes[0] if palettes and not colours else None,
    )
    # White of a mask of one bit is what the others have as 255.
    values = {value for one in seen for value in one.counts if one.bits > 1}
    white = 255 if made.kind == "values" and 255 in values and 1 not in values else 1
    for index, one in enumerate(seen):
        if colours:
            seen[index] = replace(one, counts=_as_colours(one))
        elif one.bits == 1 and one.palette is None:
            seen[index] = replace(one, counts={white if value else 0: count for value, count in one.counts.items()})
        made.images.update(seen[index].counts.keys())
        made.pixels.update(seen[index].counts)
    return made


def _as_colours(one: Seen) -> Counter[int]:
    """The pixels of each colour in a mask, which may be one of values: black all over, say."""
    total: Counter[int] = Counter()
    for value, count in one.counts.items():
        if one.kind == "colours":
            total[value] += count
        elif one.palette is not None:
            total[key(one.palette[value])] += count
        else:
            grey = 255 * value if one.bits == 1 else value
            total[key((grey, grey, grey))] += count
    return total
