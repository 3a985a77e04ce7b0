"""Everything that a run ends in -> results/report.html, one page that asks for nothing from outside.

    python -m pipeline.report

What the data sets hold, the tables with this run's numbers, the training curves, images beside truth and prediction,
and what each number was made from. No times, no run ids, no paths of a machine: the same results give the same page,
byte for byte.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline import datasets, overview, pictures, scores, stage, tables
from pipeline.files import dvc_md5
from pipeline.pictures import GAP, SERIES
from pipeline.published import NOT_PRINTED, PROTOCOLS, Source, Table, caveat, published, slug
from pipeline.scores import Scores
from refinenet.files import UserError, whole_file

REPORT = Path("results", "report.html")
CLOSE = 1.0  # points within which a number counts as reproduced


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


# The report is kept in git, where a file may have 1 MB: the first level that fits is taken.
LIMIT = 900_000
LEVELS = (
    Level(12, 160, 60, 3, 320, 80),
    Level(8, 128, 60, 3, 240, 70),
    Level(8, 112, 50, 2, 200, 60),
    Level(6, 96, 50, 1, 160, 50),
    Level(4, 80, 40, 1, 120, 40),
)


@dataclass(frozen=True)
class Line:
    """A row of a table on the page. `kind`: competitor, paper, run or difference; `anchors`: whose numbers they are."""

    kind: str
    labels: list[str]
    cells: list[str]
    anchors: list[str]


def table_lines(of: Table, records: list[dict[str, str]]) -> Iterator[Line]:
    """The rows of a csv as the paper prints them, ours followed by this run's numbers and the differences."""
    for record in records:
        labels = [record[slug(label)] for label in of.labels]
        cells = {
            part: [record[f"{slug(score.column)}_{part}"] for score in of.scores]
            for part in ("paper", "run", "difference")
        }
        names = list(dict.fromkeys(name for prefix, _ in of.groups() if (name := record[f"{prefix}experiment"])))
        yield Line("paper" if names else "competitor", labels, [text or NOT_PRINTED for text in cells["paper"]], [])
        if names:
            source = next(row.sources[0] for row in of.rows if list(row.labels) == labels and row.sources)
            how = tables.how(of, source, record[f"{of.groups()[0][0]}evaluated_on_run"])
            yield Line("run", [how], [text or NOT_PRINTED for text in cells["run"]], names)
            yield Line("difference", ["difference"], list(map(tables.signed, cells["difference"])), [])


def notes(of: Table, records: list[dict[str, str]]) -> list[str]:
    """What is to be said below a table: of the paper's numbers, then of this run's."""
    ours = {record[f"{prefix}notes"] for record in records for prefix, _ in of.groups()}
    return [*of.notes, *sorted(ours - {""})]


def curve(experiment: str, root: Path) -> tuple[list[float], list[float], list[float]]:
    """Steps, losses and learning rates of a training, from curves/<experiment>.csv; empty for finished weights."""
    file = Path("curves", f"{experiment}.csv")
    try:
        with (root / file).open(encoding="utf-8", newline="") as stream:
            reader = csv.DictReader(stream)
            rows = list(reader)
        if not {"step", "loss", "lr"} <= set(reader.fieldnames or ()):
            raise ValueError(f"found {', '.join(reader.fieldnames or ()) or 'nothing'}")
        columns = tuple([float(row[column]) for row in rows] for column in ("step", "loss", "lr"))
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; `train {experiment}` makes it") from None
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file}: expected the columns step, loss, lr with numbers ({error})") from None
    return columns[0], columns[1], columns[2]


def predictions(experiment: str, level: Level, root: Path) -> list[dict[str, Any]]:
    """The first pictures of predictions/<experiment>/, each cut into image, truth and prediction."""
    folder = Path("predictions", experiment)
    files = sorted((root / folder).glob("*.png"))
    if not files:
        raise UserError(f"{folder}: no pictures; `evaluate {experiment}` makes them")
    result = []
    for file in files[: level.predictions]:
        with Image.open(file) as picture:
            whole = np.asarray(picture.convert("RGB"))
        width, rest = divmod(whole.shape[1] - 2 * GAP, 3)
        if rest or width < 1:
            raise UserError(f"{folder / file.name}: {whole.shape[1]} pixels wide, expected three pictures {GAP} apart")
        image, truth, prediction = (whole[:, i * (width + GAP) :][:, :width] for i in range(3))
        parts = [
            pictures.photo(image, f"Image {file.stem}", level.width, level.quality),
            pictures.flat(truth, f"Truth of {file.stem}", level.width),
            pictures.flat(prediction, f"Prediction of {experiment} for {file.stem}", level.width),
        ]
        result.append({"name": file.stem, "parts": parts})
    return result


def chapter(of: Table, runs: Mapping[str, Scores], level: Level, root: Path) -> dict[str, Any]:
    """The results on a data set. `of`: its own table, whose last row of ours is the experiment in the pictures."""
    trainings = {name: curve(name, root) for name, run in runs.items() if run.dataset == of.name}
    chart = {name: (steps, losses) for name, (steps, losses, _) in trainings.items()}
    source = shown(of)
    return {
        "name": of.name,
        "title": datasets.load(of.name).TITLE,
        "shown": f"{source.experiment}, {PROTOCOLS[source.protocol]}",
        "predictions": predictions(source.experiment, level, root),
        "curves": pictures.curves(chart, f"Training loss against step of {', '.join(trainings)}")
        if any(steps for steps, _ in chart.values())
        else None,
        "trainings": [{"name": name, "told": told(*columns)} for name, columns in trainings.items()],
    }


