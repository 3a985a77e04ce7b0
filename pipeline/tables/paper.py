"""Read paper.yaml: the paper's nine tables, and which experiment reproduces which row."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from refinenet.errors import UserError

PUBLISHED = Path(__file__).with_name("paper.yaml")
NOT_PRINTED = "–"
PROTOCOLS = {"single": "single-scale", "multi": "multi-scale"}


@dataclass(frozen=True)
class RowSource:
    """What reproduces a number: an experiment, one of the protocols of its metrics, "single" or "multi"."""

    experiment: str
    protocol: str


@dataclass(frozen=True)
class Score:
    """A printed column of numbers. `metric` as the metrics call it: "mean_iou", or "iou <class>"."""

    column: str
    metric: str


@dataclass(frozen=True)
class Row:
    """A printed row: label cells, a value for each score column, as printed, and `sources` if it is ours, else ()."""

    labels: tuple[str, ...]
    values: tuple[str, ...]
    sources: tuple[RowSource, ...]


@dataclass(frozen=True)
class Table:
    """One table of the paper; the fields are explained at the top of paper.yaml."""

    name: str
    number: int
    title: str
    measure: str
    evaluated_on: str
    same_images: bool
    notes: tuple[str, ...]
    labels: tuple[str, ...]
    scores: tuple[Score, ...]
    rows: tuple[Row, ...]

    def experiments(self) -> list[str]:
        """The experiments whose metrics this table needs, sorted: the deps of stage `table-<name>`."""
        return sorted({source.experiment for row in self.rows for source in row.sources})

    def groups(self) -> list[tuple[str, list[int]]]:
        """Score columns that share an experiment, with a prefix for their columns in the csv.

        One group with the prefix "" in most tables; a group for each score column in Table 2.
        """
        if any(len(set(row.sources)) > 1 for row in self.rows):
            return [(f"{slug(score.column)}_", [i]) for i, score in enumerate(self.scores)]
        return [("", list(range(len(self.scores))))]


def slug(column: str) -> str:
    """A printed heading as a column name of the csv: "Pixel acc." -> "pixel_acc"."""
    return re.sub(r"[^a-z0-9]+", "_", column.lower()).strip("_")


def _row(table: str, cells: list[Any], labels: int, scores: int) -> Row:
    """Cut a row of paper.yaml into labels, values and, for a row of ours, its sources."""
    wrong = UserError(f"{PUBLISHED.name}: {table}: row {cells} does not read as labels, values, sources")
    texts, numbers, ours = cells[:labels], cells[labels : labels + scores], cells[labels + scores :]
    if len(numbers) != scores or len(ours) not in (0, 1, scores):
        raise wrong
    if not all(isinstance(text, str) for text in texts):
        raise wrong
    if not all(number == NOT_PRINTED or isinstance(number, float) for number in numbers):
        raise wrong
    sources = tuple(RowSource(*str(source).split()) for source in ours if len(str(source).split()) == 2)
    if len(sources) != len(ours) or any(source.protocol not in PROTOCOLS for source in sources):
        raise wrong
    values = tuple(number if isinstance(number, str) else f"{number:.1f}" for number in numbers)
    return Row(tuple(texts), values, sources * scores if len(sources) == 1 else sources)


@cache
def published() -> dict[str, Table]:
    """The nine tables by name, in the paper's order. Raises UserError where a row does not fit its columns."""
    tables = {}
    for name, table in yaml.safe_load(PUBLISHED.read_text(encoding="utf-8")).items():
        labels, scores, notes, rows = (table.pop(key) for key in ("labels", "scores", "notes", "rows"))
        tables[name] = Table(
            name=name,
            **table,
            notes=tuple(notes),
            labels=tuple(labels),
            scores=tuple(Score(column, metric) for column, metric in scores.items()),
            rows=tuple(_row(name, row, len(labels), len(scores)) for row in rows),
        )
    return tables


def table(name: str) -> Table:
    """The table of that name, or UserError that lists the names there are."""
    if name not in published():
        raise UserError(f"no table {name!r}; the tables are {', '.join(published())}")
    return published()[name]


def caveat(profile: str) -> str:
    """What to say beside every number of a run with this profile; nothing where it is the paper's own."""
    if profile == "paper":
        return ""
    if profile == "mini":
        return "mini: drawn scenes; shows that the pipeline works, says nothing about RefineNet's accuracy"
    return f"{profile}: not the paper's data or settings (profiles/{profile}.yaml); not a reproduction of its numbers"
