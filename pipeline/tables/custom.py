"""The table of a data set that is not in the paper: metrics/<data>/*.json -> results/<data>_table.csv, .md and .tex.

One row for each experiment of params.yaml on it and each protocol, numbers as the paper prints them: percent, one
decimal, "" for a class that no mask has; over several seeds their mean. Columns: data_set, experiment, backbone,
cascade, pools, protocol, pixel_accuracy, mean_accuracy, mean_iou; mean_iou_low, mean_iou_high (95 % interval),
mean_iou_spread (standard deviation over seeds, "" for one); `iou <class>` for each class; evaluated_on, images, seed,
seeds (how many), profile, notes.

Where others have published scores (pipeline/tables/others.py), these are rows, too, below this project's and without an
experiment; then every row ends in the columns method ("this run" in this project's), size, starts_from, trained_on,
published_by, verified.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.config import resolve
from pipeline.config.profiles import PARAMS
from pipeline.tables import columns as tables
from pipeline.tables import latex, metrics_files, others
from pipeline.tables.metrics_files import MetricsFile, Seeds
from pipeline.tables.others import PublishedScores
from pipeline.tables.paper import NOT_PRINTED, PROTOCOLS, published
from refinenet.errors import UserError

COLUMNS = ("data_set", "experiment", "backbone", "cascade", "pools", "protocol")
MEASURES = {"pixel_accuracy": "Pixel acc.", "mean_accuracy": "Mean acc.", "mean_iou": "IoU"}
HEAD = ("Experiment", "Backbone", "Cascade", "Pools", "Protocol", *MEASURES.values(), "95 % interval", "Seeds")
PARTS = ("mean_iou_low", "mean_iou_high", "mean_iou_spread")
BEHIND = ("evaluated_on", "images", "seed", "seeds", "profile", "notes")
WIDTH = 256  # of the paper's decoder
OURS = "this run"


def _runs(name: str, root: Path, resolved: Mapping[str, Any]) -> tuple[str, list[str], list[Seeds]]:
    """Title and classes of the data set `name`, and the scores of its experiments in the order of params.yaml."""
    known = resolve.custom_datasets(resolved)
    if name not in known:
        raise UserError(f"no table {name!r}; the tables are {', '.join([*published(), *known])}")
    title, classes = known[name]
    # What repeats an experiment from another seed has no row of its own.
    evaluated = resolved["evaluate"].items()
    experiments = [one for one, value in evaluated if value["data"] == name and not value.get("of")]
    stale = {file.stem for file in (root / "metrics" / name).glob("*.json")} - set(experiments)
    for experiment in sorted(stale):
        print(f"{metrics_files.path(experiment, name)}: left out, no experiment of {PARAMS}")
    runs = [metrics_files.seeds(experiment, root, name) for experiment in experiments]
    for run in (run for same in runs for run in same.runs):
        if any(set(protocol.iou) != set(classes) for protocol in run.protocols.values()):
            raise UserError(f"{run.file}: not the classes {', '.join(classes)}; `evaluate {run.experiment}` renews it")
    return title, classes, runs


def in_order(run: MetricsFile) -> list[str]:
    """The paper's protocols, then others; the file has them by the alphabet."""
    return sorted(run.protocols, key=lambda protocol: ([*PROTOCOLS, protocol].index(protocol), protocol))


def _notes(run: MetricsFile) -> list[str]:
    thin = [] if run.network.width >= WIDTH else [f"width {run.network.width}, the paper's is {WIDTH}"]
    return run.absent() + thin + (["synthetic images: says nothing about accuracy"] if run.drawn else [])


@dataclass(frozen=True)
class CustomRow:
    """An experiment under a protocol; all texts as the csv has them."""

    runs: Seeds
    protocol: str
    measures: list[str]
    interval: tuple[str, str]
    spread: str
    iou: list[str]
    circumstances: list[str] = field(default_factory=list)  # size, starts from, trained on; where others have published

    def left(self) -> list[str]:
        """The first columns."""
        run, network = self.runs.first, self.runs.first.network
        return [run.dataset, run.experiment, network.backbone, network.cascade, str(network.pools), self.protocol]

    def csv(self) -> list[str]:
        """The row of the csv."""
        run, seeds = self.runs.first, [str(run.seed) for run in self.runs.runs]
        behind = [run.split, str(run.images), " ".join(seeds), str(len(seeds)), run.profile, "; ".join(_notes(run))]
        last = [OURS, *self.circumstances, "", ""] if self.circumstances else []
        return [*self.left(), *self.measures, *self.interval, self.spread, *self.iou, *behind, *last]

    def compared(self) -> list[str]:
        """The row among those of others."""
        low, high = self.interval
        source = [f"95 % interval {tables.interval(low, high)}"] if low else []
        source += [f"{len(self.runs.runs)} seeds ± {self.spread}"] if self.spread else []
        score = self.measures[list(MEASURES).index("mean_iou")]
        return [f"{OURS}: {self.heading()}", *self.circumstances, ", ".join(source), score]

    def heading(self) -> str:
        """Experiment and protocol in words."""
        return f"{self.runs.first.experiment}, {PROTOCOLS.get(self.protocol, self.protocol)}"

    def shown(self) -> list[str]:
        """The row for reading, without the classes."""
        words = [*self.left()[1:-1], PROTOCOLS.get(self.protocol, self.protocol)]
        seeds = str(len(self.runs.runs)) + (f" (± {self.spread})" if self.spread else "")
        return [*words, *(text or NOT_PRINTED for text in self.measures), tables.interval(*self.interval), seeds]


