"""What the report of the paper's tables and that of a user's own data have in common.

One self-contained file, small enough for git; the sheets of a data set, and what an experiment left to look at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.page import charts, dataset_section, provenance, result_section
from pipeline.page.result_section import Curve, Level
from pipeline.tables.paper import PROTOCOLS
from refinenet.data.split import Schema
from refinenet.errors import UserError

# A page is kept in git, where a file may have 1 MB: the first level that fits is taken.
LIMIT = 900_000
LEVELS = (
    Level(8, 160, 60, 3, 320, 80),
    Level(6, 128, 60, 3, 240, 70),
    Level(4, 96, 50, 3, 200, 60),
    Level(6, 96, 50, 1, 160, 50),
    Level(4, 80, 40, 1, 120, 40),
)


def render_within_limit(
    template: str, values: Mapping[str, Any], shown: Callable[[Level], Mapping[str, Any]], limit: int
) -> str:
    """The page of `template` at the first level at which it has at most `limit` bytes, or else at the last.

    `values`: what it says, the same at every level; `shown`: what it shows at a level.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name("templates")),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    of = environment.get_template(template)
    for level in LEVELS:
        html = of.render(**values, colours=charts.SERIES, **shown(level))
        if len(html.encode()) <= limit:
            break
    return html


def data_set(name: str, title: str, holding: dataset_section.DatasetContents, level: Level) -> dict[str, Any]:
    """What a data set holds: a sheet of each split, and its numbers."""
    return {
        "name": name,
        "title": title,
        "sheets": {
            holding.called(part): dataset_section.sheet(
                split, level.tiles if part == "train" else level.tiles // 2, level.tile_width, level.tile_quality
            )
            for part, split in holding.splits.items()
        },
        **dataset_section.facts(holding),
    }


def pictured(experiment: str, cfg: Mapping[str, Any]) -> str:
    """The protocol that an experiment's pictures are of: `evaluate` takes the last one in settings.json."""
    try:
        return str(list(cfg["evaluate"][experiment]["protocols"])[-1])
    except (KeyError, TypeError, IndexError):
        raise UserError(f"{provenance.SETTINGS}: has no evaluate.{experiment}; stage settings renews it") from None


def results(
    experiment: str,
    protocol: str,
    trainings: Mapping[str, Curve],
    cfg: Mapping[str, Any],
    linked: Sequence[str],
    schema: Schema,
    level: Level,
    root: Path,
) -> dict[str, Any]:
    """What an experiment left to look at. `protocol`: of the confusion matrix; that of the pictures `evaluate` chose.

    `trainings`: what to draw the curves of, of which `linked` have a chain. `cfg`: settings.json.
    """
    of_pictures = pictured(experiment, cfg)
    wanted = cfg["evaluate"][experiment]["pictures"]
    chart = {name: (curve.steps, curve.losses) for name, curve in trainings.items() if curve.steps}
    matrix, mistakes = result_section.confusion(experiment, protocol, schema.classes, root)
    return {
        "pictured": f"{experiment}, {PROTOCOLS.get(of_pictures, of_pictures)}",
        # A licence may forbid to hand pictures on; only where none were asked for may none be there.
        "examples": result_section.predictions(experiment, schema.classes, schema.palette, level, root)
        if wanted
        else None,
        "matrix": matrix,
        "mistakes": mistakes,
        "curves": charts.curves(chart, f"Training loss against step of {', '.join(chart)}") if chart else None,
        "trainings": [
            {
                "name": name,
                "linked": name in linked,
                "summary": curve.summary(),
                "line": list(chart).index(name) if name in chart else 0,
            }
            for name, curve in trainings.items()
        ],
    }
