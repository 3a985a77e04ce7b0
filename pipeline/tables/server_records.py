"""What a test server answered: metrics/servers/<experiment>.json, which `submit record` writes and two tables read.

    {"experiment", "dataset", "protocol", "profile", "images", "competition", "link",
     "archive": {"file", "md5"}, "weights": {"file", "md5"}, "data": {"file", "md5"}, "commit",
     "percent": {"mean_iou", "iou": {class: ...}}}

The numbers are in percent, to as many digits as the server gave. The rest is from the notes beside the archive that was
sent (submissions/<name>.json): which weights, data and settings made it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasPath, Field

from pipeline.config.schema import build
from pipeline.tables.paper import published
from refinenet.atomic import atomic_file
from refinenet.errors import UserError

FOLDER = Path("metrics", "servers")
SERVED = ("voc", "cityscapes")  # the tables of which the paper's numbers are a test server's
BACKGROUND = "background"  # which neither the paper nor VOC's leaderboard prints

Percent = Annotated[Decimal, Field(ge=0, le=100)]


@dataclass(frozen=True)
class Answer:
    """Percent, as the server gave them. `iou` may be empty, or lack VOC's background."""

    mean_iou: Percent
    iou: Mapping[str, Percent] = field(default_factory=dict)


@dataclass(frozen=True)
class ServerScores:
    """A test server's scores of one archive. `weights`: the md5 of the model's file that made it."""

    experiment: str
    dataset: str
    protocol: str
    profile: str
    images: int
    weights: Annotated[str, Field(validation_alias=AliasPath("weights", "md5"))]
    link: str
    answer: Annotated[Answer, Field(alias="percent")]

    @property
    def file(self) -> Path:
        return path(self.experiment)

    def value(self, metric: str) -> Decimal | None:
        """A score in percent by the metric's name in paper.yaml; None where the server did not tell it."""
        kind, _, name = metric.partition(" ")
        return self.answer.iou.get(name) if kind == "iou" else self.answer.mean_iou


def path(experiment: str) -> Path:
    """Where the test server's scores of an experiment lie, from the project's root."""
    return FOLDER / f"{experiment}.json"


def _slack(numbers: Mapping[str, Decimal]) -> Decimal:
    """How far rounding alone can move the mean of numbers: half a unit of the coarsest one's last digit."""
    return max(Decimal(5).scaleb(int(number.as_tuple().exponent) - 1) for number in numbers.values())


def check(answer: Answer, classes: tuple[str, ...], where: str) -> None:
    """UserError unless the names are the classes' and the mean is theirs, to rounding.

    Without VOC's background, what is left over for it must be a percentage.
    """
    if not answer.iou:
        return
    if unknown := [name for name in answer.iou if name not in classes]:
        raise UserError(f"{where}: no class {unknown[0]!r}, expected {', '.join(classes)}")
    missing = [name for name in classes if name not in answer.iou]
    if missing and missing != [BACKGROUND]:
        raise UserError(f"{where}: no IoU of {', '.join(missing)}; expected all {len(classes)} classes or none")
    total = sum(answer.iou.values(), Decimal(0))
    of_mean, of_classes = _slack({"mean": answer.mean_iou}), _slack(answer.iou)
    if not missing:
        mean = total / len(classes)
        if abs(mean - answer.mean_iou) > of_mean + of_classes:
            raise UserError(f"{where}: mean IoU {answer.mean_iou}, expected {mean:.2f}, the mean of the classes")
        return
    left, slack = len(classes) * answer.mean_iou - total, len(classes) * (of_mean + of_classes)
    if not -slack <= left <= 100 + slack:
        raise UserError(
            f"{where}: mean IoU {answer.mean_iou} leaves {left:.1f} for {BACKGROUND}, expected 0 to 100; "
            f"the mean is over {len(classes)} classes"
        )


def _plain(number: Decimal) -> int | float:
    """As written: how many digits there are says how far it is rounded."""
    return float(number) if int(number.as_tuple().exponent) < 0 else int(number)


def write(notes: Mapping[str, Any], answer: Answer, link: str, root: Path = Path()) -> Path:
    """Write the record of `answer` to the archive that `notes` describe; its path, from the root."""
    record = {
        "experiment": notes["experiment"],
        "dataset": notes["server"]["data"],
        "competition": notes["server"]["competition"],
        "protocol": notes["protocol"]["name"],
        "profile": notes["profile"],
        "images": notes["archive"]["images"],
        "archive": {key: notes["archive"][key] for key in ("file", "md5")},
        "weights": notes["model"],
        "data": notes["data"],
        "commit": notes["commit"],
        "link": link,
        "percent": {
            "mean_iou": _plain(answer.mean_iou),
            "iou": {name: _plain(value) for name, value in answer.iou.items()},
        },
    }
    file = path(str(notes["experiment"]))
    with atomic_file(root / file) as part:
        part.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return file


def load(experiment: str, root: Path = Path()) -> ServerScores | None:
    """The record in `root`/metrics/servers/<experiment>.json, None without one; UserError where it is none."""
    file = path(experiment)
    where = f"{file}: not what `submit record` writes"
    try:
        read = json.loads((root / file).read_text(encoding="utf-8"), parse_float=str)  # with all its digits
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: {str(error).splitlines()[0]}") from None
    found = build(ServerScores, read, where)
    if (found.experiment, found.dataset) != (experiment, experiment.partition("-")[0]):
        raise UserError(f"{file}: of experiment {found.experiment!r} on {found.dataset}, expected {experiment!r}")
    printed = tuple(score.metric[4:] for score in published()[found.dataset].scores if score.metric[:4] == "iou ")
    check(found.answer, (BACKGROUND, *printed) if printed else tuple(found.answer.iou), str(file))
    asked = protocol(found.dataset, experiment)
    if found.protocol != asked:
        raise UserError(f"{file}: protocol {found.protocol!r}, the table shows {asked!r}")
    return found


def protocol(table: str, experiment: str) -> str:
    """The protocol that the paper's table of a test server shows of an experiment; UserError where it shows none."""
    shown = {source.experiment: source.protocol for row in published()[table].rows for source in row.sources}
    if experiment not in shown:
        raise UserError(f"--experiment {experiment}: not in Table {published()[table].number}, {', '.join(shown)} are")
    return shown[experiment]
