"""Look whether the files that DVC keeps still hold what they held: it goes by their times and rights, not by content.

    python -m pipeline.verify

reads the whole cache and all outputs once. What a disk, a copy that broke off or a hand has damaged is named, removed
from the cache, and in the working folder given a new time, so that DVC looks at it again: `dvc pull` or `dvc repro`
then brings it back.
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
    """The files of a cache (.dvc/cache/files/md5) whose md5 is not their name; what is being written is passed over."""
    broken = []
    objects = sorted(path for path in cache.glob("??/*") if not path.name.startswith("."))
    with bar("cache", "file", total=len(objects)) as progress:
        for path in objects:
            if dvc_md5(path) != (path.parent.name + path.name).removesuffix(".dir"):
                broken.append(path)
            progress.update()
    return broken


def changed_outputs(repo: Any) -> list[Path]:
    """The cached outputs of `repo` (dvc.repo.Repo) that are there and are not what dvc.lock says."""
    outs = [out for out in repo.index.outs if out.use_cache and out.hash_info and Path(out.fs_path).exists()]
    changed = []
    with bar("outputs", "output", total=len(outs)) as progress:
        for out in outs:
            if dvc_md5(Path(out.fs_path)) != out.hash_info.value:
                changed.append(Path(out.fs_path).relative_to(repo.root_dir))
            progress.update()
    return changed


def run() -> None:
    """Check all; UserError where anything is broken, once DVC has been made to see it."""
    from dvc.repo import Repo

    repo = Repo(".")
    objects = broken_objects(Path(repo.cache.local.path))
    for path in objects:
        path.unlink()
        print(f"{path}: was not what its name says, removed")
    outputs = changed_outputs(repo)
    for output in outputs:
        for path in (output, *output.rglob("*")):
            os.utime(path)
    if objects or outputs:
        named = ", ".join(map(str, outputs)) or "nothing in the working folder"
        raise UserError(
            f"DVC's cache: {len(objects)} broken; not as dvc.lock says: {named}; `dvc pull` or `dvc repro` restores it"
        )
    print("every file is as DVC knows it")


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0]).parse_args()
    sys.exit(run_cli(run))
