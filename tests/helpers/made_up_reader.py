"""A reader of images that are made up as they are read, and a data set of them; also in other processes."""

from __future__ import annotations

import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from pipeline import datasets
from refinenet.data.split import Array
from refinenet.errors import UserError

CLASSES = ("a", "b", "c", "d")


class Reader(datasets.Reader):
    """`wrong`: image -> what is wrong with it. `seconds`: of each image. `side`: of all images, else sizes differ."""

    def __init__(
        self, raw: Path, count: int = 0, wrong: dict[str, str] | None = None, seconds: float = 0.0, side: int = 0
    ) -> None:
        super().__init__(raw)
        self.count, self.wrong, self.seconds, self.side = count, wrong or {}, seconds, side

    def names(self, split: str) -> list[str]:
        return [f"{split}{i:04}" for i in range(self.count)]

    def where(self, split: str, name: str) -> str:
        return f"{self.raw}!{name}"

    def read(self, split: str, name: str) -> tuple[Array, Array | None]:
        """Image, label: of sizes and contents that follow from the name alone."""
        time.sleep(self.seconds)
        wrong = self.wrong.get(name)
        draw = np.random.default_rng([ord(char) for char in name])
        height, width = (self.side, self.side) if self.side else draw.integers(1, 60, 2)
        image = draw.integers(0, 256, (height, width, 3), np.uint8)
        label = draw.choice(np.array([0, 1, 3, 255], np.uint8), (height, width))
        if wrong == "late":
            time.sleep(0.3)
            raise UserError(f"{self.where(split, name)}: late")
        if wrong == "at once":
            raise UserError(f"{self.where(split, name)}: at once")
        if wrong == "label":
            label[0, 0] = 4
        if wrong == "bug":
            raise KeyError("a mistake in the code")
        if wrong == "exit":
            os._exit(3)
        return image, None if split == "test" else label


def dataset(**options: Any) -> Any:
    """The data set as a module of pipeline/datasets has it."""
    palette = tuple((i, i, i) for i in range(len(CLASSES)))
    counts = {"train": 0, "val": 0, "test": 0}
    return SimpleNamespace(
        TITLE="Made up", CLASSES=CLASSES, PALETTE=palette, COUNTS=counts, Reader=lambda raw: Reader(raw, **options)
    )


def prepare(**options: Any) -> None:
    """`python -m pipeline.prepare ade20k` in the current folder, with this data set in the place of ADE20K."""
    from pipeline import prepare
    from pipeline.runtime import cli

    datasets.load = lambda name: dataset(**options)  # type: ignore[assignment, return-value]
    Path("data/raw/ade20k").mkdir(parents=True, exist_ok=True)
    Path("settings.json").write_text('{"prepare": {"ade20k": {}}}')
    raise SystemExit(cli.run_cli(lambda: prepare.run("ade20k")))
