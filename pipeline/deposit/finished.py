"""What a finished run, or a record of one, has left: its steps, and its files with their checksums.

Of a run: dvc.lock, which has every step with the md5 of what went in and came out; the files on the disk have to be
those. Of a record (docs/records/): the md5 of its page and its settings.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

from pipeline import datasets
from pipeline.config import profiles, resolve
from pipeline.config.schema import build
from pipeline.page import provenance
from pipeline.runtime import git
from pipeline.runtime.dvc_md5 import dvc_md5
from pipeline.runtime.progress import bar
from pipeline.tables import server_records
from pipeline.tables.metrics_files import MetricsFile
from refinenet.data.split import RGB, Split
from refinenet.errors import UserError

LOCK, GRAPH, SETTINGS = Path("dvc.lock"), Path("dvc.yaml"), Path("settings.json")
LOCKS = (LOCK, Path("requirements.lock"), Path("bootstrap.lock"), Path("crf.lock"))
_SETTLED = (str(LOCK), str(GRAPH), str(SETTINGS), str(profiles.PARAMS), "Snakefile")
_LARGE = ("data", "models", "weights", "predictions")  # folders whose files are named, not kept
# Reproducible-builds.org: the date, in seconds since 1970, for what cannot know it otherwise.
EPOCH = "SOURCE_DATE_EPOCH"
_MD5_LINE = re.compile(r"^- `([^`]+)`: ([0-9a-f]{32}(?:\.dir)?)$", re.M)
_COMMIT_LINE = re.compile(r"^- `([0-9a-f]{40})`$", re.M)
_CHANGED_LINE = re.compile(r"^- other than there: .*$", re.M)
_SERVERS = {"metrics", str(server_records.FOLDER)}
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Item:
    """A file or folder that a step read or wrote.

    `path`: in the project. `md5`: as DVC has it, of a folder with ".dir". `sha256`: "" of a folder, and where the bytes
    are not here. `size`: bytes, None where nobody has recorded it. `kept`: its path in the artifact, "" where it is
    only named there.
    """

    path: str
    md5: str
    sha256: str = ""
    size: int | None = None
    kept: str = ""


@dataclass(frozen=True)
class Step:
    """A step of the graph as it was run; inputs and outputs are paths of `Run.items`."""

    address: str  # DVC's: "train@voc-res101"
    command: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]

    @property
    def tool(self) -> str:
        """The module that is run: "pipeline.train"."""
        return self.command.split()[2]


@dataclass(frozen=True)
class Part:
    """A file of a prepared data set: `name` is that in its folder, "train.arrow"."""

    name: str
    sha256: str
    size: int


@dataclass(frozen=True)
class Prepared:
    """A prepared data set. `parts`: the files of its splits, none in a record; `archives`: those it was made from."""

    name: str
    title: str
    drawn: str
    md5: str
    classes: tuple[str, ...]
    palette: tuple[RGB, ...]
    parts: tuple[Part, ...]
    archives: tuple[Mapping[str, str], ...]

    @property
    def folder(self) -> Path:
        return Path("data", self.name)


@dataclass(frozen=True)
class Trained:
    """A training. `scores`: None of a pretraining. `settings`: as of train.<name>; `path`: of its weights.

    `backbone`: where the weights that it, or its pretraining, starts from come from, as settings.json has it; None
    of a seeded start.
    """

    name: str
    path: str
    settings: Mapping[str, Any]
    data: tuple[str, ...]
    scores: MetricsFile | None
    backbone: Mapping[str, Any] | None = None


@dataclass(frozen=True)
class Run:
    """A finished run, or a record of one.

    `commit`: "" without git; `changed`: what of the run is not in it. `copies`: path in the artifact -> file here.
    """

    title: str
    profile: str
    is_record: bool
    date: str  # YYYY-MM-DD
    commit: str
    changed: tuple[str, ...]
    steps: tuple[Step, ...]
    items: Mapping[str, Item]
    copies: Mapping[str, Path]
    data: tuple[Prepared, ...]
    trained: tuple[Trained, ...]

    @property
    def drawn(self) -> bool:
        """Whether any of its images are drawn ones."""
        return any(one.drawn for one in self.data)


def sums(file: Path) -> tuple[str, str]:
    """Return md5 and sha256 of a file, read once. Raises UserError where it cannot be read."""
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    try:
        with file.open("rb") as stream:
            while block := stream.read(_BLOCK):
                md5.update(block)
                sha256.update(block)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}), expected a file to take sums of") from error
    return md5.hexdigest(), sha256.hexdigest()


def expected_steps() -> list[str]:
    """Return the addresses of all steps of dvc.yaml, every foreach expanded, in the order of the file."""
    params, found = profiles.read_yaml(profiles.PARAMS), []
    for name, entry in profiles.read_yaml(GRAPH)["stages"].items():
        if "foreach" in entry:
            found += [f"{name}@{item}" for item in params.get(entry["foreach"].strip("${}")) or ()]
        else:
            found.append(name)
    return found


def of_run(with_weights: bool = False) -> Run:
    """Return the finished run in this folder; its large files are read once, for their sha256.

    Raises UserError, in one line, where a step is missing or its files are not those of dvc.lock.
    """
    lock, addresses = _lock(), expected_steps()
    if missing := [one for one in addresses if one not in lock]:
        more = f" and {len(missing) - 1} more" if missing[1:] else ""
        raise UserError(f"{LOCK}: has no {missing[0]}{more}, expected all steps of {GRAPH}; `make repro` ends the run")
    made = {out["path"]: str(out["md5"]) for one in addresses for out in lock[one].get("outs", ())}
    params = profiles.read_params()
    given = [profiles.PARAMS, *_profile_files(params.profile, (*params.datasets, *params.own))]
    servers = sorted(server_records.FOLDER.glob("*.json"))  # of test servers, entered by hand; tables read them
    steps = []
    for one in addresses:
        read = [str(file) for file in given] if one == "settings" else _inputs(one, lock[one], made)
        inputs = read + [str(file) for file in servers if _SERVERS & _paths(lock[one])]
        steps.append(
            Step(one, lock[one]["cmd"], tuple(inputs), tuple(out["path"] for out in lock[one].get("outs", ())))
        )
    items, parts = {}, dict[str, list[Part]]()
    with bar("artifact", "file", total=len(made)) as progress:
        for path, md5 in made.items():
            items[path] = _item(path, md5, with_weights, parts)
            progress.update()
    items |= {str(file): Item(str(file), *sums(file), file.stat().st_size, str(file)) for file in (*given, *servers)}
    settings = resolve.everything()
    commit, date, changed = _source()
    files = [GRAPH, Path("Snakefile"), *LOCKS, *(Path(item.kept) for item in items.values() if item.kept)]
    return Run(
        title=f"All tables of profile {params.profile}",
        profile=params.profile,
        is_record=False,
        date=date,
        commit=commit,
        changed=changed,
        steps=tuple(steps),
        items=items,
        copies={str(file): file for file in files if file.is_file()},
        data=tuple(
            _prepared(name, settings["download"][name], items[f"data/{name}"].md5, parts.get(name, []))
            for name in sorted((*params.datasets, *params.own))
        ),
        trained=tuple(_trained(path, settings, made) for path in made if _name(path) in settings["train"]),
    )


def of_record(folder: Path) -> Run:
    """Return the run of which `folder` is a record, as far as its files say. Raises UserError where they do not fit."""
    page, settings = _read(folder / "README.md").decode(), json.loads(_read(folder / "settings.json"))
    named = dict(_MD5_LINE.findall(page))
    metrics = [path for path in named if path.startswith("metrics/")]
    commit = _COMMIT_LINE.search(page)
    if len(metrics) != 1 or commit is None:
        raise UserError(f"{folder / 'README.md'}: not a record as `python -m pipeline.record` writes it")
    copies = {
        f"record/{file.relative_to(folder).as_posix()}": file for file in sorted(folder.rglob("*")) if file.is_file()
    }
    scores = build(MetricsFile, _read(folder / "metrics.json"), str(folder / "metrics.json"))
    model = f"models/{scores.experiment}.safetensors"
    if scores.weights != named.get(model):
        raise UserError(
            f"{folder / 'metrics.json'}: of weights with md5 {scores.weights}, its page has {named.get(model)}"
        )
    items = {path: Item(path, md5) for path, md5 in named.items()}
    for path, name in ((metrics[0], "metrics.json"), ("curves", "curve.csv"), ("settings.json", "settings.json")):
        at = f"curves/{scores.experiment}.csv" if path == "curves" else path
        found = Item(at, *sums(folder / name), (folder / name).stat().st_size, f"record/{name}")
        if found.md5 != named.get(at, found.md5):
            raise UserError(f"{folder / name}: its md5 is {found.md5}, its page has {named[at]}")
        items[at] = found
    return Run(
        title=f"Record of {scores.experiment}",
        profile=scores.profile,
        is_record=True,
        date=_date_of(folder),
        commit=commit[1],
        changed=tuple(re.findall(r"`([^`]+)`", changed[0])) if (changed := _CHANGED_LINE.search(page)) else (),
        steps=tuple(_steps_of(scores, settings, items)),
        items=items,
        copies=copies,
        data=tuple(
            _prepared(name, settings["download"][name], named[f"data/{name}"], [])
            for name in sorted(settings["prepare"])
            if f"data/{name}" in named
        ),
        trained=(_trained(model, settings, {metrics[0]: ""}, scores),),
    )


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise UserError(
            f"{file}: {error.strerror}, expected a folder as `python -m pipeline.record` writes it"
        ) from None


def _lock() -> Mapping[str, Any]:
    if not LOCK.is_file():
        raise UserError(f"{LOCK}: no such file, expected that of a finished run; `make repro` makes it")
    steps: Mapping[str, Any] = (yaml.load(LOCK.read_bytes(), yaml.CSafeLoader) or {}).get("stages", {})
    return steps


def _profile_files(profile: str, data: Collection[str]) -> list[Path]:
    """Return the profile with its bases, and the plans of these data sets."""
    files = [profiles.PROFILES / f"{one}.yaml" for one in (profile, *profiles.bases(profile))]
    return files + [plan for one in sorted(data) if (plan := profiles.plan_file(one)).is_file()]


def _paths(entry: Mapping[str, Any]) -> set[str]:
    return {str(dep["path"]) for dep in entry.get("deps", ())}


def _inputs(address: str, entry: Mapping[str, Any], made: Mapping[str, str]) -> list[str]:
    """Return what a step read of other steps' outputs, and settings.json; code is what the commit says.

    Raises UserError where it read something else than there is now: the run was changed and not ended.
    """
    found = [str(SETTINGS)]
    for dep in entry.get("deps", ()):
        path = dep["path"]
        if path in made:
            if dep["md5"] != made[path]:
                raise UserError(
                    f"{LOCK}: {address} is of another {path} than the one there is now; `make repro` ends the run"
                )
            found.append(path)
        else:  # a folder into which steps write
            found += [out for out in made if out.startswith(f"{path}/")]
    return list(dict.fromkeys(found))


def _item(path: str, md5: str, with_weights: bool, parts: dict[str, list[Part]]) -> Item:
    """Return an output of the run; of a prepared data set its files, too, into `parts`."""
    at, top = Path(path), Path(path).parts[0]
    if top == "predictions" or (path.startswith("data/raw/") and not at.is_file()):
        return Item(path, md5)  # pictures and own archives: only named, so not read
    if not at.exists():
        raise UserError(f"{path}: no such file; `dvc pull` gets it or `make repro` makes it")
    if at.is_dir():
        files: list[Part] = []

        def of_file(file: Path) -> str:
            found = sums(file)
            files.append(Part(file.relative_to(at).as_posix(), found[1], file.stat().st_size))
            return found[0]

        found, sha256 = dvc_md5(at, of_file), ""
        parts[at.name] = sorted(files, key=lambda part: part.name)
        size = sum(part.size for part in files)
    else:
        (found, sha256), size = sums(at), at.stat().st_size
    if found != md5:
        raise UserError(
            f"{path}: its md5 is {found}, {LOCK} has {md5}; `make repro` ends the run, `dvc pull` restores it"
        )
    weights = top in ("models", "weights")
    kept = with_weights if weights else top not in _LARGE or path.startswith("data/raw/")
    return Item(path, md5, sha256, size, path if kept else "")


def _source() -> tuple[str, str, tuple[str, ...]]:
    """Return the commit that has this run ("" without git), its day, and which files of the run it does not have."""
    of_the_run = (*_SETTLED, "pipeline", "refinenet", "profiles", "metrics", "results")
    try:
        changed = tuple(line[3:] for line in git.ask("status", "--porcelain", "--", *of_the_run).decode().splitlines())
        what = ("HEAD",) if changed else ("HEAD", "--", str(LOCK))
        commit, _, seconds = git.ask("log", "-1", "--format=%H %ct", *what).decode().strip().partition(" ")
        if not seconds:
            raise UserError(f"no commit has {LOCK}")
    except UserError as error:
        if EPOCH not in os.environ:
            raise UserError(
                f"the date of the run is not known ({error}); set {EPOCH} to it, in seconds since 1970"
            ) from None
        commit, seconds, changed = "", "", ()
    return commit, _day(os.environ.get(EPOCH) or seconds), changed


def _date_of(folder: Path) -> str:
    if found := re.match(r"\d{4}-\d{2}-\d{2}(?=-)", folder.resolve().name):
        return found[0]
    if EPOCH not in os.environ:
        raise UserError(f"{folder}: its name begins with no date; set {EPOCH} to it, in seconds since 1970")
    return _day(os.environ[EPOCH])


def _day(seconds: str) -> str:
    if not seconds.isdecimal():
        raise UserError(f"{EPOCH}: is {seconds!r}, expected seconds since 1970")
    return f"{datetime.fromtimestamp(int(seconds), UTC):%Y-%m-%d}"


def _prepared(name: str, download: Mapping[str, Any], md5: str, parts: list[Part]) -> Prepared:
    arrows = [part for part in parts if part.name.endswith(".arrow")]
    title = name
    classes: tuple[str, ...] = ()
    palette: tuple[RGB, ...] = ()
    if name in datasets.NAMES:
        module = datasets.load(name)
        title, classes, palette = module.TITLE, tuple(module.CLASSES), tuple(module.PALETTE)
    if arrows:
        schema = Split(Path("data", name, arrows[0].name)).schema
        classes, palette = schema.classes, schema.palette
    made_from = provenance.archives(name, {"download": {name: download}})
    return Prepared(name, title, made_from.drawn, md5, classes, palette, tuple(arrows), tuple(made_from.files))


def _trained(
    path: str, settings: Mapping[str, Any], made: Mapping[str, str], scores: MetricsFile | None = None
) -> Trained:
    """Return a training by the path of its weights."""
    name = _name(path)
    found = [one for one in made if one.startswith("metrics/") and Path(one).stem == name]
    if found and scores is None:
        scores = build(MetricsFile, Path(found[0]).read_bytes(), found[0])
        if scores.weights not in ("", made[path]):
            raise UserError(f"{found[0]}: of weights with md5 {scores.weights}, {path} has {made[path]}")
    data = tuple(provenance.sources(name, settings))
    return Trained(name, path, settings["train"][name], data, scores, _backbone(name, settings))


def _backbone(name: str, settings: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return the source of the backbone's weights that a training starts from, through its pretraining."""
    before = provenance.pretraining(name, settings)
    if before is not None:
        return _backbone(before, settings)
    source: Mapping[str, Any] | None = settings["weights"][settings["train"][name]["start"]]["source"]
    return source


