"""results/<table>_table.csv: its columns, reading it back, and the words that every rendering of a table shares.

One row for each printed row. Columns: table, row; the paper's label columns; for each of its score columns
`<score>_paper`, `<score>_run`, `<score>_difference`, in percent and in points; evaluated_on_paper; then what stands
behind the run's numbers, empty for a competitor: experiment, protocol, evaluated_on_run, images, seed, profile, notes.
In Table 2, where each score column has an experiment of its own, these carry the score's name in front.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path

from pipeline.published import NOT_PRINTED, PROTOCOLS, Source, Table, slug
from refinenet.files import UserError

BEHIND = ("experiment", "protocol", "evaluated_on_run", "images", "seed", "profile", "notes")


def columns(of: Table) -> list[str]:
    """The csv's header."""
    cells = [f"{slug(score.column)}_{part}" for score in of.scores for part in ("paper", "run", "difference")]
    behind = [prefix + column for prefix, _ in of.groups() for column in BEHIND]
    return ["table", "row", *map(slug, of.labels), *cells, "evaluated_on_paper", *behind]


def read(of: Table, root: Path = Path()) -> list[dict[str, str]]:
    """The rows of `root`/results/<table>_table.csv; UserError unless its columns and rows are those of the table."""
    file = Path("results", f"{of.name}_table.csv")
    try:
        with (root / file).open(encoding="utf-8", newline="") as stream:
            records = csv.DictReader(stream)
            rows, header = list(records), list(records.fieldnames or [])
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; stage table-{of.name} makes it") from None
    if header != columns(of) or len(rows) != len(of.rows):
        raise UserError(f"{file}: not Table {of.number} as published.yaml has it; stage table-{of.name} makes it")
    return rows


def percent(value: float | None) -> str:
    """A fraction as the paper prints it: percent, one decimal. "" for a class that does not occur."""
    return "" if value is None else f"{100 * value:.1f}"


def signed(points: str) -> str:
    """A difference for reading: "+0.3", "−1.2" (with a minus sign), "–" where there is none."""
    if points == "":
        return NOT_PRINTED
    return points.replace("-", "−") if Decimal(points) < 0 else f"+{points}" if Decimal(points) > 0 else points


def markdown(header: Sequence[str], left: int, rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """A Markdown table, its first `left` columns aligned to the left, the rest to the right."""
    for cells in (header, [":--"] * left + ["--:"] * (len(header) - left), *rows):
        yield f"| {' | '.join(cells)} |"


def how(of: Table, source: Source, split: str) -> str:
    """How a number of this run was taken: "multi-scale", and the split where it is not the paper's images."""
    instead = "" if of.same_images else f", {split} instead of {of.evaluated_on.partition(',')[0]}"
    return PROTOCOLS[source.protocol] + instead
