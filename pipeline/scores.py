"""Read metrics/<experiment>.json, which `evaluate` writes, and check what it says before a table repeats it."""

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
    most_frequent: tuple[str, float]
    protocols: Mapping[str, Protocol]

    def value(self, protocol: str, metric: str) -> float | None:
        """A score by the metric's name in published.yaml: "mean_iou", or "iou <class>". None: no such pixel."""
        chosen = self.protocols.get(protocol)
        if chosen is None:
            raise UserError(f"{_file(self.experiment)}: no protocol {protocol!r}, only {', '.join(self.protocols)}")
        kind, _, name = metric.partition(" ")
        if kind != "iou":
            return float(getattr(chosen, metric))
        if name not in chosen.iou:
            raise UserError(f"{_file(self.experiment)}: no IoU of class {name!r} under protocol {protocol!r}")
        return chosen.iou[name]


def _file(experiment: str) -> Path:
    return Path("metrics", f"{experiment}.json")


def _fraction(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{value!r} is not a fraction, 0 to 1")
    return float(value)


def load(experiment: str, root: Path = Path()) -> Scores:
    """The scores in `root`/metrics/<experiment>.json. Raises UserError where that is not what evaluate writes."""
    file = root / _file(experiment)
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
        if read["experiment"] != experiment:
            raise ValueError(f"it is of experiment {read['experiment']!r}")
        return Scores(
            experiment=experiment,
            dataset=str(read["dataset"]),
            split=str(read["split"]),
            profile=str(read["profile"]),
            images=int(read["images"]),
            seed=int(read["seed"]),
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
        raise UserError(f"{_file(experiment)}: no such file; `evaluate {experiment}` makes it") from None
    except KeyError as error:
        raise UserError(f"{_file(experiment)}: has no {error}; `evaluate {experiment}` writes one") from None
    except (OSError, ValueError, TypeError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{_file(experiment)}: not the metrics of {experiment} ({reason})") from None
