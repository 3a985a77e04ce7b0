"""Read metrics/<data>/<experiment>.json, which `evaluate` writes, and check what it says before a table repeats it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from refinenet.files import UserError


@dataclass(frozen=True)
class Protocol:
    """One way of testing. Scores are fractions, 0 to 1; the IoU of a class that no truth has is None."""

    scales: tuple[float, ...]
    pixel_accuracy: float
    mean_accuracy: float
    mean_iou: float
    iou: Mapping[str, float | None]


@dataclass(frozen=True)
class Network:
    """What sets networks apart, as `refinenet.config.Config` calls it; `cascade`: its name, or "own"."""

    backbone: str
    cascade: str
    pools: int
    width: int


@dataclass(frozen=True)
class Scores:
    """How one trained model scored: on which images, under which protocols.

    `most_frequent`: (class, mean IoU) of always answering the most frequent class, the floor of any score.
    """

    experiment: str
    dataset: str
    split: str
    profile: str
    images: int
    seed: int
    network: Network
    most_frequent: tuple[str, float]
    protocols: Mapping[str, Protocol]

    @property
    def file(self) -> Path:
        return path(self.experiment, self.dataset)

    def absent(self) -> list[str]:
        """Says where the mean is over fewer classes than the data set has."""
        iou = next(iter(self.protocols.values())).iou
        present = sum(value is not None for value in iou.values())
        return [] if present == len(iou) else [f"{present} of {len(iou)} classes occur"]

    def value(self, protocol: str, metric: str) -> float | None:
        """A score by the metric's name in published.yaml: "mean_iou", or "iou <class>". None: no such pixel."""
        chosen = self.protocols.get(protocol)
        if chosen is None:
            raise UserError(f"{self.file}: no protocol {protocol!r}, only {', '.join(self.protocols)}")
        kind, _, name = metric.partition(" ")
        if kind != "iou":
            return float(getattr(chosen, metric))
        if name not in chosen.iou:
            raise UserError(f"{self.file}: no IoU of class {name!r} under protocol {protocol!r}")
        return chosen.iou[name]


def path(experiment: str, dataset: str) -> Path:
    """Where the metrics of an experiment on this data set lie, from the project's root."""
    return Path("metrics", dataset, f"{experiment}.json")


def _fraction(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{value!r} is not a fraction, 0 to 1")
    return float(value)


def load(experiment: str, root: Path = Path(), dataset: str | None = None) -> Scores:
    """The scores in `root`/metrics/<dataset>/<experiment>.json. UserError where that is not what evaluate writes.

    Without `dataset` it is what the experiment's name begins with, as in all of the paper's tables: voc-res101.
    """
    dataset = dataset or experiment.partition("-")[0]
    file = path(experiment, dataset)
    try:
        read = json.loads((root / file).read_text(encoding="utf-8"))
        if (read["experiment"], read["dataset"]) != (experiment, dataset):
            raise ValueError(f"it is of experiment {read['experiment']!r} on {read['dataset']}")
        return Scores(
            experiment=experiment,
            dataset=dataset,
            split=str(read["split"]),
            profile=str(read["profile"]),
            images=int(read["images"]),
            seed=int(read["seed"]),
            network=Network(
                backbone=str(read["network"]["backbone"]),
                cascade=str(read["network"]["cascade"]),
                pools=int(read["network"]["pools"]),
                width=int(read["network"]["width"]),
            ),
            most_frequent=(str(read["most_frequent"]["class"]), _fraction(read["most_frequent"]["mean_iou"])),
            protocols={
                name: Protocol(
                    scales=tuple(float(scale) for scale in protocol["scales"]),
                    pixel_accuracy=_fraction(protocol["pixel_accuracy"]),
                    mean_accuracy=_fraction(protocol["mean_accuracy"]),
                    mean_iou=_fraction(protocol["mean_iou"]),
                    iou={name: None if iou is None else _fraction(iou) for name, iou in protocol["iou"].items()},
                )
                for name, protocol in read["protocols"].items()
            },
        )
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; `evaluate {experiment}` makes it") from None
    except KeyError as error:
        raise UserError(f"{file}: has no {error}; `evaluate {experiment}` writes one") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file}: not the metrics of {experiment} ({reason})") from None
