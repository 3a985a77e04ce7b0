"""What a number was made from, step by step, with the commands by which a reader follows it by hand.

Experiment -> MLflow run -> git commit -> md5 of weights and data -> checksums of the archives. All but the run's id and
the commit, which differ between runs with equal results: for those there is the question that finds them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.page import result_section
from pipeline.runtime.dvc_md5 import dvc_md5
from pipeline.tables import columns
from pipeline.tables.metrics_files import MetricsFile, Seeds
from pipeline.tables.paper import NOT_PRINTED, PROTOCOLS, published
from refinenet.errors import UserError

SETTINGS = Path("settings.json")


@dataclass(frozen=True)
class Provenance:
    """What the numbers of an experiment were made from.

    `split`: what its images are called in print. `files`: (what, path, md5 as dvc.lock has it). `further`: of the other
    seeds (seed, metrics file, md5 of weights). `data`: the data sets whose archives went into it.
    """

    run: MetricsFile
    split: str
    rows: list[tuple[str, int, str]]
    protocols: list[tuple[str, Any]]
    files: list[tuple[str, str, str]]
    further: list[tuple[int, str, str]]
    data: list[str]

    @property
    def weights(self) -> str:
        """The md5 of the model's file."""
        return next(md5 for what, _, md5 in self.files if what == "Weights")

    @property
    def query(self) -> str:
        """The filter by which MLflow finds the runs."""
        return f'tags."weights.md5" = "{self.weights}"'


@dataclass(frozen=True)
class Cost:
    """What a training took, as far as it is the same in every run: crops and pixels, not hours.

    `crop`: pixels a side; `size`: bytes of the weights' file and `passes`: forward passes of the evaluation, both None
    for a pretraining.
    """

    name: str
    backbone: str
    steps: int
    batch: int
    crop: int
    crops: int
    megapixels: float
    size: int | None
    passes: int | None


@dataclass(frozen=True)
class SameCost:
    """Trainings that took the same, `first` of them. `sizes`: of their weights' files in MB, "–" for pretrainings."""

    first: Cost
    all: list[Cost]

    @property
    def sizes(self) -> str:
        found = [f"{cost.size / 1e6:.2f}" for cost in self.all if cost.size is not None]
        ends = list(dict.fromkeys([min(found, key=float), max(found, key=float)])) if found else [NOT_PRINTED]
        return "–".join(ends)


def same_costs(costs: Sequence[Cost]) -> list[SameCost]:
    """Group trainings with the same backbone, steps, batch, crop and evaluation, in the order of the first of each."""
    groups: dict[tuple[object, ...], list[Cost]] = {}
    for cost in costs:
        groups.setdefault((cost.backbone, cost.steps, cost.batch, cost.crop, cost.passes), []).append(cost)
    return [SameCost(group[0], group) for group in groups.values()]


@dataclass(frozen=True)
class Archives:
    """What a data set was unpacked from. `drawn`: in words, where there is no archive to download."""

    name: str
    drawn: str
    files: list[dict[str, str]]


def settings(root: Path) -> dict[str, Any]:
    """`root`/settings.json; UserError where it is not what stage settings writes."""
    try:
        read: dict[str, Any] = json.loads((root / SETTINGS).read_text(encoding="utf-8"))
        if missing := {"download", "train"} - set(read):
            raise ValueError(f"has no {', '.join(sorted(missing))}")
    except FileNotFoundError:
        raise UserError(f"{SETTINGS}: no such file; stage settings makes it") from None
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{SETTINGS}: not what stage settings writes ({str(error).splitlines()[0]})") from None
    return read


def training(name: str, cfg: Mapping[str, Any]) -> Any:
    """What settings.json says of a training; UserError where it says nothing."""
    if name not in cfg["train"]:
        raise UserError(f"{SETTINGS}: has no train.{name}; stage settings renews it")
    return cfg["train"][name]


