"""What the page says of a run of the paper: data sets, tables with this run's numbers, curves, pictures, provenance."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import datasets
from pipeline.fetch.input_md5 import input_md5
from pipeline.page import charts, dataset_section, page, provenance, result_section, summary
from pipeline.page.provenance import Provenance
from pipeline.page.result_section import Curve, Level
from pipeline.tables import columns, comparable, metrics_files
from pipeline.tables.metrics_files import MetricsFile, Seeds
from pipeline.tables.paper import (
    NOT_PRINTED,
    PROTOCOLS,
    Row,
    RowSource,
    Table,
    caveat,
    notes_of_others,
    published,
    slug,
)
from refinenet.errors import UserError

WIDE = 6  # score columns; with more the mean stands first, before what a narrow screen cuts off


@dataclass(frozen=True)
class Line:
    """A row of a table on the page. `kind`: competitor, paper, run, difference, or of those by others group and other.

    `cells`: each a text and its interval, "" for none. `anchors`: whose numbers they are; `seeds`: how many;
    `split`: on which images; `said`: what stands in place of the cells after the last, "" for nothing.
    """

    kind: str
    labels: list[str]
    cells: list[tuple[str, str]]
    anchors: list[str]
    seeds: str = ""
    split: str = ""
    said: str = ""


def shown_order(of: Table) -> list[int]:
    """Return the score columns in the page's order: the paper's, but in a wide table the mean IoU, its last, first."""
    order = list(range(len(of.scores)))
    return order if len(order) < WIDE else [order[-1], *order[:-1]]


def table_lines(of: Table, records: list[dict[str, str]]) -> Iterator[Line]:
    """The rows of a csv as the paper prints them, ours followed by this run's numbers and the differences.

    Below them, told apart, what others have published. This run's numbers that are not comparable are in `run_lines`.
    """
    scores = _scores(of)
    for row, record in zip(of.all_rows, records, strict=True):
        if row in of.others[:1]:
            yield Line("group", ["Not in the paper: published by others \N{DOUBLE DAGGER}"], [], [])
        names = list(dict.fromkeys(name for prefix, _ in of.groups() if (name := record[f"{prefix}experiment"])))
        printed = [(record[f"{score}_paper"] or NOT_PRINTED, "") for score in scores]
        images, _, count = row.on.partition(", ")
        split = f"{images} ({count.removesuffix(' images')})" if count else images
        kind = "other" if row.by else "paper" if names else "competitor"
        said = f"{row.protocol}. Source: {row.by}." if row.by and _alone(row) else ""
        yield Line(kind, row.marked(), printed[:1] if said else printed, [], split=split, said=said)
        if names and _comparable(of, record):
            yield from _run(of, row, record)


def run_lines(of: Table, records: list[dict[str, str]]) -> list[Line]:
    """Return this run's numbers that are not comparable with the paper's, for a table of their own."""
    return [
        line
        for row, record in zip(of.all_rows, records, strict=True)
        if not _comparable(of, record)
        for line in _run(of, row, record)
    ]


def _comparable(of: Table, record: dict[str, str]) -> bool:
    """Return whether all of this run's numbers in a row may stand against the printed ones; so they may without any."""
    return all(record[f"{prefix}comparable"] != "no" for prefix, _ in of.groups())


def _scores(of: Table) -> list[str]:
    """Return the score columns in the page's order, as the csv calls them."""
    return [slug(of.scores[i].column) for i in shown_order(of)]


