"""Read metrics/<data>/<experiment>.json, which `evaluate` writes, and check what it says before a table repeats it.

The same experiment from further seeds lies in metrics/seeds/<experiment>-seed<k>.json.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from refinenet.errors import UserError

FURTHER = Path("metrics", "seeds")


@dataclass(frozen=True)
class ProtocolScores:
    """One way of testing. Scores are fractions, 0 to 1; the IoU of a class that no truth has is None.

    `interval`: in which the mean IoU lies with 95 %, over images drawn anew; None in files that have none.
    """

    scales: tuple[float, ...]
    pixel_accuracy: float
    mean_accuracy: float
    mean_iou: float
    iou: Mapping[str, float | None]
    interval: tuple[float, float] | None = None


@dataclass(frozen=True)
class NetworkInfo:
    """What sets networks apart, as `refinenet.config.Config` calls it; `cascade`: its name, or "own"."""

    backbone: str
    cascade: str
    pools: int
    width: int


@dataclass(frozen=True)
class MetricsFile:
    """How one trained model scored: on which images, under which protocols.

    `most_frequent`: (class, mean IoU) of always answering the most frequent class, the floor of any score. `weights`:
    md5 of the model's file, "" in metrics that do not tell.
    """

    experiment: str
    dataset: str
    split: str
    profile: str
    images: int
    seed: int
    network: NetworkInfo
    most_frequent: tuple[str, float]
    protocols: Mapping[str, ProtocolScores]
    file: Path
    weights: str = ""

    def absent(self) -> list[str]:
        """Says where the mean is over fewer classes than the data set has."""
        iou = next(iter(self.protocols.values())).iou
        present = sum(value is not None for value in iou.values())
        return [] if present == len(iou) else [f"{present} of {len(iou)} classes occur"]

    def protocol(self, name: str) -> ProtocolScores:
        """The scores under a protocol; UserError where it was not tested."""
        if name not in self.protocols:
            raise UserError(f"{self.file}: no protocol {name!r}, only {', '.join(self.protocols)}")
        return self.protocols[name]

    def value(self, protocol: str, metric: str) -> float | None:
        """A score by the metric's name in paper.yaml: "mean_iou", or "iou <class>". None: no such pixel."""
        chosen = self.protocol(protocol)
        kind, _, name = metric.partition(" ")
        if kind != "iou":
            return float(getattr(chosen, metric))
        if name not in chosen.iou:
            raise UserError(f"{self.file}: no IoU of class {name!r} under protocol {protocol!r}")
        return chosen.iou[name]


@dataclass(frozen=True)
class Seeds:
    """An experiment from one seed or several, its own run first; what differs between them is chance."""

    runs: tuple[MetricsFile, ...]

    @property
    def first(self) -> MetricsFile:
        return self.runs[0]

    def values(self, protocol: str, metric: str) -> list[float]:
        """A score of each run; [] where a run has none."""
        found = [run.value(protocol, metric) for run in self.runs]
        return [] if None in found else [value for value in found if value is not None]

    def mean(self, protocol: str, metric: str) -> float | None:
        """The score, over several seeds their mean."""
        values = self.values(protocol, metric)
        return fmean(values) if values else None

    def spread(self, protocol: str, metric: str) -> float | None:
        """Standard deviation over seeds (of a sample: n - 1); None for one seed."""
        values = self.values(protocol, metric)
        return stdev(values) if len(values) > 1 else None

    def interval(self, protocol: str, metric: str) -> tuple[float, float] | None:
        """The 95 % interval of the mean IoU, over several seeds the mean of its ends: that of one run, images redrawn.

        It says how far other images would move the score, `spread` how far another seed would. None for other scores.
        """
        ends = [run.protocol(protocol).interval for run in self.runs]
        if metric != "mean_iou" or None in ends:
            return None
        low, high = zip(*(end for end in ends if end is not None), strict=True)
        return fmean(low), fmean(high)


