"""DVC's md5 of what a stage reads; files that have not changed are not read again, which takes minutes of COCO."""

from __future__ import annotations

import contextlib
from pathlib import Path
from urllib.parse import quote

from pipeline.fetch.checksums import ChecksumCache, digests
from pipeline.runtime.dvc_md5 import dvc_md5, md5_of_file
from refinenet.errors import UserError

NOTES = Path("data/.md5")  # one file for each path that was asked for: processes at once do not lose each other's notes
SMALL = 1 << 24  # bytes; what is smaller is read in less time than it takes to write a note


def input_md5(path: Path) -> str:
    """Return `dvc_md5(path)`; of an unchanged file (path, size, time, inode) the md5 noted before.

    Raises UserError for a file that cannot be read. Where no notes can be written nothing is remembered.
    """
    here = path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
    known = ChecksumCache(NOTES / f"{quote(here.as_posix(), safe='')}.json")
    return dvc_md5(path, lambda file: _remembered(file, known))


def _remembered(file: Path, known: ChecksumCache) -> str:
    try:
        if file.stat().st_size < SMALL:
            return md5_of_file(file)
        if "md5" in (noted := known.valid(file)):
            return str(noted["md5"])
        before = known.state(file)
        found = digests(file, ["md5"])
        if known.state(file) == before:
            with contextlib.suppress(OSError):
                known.note(file, found, None)
        return found["md5"]
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}), expected a file to take the md5 of") from error