def _run(of: Table, row: Row, record: dict[str, str]) -> Iterator[Line]:
    """Yield what this run has for a row: its numbers and, where said, the differences."""
    scores = _scores(of)
    names = list(dict.fromkeys(record[f"{prefix}experiment"] for prefix, _ in of.groups()))
    how = columns.how(of, row, record[f"{of.groups()[0][0]}evaluated_on_run"])
    ours = []
    for score in scores:
        text, spread, low, high = (record[f"{score}_{part}"] for part in ("run", "spread", "low", "high"))
        words = f"{text} ± {spread}" if spread else text or NOT_PRINTED
        ours.append((words, f"({columns.interval(low, high)})" if low else ""))
    counted = [
        f"{columns.split_name(of, record[f'{prefix}evaluated_on_run'])} ({record[f'{prefix}images']})"
        for prefix, _ in of.groups()
    ]
    seeds = dict.fromkeys(record[f"{prefix}seeds"] for prefix, _ in of.groups())
    yield Line("run", [how], ours, names, ", ".join(seeds), ", ".join(dict.fromkeys(counted)))
    points = [record[f"{score}_difference"] for score in scores]
    if any(points):
        yield Line("difference", ["difference"], [(columns.signed(one), "") for one in points], [])


def _alone(row: Row) -> bool:
    """Return whether in a row of a wide table the mean alone is there, so that there is room for words."""
    return len(row.values) >= WIDE and set(row.values[:-1]) == {NOT_PRINTED}


def notes(of: Table, records: list[dict[str, str]], comparable: bool) -> list[str]:
    """Return what is to be said below the numbers of this run that are, or are not, comparable with the paper's."""
    shown = [record for record in records if _comparable(of, record) == comparable]
    return sorted({record[f"{prefix}notes"] for record in shown for prefix, _ in of.groups()} - {""})


def shown_table(of: Table, records: list[dict[str, str]]) -> dict[str, Any]:
    """Return a table of the paper for the page: its rows, and apart from them what of this run is not comparable."""
    others = notes_of_others(row for row in of.others if not _alone(row))
    lines = list(table_lines(of, records))
    return {
        "of": of,
        "scores": [of.scores[i] for i in shown_order(of)],
        "lines": lines,
        "seeds": any(line.seeds for line in lines),  # how many each number is of; the paper does not say
        "notes": [*of.notes, *notes(of, records, True), *others],
        "apart": run_lines(of, records),
        "notes_apart": notes(of, records, False),
    }


def card(
    of: Table, seeds: Seeds, chapter: Mapping[str, Any], holding: dataset_section.DatasetContents
) -> dict[str, Any]:
    """Return a data set in brief: first picture, score, what goes wrong most. `chapter`: that of the data set."""
    source, run = shown(of), seeds.first
    iou = run.protocol(source.protocol).iou
    classes = holding.splits["train"].schema.classes
    worst = sorted((value, one) for one in classes if (value := iou.get(one)) is not None)[:3]
    interval = seeds.interval(source.protocol, "mean_iou")
    examples = chapter["examples"]
    return {
        "name": of.name,
        "title": chapter["title"],
        "score": columns.percent(seeds.mean(source.protocol, "mean_iou")),
        "interval": columns.interval(*map(columns.percent, interval)) if interval else "",
        "of": f"{run.images} {'synthetic' if run.drawn else columns.split_name(of, run.split)} images",
        "shown": chapter["shown"],
        "picture": next(iter(examples.pictures.items()), None) if examples else None,
        "pictured": chapter["pictured"].partition(", ")[2],
        "worst": [(one, columns.percent(value)) for value, one in worst],
        "mistakes": chapter["mistakes"][:2],
    }


