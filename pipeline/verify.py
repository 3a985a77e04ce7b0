"""Verify the checksums of all files in DVC's cache and of all outputs; DVC itself trusts file times.

    python -m pipeline.verify

reads the whole cache and all outputs once. Files damaged by a disk, an interrupted copy or an edit are listed. In the
cache they are removed; in the working folder they get a new time, so that DVC checks them again: `dvc pull` or
`dvc repro` then restores them.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from pipeline.runtime.cli import run_cli
from pipeline.runtime.dvc_md5 import dvc_md5
from pipeline.runtime.progress import bar
from refinenet.errors import UserError


def broken_objects(cache: Path) -> list[Path]:
    """Return the files of a cache (.dvc/cache/files/md5) whose md5 is not their name; skip those being written."""
    broken = []
    objects = sorted(path for path in cache.glob("??/*") if not path.name.startswith("."))
    with bar("cache", "file", total=len(objects)) as progress:
        for path in objects:
            if dvc_md5(path) != (path.parent.name + path.name).removesuffix(".dir"):
                broken.append(path)
            progress.update()
    return broken


def changed_outputs(repo: Any) -> list[Path]:
    """Return the cached outputs of `repo` (dvc.repo.Repo) that exist and differ from dvc.lock."""
    outs = [out for out in repo.index.outs if out.use_cache and out.hash_info and Path(out.fs_path).exists()]
    changed = []
    with bar("outputs", "output", total=len(outs)) as progress:
        for out in outs:
            if dvc_md5(Path(out.fs_path)) != out.hash_info.value:
                changed.append(Path(out.fs_path).relative_to(repo.root_dir))
            progress.update()
    return changed


def run() -> None:
    """Check everything; make DVC notice what is broken, then raise UserError."""
    from dvc.repo import Repo

    repo = Repo(".")
    objects = broken_objects(Path(repo.cache.local.path))
    for path in objects:
        path.unlink()
        print(f"{path}: its md5 is not its name, removed")
    outputs = changed_outputs(repo)
    for output in outputs:
        for path in (output, *output.rglob("*")):
            os.utime(path)
    if objects or outputs:
        named = ", ".join(map(str, outputs)) or "nothing in the working folder"
        raise UserError(
            f"DVC's cache: {len(objects)} broken; not as dvc.lock says: {named}; `dvc pull` or `dvc repro` restores it"
        )
    print("all files match dvc.lock")


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0]).parse_args()
    sys.exit(run_cli(run))
