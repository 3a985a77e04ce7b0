"""Read metrics/<data>/<experiment>.json, which `evaluate` writes, and check what it says before a table repeats it.

The same experiment from further seeds lies in metrics/seeds/<experiment>-seed<k>.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated

from pydantic import AliasPath, Field

from pipeline.config.schema import build
from refinenet.errors import UserError

FURTHER = Path("metrics", "seeds")

Fraction = Annotated[float, Field(ge=0, le=1)]
_INTERVAL = Field(validation_alias=AliasPath("interval", "mean_iou"))


@dataclass(frozen=True)
class ProtocolScores:
    """One way of testing. Scores are fractions, 0 to 1; the IoU of a class that no truth has is None.

    `interval`: in which the mean IoU lies with 95 %, over images drawn anew; None in files that have none.
    """

    scales: tuple[float, ...]
    pixel_accuracy: Fraction
    mean_accuracy: Fraction
    mean_iou: Fraction
    iou: Mapping[str, Fraction | None]
    interval: Annotated[tuple[Fraction, Fraction] | None, _INTERVAL] = None


@dataclass(frozen=True)
class NetworkInfo:
    """What sets networks apart, as `refinenet.config.Config` calls it; `cascade`: its name, or "own"."""

    backbone: str
    cascade: str
    pools: int
    width: int


@dataclass(frozen=True)
class MostFrequent:
    """The score of always answering the most frequent class `name`, the floor of any score."""

    name: Annotated[str, Field(alias="class")]
    mean_iou: Fraction


@dataclass(frozen=True)
class MetricsFile:
    """How one trained model scored: on which images, under which protocols.

    `drawn`: whether images that it was trained or tested on are drawn ones. `weights`: md5 of the model's file, "" in
    metrics that do not tell. `file`: where it stands, from the root.
    """

    experiment: str
    dataset: str
    split: str
    profile: str
    images: int
    seed: int
    network: NetworkInfo
    most_frequent: MostFrequent
    protocols: Mapping[str, ProtocolScores]
    drawn: bool = False
    weights: Annotated[str, Field(validation_alias=AliasPath("weights", "md5"))] = ""
    file: Path = Path()

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
        found = self.protocol(protocol)
        kind, _, name = metric.partition(" ")
        if kind != "iou":
            return float(getattr(found, metric))
        if name not in found.iou:
            raise UserError(f"{self.file}: no IoU of class {name!r} under protocol {protocol!r}")
        return found.iou[name]


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


def load(experiment: str, root: Path = Path(), dataset: str | None = None) -> MetricsFile:
    """The scores in `root`/metrics/<dataset>/<experiment>.json. UserError where that is not what evaluate writes.

    Without `dataset` it is what the experiment's name begins with, as in all of the paper's tables: voc-res101.
    """
    dataset = dataset or experiment.partition("-")[0]
    return _read(path(experiment, dataset), experiment, dataset, root)


def _read(file: Path, experiment: str, dataset: str, root: Path) -> MetricsFile:
    """The metrics in `root`/`file`."""
    where = f"{file}: not the metrics of {experiment} that `evaluate` writes"
    try:
        found = build(MetricsFile, (root / file).read_bytes(), where)
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; `evaluate {experiment}` makes it") from None
    except OSError as error:
        raise UserError(f"{where}: {error.strerror}") from None
    if (found.experiment, found.dataset) != (experiment, dataset):
        raise UserError(f"{where}: it is of experiment {found.experiment!r} on {found.dataset}")
    return replace(found, file=file)