def path(experiment: str, dataset: str) -> Path:
    """Where the metrics of an experiment on this data set lie, from the project's root."""
    return Path("metrics", dataset, f"{experiment}.json")


def seeds(experiment: str, root: Path = Path(), dataset: str | None = None) -> Seeds:
    """The scores of an experiment and of its repetitions in `root`/metrics/seeds/<dataset>, by seed.

    UserError where a repetition is of another data set, profile or network, or has the seed of another one.
    """
    first = load(experiment, root, dataset)
    folder = FURTHER / first.dataset
    found = sorted((root / folder).glob(f"{experiment}-seed*.json"))
    named = [file for file in found if file.stem.removeprefix(f"{experiment}-seed").isdecimal()]
    further = [_read(folder / file.name, experiment, first.dataset, root) for file in named]
    runs = [first]
    for run in sorted(further, key=lambda run: run.seed):
        for what in ("split", "profile", "images", "network"):
            ours, theirs = getattr(run, what), getattr(first, what)
            if ours != theirs:
                raise UserError(f"{run.file}: {what} {ours}, {first.file} has {theirs}; renew or remove it")
        if same := [other for other in runs if other.seed == run.seed]:
            raise UserError(f"{run.file}: seed {run.seed} is also that of {same[0].file}")
        runs.append(run)
    return Seeds(tuple(runs))


def _fraction(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{value!r} is not a fraction, 0 to 1")
    return float(value)


def load(experiment: str, root: Path = Path(), dataset: str | None = None) -> MetricsFile:
    """The scores in `root`/metrics/<dataset>/<experiment>.json. UserError where that is not what evaluate writes.

    Without `dataset` it is what the experiment's name begins with, as in all of the paper's tables: voc-res101.
    """
    dataset = dataset or experiment.partition("-")[0]
    return _read(path(experiment, dataset), experiment, dataset, root)


def _interval(protocol: Mapping[str, Any]) -> tuple[float, float] | None:
    if "interval" not in protocol:
        return None
    low, high = map(_fraction, protocol["interval"]["mean_iou"])
    return low, high


def _read(file: Path, experiment: str, dataset: str, root: Path) -> MetricsFile:
    """The metrics in `root`/`file`."""
    try:
        read = json.loads((root / file).read_text(encoding="utf-8"))
        if (read["experiment"], read["dataset"]) != (experiment, dataset):
            raise ValueError(f"it is of experiment {read['experiment']!r} on {read['dataset']}")
        return MetricsFile(
            experiment=experiment,
            dataset=dataset,
            split=str(read["split"]),
            profile=str(read["profile"]),
            images=int(read["images"]),
            seed=int(read["seed"]),
            network=NetworkInfo(
                backbone=str(read["network"]["backbone"]),
                cascade=str(read["network"]["cascade"]),
                pools=int(read["network"]["pools"]),
                width=int(read["network"]["width"]),
            ),
            most_frequent=(str(read["most_frequent"]["class"]), _fraction(read["most_frequent"]["mean_iou"])),
            protocols={
                name: ProtocolScores(
                    scales=tuple(float(scale) for scale in protocol["scales"]),
                    pixel_accuracy=_fraction(protocol["pixel_accuracy"]),
                    mean_accuracy=_fraction(protocol["mean_accuracy"]),
                    mean_iou=_fraction(protocol["mean_iou"]),
                    iou={name: None if iou is None else _fraction(iou) for name, iou in protocol["iou"].items()},
                    interval=_interval(protocol),
                )
                for name, protocol in read["protocols"].items()
            },
            file=file,
            weights=str(read["weights"]["md5"]) if "weights" in read else "",
        )
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; `evaluate {experiment}` makes it") from None
    except KeyError as error:
        raise UserError(f"{file}: has no {error}; `evaluate {experiment}` writes one") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: not the metrics of {experiment} ({reason})") from None
