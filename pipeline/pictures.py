"""Labels in colour, and pictures for the report as data: URIs, the same bytes every time.

Thumbnails are WebP and PNG, charts SVG.
"""

from __future__ import annotations

import io
import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING
from urllib.parse import quote

import numpy as np
from PIL import Image

from refinenet.data import RGB, Array

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

VOID_COLOUR = (224, 224, 192)  # as the VOC devkit draws it

GAP = 4  # white pixels between image, truth and prediction

# Colours of the charts by role: on a light page, on a dark page. Lines and marks have 3:1 and text 4.5:1 against both.
ROLES = {
    "ink": ("#1d2330", "#e6e9ef"),
    "quiet": ("#5b6472", "#a3adbd"),
    "grid": ("#d9dde4", "#343b48"),
}
SERIES = (
    ("#1f5fbf", "#7fb2ff"),
    ("#b3460b", "#ff9d5c"),
    ("#137a4b", "#4fd695"),
    ("#9a2c86", "#f08bdc"),
    ("#7a6200", "#e3c341"),
    ("#0c7480", "#45cfdd"),
    ("#c02b3a", "#ff8f98"),
)


@dataclass(frozen=True)
class Picture:
    """An image of the page. Sizes in pixels of the file; the page scales it."""

    uri: str
    alt: str
    width: int
    height: int


def photo(image: Array, alt: str, width: int, quality: int) -> Picture:
    """An H x W x 3 uint8 image, at most `width` pixels wide, as WebP."""
    picture = Image.fromarray(image)
    picture.thumbnail((width, 2 * width), Image.Resampling.LANCZOS)
    return _encode(picture, "webp", alt, quality=quality, method=6)


def colour(label: Array, palette: Sequence[RGB]) -> Array:
    """H x W class indices -> H x W x 3 uint8 in the colours of the data set; void, and what is no class, is pale."""
    table = np.full((256, 3), VOID_COLOUR, np.uint8)
    table[: len(palette)] = palette
    return table[label]


def label_map(label: Array, palette: Sequence[RGB], alt: str, width: int) -> Picture:
    """H x W class indices in the colours of the data set, void pale, at most `width` pixels wide."""
    return flat(colour(label, palette), alt, width)


def flat(image: Array, alt: str, width: int) -> Picture:
    """An H x W x 3 uint8 picture of few colours, which it keeps (nearest pixels), as palette PNG."""
    picture = Image.fromarray(image)
    picture.thumbnail((width, 2 * width), Image.Resampling.NEAREST)
    pixels = np.asarray(picture).reshape(-1, 3)
    colours, indices = np.unique(pixels @ np.array([1 << 16, 1 << 8, 1]), return_inverse=True)
    if len(colours) > 256:  # not a label map after all
        return _encode(picture.quantize(256), "png", alt, optimize=True)
    indexed = Image.fromarray(indices.reshape(picture.height, picture.width).astype(np.uint8), "P")
    indexed.putpalette(np.stack([colours >> 16, colours >> 8 & 255, colours & 255], axis=1).astype(np.uint8).tobytes())
    return _encode(indexed, "png", alt, optimize=True)


def _encode(picture: Image.Image, kind: str, alt: str, **options: object) -> Picture:
    data = io.BytesIO()
    picture.save(data, kind, **options)
    return Picture(f"data:image/{kind};base64,{b64encode(data.getvalue()).decode()}", alt, *picture.size)


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
