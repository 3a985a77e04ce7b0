"""Official archives -> one Arrow file a split, of decoded images and labels.

    data/raw/<name>/  ->  data/<name>/train.arrow, data/<name>/val.arrow; test.arrow where there are test images

What lies in data/raw is read as the official release, whoever put it there: downloaded, copied or drawn.
All cores read (PIPELINE_CORES: how many); the files are the same for any number of them.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from pathlib import Path

from pipeline import datasets
from pipeline.config import resolve
from pipeline.datasets import Dataset, Reader
from pipeline.datasets.pool import cores, reading
from pipeline.runtime import progress
from pipeline.runtime.cli import main
from refinenet.atomic import atomic_folder
from refinenet.data.split import Schema
from refinenet.data.writer import write_split
from refinenet.errors import UserError

DATA = Path("data")
SMALL = 100  # fewer images are read before other processes have started


def run(name: str) -> None:
    """Prepare the data set `name`. UserError, in one line, for an archive that is not as the official one."""
    wanted = resolve.load("prepare", name)
    if wanted.own:
        from pipeline.datasets import custom

        dataset = custom.dataset(name, wanted.own)
    else:
        dataset = datasets.load(name)
    raw = DATA / "raw" / name
    if not raw.is_dir():
        raise UserError(f"{raw}: no such folder; `python -m pipeline.download {name}` makes it")
    with dataset.Reader(raw) as reader, atomic_folder(DATA / name) as part:
        names = {split: reader.names(split) for split in tuple(dataset.COUNTS) or ("train", "val")}
        if not names.get("test"):
            names.pop("test", None)  # its archive is optional
        if wanted.official_counts:
            check_counts(dataset, reader, names)
        count = cores() if sum(map(len, names.values())) >= SMALL else 1
        with reading(reader, count) as read:
            for split, images in names.items():
                images = images[: wanted.limit]
                schema = Schema(name, split, dataset.CLASSES, dataset.PALETTE)
                with write_split(part / f"{split}.arrow", schema) as writer:
                    for example in progress.bar(f"{name} {split}", "image", read(schema, images), len(images)):
                        writer.put(*example)


def check_counts(dataset: Dataset, reader: Reader, splits: Iterable[str]) -> None:
    """Raise UserError unless each of `splits` has as many images as the official release; warn where nobody is sure."""
    wrong: dict[bool, list[str]] = {True: [], False: []}
    for split in splits:
        expected, count = dataset.COUNTS.get(split), reader.released(split)
        if expected not in (None, count):
            wrong[reader.is_verified(split)].append(f"{split} has {count} images, expected {expected}")
    if wrong[True]:
        raise UserError(f"{dataset.TITLE}: {'; '.join(wrong[True] + wrong[False])} (official_counts is on)")
    if wrong[False]:
        print(
            f"warning: {dataset.TITLE}: {'; '.join(wrong[False])}; no source confirms that number, so it is no error",
            file=sys.stderr,
        )


if __name__ == "__main__":
    main(run, __doc__, "DATASET")
