"""Read paper.yaml: the paper's nine tables, which experiment reproduces which row, and what others have published."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from refinenet.errors import UserError

PUBLISHED = Path(__file__).with_name("paper.yaml")
NOT_PRINTED = "–"
ELSEWHERE = "‡"  # beside a number that is published, but not by the paper
_OF_OTHERS = ("labels", "values", "scored_on", "protocol", "by", "here")
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
    """A printed row: label cells, a value for each score column, as printed, and `sources` if it is ours, else ().

    `by`: where it is published, if not in the paper, `on` which images, and tested by which `protocol`; all three "" of
    the paper's own.
    """

    labels: tuple[str, ...]
    values: tuple[str, ...]
    sources: tuple[RowSource, ...]
    by: str = ""
    on: str = ""
    protocol: str = ""

    def marked(self) -> list[str]:
        """The label cells for reading, in which what is not the paper's bears a mark."""
        return [f"{self.labels[0]} {ELSEWHERE}" if self.by else self.labels[0], *self.labels[1:]]


def notes_of_others(rows: Iterable[Row]) -> list[str]:
    """Return what is to be said below a table of the rows that are not the paper's: a line for each source."""
    named: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        named.setdefault((row.on, row.protocol, row.by), []).append(row.labels[0])
    return [
        f"{ELSEWHERE} Not in the paper: {'; '.join(names)}. On {on}; {protocol}. Source: {by}."
        for (on, protocol, by), names in named.items()
    ]


@dataclass(frozen=True)
class Table:
    """One table of the paper; the fields are explained at the top of paper.yaml. `others`: rows of others, below it."""

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
    split: str = "val"
    others: tuple[Row, ...] = ()

    @property
    def all_rows(self) -> tuple[Row, ...]:
        """The paper's rows, then those of others."""
        return (*self.rows, *self.others)

    def experiments(self) -> list[str]:
        """The experiments whose metrics this table needs, sorted: the deps of stage `table-<name>`."""
        return sorted({source.experiment for row in self.all_rows for source in row.sources})

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


def _other(table: str, given: Any, labels: tuple[str, ...], columns: tuple[str, ...]) -> Row:
    """Read a row that others have published."""
    wrong = UserError(
        f"{PUBLISHED.name}: {table}: others: {given} does not read as labels, values, scored_on, protocol, by and here"
    )
    if not isinstance(given, dict) or not {*_OF_OTHERS} - {"here"} <= given.keys() <= {*_OF_OTHERS}:
        raise wrong
    values, here = given["values"], str(given.get("here", "")).split()
    if not isinstance(values, dict) or not values.keys() <= set(columns) or len(given["labels"]) != len(labels):
        raise wrong
    if not all(isinstance(value, float) for value in values.values()):
        raise wrong
    if len(here) not in (0, 2) or (here and here[1] not in PROTOCOLS):
        raise wrong
    cells = tuple(str(values[column]) if column in values else NOT_PRINTED for column in columns)
    sources = (RowSource(*here),) * len(columns) if here else ()
    return Row(tuple(given["labels"]), cells, sources, given["by"], given["scored_on"], given["protocol"])


@cache
def published() -> dict[str, Table]:
    """The nine tables by name, in the paper's order. Raises UserError where a row does not fit its columns."""
    tables = {}
    for name, table in yaml.safe_load(PUBLISHED.read_text(encoding="utf-8")).items():
        labels, scores, notes, rows = (table.pop(key) for key in ("labels", "scores", "notes", "rows"))
        others = [_other(name, row, tuple(labels), tuple(scores)) for row in table.pop("others", [])]
        tables[name] = Table(
            name=name,
            **table,
            notes=tuple(notes),
            labels=tuple(labels),
            scores=tuple(Score(column, metric) for column, metric in scores.items()),
            rows=tuple(_row(name, row, len(labels), len(scores)) for row in rows),
            others=tuple(others),
        )
    return tables


def table(name: str) -> Table:
    """The table of that name, or UserError that lists the names there are."""
    if name not in published():
        raise UserError(f"no table {name!r}; the tables are {', '.join(published())}")
    return published()[name]


def caveat(profile: str, comparable: bool, drawn: bool) -> str:
    """Return what to say of every number of a run with this profile; "" where it is the paper's own.

    Args:
        profile: its name.
        comparable: whether its numbers may stand against the paper's.
        drawn: whether it was trained or evaluated on synthetic images.
    """
    if drawn:
        return f"{profile}: synthetic images; shows that the pipeline works, says nothing about RefineNet's accuracy"
    if not comparable:
        return f"{profile}: not comparable with the paper's numbers (profiles/{profile}.yaml)"
    if profile == "paper":
        return ""
    return f"{profile}: not the paper's data or settings (profiles/{profile}.yaml); not a reproduction of its numbers"
