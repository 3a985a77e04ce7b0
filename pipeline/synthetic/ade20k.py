"""ADE20K scene parsing in the layout of its archive."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from pipeline.config.schema import Rendered
from pipeline.datasets import ade20k
from pipeline.formats.encode import Member, in_folders, jpeg, lines, png, write_zip
from pipeline.synthetic.album import paint, shifted


def render(settings: Rendered, folder: Path) -> None:
    """One zip: photographs, grey PNGs (0 = other, 1 to 150), the table of objects with this set's own counts."""
    pictures = paint("ade20k", ade20k.CLASSES, settings, "outdoor", void="seams")
    root = "ADEChallengeData2016"

    def members() -> Iterator[Member]:
        pixels = np.zeros(151, np.int64)
        images = {split: np.zeros(151, np.int64) for split in ("train", "val")}
        scenes = []
        for split, folder_name in (("train", "training"), ("val", "validation")):
            for number, p in enumerate((p for p in pictures if p.split == split), 1):
                name, label = f"ADE_{split}_{number:08d}", shifted(p.label)
                counts = np.bincount(label.ravel(), minlength=151)
                pixels += counts
                images[split] += counts > 0
                scenes.append(f"{name} misc")
                yield f"{root}/images/{folder_name}/{name}.jpg", jpeg(p.image)
                yield f"{root}/annotations/{folder_name}/{name}.png", png(label)
        rows = ["Idx\tRatio\tTrain\tVal\tName"]
        for index, name in enumerate(ade20k.CLASSES, 1):
            # In ten-thousandths and whole numbers: no floating point to print.
            ratio = int(pixels[index]) * 10000 // int(pixels[1:].sum())
            # In the official table other words for a class follow its name, here and there with a blank at the end.
            words = name + ", or in other words" * (index % 3 == 0) + " " * (index % 4 == 0)
            rows.append(f"{index}\t0.{ratio:04d}\t{images['train'][index]}\t{images['val'][index]}\t{words}")
        yield f"{root}/objectInfo150.txt", lines(rows)
        yield f"{root}/sceneCategories.txt", lines(scenes)

    write_zip(folder / "ADEChallengeData2016.zip", in_folders(members()))
