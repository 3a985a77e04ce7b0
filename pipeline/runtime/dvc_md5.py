"""The name DVC gives to the content of a file or folder, without importing DVC (which costs a second)."""

from __future__ import annotations

import hashlib
import json
import os
import re
from fnmatch import translate
from pathlib import Path

from refinenet.errors import UserError

# What .dvcignore lists: names that never belong to an output, in whatever folder they turn up.
NOT_VERSIONED = (".snakemake_timestamp", "__pycache__", ".*.part")
# DVC skips these without being told to.
_ALWAYS = (".git", ".hg/", ".dvc/")
_SKIPPED_FILE = re.compile("|".join(translate(name) for name in (*NOT_VERSIONED, *_ALWAYS) if not name.endswith("/")))
_SKIPPED_FOLDER = re.compile("|".join(translate(name.rstrip("/")) for name in (*NOT_VERSIONED, *_ALWAYS)))


def dvc_md5(path: Path) -> str:
    """What DVC 3 writes as `md5` of `path` into dvc.lock: 32 hex digits, for a folder with ".dir" behind them.

    A file is its plain md5. A folder is the md5 of its listing, as DVC's cache keeps it: JSON, one
    {"md5", "relpath"} a file, sorted by relpath with "/" between the parts; empty folders and linked folders do not
    count. Names in NOT_VERSIONED are left out, as .dvcignore has DVC do.
    """
    if not path.is_dir():
        return _md5(path)
    files = {}
    for root, folders, names in os.walk(path):
        folders[:] = [name for name in folders if not _SKIPPED_FOLDER.match(name)]
        for name in names:
            if not _SKIPPED_FILE.match(name):
                file = Path(root, name)
                files[file.relative_to(path).as_posix()] = file
    listing = [{"md5": _md5(files[relpath]), "relpath": relpath} for relpath in sorted(files)]
    return hashlib.md5(json.dumps(listing).encode(), usedforsecurity=False).hexdigest() + ".dir"


def _md5(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            # usedforsecurity=False: machines in FIPS mode refuse md5 otherwise.
            return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}), expected a file to take the md5 of") from error