def _name(path: str) -> str:
    """Return the name of the training whose weights lie there, or ""."""
    return Path(path).name.removesuffix(".safetensors") if path.endswith(".safetensors") else ""


def _steps_of(scores: MetricsFile, settings: Mapping[str, Any], items: Mapping[str, Item]) -> list[Step]:
    """Return the steps that a record tells of: those whose outputs it names."""
    model, values = f"models/{scores.experiment}.safetensors", settings["train"][scores.experiment]
    start = f"weights/{values['start']}.safetensors"
    data = tuple(path for path in items if path.startswith("data/"))
    (metrics,) = (path for path in items if path.startswith("metrics/"))
    first = "pretrain" if values["start"] in settings["train"] else "weights"
    told = [
        *((f"prepare@{Path(path).name}", "prepare", Path(path).name, (), (path,)) for path in data),
        (f"{first}@{values['start']}", first.replace("pre", ""), values["start"], (), (start,)),
        (
            f"train@{scores.experiment}",
            "train",
            scores.experiment,
            (*data, start),
            (model, f"curves/{scores.experiment}.csv"),
        ),
        (f"evaluate@{scores.experiment}", "evaluate", scores.experiment, (f"data/{scores.dataset}", model), (metrics,)),
    ]
    return [
        Step(address, f"python -m pipeline.{stage} {name}", ("settings.json", *inputs), outputs)
        for address, stage, name, inputs, outputs in told
        if all(path in items for path in (*inputs, *outputs))
    ]