def citation(of: Table, seeds: Seeds, made: Provenance, comparable: bool) -> str:
    """Return how the number of a data set's own table is reported, in one sentence.

    Of one that is not comparable with the paper's this is the form alone, "…" in the place of all that was measured.
    """
    source, run = shown(of), seeds.first
    row = next(row for row in reversed(of.rows) if row.sources)
    protocol = run.protocol(source.protocol)
    if not comparable:
        scales = ", ".join(f"{scale:g}" for scale in protocol.scales)
        return (
            f"{row.labels[0]}, our reproduction: … % mean IoU on {datasets.load(of.name).TITLE} "
            f"{columns.split_name(of, run.split)} (… images); {PROTOCOLS[source.protocol]} ({scales}); mean of … seeds "
            "(…) ± …; 95 % bootstrap interval over images …; profile …; weights md5 …"
        )
    spread = columns.percent(seeds.spread(source.protocol, "mean_iou"))
    numbers = ", ".join(str(one.seed) for one in seeds.runs)
    chance = f"mean of {len(seeds.runs)} seeds ({numbers}) ± {spread}" if spread else f"seed {numbers}, n = 1"
    interval = seeds.interval(source.protocol, "mean_iou")
    bounds = columns.interval(*map(columns.percent, interval)) if interval else ""
    score = columns.percent(seeds.mean(source.protocol, "mean_iou"))
    return "; ".join(
        [
            f"{row.labels[0]}, our reproduction: {score} % mean IoU on "
            f"{datasets.load(of.name).TITLE} {columns.split_name(of, run.split)} ({run.images} images)",
            f"{PROTOCOLS[source.protocol]} ({', '.join(f'{scale:g}' for scale in protocol.scales)})",
            chance,
            *([f"95 % bootstrap interval over images {bounds}"] if bounds else []),
            f"profile {run.profile}",
            f"weights md5 {made.weights}",
        ]
    )


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
    allowed = comparable.profiles(root)
    said = {caveat(run.profile, _is_allowed(run, allowed), run.drawn) for run in runs.values()}
    beside = {f"{number.experiment}, {number.protocol}": (number.paper, number.run) for number in found}
    alt = f"{len(found)} mean IoU of the paper beside this run's, as in the tables"
    experiments = [provenance.provenance_of(seeds[name], cfg, md5s, root) for name in runs]
    told = next(of for of in every if of.name in datasets.NAMES and of.same_images)
    behind = next(one for one in experiments if one.run.experiment == shown(told).experiment)
    return {
        "caveats": sorted(said - {""}),
        "tables": [shown_table(of, printed[of.name]) for of in every],
        "wide": WIDE,
        "rows": sum(bool(row.sources) for of in every for row in of.rows),
        "numbers": found,
        "counts": summary.counts(found),
        "beside": charts.beside(beside, alt) if beside else None,
        "experiments": experiments,
        "citation": citation(told, seeds[shown(told).experiment], behind, _is_allowed(behind.run, allowed)),
        "cited": told.number,
        "archives": [provenance.archives(name, cfg) for name in names],
        "costs": provenance.same_costs(
            [provenance.cost(name, curve, cfg, runs.get(name), root) for name, curve in made.items()]
        ),
        "names": names,
        "seeds": seeds,
        "runs": runs,
        "made": made,
        "cfg": cfg,
    }


def _is_allowed(run: MetricsFile, allowed: Collection[str]) -> bool:
    """Return whether the numbers of a run may stand against the paper's; `allowed`: the profiles whose may."""
    return run.profile in allowed and not run.drawn


def html(root: Path = Path(), limit: int = page.LIMIT) -> str:
    """The report of the results under `root`, in at most `limit` bytes where fewer and smaller pictures make it so."""
    values = context(root)
    runs = values["runs"]
    own = [of for of in published().values() if of.name in datasets.NAMES]
    holdings = {}
    for name in values["names"]:
        table = published().get(name)
        called = "validation" if table is None or table.split == "val" else table.split
        holdings[name] = dataset_section.open_dataset(root, name, called)
    order = [of.name for of in own] + [name for name in holdings if name not in published()]

    def shown_at(level: Level) -> dict[str, Any]:
        results = {
            of.name: chapter(of, runs, values["made"], values["cfg"], holdings[of.name], level, root) for of in own
        }
        contents = {name: data(name, runs, holdings[name], level) for name in order}
        return {
            "cards": [
                card(of, values["seeds"][shown(of).experiment], results[of.name], holdings[of.name]) for of in own
            ],
            "chapters": [(contents[name], results.get(name)) for name in order],
        }

    return page.render_within_limit("report.html.j2", values, shown_at, limit)
