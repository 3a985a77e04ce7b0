"""Read what a test server gave back: numbers of the command line, or a JSON file of them."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

from pipeline.config.schema import build
from pipeline.tables.server_records import Answer, Percent, check
from refinenet.errors import UserError

EXPECTED = '{"mean_iou": 73.6, "iou": {"road": 98.2, ...}}, in percent'


@dataclass(frozen=True)
class _Given:
    """What a user may give: the mean, or the IoU of each class, or both."""

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012 - pydantic's

    mean_iou: Percent | None = None
    iou: Mapping[str, Percent] = field(default_factory=dict)


@dataclass(frozen=True)
class _CityscapesScripts:
    """What the official tool of Cityscapes writes: fractions, NaN for classes that do not count."""

    averageScoreClasses: float  # noqa: N815 - the tool's
    classScores: Mapping[str, float]  # noqa: N815


def read(file: Path, classes: tuple[str, ...]) -> Answer:
    """The answer in a JSON file, "-" for stdin: as `answer` takes it, or as cityscapesScripts writes it."""
    where = "stdin" if str(file) == "-" else str(file)
    try:
        text = sys.stdin.read() if where == "stdin" else file.read_text(encoding="utf-8-sig")
        values = json.loads(text, parse_float=str)  # with all its digits
    except (OSError, ValueError) as error:
        raise UserError(f"{where}: no JSON ({error}), expected {EXPECTED}") from None
    if isinstance(values, dict) and "classScores" in values:
        tool = build(_CityscapesScripts, values, where)
        iou = {name: _percent(tool.classScores[name]) for name in classes if name in tool.classScores}
        values = {"mean_iou": _percent(tool.averageScoreClasses), "iou": iou}
    return answer(values, classes, where)


def typed(mean_iou: str | None, iou: Sequence[str], classes: tuple[str, ...]) -> Answer:
    """The answer on the command line; `iou`: CLASS=PERCENT each."""
    pairs = {name: percent for name, _, percent in (text.partition("=") for text in iou)}
    if len(pairs) < len(iou):
        raise UserError("--iou: a class is there twice, expected CLASS=PERCENT once for each class")
    return answer({"mean_iou": mean_iou, "iou": pairs}, classes, "command line")


def answer(values: object, classes: tuple[str, ...], where: str) -> Answer:
    """The checked answer of {"mean_iou": percent, "iou": {class: percent}}, of which one may be missing.

    A mean that the server does not tell (VOC's list of scores) is that of all classes.
    """
    given = build(_Given, values, where)
    iou = {name: given.iou[name] for name in (*classes, *given.iou) if name in given.iou}
    mean = given.mean_iou
    if mean is None:
        if set(iou) != set(classes):
            raise UserError(f"{where}: no mean IoU, and not all {len(classes)} classes; expected one of the two")
        exact = sum(iou.values(), Decimal(0)) / len(classes)
        mean = round(exact, -min(int(value.as_tuple().exponent) for value in iou.values()))
    made = Answer(mean, iou)
    check(made, classes, where)
    return made


def _percent(fraction: float) -> Decimal:
    return 100 * Decimal(str(fraction))
