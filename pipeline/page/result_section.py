"""What an experiment left to look at: its predictions, its confusion matrix, its training curve.

predictions/<experiment>/*.png and confusion-<protocol>.npy, and curves/<experiment>.csv, which the report shows.
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from pipeline.formats.label_images import GAP, VOID_COLOUR
from pipeline.page import charts, inline_images
from pipeline.page.inline_images import Picture
from refinenet.data.split import RGB, Array, Integers
from refinenet.errors import UserError

MISTAKES = 5  # that are named


@dataclass(frozen=True)
class Level:
    """How much a page shows. Widths in pixels, `quality` of WebP, 0 to 100.

    `tiles`: of the contact sheet of the training images; others have half as many.
    """

    tiles: int
    tile_width: int
    tile_quality: int
    predictions: int
    width: int
    quality: int


@dataclass(frozen=True)
class Curve:
    """A training: the step of each line of the log, the loss, the learning rate. Empty for finished weights."""

    steps: list[float]
    losses: list[float]
    rates: list[float]

    def summary(self) -> str:
        """In words."""
        if not self.steps:
            return "finished weights of others, not trained here"
        lr = " to ".join(dict.fromkeys(f"{rate:.2g}".replace("e-0", "e-") for rate in (self.rates[0], self.rates[-1])))
        loss = np.mean(self.losses[-max(1, len(self.losses) // 10) :])
        return f"{round(self.steps[-1])} steps, learning rate {lr}, loss {loss:.3f} over the last tenth"


def curve(training: str, root: Path) -> Curve:
    """The curve in `root`/curves/<training>.csv; UserError where that is not what train writes."""
    file = Path("curves", f"{training}.csv")
    try:
        with (root / file).open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            rows = list(reader)
        if not {"step", "loss", "lr"} <= set(reader.fieldnames or ()):
            raise ValueError(f"found {', '.join(reader.fieldnames or ()) or 'nothing'}")
        return Curve(*([float(row[column]) for row in rows] for column in ("step", "loss", "lr")))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; `train {training}` makes it") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: expected the columns step, loss, lr with numbers ({error})") from None


@dataclass(frozen=True)
class Shown:
    """Pictures of an experiment: name -> (image, truth, prediction), and the classes that occur in them, in order."""

    pictures: dict[str, tuple[Picture, Picture, Picture]]
    legend: dict[str, str]


def predictions(experiment: str, classes: Sequence[str], palette: Sequence[RGB], level: Level, root: Path) -> Shown:
    """The first pictures of predictions/<experiment>/, each cut in three. `legend`: class -> its colour, #rrggbb."""
    folder = Path("predictions", experiment)
    files = sorted((root / folder).glob("*.png"))
    if not files:
        raise UserError(f"{folder}: no pictures; `evaluate {experiment}` makes them")
    result, found = {}, set()
    for file in files[: level.predictions]:
        with Image.open(file) as picture:
            whole = np.asarray(picture.convert("RGB"))
        width, rest = divmod(whole.shape[1] - 2 * GAP, 3)
        if rest or width < 1:
            raise UserError(f"{folder / file.name}: {whole.shape[1]} pixels wide, expected three pictures {GAP} apart")
        image, truth, prediction = (whole[:, i * (width + GAP) :][:, :width] for i in range(3))
        here = {name: _colours(part) for name, part in (("truth", truth), ("prediction", prediction))}
        found |= here["truth"] | here["prediction"]
        words = {name: _listed(classes, palette, colours) for name, colours in here.items()}
        result[file.stem] = (
            inline_images.photo(image, f"Image {file.stem}", level.width, level.quality),
            inline_images.flat(truth, f"Truth of {file.stem}: {words['truth']}", level.width),
            inline_images.flat(
                prediction, f"Prediction of {experiment} for {file.stem}: {words['prediction']}", level.width
            ),
        )
    of = {name: colour for name, colour in zip(classes, palette, strict=True) if tuple(colour) in found}
    named = of | ({"void": VOID_COLOUR} if VOID_COLOUR in found else {})
    return Shown(result, {name: "#{:02x}{:02x}{:02x}".format(*colour) for name, colour in named.items()})


def _colours(part: Array) -> set[RGB]:
    """The colours in an H x W x 3 picture."""
    codes = np.unique(part.reshape(-1, 3) @ np.array([1 << 16, 1 << 8, 1])).tolist()
    return {(code >> 16, code >> 8 & 255, code & 255) for code in codes}


def _listed(classes: Sequence[str], palette: Sequence[RGB], colours: set[RGB]) -> str:
    """The classes that have one of these colours, in words; ten at most."""
    named = [name for name, colour in zip(classes, palette, strict=True) if tuple(colour) in colours]
    return f"{', '.join(named[:10])}{' …' if len(named) > 10 else ''}" if named else "no class"


@dataclass(frozen=True)
class Mistake:
    """Two classes and the share (0 to 1) of the pixels of `truth` that were taken for `taken`."""

    truth: str
    taken: str
    share: float


def confusion(experiment: str, protocol: str, classes: Sequence[str], root: Path) -> tuple[Picture, list[Mistake]]:
    """The confusion matrix of an experiment as a picture, and its largest mistakes.

    Read from predictions/<experiment>/confusion-<protocol>.npy, C x (C + 1) pixels: rows the truth, columns
    the prediction, last of them void.
    """
    file = Path("predictions", experiment, f"confusion-{protocol}.npy")
    try:
        table: Integers = np.load(root / file, allow_pickle=False)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; `evaluate {experiment}` makes it") from None
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{file}: not a matrix ({str(error).splitlines()[0]}); `evaluate {experiment}` makes it"
        ) from None
    expected = len(classes), len(classes) + 1
    if table.shape != expected or table.dtype.kind not in "iu" or table.min() < 0:
        found = f"{table.dtype} {' x '.join(map(str, table.shape))}"
        raise UserError(f"{file}: found {found}, expected pixel counts {' x '.join(map(str, expected))}")
    answers = [*classes, "void"] if table[:, -1].any() else list(classes)
    table = table[:, : len(answers)]
    shares = table / np.maximum(table.sum(axis=1, keepdims=True), 1)
    mistaken = table * (1 - np.eye(*table.shape, dtype=np.int64))
    # By pixels, not by share: a class of ten pixels is no finding.
    order = np.argsort(-mistaken.ravel(), kind="stable")[:MISTAKES]
    pairs = [divmod(int(place), len(answers)) for place in order]
    mistakes = [Mistake(classes[a], answers[b], float(shares[a, b])) for a, b in pairs if mistaken[a, b]]
    alt = f"Confusion matrix of {experiment}, {len(classes)} classes: {_right(shares, table)}"
    return charts.confusion(shares, classes, answers, alt), mistakes


def _right(shares: npt.NDArray[np.float64], table: Integers) -> str:
    """The diagonal in a sentence."""
    occurs = table.sum(axis=1) > 0
    recall = np.diag(shares)[occurs]
    return f"{int((recall > 0.5).sum())} of the {int(occurs.sum())} classes that occur have most of their pixels right"
