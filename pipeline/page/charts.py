"""Charts of the report, as SVG: data: URIs, the same bytes every time, in the reader's light or dark colours."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np

from pipeline.formats.label_images import ROLES
from pipeline.page.inline_images import Picture
from refinenet.data.split import Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SERIES = (
    ("#1f5fbf", "#7fb2ff"),
    ("#b3460b", "#ff9d5c"),
    ("#137a4b", "#4fd695"),
    ("#9a2c86", "#f08bdc"),
    ("#7a6200", "#e3c341"),
    ("#0c7480", "#45cfdd"),
    ("#c02b3a", "#ff8f98"),
)


def _roles() -> dict[str, tuple[str, str, str]]:
    """Role -> (the colour matplotlib draws it in, which stands for the role in the file; on light; on dark)."""
    pairs = ROLES | {f"s{i}": pair for i, pair in enumerate(SERIES)}
    return {role: (f"#fe{i:02x}dc", *pair) for i, (role, pair) in enumerate(pairs.items())}


def _figure(width: float, height: float) -> tuple[Figure, Axes]:
    """An empty chart, sizes in inches, drawn small: a phone shows it at about its size."""
    from matplotlib.figure import Figure

    ink, quiet, grid = (_roles()[role][0] for role in ("ink", "quiet", "grid"))
    figure = Figure((width, height), layout="constrained")
    axes = figure.subplots()
    axes.set_facecolor("none")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(quiet)
    axes.tick_params(colors=quiet, labelcolor=ink, labelsize=8, length=0)
    axes.grid(color=grid, linewidth=0.6)
    axes.set_axisbelow(True)
    return figure, axes


def _svg(figure: Figure, alt: str) -> Picture:
    """The chart as SVG. No date, no random ids; its colours follow the reader's light or dark setting."""
    import matplotlib as mpl

    data = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "refinenet", "svg.fonttype": "none", "font.family": "sans-serif"}):
        figure.savefig(data, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = data.getvalue()[data.getvalue().index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # matplotlib lists the fonts it would try; the reader's own sans-serif is what is meant.
    text = re.sub(r"font: ([^;\"]*?px)[^;\"]*", r"font: \1 system-ui, sans-serif", text)
    light = dark = ""
    for role, (drawn, on_light, on_dark) in _roles().items():
        if drawn in text:
            text = text.replace(drawn, f"var(--{role})")
            light, dark = f"{light}--{role}:{on_light};", f"{dark}--{role}:{on_dark};"
    style = f"<style>:root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}</style>"
    text = re.sub(r">\s+<", "><", text.replace("<defs>", f"{style}<defs>", 1))
    width, height = (round(size * 72) for size in figure.get_size_inches())
    return Picture("data:image/svg+xml," + quote(text, safe=" ='/:;(),"), alt, width, height)


def _blocks(values: Sequence[float], count: int) -> list[float]:
    """Means of `count` consecutive blocks of about equal length: at most as many points as there are values."""
    edges = np.linspace(0, len(values), min(count, len(values)) + 1).round().astype(int)
    return [float(np.mean(values[start:end])) for start, end in pairwise(edges)]


def curves(losses: Mapping[str, tuple[Sequence[float], Sequence[float]]], alt: str) -> Picture:
    """Training curves: name -> (steps, losses). Each is averaged over blocks, a hundred points at most."""
    figure, axes = _figure(4.4, 2.5)
    for i, (steps, values) in enumerate(losses.values()):
        colour = _roles()[f"s{i % len(SERIES)}"][0]
        dashes = "-" if i < len(SERIES) else "--"
        points = min(100, max(2, len(values) // 4))
        axes.plot(_blocks(steps, points), _blocks(values, points), color=colour, linestyle=dashes, linewidth=1.4)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("step", color=_roles()["quiet"][0], fontsize=8)
    axes.set_ylabel("loss", color=_roles()["quiet"][0], fontsize=8)
    return _svg(figure, alt)


def beside(scores: Mapping[str, tuple[float, float]], alt: str) -> Picture:
    """Name -> (paper, this run), in percent: a line for each name, a ring for the paper, a dot for this run."""
    figure, axes = _figure(4.4, 0.9 + 0.19 * len(scores))
    quiet, ours = _roles()["quiet"][0], _roles()["s0"][0]
    places = range(len(scores))
    paper, run = [pair[0] for pair in scores.values()], [pair[1] for pair in scores.values()]
    axes.hlines(places, paper, run, color=quiet, linewidth=0.8)
    axes.plot(paper, places, "o", markerfacecolor="none", markeredgecolor=quiet, markersize=5, label="paper")
    axes.plot(run, places, "o", color=ours, markersize=5, label="this run")
    axes.set_yticks(places, list(scores))
    axes.set_ylim(len(scores) - 0.4, -0.6)
    axes.set_xlim(0, 100)
    axes.set_xlabel("mean IoU, percent", color=quiet, fontsize=8)
    axes.legend(
        loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, fontsize=8, labelcolor=_roles()["ink"][0]
    )
    return _svg(figure, alt)


def confusion(shares: Array, classes: Sequence[str], answers: Sequence[str], alt: str) -> Picture:
    """A cell for each class of the truth (rows) and each answer: `shares` of the row's pixels, 0 to 1, C x A.

    White to dark blue on both pages, by square root, so that small shares show. Up to 40 classes are named at the
    edges; of more every tenth has its place in the list of classes, from 1.
    """
    named = len(classes) <= 40
    side = max(3.2, 1.1 + min(0.16 * len(classes), 5.2)) if named else 5.2
    figure, axes = _figure(side, side)
    axes.grid(visible=False)
    axes.spines["bottom"].set_visible(False)
    axes.imshow(np.sqrt(shares), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    font = 8 if len(classes) <= 21 else 6
    for names, place in ((answers, axes.set_xticks), (classes, axes.set_yticks)):
        at = list(range(len(names))) if named else list(range(9, len(names), 10))
        place(at, [names[i] if named else str(i + 1) for i in at], fontsize=font)
    axes.tick_params(axis="x", rotation=90)
    axes.set_xlabel("prediction", color=_roles()["quiet"][0], fontsize=8)
    axes.set_ylabel("truth", color=_roles()["quiet"][0], fontsize=8)
    return _svg(figure, alt)
