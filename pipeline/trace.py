"""Print all that a paper's footnote needs of a result: score, images, commit, and what it was made from.

    refinenet trace                      every experiment with its scores
    refinenet trace voc-res101           one of them
    refinenet trace voc-res101 --json    the same for programs; scores there are fractions
    refinenet trace docs/records/2026-11-29-camvid-lite0     a result that was kept as a record

The scores are those of its metrics file, over several seeds their mean. The md5s are what DVC noted when the result was
made (dvc.lock), and the model that lies here has to be the one that was scored. The commit is the one that has the
metrics file. MLflow is asked for the runs, where its database is at hand.
"""

from __future__ import annotations

import json
import os
import re
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import resolve, schema
from pipeline.fetch.input_md5 import input_md5
from pipeline.page import provenance
from pipeline.runtime import git
from pipeline.runtime.cli import command_parser, run_cli, user_path
from pipeline.tables import columns, custom, metrics_files
from pipeline.tables.metrics_files import MetricsFile, Seeds
from pipeline.tables.paper import PROTOCOLS, caveat, published
from refinenet.errors import UserError, expected_one_of

LOCK = Path("dvc.lock")


@dataclass(frozen=True)
class Score:
    """A mean IoU and what belongs to it, as fractions: over several seeds the mean, with its standard deviation.

    `tables`: where the paper prints its own, in words.
    """

    protocol: str
    scales: tuple[float, ...]
    mean_iou: float
    interval: tuple[float, float] | None
    spread: float | None
    pixel_accuracy: float
    mean_accuracy: float
    tables: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """A finished run in MLflow that made these weights or scored them. `rate`: images/s, in its last interval."""

    id: str
    stage: str
    minutes: float
    rate: float | None
    commit: str
    host: str


@dataclass(frozen=True)
class Trace:
    """What is known of a result. `md5`: path -> md5. `archives`: data set -> what it was unpacked from.

    `commit`: of the metrics file, with what is to be said of it; "" where git does not know one. `notes`: what of the
    above is missing, and why.
    """

    experiment: str
    dataset: str
    split: str
    images: int
    profile: str
    drawn: bool
    caveat: str
    network: Mapping[str, Any]
    seeds: tuple[int, ...]
    scores: tuple[Score, ...]
    commit: str
    md5: Mapping[str, str]
    archives: Mapping[str, Sequence[Mapping[str, str]]]
    runs: tuple[Run, ...] = ()
    machine: str = ""
    notes: tuple[str, ...] = field(default=())


def trace(name: str) -> Trace:
    """Gather what is known of the experiment `name`. Raises UserError: none, not evaluated, files that do not fit."""
    settings = resolve.everything()
    evaluations = settings.get("evaluate", {})
    if name not in evaluations:
        raise UserError(f"no experiment {name!r}{expected_one_of(name, list(evaluations), 'refinenet trace')}")
    again: str | None = evaluations[name]["of"]
    if again:
        raise UserError(f"{name}: {again} from another seed, whose scores are with it; `refinenet trace {again}`")
    seeds = metrics_files.seeds(name, dataset=evaluations[name]["data"])
    first, notes = seeds.first, []
    md5, made_of = _md5s(seeds, settings)
    model = Path("models", f"{name}.safetensors")
    if first.weights and md5.get(str(model), first.weights) != first.weights:
        renew = f"`refinenet evaluate {name}` renews it"
        raise UserError(f"{first.file}: of weights with md5 {first.weights}, {model} has {md5[str(model)]}; {renew}")
    if not model.is_file():
        notes.append(f"{model} is not on this machine; `dvc pull train@{name}` brings it")
    try:
        commit = _commit(first.file)
    except UserError as error:
        commit = ""
        notes.append(f"commit: {error}")
    found: list[Run] = []
    try:
        found = runs(first.weights or md5[str(model)])
        if not found:
            notes.append("MLflow knows no finished run with these weights")
    except UserError as error:
        notes.append(f"not in MLflow: {error}")
    return Trace(
        **_of_metrics(seeds),
        commit=commit,
        md5=md5,
        archives={data: _archives(data, settings) for data in made_of},
        runs=tuple(found),
        machine=_machine(found),
        notes=tuple(notes),
    )


