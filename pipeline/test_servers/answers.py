"""Read what a test server gives back: the scores on its page, copied or saved, or a file of its tool."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from decimal import Decimal
from typing import Any

from pipeline import datasets
from pipeline.tables.paper import published
from pipeline.tables.server_records import Answer, check, percent
from refinenet.errors import UserError

MEAN = "mean IoU"

# What is called the mean over the classes: VOC's leaderboard, cityscapesScripts' text and .json, Cityscapes' page.
_MEANS = ("mean", "meaniou", "miou", "average", "scoreaverage", "averagescoreclasses", "iouclass")
_MORE = {  # cityscapesScripts' other averages
    "averageScoreInstClasses": "mean_iiou",
    "averageScoreCategories": "category_iou",
    "averageScoreInstCategories": "category_iiou",
}
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e-?\d+)?%?$")


def names(data: str) -> dict[str, str]:
    """What the servers and the paper call a class, in small letters without signs -> our name of it, or MEAN."""
    printed = {_plain_name(score.column): score.metric for score in published()[data].scores}
    known = {name: metric.partition(" ")[2] for name, metric in printed.items() if metric.startswith("iou ")}
    return known | {_plain_name(one): one for one in datasets.load(data).CLASSES} | dict.fromkeys(_MEANS, MEAN)


def _plain_name(text: str) -> str:
    return re.sub("[^a-z]", "", text.lower())


def _cells(text: str) -> Iterator[list[str]]:
    """The lines of a text or of a page's tables, each cut where columns are."""
    if re.search("<t[rd]", text, re.IGNORECASE):
        text = re.sub(r"\s+", " ", text)
        text = re.sub("<(?i:/tr)[^>]*>", "\n", re.sub("<(?i:/t[dh])[^>]*>", "\t", text))
        text = html.unescape(re.sub("<[^>]*>", " ", text))
    text = re.sub(r"\x1b\[[\d;]*m", "", text)  # colours of a terminal
    for line in text.splitlines():
        if cells := [cell.strip() for cell in re.split(r"[\t|:;,=]|\s{2,}", line) if cell.strip()]:
            yield cells


def _pairs(text: str, known: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """(class, number) of each line that ends in a class and its numbers, of which the first counts.

    A line of classes alone is the heading of the line of numbers that follows (VOC's leaderboard).
    """
    heading: list[str] = []
    for cells in _cells(text):
        words = [word for cell in cells for word in (cell.split() if len(cells) < 3 else [cell])]
        found = [known[name] for cell in cells if (name := _plain_name(cell)) in known and not _NUMBER.match(cell)]
        numbers = [word for word in words if _NUMBER.match(word) and (not heading or "." in word)]
        if len(found) > 1 and not numbers:
            heading = found
        elif heading and len(numbers) == len(heading):
            yield from zip(heading, numbers, strict=True)
        elif numbers:
            first = next(i for i, word in enumerate(words) if _NUMBER.match(word))
            tails = ("".join(map(_plain_name, words[i:first])) for i in range(first))
            if name := next((known[tail] for tail in tails if tail in known), ""):
                yield name, words[first]


def parse(text: str, data: str, where: str) -> tuple[dict[str, Decimal], dict[str, Decimal]]:
    """Class, or MEAN -> percent as in the answer of the server of `data`; and what else of its averages are there.

    Read are: of VOC the table of scores on a submission's page or on the leaderboard, copied or as .html; of Cityscapes
    cityscapesScripts' .json and text, and the table of a page; for both a .json of class: percent. UserError where
    a class has two values, or none is found.
    """
    known = names(data)
    more: dict[str, Decimal] = {}
    pairs: Iterable[tuple[str, Any]]
    if text.lstrip().startswith("{"):
        try:
            read = json.loads(text, parse_float=Decimal)
            more = {ours: Decimal(read[key]) for key, ours in _MORE.items() if key in read}
            flat = {**read, **read.get("classScores", {})}
            pairs = [(known[_plain_name(name)], value) for name, value in flat.items() if _plain_name(name) in known]
        except (ValueError, TypeError, ArithmeticError) as error:
            raise UserError(f"{where}: not an answer of a server ({str(error).splitlines()[0]})") from None
    else:
        pairs = _pairs(re.split(r"(?im)^\W*categor", text)[0], known)
    found: dict[str, Decimal] = {}
    for name, value in pairs:
        number = percent(value, name, where)
        if found.setdefault(name, number) != number:
            raise UserError(f"{where}: {name} is there twice, {found[name]} and {number}; leave one result in it")
    if not found:
        raise UserError(f"{where}: no class of {data} with a number beside it, nor a mean")
    if data == "cityscapes" and max(found.values()) <= 1:  # cityscapesScripts' numbers are fractions
        found, more = ({name: 100 * value for name, value in one.items()} for one in (found, more))
    return found, more


def typed(classes: Iterable[str], mean: str | None, data: str) -> dict[str, Decimal]:
    """`parse` for the command line: `classes` are CLASS=PERCENT."""
    known = names(data)
    found = {} if mean is None else {MEAN: percent(mean, MEAN, "--mean-iou")}
    for text in classes:
        name, _, value = text.partition("=")
        ours = known.get(_plain_name(name), MEAN)
        if ours == MEAN or ours in found:
            told = f"{ours} is there twice" if ours in found and ours != MEAN else f"no class of {data}"
            raise UserError(f"--iou {text}: {told}, expected CLASS=PERCENT once for each class")
        found[ours] = percent(value, ours, f"--iou {text}")
    return found


def answer(found: Mapping[str, Decimal], more: Mapping[str, Decimal], classes: tuple[str, ...], where: str) -> Answer:
    """The checked answer; a mean that the server does not tell (VOC's list of scores) is that of all classes."""
    iou = {name: found[name] for name in (*classes, *found) if name in found and name != MEAN}
    if MEAN in found:
        mean = found[MEAN]
    elif set(iou) == set(classes):
        exact = sum(iou.values(), Decimal(0)) / len(classes)
        mean = round(exact, -min(int(value.as_tuple().exponent) for value in iou.values()))
    else:
        raise UserError(f"{where}: no mean IoU, and not all {len(classes)} classes; expected one of the two")
    made = Answer(mean, iou, more)
    check(made, classes, where)
    return made
