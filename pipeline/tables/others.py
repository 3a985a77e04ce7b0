"""What others have published on a data set that is not in the paper: pipeline/tables/published/<data set>.yaml.

    split, images     what all of them are scored on
    rows              each with method; size, of an image, height x width; starts_from; trained_on; mean_iou in
                      percent, as printed; source: where it is published; `verified: false`: nobody has looked there
    notes             to be said below them

Rows of this project stand among them only where they are of the same images: never those of synthetic images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import ConfigDict, Field

from pipeline.config import resolve
from pipeline.config.schema import build
from pipeline.tables.metrics_files import MetricsFile
from refinenet.errors import UserError

FOLDER = Path(__file__).with_name("published")
COLUMNS = ("method", "size", "starts_from", "trained_on", "published_by", "verified")
HEAD = ("Method", "Size", "Starts from", "Trained on", "Source", "IoU")
UNSURE = "unverified"


@dataclass(frozen=True)
class PublishedScore:
    """A row; the module's text has the meaning of its fields."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    method: str
    size: str
    starts_from: str
    trained_on: str
    mean_iou: Annotated[float, Field(gt=0, le=100)]
    source: str
    verified: bool = True

    def csv(self) -> list[str]:
        """The cells of `COLUMNS`."""
        verified = "yes" if self.verified else "no"
        return [self.method, self.size, self.starts_from, self.trained_on, self.source, verified]

    def shown(self) -> list[str]:
        """The cells of `HEAD`; a score that nobody has looked up is in brackets."""
        score, source = str(self.mean_iou), self.source
        if not self.verified:
            score, source = f"({score})", f"{source}, {UNSURE}"
        return [self.method, self.size, self.starts_from, self.trained_on, source, score]


@dataclass(frozen=True)
class PublishedScores:
    """What others have published on a data set, in the order of the file."""

    __pydantic_config__ = ConfigDict(extra="forbid")

    split: str
    images: int
    rows: tuple[PublishedScore, ...]
    notes: tuple[str, ...] = ()

    def obstacle(self, run: MetricsFile) -> str:
        """Say why the scores of `run` cannot stand beside these; "" where they can."""
        if run.drawn:
            return "of synthetic images"
        if (run.split, run.images) != (self.split, self.images):
            return f"of {run.images} images of {run.split}, not of the {self.images} of {self.split}"
        return ""

    def remarks(self) -> list[str]:
        """What is to be said below the rows."""
        unsure = (
            ["In brackets: from memory, not looked up; do not quote."] if any(not r.verified for r in self.rows) else []
        )
        return [*self.notes, *unsure]


def read(name: str) -> PublishedScores | None:
    """What is published on the data set `name`; None where there is no such file. Raises UserError for a wrong one."""
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        return None
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path.name}: not YAML: {' '.join(str(error).split())}") from None
    return build(PublishedScores, values, f"pipeline/tables/published/{path.name}")


def circumstances(experiment: str, settings: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """How an experiment of this project was trained: the cells size, starts_from and trained_on.

    Args:
        experiment: its name.
        settings: stage -> name -> values, as settings.json has them.
    """
    train, evaluate = settings["train"][experiment], settings["evaluate"][experiment]
    pixels, factor = resolve.image_size(train["data"], settings), evaluate["input_scale"]
    size = f"{pixels[0]} x {pixels[1]}" if pixels else ""
    size += "" if factor == 1 else f", times {factor:g}"
    if train["source"] is not None:
        return [size, "finished weights", ""]
    chain = [train]
    while (start := chain[0]["start"]) in settings["train"]:
        chain.insert(0, settings["train"][start])
    parts = [part for one in chain for phase in one["phases"] for part in phase["parts"]]
    if not train["phases"]:
        parts.append([train["data"], "train"])
    seen = [split if data == train["data"] else f"{data} {split}" for data, split in parts]
    source = settings["weights"][start]["source"]
    known = source is not None and ("package" in source or "torchvision" in source)
    begins = "ImageNet" if known else "nothing" if source is None else "weights of one's own"
    return [size, begins, " + ".join(dict.fromkeys(seen))]