def _of_metrics(seeds: Seeds) -> dict[str, Any]:
    """Return the fields of Trace that stand in the metrics files."""
    first = seeds.first
    scores = []
    for protocol in custom.in_order(first):
        mean = seeds.mean(protocol, "mean_iou")
        assert mean is not None  # a number in every file
        scores.append(
            Score(
                protocol=protocol,
                scales=first.protocols[protocol].scales,
                mean_iou=mean,
                interval=seeds.interval(protocol, "mean_iou"),
                spread=seeds.spread(protocol, "mean_iou"),
                pixel_accuracy=seeds.mean(protocol, "pixel_accuracy") or 0.0,
                mean_accuracy=seeds.mean(protocol, "mean_accuracy") or 0.0,
                tables=tuple(_tables(first, protocol)),
            )
        )
    return {
        "experiment": first.experiment,
        "dataset": first.dataset,
        "split": first.split,
        "images": first.images,
        "profile": first.profile,
        "drawn": first.drawn,
        "caveat": caveat(first.profile, True, first.drawn),
        "network": asdict(first.network),
        "seeds": tuple(run.seed for run in seeds.runs),
        "scores": tuple(scores),
    }


def _tables(run: MetricsFile, protocol: str) -> Iterator[str]:
    """Yield the rows of the paper's tables that this score stands in, each with the printed number and its images."""
    for of in published().values():
        for row in of.all_rows:
            for score, printed, source in zip(of.scores, row.values, row.sources, strict=False):
                if (source.experiment, source.protocol, score.metric) == (run.experiment, protocol, "mean_iou"):
                    where = f"Table {of.number}, {', '.join(row.marked())}"
                    like = "" if columns.like_for_like(of, row, run.split) else ", other images than these"
                    # Beside drawn images the paper's number says nothing.
                    yield where if run.drawn else f"{where}: {printed} on {row.on or of.evaluated_on}{like}"


def _md5s(seeds: Seeds, settings: Mapping[str, Mapping[str, Any]]) -> tuple[dict[str, str], list[str]]:
    """Return path -> md5 of what the result was made from, as dvc.lock has it or else as it lies here; and its data."""
    name = seeds.first.experiment
    try:
        read: dict[str, Any] = yaml.load(LOCK.read_bytes(), yaml.CSafeLoader)
        lock: dict[str, Any] = read["stages"]
    except (FileNotFoundError, KeyError, TypeError):
        lock = {}
    trainings = [name]
    while (start := provenance.pretraining(trainings[-1], settings)) is not None:
        trainings.append(start)
    model = Path("models", f"{name}.safetensors")
    files = [model, *(Path("weights", f"{settings['train'][one]['start']}.safetensors") for one in trainings)]
    data = provenance.sources(name, settings)
    files += [Path("data", one) for one in data]
    noted: dict[str, str] = {}
    for address in (*(f"pretrain@{one}" for one in reversed(trainings)), f"train@{name}", f"evaluate@{name}"):
        entry = lock.get(address, {})
        noted |= {of["path"]: of["md5"] for of in (*entry.get("deps", ()), *entry.get("outs", ())) if "md5" in of}
    if model.is_file():  # it is looked at, and has to be the one that was scored
        noted.pop(str(model), None)
    found = {str(seeds.first.file): input_md5(seeds.first.file)}
    for file in files:
        if str(file) in noted:
            found[str(file)] = noted[str(file)]
        elif file.exists():
            found[str(file)] = input_md5(file)
    for run in seeds.runs[1:]:
        found[str(run.file)] = input_md5(run.file)
        found[f"models/{run.experiment}-seed{run.seed}.safetensors"] = run.weights
    return found, data


def _commit(file: Path) -> str:
    """Return the commit that last changed `file`; with a word where the file differs from it. Raises UserError."""
    commit = git.ask("log", "-1", "--format=%H", "--", str(file)).decode().strip()
    if not commit:
        raise UserError(f"{file} is in none yet")
    changed = git.ask("status", "--porcelain", "--", str(file)).strip()
    return f"{commit}, from which {file} differs: commit it" if changed else commit


