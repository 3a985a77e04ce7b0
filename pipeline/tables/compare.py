"""What stands beside the paper's numbers in a table: this run's, on val or a test server, and whose they are."""

from __future__ import annotations

from dataclasses import dataclass, replace
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path

from pipeline.tables import columns, comparable, metrics_files, server_records
from pipeline.tables.metrics_files import Seeds
from pipeline.tables.paper import NOT_PRINTED, Row, RowSource, Table, caveat
from pipeline.tables.server_records import ServerScores


@dataclass(frozen=True)
class Cell:
    """The number of this run beside a printed one, in percent; "" for what there is not."""

    run: str
    difference: str = ""
    low: str = ""
    high: str = ""
    spread: str = ""


@dataclass(frozen=True)
class Result:
    """Whose a number is: an experiment's, from one seed or several on val, or one archive's on a test server.

    `profiles`: those whose scores are comparable with the paper's.
    """

    source: RowSource
    val: Seeds
    server: ServerScores | None
    profiles: frozenset[str]

    @property
    def split(self) -> str:
        return "test" if self.server else self.val.first.split

    @property
    def images(self) -> int:
        return self.server.images if self.server else self.val.first.images

    @property
    def profile(self) -> str:
        return self.server.profile if self.server else self.val.first.profile

    @property
    def drawn(self) -> bool:
        """Say whether the model has seen synthetic images: a test server has none, but the training may have."""
        return self.val.first.drawn

    @property
    def comparable(self) -> bool:
        """Say whether its numbers may stand against the paper's."""
        return self.profile in self.profiles and not self.drawn

    @property
    def caveat(self) -> str:
        """Return what must be read before its numbers; "" for a run at the paper's settings."""
        return caveat(self.profile, self.comparable, self.drawn)

    @property
    def seeds(self) -> tuple[int, ...]:
        return (self.val.first.seed,) if self.server else tuple(run.seed for run in self.val.runs)

    def cell(self, metric: str, paper: str) -> Cell:
        """The number of a column, beside the paper's."""
        protocol = self.source.protocol
        if self.server:
            run = _one_decimal(self.server.value(metric))
            return Cell(run, self._difference(run, paper))
        run = columns.percent(self.val.mean(protocol, metric))
        low, high = map(columns.percent, self.val.interval(protocol, metric) or (None, None))
        spread = columns.percent(self.val.spread(protocol, metric))
        return Cell(run, self._difference(run, paper), low, high, spread)

    def _difference(self, run: str, paper: str) -> str:
        return difference(run, paper) if self.comparable else ""

    def notes(self) -> list[str]:
        """What else is to be said of it."""
        if not self.server:
            return self.val.first.absent()
        val = replace(self, server=None)
        cell, first = val.cell("mean_iou", NOT_PRINTED), self.val.first
        text = f"{cell.run} on {first.split}" + (f" ({columns.interval(cell.low, cell.high)})" if cell.low else "")
        if len(val.seeds) > 1:
            text += f", mean of {len(val.seeds)} seeds ± {cell.spread}"
        return [f"{columns.SERVER}: {self.server.link}", text, *self.warnings()]

    def warnings(self) -> list[str]:
        """Says where a test server's scores are of other weights than the rest of the run."""
        if not self.server or self.val.first.weights in ("", self.server.weights):
            return []
        model = f"models/{self.source.experiment}.safetensors"
        return [
            f"recorded for other weights than {model}: md5 {self.server.weights}, "
            f"{self.val.first.file} is of {self.val.first.weights}"
        ]


@dataclass(frozen=True)
class ResultRow:
    """A printed row beside this run: for each score column the number and whose it is; () in a competitor's row."""

    row: Row
    cells: tuple[Cell, ...]
    behind: tuple[Result, ...]

    @property
    def comparable(self) -> bool:
        """Say whether all of this run's numbers may stand against the printed ones; so they may where it has none."""
        return all(one.comparable for one in self.behind)


def difference(run: str, paper: str) -> str:
    """Points between two printed numbers, as a reader would subtract them; "" where one is missing."""
    return "" if run == "" or paper == NOT_PRINTED else str(Decimal(run) - Decimal(paper))


def _one_decimal(value: Decimal | None) -> str:
    return "" if value is None else str(value.quantize(Decimal("0.1"), ROUND_HALF_UP))


def rows(of: Table, root: Path) -> list[ResultRow]:
    """All rows of a table with what this run has for them."""
    metrics = {experiment: metrics_files.seeds(experiment, root) for experiment in of.experiments()}
    served = {name: server_records.load(name, root) for name in metrics} if of.name in server_records.SERVED else {}
    profiles, result = comparable.profiles(root), []
    for row in of.all_rows:
        behind = tuple(
            Result(one, metrics[one.experiment], served.get(one.experiment), profiles) for one in row.sources
        )
        cells = tuple(
            one.cell(score.metric, paper) for one, score, paper in zip(behind, of.scores, row.values, strict=False)
        )
        result.append(ResultRow(row, cells, behind))
    return result
