"""Official archives -> one Arrow file a split, of decoded images and labels.

    data/raw/<name>/  ->  data/<name>/train.arrow, data/<name>/val.arrow; test.arrow where there are test images

What lies in data/raw is read as the official release, whoever put it there: downloaded, copied or drawn.
All cores read (PIPELINE_CORES: how many); the files are the same for any number of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path

from pipeline import datasets
from pipeline.config import resolve
from pipeline.datasets import Dataset, Reader
from pipeline.datasets.pool import Workers, cores, measured
from pipeline.runtime import progress
from pipeline.runtime.cli import main
from refinenet.atomic import atomic_folder
from refinenet.data.split import Schema
from refinenet.data.writer import SplitWriter, write_split
from refinenet.errors import UserError

DATA = Path("data")
SMALL = 100  # images that are read before another process has started


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
            check_counts(dataset, {split: reader.released(split) for split in names})
        count = cores() if sum(map(len, names.values())) >= SMALL else 1
        with Workers(reader, count) if count > 1 else nullcontext() as workers:
            for split, images in names.items():
                schema = Schema(name, split, dataset.CLASSES, dataset.PALETTE)
                with write_split(part / f"{split}.arrow", schema) as writer:
                    written = workers.write(images, writer) if workers else write(reader, images, writer)
                    for _ in progress.bar(f"{name} {split}", "image", written, len(images)):
                        pass


def write(reader: Reader, images: Sequence[str], writer: SplitWriter) -> Iterator[None]:
    """What `Workers.write` does, in this process."""
    for image in images:
        pixels, label, facts = measured(reader, writer.schema, image)
        writer.put(facts, pixels, label)
        yield


def check_counts(dataset: Dataset, found: dict[str, int]) -> None:
    """UserError unless each split that was found has as many images as the official release."""
    wrong = [
        f"{split} has {count} images, expected {dataset.COUNTS[split]}"
        for split, count in found.items()
        if count != dataset.COUNTS.get(split, count)
    ]
    if wrong:
        raise UserError(f"{dataset.TITLE}: {'; '.join(wrong)} (official_counts is on)")


if __name__ == "__main__":
    main(run, __doc__, "DATASET")