def shown(of: Table) -> Source:
    """The experiment of a data set's own table that its pictures are of: that of its last row of ours."""
    return next(row.sources[0] for row in reversed(of.rows) if row.sources)


def data(name: str, runs: Mapping[str, Scores], holding: overview.Holding, level: Level) -> dict[str, Any]:
    """What the data set `name` holds, and for each class how well it is found where a table is about this data set."""
    of = published().get(name)
    scored = None
    if of is not None:
        source = shown(of)
        iou = runs[source.experiment].protocols[source.protocol].iou
        classes = holding.splits["train"].schema.classes
        scored = [tables.percent(iou.get(one)) or NOT_PRINTED for one in classes]
    return {
        "name": name,
        "title": datasets.load(name).TITLE,
        "shown": f"{source.experiment}, {PROTOCOLS[source.protocol]}" if of is not None else None,
        "scored": scored,
        "sheets": {
            overview.PARTS[part]: overview.sheet(
                split, level.tiles if part == "train" else level.tiles // 2, level.tile_width, level.tile_quality
            )
            for part, split in holding.splits.items()
        },
        **overview.told(holding),
    }


def told(steps: list[float], losses: list[float], rates: list[float]) -> str:
    """A training in words."""
    if not steps:
        return "finished weights of others, not trained here"
    lr = " to ".join(dict.fromkeys(f"{rate:.2g}".replace("e-0", "e-") for rate in (rates[0], rates[-1])))
    loss = np.mean(losses[-max(1, len(losses) // 10) :])
    return f"{round(steps[-1])} steps, learning rate {lr}, loss {loss:.3f} over the last tenth"


def chain(run: Scores, data: str, root: Path) -> dict[str, Any]:
    """What the numbers of an experiment were made from; `data` is the md5 of its prepared data set."""
    rows = [
        (of, ", ".join(row.labels))
        for of in published().values()
        for row in of.rows
        if any(source.experiment == run.experiment for source in row.sources)
    ]
    made = [run.file, Path("models", f"{run.experiment}.safetensors")]
    return {
        "run": run,
        "rows": rows,
        "protocols": [(PROTOCOLS[name], run.protocols[name]) for name in PROTOCOLS if name in run.protocols],
        "files": [(path.as_posix(), dvc_md5(root / path)) for path in made] + [(f"data/{run.dataset}", data)],
    }


@dataclass(frozen=True)
class Number:
    """A mean IoU of the paper and this run's, in percent. `comparable`: the paper's profile, on the paper's images."""

    experiment: str
    protocol: str
    paper: float
    run: float
    comparable: bool

    @property
    def close(self) -> bool:
        """Within CLOSE points, as printed: both have one decimal."""
        return round(abs(self.run - self.paper), 1) <= CLOSE


def numbers(printed: Mapping[str, list[dict[str, str]]]) -> list[Number]:
    """Each mean IoU of the tables' rows of ours once, though it may stand in several; data set by data set."""
    found = {}
    for of in published().values():
        for prefix, columns in of.groups():
            score = slug(of.scores[columns[-1]].column)  # where the paper prints several, the last is the mean IoU
            for record in printed[of.name]:
                if experiment := record[f"{prefix}experiment"]:
                    protocol, profile = record[f"{prefix}protocol"], record[f"{prefix}profile"]
                    paper, run = float(record[f"{score}_paper"]), float(record[f"{score}_run"])
                    found[experiment, protocol] = Number(
                        experiment, protocol, paper, run, of.same_images and profile == "paper"
                    )
    order = [of.name for of in published().values()]
    return sorted(found.values(), key=lambda number: order.index(number.experiment.partition("-")[0]))


def context(root: Path) -> dict[str, Any]:
    """What the page says, its chapters on the data sets aside."""
    every = published().values()
    printed = {of.name: tables.read(of, root) for of in every}
    runs = {name: scores.load(name, root) for of in every for name in of.experiments()}
    folders = {name: root / "data" / name for name in datasets.NAMES}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise UserError(f"data/{name}: no such folder; `prepare {name}` makes it")
    md5 = {run.dataset: dvc_md5(folders[run.dataset]) for run in runs.values()}
    found = numbers(printed)
    profiles = sorted({run.profile for run in runs.values()})
    beside = {f"{number.experiment}, {number.protocol}": (number.paper, number.run) for number in found}
    return {
        "caveats": [warning for profile in profiles if (warning := caveat(profile))],
        "profiles": profiles,
        "tables": [(of, list(table_lines(of, printed[of.name])), notes(of, printed[of.name])) for of in every],
        "printed": sum(map(len, printed.values())),
        "numbers": found,
        "beside": pictures.beside(beside, f"{len(found)} mean IoU of the paper beside this run's, as in the tables"),
        "experiments": [chain(runs[name], md5[runs[name].dataset], root) for name in sorted(runs)],
        "runs": runs,
        "colours": SERIES,
    }


def page(root: Path = Path()) -> str:
    """The report of the results under `root`, as HTML."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("report.html.j2")
    values = context(root)
    runs = values["runs"]
    own = [of for of in published().values() if of.name in datasets.NAMES]
    holdings = {name: overview.look(root, name) for name in datasets.NAMES}
    for level in LEVELS:
        html = template.render(
            **values,
            data=[data(name, runs, holding, level) for name, holding in holdings.items()],
            chapters=[chapter(of, runs, level, root) for of in own],
        )
        if len(html.encode()) <= LIMIT:
            break
    return html


def report(root: Path = Path()) -> None:
    """Write `root`/results/report.html."""
    html = page(root)
    with whole_file(root / REPORT) as part:
        part.write_text(html, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0]).parse_args()
    sys.exit(stage.report(report))
