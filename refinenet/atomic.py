"""Files and folders that appear under their name whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def sync(path: Path) -> None:
    """Wait until the file or folder `path` is on disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def process_start_time(process: int) -> str:
    """Return when the process with this id started, in clock ticks since boot: a later one with the id differs.

    "" where there is none or where it is a zombie: it has ended, but its parent has not waited for it (in a container
    whose first process reaps no orphans a zombie stays for ever). "?" where there is no /proc.
    """
    try:
        # proc(5): number (name) state parent ... start time; the name may hold blanks and brackets.
        fields = Path(f"/proc/{process}/stat").read_bytes().rpartition(b")")[2].split()
    except OSError:
        try:
            os.kill(process, 0)
        except (ProcessLookupError, OverflowError):
            return ""
        except PermissionError:
            pass
        return "?"
    return "" if fields[0] in (b"Z", b"X") else fields[19].decode()


def alive(process: int) -> bool:
    """Return whether a process with this id runs on this machine, of any user."""
    return process_start_time(process) != ""


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _part(path: Path) -> Path:
    """Return the temporary name to write to, next to `path`; remove what killed processes left under such names."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.*.part"):
        writer = left.name.split(".")[-2]
        if not writer.isdigit() or not alive(int(writer)):
            _remove(left)
    return path.with_name(f".{path.name}.{os.getpid()}.part")


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a path to write a file to; on success it is synced and renamed to `path`, on any error removed."""
    part = _part(path)
    try:
        yield part
        part.chmod(0o666 & ~_umask())  # some writers make files that only their owner can read
        sync(part)
        part.replace(path)
        sync(path.parent)
    finally:
        _remove(part)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield an empty folder to write to; on success it is synced and replaces `path`, on any error it is removed."""
    part = _part(path)
    _remove(part)
    part.mkdir()
    try:
        yield part
        for file in part.rglob("*"):
            if not file.is_symlink():  # its target may belong to another user, and not be readable
                sync(file)
        if path.exists() or path.is_symlink():
            _remove(path)
        part.replace(path)
        sync(path.parent)
    finally:
        _remove(part)
