"""How many of the paper's numbers a run reproduces."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.tables import columns as tables
from pipeline.tables.paper import published, slug

POINTS = (1.0, 2.0, 5.0)  # within which numbers are counted; the first is what "reproduced" means


@dataclass(frozen=True)
class Number:
    """A mean IoU of the paper and this run's, in percent. `same_images`: whether it was taken on the paper's images.

    `interval`: the 95 % interval of this run's, None where there is none.
    """

    experiment: str
    protocol: str
    paper: float
    run: float
    same_images: bool
    interval: tuple[float, float] | None = None

    def within(self, points: float) -> bool:
        """Whether the two are no further apart, as printed: both have one decimal."""
        return round(abs(self.run - self.paper), 1) <= points

    @property
    def inside(self) -> bool:
        """Whether the paper's lies in the interval."""
        return self.interval is not None and self.interval[0] <= self.paper <= self.interval[1]


@dataclass(frozen=True)
class Counts:
    """Of the numbers on the paper's images, how many are reproduced: points -> how many within them; `inside`."""

    of: int
    within: dict[float, int]
    inside: int
    intervals: int


def counts(found: Sequence[Number]) -> Counts:
    """Count what is reproduced."""
    ours = [number for number in found if number.same_images]
    return Counts(
        of=len(ours),
        within={points: sum(number.within(points) for number in ours) for points in POINTS},
        inside=sum(number.inside for number in ours),
        intervals=sum(number.interval is not None for number in ours),
    )


def numbers(printed: Mapping[str, list[dict[str, str]]]) -> list[Number]:
    """Each mean IoU that is comparable with the paper's once, though it may stand in several tables; by data set."""
    found = {}
    for of in published().values():
        for prefix, columns in of.groups():
            score = slug(of.scores[columns[-1]].column)  # where the paper prints several, the last is the mean IoU
            for row, record in zip(of.all_rows, printed[of.name], strict=True):
                if (
                    (experiment := record[f"{prefix}experiment"])
                    and record[f"{prefix}comparable"] == "yes"
                    and not row.by
                ):
                    protocol = record[f"{prefix}protocol"]
                    same = tables.like_for_like(of, row, record[f"{prefix}evaluated_on_run"])
                    low, high = record[f"{score}_low"], record[f"{score}_high"]
                    found[experiment, protocol] = Number(
                        experiment,
                        protocol,
                        float(record[f"{score}_paper"]),
                        float(record[f"{score}_run"]),
                        same,
                        (float(low), float(high)) if low else None,
                    )
    order = [of.name for of in published().values()]
    return sorted(found.values(), key=lambda number: order.index(number.experiment.partition("-")[0]))
