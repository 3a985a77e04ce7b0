"""Official archives -> one Arrow file a split, of decoded images and labels.

    data/raw/<name>/  ->  data/<name>/train.arrow, data/<name>/val.arrow

What lies in data/raw is read as the official release, whoever put it there: downloaded, copied or drawn.
"""

from __future__ import annotations

from pathlib import Path

from pipeline import datasets, progress, settings
from pipeline.stage import main
from refinenet.data import Schema, write_split
from refinenet.files import UserError, whole_folder

DATA = Path("data")


def run(name: str) -> None:
    """Prepare the data set `name`. UserError, in one line, for an archive that is not as the official one."""
    wanted = settings.load("prepare", name)
    dataset = datasets.load(name)
    raw = DATA / "raw" / name
    if not raw.is_dir():
        raise UserError(f"{raw}: no such folder; `python -m pipeline.download {name}` makes it")
    with dataset.Reader(raw) as reader, whole_folder(DATA / name) as folder:
        names = {split: reader.names(split) for split in dataset.COUNTS}
        if wanted.official_counts:
            check_counts(dataset, names)
        for split, images in names.items():
            schema = Schema(name, split, dataset.CLASSES, dataset.PALETTE)
            with write_split(folder / f"{split}.arrow", schema) as writer:
                for image in progress.bar(f"{name} {split}", "image", images):
                    pixels, label = reader.read(split, image)
                    try:
                        writer.add(image, pixels, label)
                    except UserError as error:
                        raise UserError(f"{reader.where(split, image)}: {error}") from None


def check_counts(dataset: datasets.Dataset, names: dict[str, list[str]]) -> None:
    """UserError unless each split has as many images as the official release."""
    wrong = [
        f"{split} has {len(names[split])} images, expected {count}"
        for split, count in dataset.COUNTS.items()
        if len(names[split]) != count
    ]
    if wrong:
        raise UserError(f"{dataset.TITLE}: {'; '.join(wrong)} (official_counts is on)")


if __name__ == "__main__":
    main(run, __doc__, "DATASET")