def _archives(data: str, settings: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return file, size, md5, source of each archive of a data set: as recorded, or only as the settings have them."""
    record, folder = Path("data/raw", f"{data}.json"), Path("data/raw", data)
    known = {}
    if "archives" in settings["download"][data] and not settings["download"][data].get("own"):
        about = provenance.archives(data, settings)
        known = {one["file"]: one for one in about.files}
        source = about.drawn
    else:
        source = "own folders, packed"
    if record.is_file():
        noted = json.loads(record.read_text(encoding="utf-8"))
    elif settings["download"][data].get("own") and folder.is_dir():
        noted = {file.name: {"size": file.stat().st_size, "md5": input_md5(file)} for file in sorted(folder.iterdir())}
    else:
        return [one | {"recorded": "not on this machine"} for one in known.values()]
    found = []
    for file, of in noted.items():
        published_sums = {key: known.get(file, {}).get(key, "") for key in ("md5", "sha256")}
        confirmed = [key for key, value in published_sums.items() if value]
        found.append(
            {
                "file": file,
                "size": f"{of['size']:,}",
                "md5": of["md5"],
                "url": known.get(file, {}).get("url", source),
                "published": ", ".join(confirmed),
            }
        )
    return found


def runs(weights: str) -> list[Run]:
    """Return MLflow's finished runs that made the weights with this md5, or scored them, oldest first.

    Raises UserError, in one line, where MLflow cannot be asked.
    """
    from pipeline.tracking.__main__ import find

    try:
        found = [run for _, run in find(weights)]
    except UserError:
        raise
    except Exception as error:  # of MLflow, its database or its server, each of a type of its own
        raise UserError(f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}") from None
    made = []
    for run in found:
        about, tags = run.info, run.data.tags
        if about.status != "FINISHED" or not about.end_time or "stage" not in tags:
            continue
        commit = tags.get("mlflow.source.git.commit") or f"no commit ({tags.get('git.problem', 'not recorded')})"
        if tags.get("git.dirty") == "true":
            commit += ", and changed files"
        made.append(
            Run(
                id=about.run_id,
                stage=tags["stage"],
                minutes=(about.end_time - about.start_time) / 60_000,
                rate=run.data.metrics.get("images_per_second"),
                commit=commit,
                host=tags.get("writer", "").partition(" ")[0],
            )
        )
    return made


def _machine(found: Sequence[Run]) -> str:
    """Return where the training ran, with its processor if that is this machine; "" where nobody has noted it."""
    hosts = [run.host for run in found if run.stage == "train" and run.host]
    if not hosts:
        return ""
    if hosts[-1] != socket.gethostname():
        return f"host {hosts[-1]}"
    from refinenet.device import processor

    return f"host {hosts[-1]}, this machine: {processor()}, {os.cpu_count()} processors"


def of_record(folder: Path) -> Trace:
    """Read a result that `refinenet record` has kept. Raises UserError where the folder is none."""
    page, file = folder / "README.md", folder / "metrics.json"
    try:
        text = page.read_text(encoding="utf-8")
        read = schema.build(MetricsFile, file.read_bytes(), f"{file}: not as `refinenet record` writes it")
        settings = json.loads((folder / "settings.json").read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: no such file, expected a folder that `refinenet record` made") from None
    sections: dict[str, str] = dict(re.findall(r"^## (.*)\n((?:(?!## ).*\n?)*)", text, re.M))

    def lines(title: str) -> list[str]:
        return re.findall(r"^- (.*)$", sections.get(title, ""), re.M)

    found = []
    for line in lines("Runs"):
        if of := re.match(
            r"(\w+): run `(\w+)`, ([\d.]+) minutes(?:, ([\d.]+) images/s[^,]*)?, commit `?([^`]*)`?$", line
        ):
            found.append(Run(of[2], of[1], float(of[3]), float(of[4]) if of[4] else None, of[5], ""))
    return Trace(
        **_of_metrics(Seeds((replace(read, file=file),))),
        commit=" ".join(lines("Commit")).replace("`", ""),
        md5=dict(re.findall(r"^- `(.+)`: (\w+(?:\.dir)?)$", sections.get("md5, as DVC computes it", ""), re.M)),
        archives={data: provenance.archives(data, settings).files for data in settings.get("download", {})},
        runs=tuple(found),
        machine="; ".join(lines("Machine and versions, when this was written")),
    )


def text(of: Trace) -> Iterator[str]:
    """Yield the lines to print."""
    network = ", ".join(f"{key} {value}" for key, value in of.network.items())
    yield f"{of.experiment}: {network}"

    def rows(title: str, lines: Sequence[str]) -> Iterator[str]:
        for number, line in enumerate(lines):
            yield f"  {title if number == 0 else '':9} {line}"

    for score in of.scores:
        yield from rows("score", [_score(score, len(of.seeds)), *(f"  {one}" for one in score.tables)])
    seeds = ", ".join(map(str, of.seeds))
    more = "the scores are means over them" if len(of.seeds) > 1 else "one: how far another would move it is not known"
    yield from rows("seeds", [f"{seeds} ({more})"])
    yield from rows("images", [_images(of)])
    yield from rows("profile", [of.profile])
    yield from rows("commit", [of.commit] if of.commit else [])
    yield from rows("md5", [f"{value}  {path}" for path, value in of.md5.items()])
    archives = []
    for data, files in of.archives.items():
        for one in files:
            sums = " ".join(f"{key} {one[key]}" for key in ("md5", "sha256") if one.get(key))
            confirmed = f"by its published {one['published']}" if one.get("published") else ""
            size = f"{one['size']} bytes" if one["size"][0].isdigit() else f"size {one['size']}"
            notes = ", ".join(filter(None, [size, sums, confirmed, one["url"], one.get("recorded", "")]))
            archives.append(f"{data}: {one['file']}, {notes}")
    yield from rows("archives", archives)
    yield from rows(
        "runs", [f"{run.stage} {run.id}, {run.minutes:.1f} minutes, commit {run.commit}" for run in of.runs]
    )
    yield from rows("machine", [of.machine] if of.machine else [])
    yield from rows("missing", list(of.notes))
    yield from rows("beware", [of.caveat] if of.caveat else [])
    yield from rows("report", ["nothing: these images are synthetic" if of.drawn else footnote(of)])


def _images(of: Trace) -> str:
    """Return how many images of which split, by the paper's name for it: NYUDv2's `val` are its "test"."""
    table = published().get(of.dataset)
    split = of.split if table is None else columns.split_name(table, of.split)
    return f"{of.images} {'synthetic ' if of.drawn else ''}images of {of.dataset} {split}"


def _score(score: Score, seeds: int) -> str:
    scales = ", ".join(f"{scale:g}" for scale in score.scales)
    text = f"{PROTOCOLS.get(score.protocol, score.protocol)} ({scales}): mean IoU {columns.percent(score.mean_iou)}"
    if score.spread is not None:
        text += f" ± {columns.percent(score.spread)} over {seeds} seeds"
    if score.interval:
        text += f" (95 % over images {' to '.join(map(columns.percent, score.interval))})"
    return f"{text}, pixel accuracy {columns.percent(score.pixel_accuracy)}"


def footnote(of: Trace) -> str:
    """Return a sentence to print under a number: the last protocol's score, and by what it can be found again."""
    best = of.scores[-1]
    weights = next((md5 for path, md5 in of.md5.items() if path.startswith("models/")), "not known")
    commit = of.commit.partition(",")[0].split()[0][:12] if of.commit else "not known"
    score = _score(best, len(of.seeds)).partition(", pixel")[0]
    seeds = f"{len(of.seeds)} training seed{'s' if len(of.seeds) > 1 else ''}"
    return f"{score}; {_images(of)}, {seeds}, commit {commit}, weights md5 {weights}"


def listing() -> Iterator[str]:
    """Yield a line for each training, other seeds apart: its scores, or that there are none."""
    settings = resolve.everything()
    evaluations = settings.get("evaluate", {})
    width = max(map(len, settings.get("train", {})), default=0)
    for name in settings.get("train", {}):
        about = evaluations.get(name)
        if about is None:
            yield f"{name:{width}}  has no scores, others start from it"
            continue
        if about.get("of"):
            continue
        try:
            seeds = metrics_files.seeds(name, dataset=about["data"])
        except UserError as error:
            missing = not metrics_files.path(name, about["data"]).is_file()
            yield f"{name:{width}}  {'not evaluated yet' if missing else error}"
            continue
        run = seeds.first
        scores = [f"{one} {columns.percent(seeds.mean(one, 'mean_iou'))}" for one in custom.in_order(run)]
        more = f", {len(seeds.runs)} seeds" if len(seeds.runs) > 1 else ""
        yield f"{name:{width}}  {', '.join(scores)} on {run.images} images{more}, profile {run.profile}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    line = command_parser("trace", __doc__)
    line.add_argument(
        "name", nargs="?", metavar="NAME", help="an experiment, or a folder of docs/records; default: list"
    )
    line.add_argument("--json", action="store_true", help="for programs")
    given = line.parse_args(arguments)

    def run() -> None:
        if given.name is None:
            print(*listing(), "mean IoU in percent; all of one: refinenet trace NAME", sep="\n")
            return
        folder = user_path(given.name)
        found = of_record(folder) if (folder / "metrics.json").is_file() else trace(given.name)
        if given.json:
            print(json.dumps(asdict(found), indent=1, ensure_ascii=False))
        else:
            print(*text(found), sep="\n")

    return run_cli(run)


if __name__ == "__main__":
    sys.exit(main())
