"""The table of a user's own data set: metrics/<data>/*.json -> results/<data>_table.csv and .md.

One row for each experiment of params.yaml on it and each protocol, numbers as the paper prints them: percent, one
decimal, "" for a class that no mask has. Columns: data_set, experiment, backbone, cascade, pools, protocol,
pixel_accuracy, mean_accuracy, mean_iou, `iou <class>` for each class; evaluated_on, images, seed, profile, notes.
"""

from __future__ import annotations

import csv
import io
from pathlib import Path

from pipeline import scores, settings, tables
from pipeline.published import NOT_PRINTED, PROTOCOLS, published
from pipeline.scores import Protocol, Scores
from refinenet.files import UserError

COLUMNS = ("data_set", "experiment", "backbone", "cascade", "pools", "protocol")
MEASURES = {"pixel_accuracy": "Pixel acc.", "mean_accuracy": "Mean acc.", "mean_iou": "IoU"}
BEHIND = ("evaluated_on", "images", "seed", "profile", "notes")
WIDTH = 256  # of the paper's decoder


def _runs(name: str, root: Path) -> tuple[str, list[str], list[Scores]]:
    """Title and classes of the data set `name`, and the scores of its experiments in the order of params.yaml."""
    resolved = settings.resolve() if settings.PARAMS.is_file() else {}
    own = {data: value["own"] for data, value in resolved.get("prepare", {}).items() if value["own"] is not None}
    if name not in own:
        raise UserError(f"no table {name!r}; the tables are {', '.join([*published(), *own])}")
    experiments = [experiment for experiment, value in resolved["evaluate"].items() if value["data"] == name]
    stale = {file.stem for file in (root / "metrics" / name).glob("*.json")} - set(experiments)
    for experiment in sorted(stale):
        print(f"{scores.path(experiment, name)}: left out, no experiment of {settings.PARAMS}")
    runs = [scores.load(experiment, root, name) for experiment in experiments]
    classes = own[name]["classes"]
    for run in runs:
        if any(set(protocol.iou) != set(classes) for protocol in run.protocols.values()):
            raise UserError(f"{run.file}: not the classes {', '.join(classes)}; `evaluate {run.experiment}` renews it")
    return own[name]["title"] or name, classes, runs


def _in_order(run: Scores) -> list[str]:
    """The paper's protocols, then others; the file has them by the alphabet."""
    return sorted(run.protocols, key=lambda protocol: ([*PROTOCOLS, protocol].index(protocol), protocol))


def _notes(run: Scores) -> list[str]:
    thin = [] if run.network.width >= WIDTH else [f"width {run.network.width}, the paper's is {WIDTH}"]
    return run.absent() + thin


def _numbers(protocol: Protocol, classes: list[str]) -> list[str]:
    values = [getattr(protocol, measure) for measure in MEASURES] + [protocol.iou[one] for one in classes]
    return [tables.percent(value) for value in values]


def _left(run: Scores, protocol: str) -> list[str]:
    network = run.network
    return [run.dataset, run.experiment, network.backbone, network.cascade, str(network.pools), protocol]


def forms(name: str, root: Path = Path()) -> dict[str, str]:
    """Suffix -> the text of the table, as csv and as Markdown; UserError where a metric is missing."""
    title, classes, runs = _runs(name, root)
    rows = [(run, protocol, run.protocols[protocol]) for run in runs for protocol in _in_order(run)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*COLUMNS, *MEASURES, *(f"iou {one}" for one in classes), *BEHIND])
    for run, protocol, values in rows:
        behind = [run.split, str(run.images), str(run.seed), run.profile, "; ".join(_notes(run))]
        writer.writerow([*_left(run, protocol), *_numbers(values, classes), *behind])
    head = ["Experiment", "Backbone", "Cascade", "Pools", "Protocol", *MEASURES.values(), *classes]
    shown = [
        [*left[1:-1], PROTOCOLS.get(left[-1], left[-1]), *(number or NOT_PRINTED for number in numbers)]
        for left, numbers in ((_left(run, protocol), _numbers(values, classes)) for run, protocol, values in rows)
    ]
    page = [f"# {title}", "", "Pixel accuracy, mean accuracy, mean IoU and each class's IoU, in percent.", ""]
    page += [*tables.markdown(list(map(_cell, head)), 5, [list(map(_cell, row)) for row in shown]), ""]
    for run in runs:
        told = [f"`{run.experiment}`: {run.images} images of {name} {run.split}", f"seed {run.seed}"]
        page.append("- " + "; ".join([*told, f"profile {run.profile}", *_notes(run)]))
    return {"csv": text.getvalue(), "md": "\n".join(page) + "\n"}


def _cell(text: str) -> str:
    return text.replace("|", "\\|")
