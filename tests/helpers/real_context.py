"""The real part of PASCAL-Context in the layout of its archives: labels.txt lies inside trainval.tar.gz."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path


def place(real: Path, folder: Path) -> None:
    """Put the archives of `real`/context into `folder`. The part has labels.txt beside trainval.tar.gz."""
    source, member = real / "context", "trainval/labels.txt"
    for name in ("VOCtrainval_03-May-2010.tar", "59_labels.txt"):
        (folder / name).symlink_to(source / name)
    with tarfile.open(source / "trainval.tar.gz") as given, tarfile.open(folder / "trainval.tar.gz", "w:gz") as packed:
        for info in given:
            packed.addfile(info, given.extractfile(info))
        if member not in given.getnames():
            data = (source / "labels.txt").read_bytes()
            info = tarfile.TarInfo(member)
            info.size = len(data)
            packed.addfile(info, io.BytesIO(data))
