"""results/<table>_table.csv: its columns, reading it back, and the words that every rendering of a table shares.

One row for each printed row, then for those of others. Columns: table, row; published_by, "paper" or where the row's
numbers are published instead; the paper's label columns; for each of its score columns `<score>_paper` (of a row of
others the number published there), `<score>_run` (over several seeds their mean), in percent; `<score>_difference` in
points; `<score>_low` and `<score>_high`, the 95 % interval, which the mean IoU alone has; `<score>_spread`, the
standard deviation over seeds, empty for one; evaluated_on_paper; then what stands behind the run's numbers, empty for a
competitor: experiment, protocol, evaluated_on_run (the split), where ("val", "test server"), images, seed (all of them,
a space between), seeds (their number), profile, comparable ("yes", or "no" by the profile's setting: then there is no
difference), notes. In Table 2, where each score column has an experiment of its own, these carry the score's name in
front.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from pathlib import Path

from pipeline.tables.paper import NOT_PRINTED, PROTOCOLS, Row, Table, slug
from refinenet.errors import UserError

PARTS = ("paper", "run", "difference", "low", "high", "spread")
BEHIND = (
    *("experiment", "protocol", "evaluated_on_run", "where", "images"),
    *("seed", "seeds", "profile", "comparable", "notes"),
)
SERVER = "test server"
MARK = "†"  # beside a number of this run that was taken on other images than the paper's


def columns(of: Table) -> list[str]:
    """The csv's header."""
    cells = [f"{slug(score.column)}_{part}" for score in of.scores for part in PARTS]
    behind = [prefix + column for prefix, _ in of.groups() for column in BEHIND]
    return ["table", "row", "published_by", *map(slug, of.labels), *cells, "evaluated_on_paper", *behind]


def read(of: Table, root: Path = Path()) -> list[dict[str, str]]:
    """The rows of `root`/results/<table>_table.csv; UserError unless its columns and rows are those of the table."""
    file = Path("results", f"{of.name}_table.csv")
    try:
        with (root / file).open(encoding="utf-8", newline="") as stream:
            records = csv.DictReader(stream)
            rows, header = list(records), list(records.fieldnames or [])
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; stage table-{of.name} makes it") from None
    if header != columns(of) or len(rows) != len(of.all_rows):
        raise UserError(f"{file}: not Table {of.number} as paper.yaml has it; stage table-{of.name} makes it")
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


def where(split: str) -> str:
    """Where a number was taken: the labels of a split `test` are known to the test servers only."""
    return SERVER if split == "test" else split


def split_name(of: Table, split: str) -> str:
    """What the paper calls the images of a split of this project, in this table: NYUDv2's `val` are its "test"."""
    return of.split if split == "val" else where(split)


def like_for_like(of: Table, row: Row, split: str) -> bool:
    """Whether a number of this run on `split` was taken on the images of the published one, a row of `of`."""
    if row.by:
        return split_name(of, split) == row.on.partition(",")[0]
    return of.same_images or where(split) == SERVER


def interval(low: str, high: str) -> str:
    """The two ends for reading: "8.4–13.4"; "–" where there are none."""
    return f"{low}–{high}" if low else NOT_PRINTED


def how(of: Table, row: Row, split: str) -> str:
    """How a number of this run was taken: "multi-scale", and the split where it is not the paper's images.

    Where it is those of a test server, that.
    """
    source = row.sources[0]
    if of.same_images:
        return PROTOCOLS[source.protocol]
    instead = (
        where(split) if like_for_like(of, row, split) else f"{split} instead of {of.evaluated_on.partition(',')[0]}"
    )
    return f"{PROTOCOLS[source.protocol]}, {instead}"
