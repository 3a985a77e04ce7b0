"""What the page says of a run of the paper: data sets, tables with this run's numbers, curves, pictures, provenance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import datasets
from pipeline.fetch.input_md5 import input_md5
from pipeline.page import charts, dataset_section, page, provenance, result_section, summary
from pipeline.page.result_section import Curve, Level
from pipeline.tables import columns, metrics_files
from pipeline.tables.metrics_files import MetricsFile
from pipeline.tables.paper import NOT_PRINTED, PROTOCOLS, RowSource, Table, caveats, published, slug
from refinenet.errors import UserError


@dataclass(frozen=True)
class Line:
    """A row of a table on the page. `kind`: competitor, paper, run, interval or difference.

    `anchors`: whose numbers they are; `seeds` and `where`: how many, and on which images.
    """

    kind: str
    labels: list[str]
    cells: list[str]
    anchors: list[str]
    seeds: str = ""
    where: str = ""


def table_lines(of: Table, records: list[dict[str, str]]) -> Iterator[Line]:
    """The rows of a csv as the paper prints them, ours followed by this run's numbers and the differences."""
    for row, record in zip(of.all_rows, records, strict=True):
        cells = {
            part: [record[f"{slug(score.column)}_{part}"] for score in of.scores]
            for part in ("paper", "run", "difference", "spread")
        }
        ends = [
            columns.interval(*(record[f"{slug(score.column)}_{end}"] for end in ("low", "high"))) for score in of.scores
        ]
        names = list(dict.fromkeys(name for prefix, _ in of.groups() if (name := record[f"{prefix}experiment"])))
        yield Line(
            "paper" if names else "competitor", row.marked(), [text or NOT_PRINTED for text in cells["paper"]], []
        )
        if names:
            how = columns.how(of, row, record[f"{of.groups()[0][0]}evaluated_on_run"])
            ours = [
                f"{text} ± {spread}" if spread else text or NOT_PRINTED
                for text, spread in zip(cells["run"], cells["spread"], strict=True)
            ]
            seeds, where = (
                ", ".join(dict.fromkeys(record[f"{prefix}{what}"] for prefix, _ in of.groups()))
                for what in ("seeds", "where")
            )
            yield Line("run", [how], ours, names, seeds, where)
            yield Line("difference", ["difference"], list(map(columns.signed, cells["difference"])), [])
            yield Line("interval", ["95 % interval"], ends, [])


def notes(of: Table, records: list[dict[str, str]]) -> list[str]:
    """What is to be said below a table: of the paper's numbers, then of this run's."""
    ours = {record[f"{prefix}notes"] for record in records for prefix, _ in of.groups()}
    return [*of.notes, *sorted(ours - {""}), *(row.note() for row in of.others)]


def chapter(
    of: Table,
    runs: Mapping[str, MetricsFile],
    made: Mapping[str, Curve],
    cfg: Mapping[str, Any],
    holding: dataset_section.DatasetContents,
    level: Level,
    root: Path,
) -> dict[str, Any]:
    """The results on a data set. `of`: its own table, whose last row of ours is the experiment in the pictures.

    `made`: the curves of all trainings, pretrainings among them.
    """
    trainings = {name: curve for name, curve in made.items() if name.partition("-")[0] == of.name}
    source, schema = shown(of), holding.splits["train"].schema
    return {
        "name": of.name,
        "title": datasets.load(of.name).TITLE,
        "shown": f"{source.experiment}, {PROTOCOLS[source.protocol]}",
        **page.results(source.experiment, source.protocol, trainings, cfg, list(runs), schema, level, root),
    }


def shown(of: Table) -> RowSource:
    """The experiment of a data set's own table that its pictures are of: that of its last row of ours."""
    return next(row.sources[0] for row in reversed(of.rows) if row.sources)


def data(
    name: str, runs: Mapping[str, MetricsFile], holding: dataset_section.DatasetContents, level: Level
) -> dict[str, Any]:
    """What the data set `name` holds, and for each class how well it is found where a table is about this data set."""
    of = published().get(name)
    scored = None
    if of is not None:
        source = shown(of)
        iou = runs[source.experiment].protocols[source.protocol].iou
        classes = holding.splits["train"].schema.classes
        scored = [columns.percent(iou.get(one)) or NOT_PRINTED for one in classes]
    return {
        "shown": f"{source.experiment}, {PROTOCOLS[source.protocol]}" if of is not None else None,
        "scored": scored,
        **page.data_set(name, datasets.load(name).TITLE, holding, level),
    }


def used(runs: Iterable[str], cfg: Mapping[str, Any]) -> list[str]:
    """The data sets of the tables, and what their trainings have seen besides; others have pages of their own."""
    seen = {data for name in runs for data in provenance.sources(name, cfg)}
    return [name for name in datasets.NAMES if name in published() or name in seen]


def context(root: Path) -> dict[str, Any]:
    """What the page says, its chapters on the data sets aside."""
    every = published().values()
    printed = {of.name: columns.read(of, root) for of in every}
    seeds = {name: metrics_files.seeds(name, root) for of in every for name in of.experiments()}
    runs = {name: seeds[name].first for name in sorted(seeds)}
    cfg = provenance.settings(root)
    names = used(runs, cfg)
    folders = {name: root / "data" / name for name in names}
    for name, folder in folders.items():
        if not folder.is_dir():
            raise UserError(f"data/{name}: no such folder; `prepare {name}` makes it")
    md5s = {name: input_md5(folder) for name, folder in folders.items()}
    before = {first for name in runs if (first := provenance.pretraining(name, cfg))}
    made = {name: result_section.curve(name, root) for name in sorted(before | set(runs))}
    found = summary.numbers(printed)
    whose = sorted({(run.profile, run.drawn) for run in runs.values()})
    profiles = list(dict.fromkeys(profile for profile, _ in whose))
    beside = {f"{number.experiment}, {number.protocol}": (number.paper, number.run) for number in found}
    return {
        "caveats": caveats(whose),
        "profiles": profiles,
        "tables": [(of, list(table_lines(of, printed[of.name])), notes(of, printed[of.name])) for of in every],
        "printed": sum(map(len, printed.values())),
        "numbers": found,
        "counts": summary.counts(found),
        "beside": charts.beside(beside, f"{len(found)} mean IoU of the paper beside this run's, as in the tables"),
        "experiments": [provenance.provenance_of(seeds[name], cfg, md5s, root) for name in runs],
        "archives": [provenance.archives(name, cfg) for name in names],
        "costs": [provenance.cost(name, curve, cfg, runs.get(name), root) for name, curve in made.items()],
        "names": names,
        "runs": runs,
        "made": made,
        "cfg": cfg,
    }


def html(root: Path = Path(), limit: int = page.LIMIT) -> str:
    """The report of the results under `root`, in at most `limit` bytes where fewer and smaller pictures make it so."""
    values = context(root)
    runs = values["runs"]
    own = [of for of in published().values() if of.name in datasets.NAMES]
    holdings = {name: dataset_section.open_dataset(root, name) for name in values["names"]}

    def shown_at(level: Level) -> dict[str, Any]:
        return {
            "data": [data(name, runs, holding, level) for name, holding in holdings.items()],
            "chapters": [
                chapter(of, runs, values["made"], values["cfg"], holdings[of.name], level, root) for of in own
            ],
        }

    return page.render_within_limit("report.html.j2", values, shown_at, limit)
