"""Official archives -> one Arrow file a split, of decoded images and labels.

    data/raw/<name>/  ->  data/<name>/train.arrow, data/<name>/val.arrow; test.arrow where there are test images

What lies in data/raw is read as the official release, whoever put it there: downloaded, copied or drawn. Where only
its record data/raw/<name>.json is there, as after `dvc pull`, the archives are brought first.
All cores read (PIPELINE_CORES: how many); the files are the same for any number of them.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline import datasets
from pipeline.config import resolve
from pipeline.config.schema import Prepare
from pipeline.datasets import Dataset, Reader
from pipeline.datasets.pool import reading
from pipeline.runtime import progress
from pipeline.runtime.cli import main
from pipeline.runtime.dvc_md5 import md5_of_file
from pipeline.runtime.machine import cores
from refinenet.atomic import atomic_folder
from refinenet.data.split import Schema, Split
from refinenet.data.writer import write_split
from refinenet.errors import UserError, several

DATA = Path("data")
CHECKS = "checks.json"  # beside the splits of a user's own data: what speaks against them
NAMED = 5  # classes of a warning
SMALL = 100  # fewer images are read before other processes have started


def run(name: str, wanted: Prepare | None = None) -> None:
    """Prepare the data set `name`. UserError, in one line, for an archive that is not as the official one.

    `wanted`: its settings; None: those in settings.json.
    """
    wanted = wanted or resolve.load("prepare", name)
    if wanted.own:
        from pipeline.datasets import custom

        dataset = custom.dataset(name, wanted.own)
    else:
        dataset = datasets.load(name)
    raw = archives(name)
    with dataset.Reader(raw) as reader, atomic_folder(DATA / name) as part:
        names = {split: reader.names(split) for split in tuple(dataset.COUNTS) or ("train", "val")}
        if not names.get("test"):
            names.pop("test", None)  # its archive is optional
        if wanted.official_counts:
            reader.check_release()
            check_counts(dataset, reader, names)
        count = cores() if sum(map(len, names.values())) >= SMALL else 1
        counts = []
        broken: list[str] = []
        fingerprints: dict[str, list[tuple[str, bytes]]] = {}
        with reading(reader, count, broken if wanted.own else None) as read:
            for split, images in names.items():
                images = images[: wanted.limit]
                schema = Schema(name, split, dataset.CLASSES, dataset.PALETTE)
                fingerprints[split] = []
                with write_split(part / f"{split}.arrow", schema) as writer:
                    for example in progress.bar(f"{name} {split}", "image", read(schema, images), len(images)):
                        writer.put(*example[:3])
                        fingerprints[split].append((example.facts.name, example.fingerprint))
                counts.append(f"{split} {len(images)}")
        if broken:
            raise several(f"{len(broken)} files cannot be used", broken)
        # The first few images of a rehearsal lack what they like.
        labelled = [split for split in names if split != "test" and wanted.limit is None]
        lacking = check_labels(name, part, labelled)
        warnings = [lack.told() for lack in lacking]
        if wanted.own:
            void = any(lack.void for lack in lacking)
            found, more = custom.checks(wanted.own, fingerprints["train"], fingerprints["val"], void)
            (part / CHECKS).write_text(json.dumps(found, indent=1, sort_keys=True, ensure_ascii=False) + "\n", "utf-8")
            warnings += more
    for warning in warnings:
        print(f"warning: {name}: {warning}", file=sys.stderr)
    print(f"{DATA / name}: {', '.join(counts)} images")


class Lack(NamedTuple):
    """The classes, of so many, that have no pixel in a split; `void`: the share of its pixels that are void."""

    split: str
    classes: list[str]
    of: int
    void: float

    def told(self) -> str:
        """Return it as a line."""
        more = f" and {len(self.classes) - NAMED} more" if len(self.classes) > NAMED else ""
        void = f"; {self.void:.0%} of the pixels are void" if self.void else ""
        found = f"{len(self.classes)} of {self.of} classes without a pixel in {self.split}"
        return f"{found}: {', '.join(self.classes[:NAMED])}{more}{void}"


def check_labels(name: str, folder: Path, splits: Sequence[str]) -> list[Lack]:
    """Look at the labels of `splits`, prepared in `folder`, before anybody trains on them.

    Returns:
        What the splits lack.

    Raises:
        UserError: a split without an image or without a labelled pixel, on which nothing can be learned or scored.
    """
    lacking = []
    for part in splits:
        split = Split(folder / f"{part}.arrow")
        if not len(split):
            raise UserError(f"{name}: no image in {part}, expected one or more")
        pixels = split.counts().sum(axis=0)
        if not pixels[:-1].any():
            raise UserError(
                f"{name}: no labelled pixel in {part}: its {len(split)} images are void all over, expected a class in "
                "one of them or more"
            )
        classes = split.schema.classes
        if missing := [one for one, count in zip(classes, pixels, strict=False) if not count]:
            lacking.append(Lack(part, missing, len(classes), float(pixels[-1] / pixels.sum())))
    return lacking


def archives(name: str) -> Path:
    """Return data/raw/<name>, with the archives of which data/raw/<name>.json, where it is there, has size and md5.

    Raises UserError where they are missing and there is no record, and where one is another one.
    """
    raw, record = DATA / "raw" / name, DATA / "raw" / f"{name}.json"
    if not raw.is_dir() and record.is_file():
        # As a process of its own: prepared data does not depend on the code that fetches or draws.
        code = subprocess.run([sys.executable, "-m", "pipeline.download", name], check=False).returncode
        if code:
            sys.exit(code)  # it has said why
    if not raw.is_dir():
        raise UserError(f"{raw}: no such folder; `python -m pipeline.download {name}` makes it")
    expected = json.loads(record.read_bytes()) if record.is_file() else {}
    with progress.bar(f"{name}: md5", "archive", expected.items()) as files:
        for file, about in files:
            if not (raw / file).is_file():
                raise UserError(f"{raw / file}: no such file, {record} has it; `python -m pipeline.download {name}`")
            if (found := md5_of_file(raw / file)) != about["md5"]:
                raise UserError(
                    f"{raw / file}: md5 {found}, {record} has {about['md5']}; `python -m pipeline.download {name}` "
                    "brings that one, or records this one"
                )
    return raw


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