def pretraining(name: str, cfg: Mapping[str, Any]) -> str | None:
    """The training from whose weights another one starts; None where that is a backbone."""
    start = training(name, cfg)["start"]
    return start if start in cfg["train"] else None


def sources(name: str, cfg: Mapping[str, Any]) -> list[str]:
    """The data sets that a training and the one it starts from have seen; its own first."""
    info = training(name, cfg)
    found = [info["data"], *(data for phase in info["phases"] for data, _ in phase["parts"])]
    before = pretraining(name, cfg)
    return list(dict.fromkeys([*found, *(sources(before, cfg) if before else [])]))


def provenance_of(runs: Seeds, cfg: Mapping[str, Any], md5s: Mapping[str, str], root: Path) -> Provenance:
    """The chain of an experiment. `md5s`: of the prepared data sets.

    UserError where its metrics are not of the weights that lie in models/.
    """
    run = runs.first
    model = Path("models", f"{run.experiment}.safetensors")
    weights = dvc_md5(root / model)
    if run.weights not in ("", weights):
        renew = f"`evaluate {run.experiment}` renews it"
        raise UserError(f"{run.file}: of weights with md5 {run.weights}, {model} has {weights}; {renew}")
    rows = [
        (of.name, of.number, ", ".join(row.marked()))
        for of in published().values()
        for row in of.all_rows
        if any(source.experiment == run.experiment for source in row.sources)
    ]
    data = sources(run.experiment, cfg)
    files = [
        ("Metrics", run.file.as_posix(), dvc_md5(root / run.file)),
        ("Weights", model.as_posix(), weights),
        *(("Data", f"data/{name}", md5s[name]) for name in data),
    ]
    table = published().get(run.dataset)
    return Provenance(
        run=run,
        split=columns.split_name(table, run.split) if table else run.split,
        rows=rows,
        protocols=[(PROTOCOLS[name], run.protocols[name]) for name in PROTOCOLS if name in run.protocols],
        files=files,
        further=[(other.seed, other.file.as_posix(), other.weights) for other in runs.runs[1:]],
        data=data,
    )


def cost(name: str, curve: result_section.Curve, cfg: Mapping[str, Any], run: MetricsFile | None, root: Path) -> Cost:
    """What a training took, by its log and its settings. `run`: of an experiment, None of a pretraining."""
    info = training(name, cfg)
    recipe, steps = info["recipe"], round(curve.steps[-1]) if curve.steps else 0
    crops = steps * int(recipe["batch_size"])
    model = root / "models" / f"{name}.safetensors"
    return Cost(
        name=name,
        backbone=str(info["network"]["backbone"]),
        steps=steps,
        batch=int(recipe["batch_size"]),
        crop=int(recipe["crop"]),
        crops=crops,
        megapixels=crops * int(recipe["crop"]) ** 2 / 1e6,
        size=model.stat().st_size if run else None,
        passes=passes(run) if run else None,
    )


def passes(run: MetricsFile) -> int:
    """Forward passes of an evaluation: each image at each scale that a protocol wants, once."""
    return run.images * len({scale for protocol in run.protocols.values() for scale in protocol.scales})


def archives(name: str, cfg: Mapping[str, Any]) -> Archives:
    """What a data set was downloaded from, by settings.json; UserError where it says nothing."""
    if name not in cfg["download"]:
        raise UserError(f"{SETTINGS}: has no download.{name}; stage settings renews it")
    info = cfg["download"][name]
    files = [
        {
            "file": file,
            # An address on this machine is not published.
            "url": of["url"] if of["url"].startswith("http") else "a file of this machine",
            "size": f"{of['size']:,}" if of["size"] else "not published",
            "md5": of["md5"] or "",
            "sha256": of["sha256"] or "",
        }
        for file, of in sorted(info["archives"].items())
    ]
    rendered = info.get("rendered") or {}
    words = ", ".join(f"{key} {value}" for key, value in sorted(rendered.items()))
    return Archives(name, words if rendered else "", files)
