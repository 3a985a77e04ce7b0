"""The official archives of one data set: fetched from their sources, or drawn in the same layout.

    settings.json  ->  data/raw/<name>/<official file names>

Downloads go to data/archives/<name>/ and get a second name in data/raw/<name>/. The first is no output of the graph:
it survives a kill, and both engines, which clear a stage's outputs before they run it again. An archive without a
published checksum does not stay there, since nothing could tell later whether it is still the right one.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from pipeline import archives, settings
from pipeline.stage import main
from refinenet.files import UserError, whole_folder

DATA = Path("data")


def run(name: str) -> None:
    """Bring or draw the archives of the data set `name`; UserError for what the user can put right."""
    wanted = settings.load("download", name)
    folder = DATA / "raw" / name
    if wanted.rendered is not None:
        from pipeline import rendered

        with whole_folder(folder) as part:
            rendered.render(name, wanted.rendered, part)
        return
    if not wanted.archives:
        raise UserError(f"settings.json: download.{name} has neither archives nor `rendered`")
    for file in wanted.archives:
        if Path(file).name != file or file.startswith("."):
            raise UserError(f"settings.json: download.{name}: {file!r}, expected the plain name of an archive")
    from filelock import FileLock, Timeout

    store = DATA / "archives" / name
    store.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{store}.lock", timeout=0):
            for file, source in wanted.archives.items():
                archives.fetch(source, store / file)
            with whole_folder(folder) as part:
                for file in wanted.archives:
                    _put(store / file, part / file)
            for file, source in wanted.archives.items():
                if source.md5 is None and source.sha256 is None:
                    (store / file).unlink()
    except Timeout:
        raise UserError(f"{store}.lock: held by another `download {name}`; wait for it") from None


def _put(source: Path, target: Path) -> None:
    """A second name for the file, or a copy where the disk has no such thing."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


if __name__ == "__main__":
    main(run, __doc__, "DATASET")
