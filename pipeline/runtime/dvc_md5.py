"""The md5 by which DVC identifies a file or folder, without importing DVC (which costs a second)."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from fnmatch import translate
from pathlib import Path

from refinenet.errors import UserError

# As in .dvcignore: names that never belong to an output, in any folder.
NOT_VERSIONED = (".snakemake_timestamp", "__pycache__", ".*.part")
# DVC ignores these by default.
_ALWAYS = (".git", ".hg/", ".dvc/")
_SKIPPED_FILE = re.compile("|".join(translate(name) for name in (*NOT_VERSIONED, *_ALWAYS) if not name.endswith("/")))
_SKIPPED_FOLDER = re.compile("|".join(translate(name.rstrip("/")) for name in (*NOT_VERSIONED, *_ALWAYS)))


def md5_of_file(file: Path) -> str:
    """Return the md5 of a file, read now, in hexadecimal digits. Raises UserError where it cannot be read."""
    try:
        with file.open("rb") as stream:
            # usedforsecurity=False: machines in FIPS mode refuse md5 otherwise.
            return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}), expected a file to take the md5 of") from error


def dvc_md5(path: Path, of_file: Callable[[Path], str] = md5_of_file) -> str:
    """Return what DVC 3 writes as `md5` of `path` into dvc.lock: 32 hex digits, for a folder followed by ".dir".

    For a file it is its md5. For a folder it is the md5 of its listing in DVC's cache: JSON, one {"md5", "relpath"} a
    file, sorted by relpath with "/" between the parts, without empty folders, linked folders and names in
    NOT_VERSIONED. `of_file`: takes the md5 of a file. Raises UserError for a file that cannot be read.
    """
    if not path.is_dir():
        return of_file(path)
    files = {}
    for root, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not _SKIPPED_FOLDER.match(name)]
        for name in names:
            if not _SKIPPED_FILE.match(name):
                file = Path(root, name)
                files[file.relative_to(path).as_posix()] = file
    listing = [{"md5": of_file(files[relpath]), "relpath": relpath} for relpath in sorted(files)]
    return hashlib.md5(json.dumps(listing).encode(), usedforsecurity=False).hexdigest() + ".dir"