def _line(runs: Seeds, protocol: str, classes: list[str], circumstances: list[str]) -> CustomRow:
    """The numbers of a row."""
    low, high = runs.interval(protocol, "mean_iou") or (None, None)
    return CustomRow(
        runs,
        protocol,
        [tables.percent(runs.mean(protocol, measure)) for measure in MEASURES],
        (tables.percent(low), tables.percent(high)),
        tables.percent(runs.spread(protocol, "mean_iou")),
        [tables.percent(runs.mean(protocol, f"iou {one}")) for one in classes],
        circumstances,
    )


@dataclass(frozen=True)
class CustomTable:
    """The table of a data set: its title, its classes, the scores of its experiments and their rows.

    `published`: what others have published on it, None where the project knows of nothing.
    """

    title: str
    classes: list[str]
    runs: list[Seeds]
    rows: list[CustomRow]
    published: PublishedScores | None = None

    def comparison(self) -> tuple[list[list[str]], list[list[str]], list[str]]:
        """Return this run's rows among those of others, the rows of others, and what is to be said below them.

        A row of this run is left out, and the remarks say why, where it was scored on other images.
        """
        if self.published is None:
            return [], [], []
        why = {one.first.experiment: self.published.obstacle(one.first) for one in self.runs}
        ours = [row.compared() for row in self.rows if not why[row.runs.first.experiment]]
        apart = [
            f"`{one}` is not compared with these: its scores are {reason}." for one, reason in why.items() if reason
        ]
        return ours, [row.shown() for row in self.published.rows], [*self.published.remarks(), *apart]


def table(name: str, root: Path = Path()) -> CustomTable:
    """The table of the data set `name`; UserError where a metric is missing."""
    resolved = resolve.resolve() if PARAMS.is_file() else {}
    title, classes, found = _runs(name, root, resolved)
    known = others.read(name)
    rows = []
    for runs in found:
        about = others.circumstances(runs.first.experiment, resolved) if known else []
        rows += [_line(runs, protocol, classes, about) for protocol in in_order(runs.first)]
    return CustomTable(title, classes, found, rows, known)


def notes(name: str, runs: Seeds) -> str:
    """What is to be said of an experiment's numbers below the table."""
    run, seeds = runs.first, [str(run.seed) for run in runs.runs]
    parts = [f"{run.images} images of {name} {run.split}", f"seed{'s' if len(seeds) > 1 else ''} {', '.join(seeds)}"]
    return "; ".join([*parts, f"profile {run.profile}", *_notes(run)])


def forms(name: str, root: Path = Path()) -> dict[str, str]:
    """Suffix -> the text of the table, as csv, Markdown and LaTeX; UserError where a metric is missing."""
    of = table(name, root)
    title, classes, rows = of.title, of.classes, of.rows
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    header = [*COLUMNS, *MEASURES, *PARTS, *(f"iou {one}" for one in classes), *BEHIND]
    writer.writerow([*header, *(others.COLUMNS if of.published else ())])
    writer.writerows(row.csv() for row in rows)
    if of.published:
        same = {"data_set": name, "evaluated_on": of.published.split, "images": str(of.published.images)}
        for one in of.published.rows:
            cells = same | {"mean_iou": str(one.mean_iou)}
            writer.writerow([*(cells.get(column, "") for column in header), *one.csv()])
    lead = "Pixel accuracy, mean accuracy, mean IoU with its 95 % interval and each class's IoU, in percent."
    below = [f"`{runs.first.experiment}`: {notes(name, runs)}" for runs in of.runs]
    shown = [[*row.shown(), *(text or NOT_PRINTED for text in row.iou)] for row in rows]
    page = [f"# {title}", "", lead, ""]
    page += [*tables.markdown(list(map(_cell, [*HEAD, *classes])), 5, [list(map(_cell, row)) for row in shown]), ""]
    page += [f"- {note}" for note in below]
    ours, theirs, remarks = of.comparison()
    if theirs:
        bold = [[f"**{row[0]}**", *row[1:-1], f"**{row[-1]}**"] for row in ours]
        shown = [list(map(_cell, row)) for row in [*bold, *theirs]]
        page += ["", f"## {_published(of)}", "", *tables.markdown(others.HEAD, 5, shown), ""]
        page += [f"- {note}" for note in remarks]
    # LaTeX: the classes in a table of their own, one a line, as there may be hundreds.
    upper = [latex.Row(row.shown()) for row in rows]
    lower = [latex.Row([one, *(row.iou[i] or NOT_PRINTED for row in rows)]) for i, one in enumerate(classes)]
    columns = [row.heading() for row in rows]
    tex = latex.table(f"{title}. {lead}", f"tab:{name}", HEAD, 5, upper, below)
    tex += "\n" + latex.long_table(f"{title}: IoU in percent", f"tab:{name}-classes", ["Class", *columns], 1, lower)
    if theirs:
        both = [*(latex.Row(row, bold=True) for row in ours), *(latex.Row(r, rule=r is theirs[0]) for r in theirs)]
        tex += "\n" + latex.table(f"{title}. {_published(of)}", f"tab:{name}-published", others.HEAD, 5, both, remarks)
    return {"csv": text.getvalue(), "md": "\n".join(page) + "\n", "tex": tex}


def _published(of: CustomTable) -> str:
    """The heading of the rows of others."""
    assert of.published is not None
    return f"Published by others: mean IoU in percent on the {of.published.images} images of {of.published.split}"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
