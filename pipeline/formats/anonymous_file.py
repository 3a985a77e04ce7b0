"""Files without a name, for what has to be unpacked to be read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any, Self


class AnonymousFile:
    """A file without a name: whatever ends the process, SIGKILL too, nothing of it stays on the disk.

    `beside`: a file; its folder's parent is where the bytes go if that can be written. Pickled it is the way to the
    same bytes through /proc/<process>/fd, as long as the process that made it has it open; where there is no such way
    (another system, that process has ended) what is unpickled is None, and the bytes have to be made again.
    """

    def __init__(self, beside: Path) -> None:
        folder = beside.absolute().parent.parent
        self.file: IO[bytes] = tempfile.TemporaryFile(dir=folder if os.access(folder, os.W_OK) else None)  # noqa: SIM115

    def fill(self, chunks: Iterable[bytes]) -> Self:
        for chunk in chunks:
            self.file.write(chunk)
        self.file.flush()
        self.file.seek(0)
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        self.file.flush()
        return _reopen, (f"/proc/{os.getpid()}/fd/{self.file.fileno()}", _identity(self.file))


def _identity(file: IO[bytes]) -> tuple[int, int, int]:
    found = os.fstat(file.fileno())
    return found.st_dev, found.st_ino, found.st_size


def _reopen(path: str, identity: tuple[int, int, int]) -> AnonymousFile | None:
    try:
        file = open(path, "rb")  # noqa: PTH123, SIM115 - kept open
    except OSError:
        return None
    if _identity(file) != identity:  # the number now belongs to another process or file
        file.close()
        return None
    scratch = AnonymousFile.__new__(AnonymousFile)
    scratch.file = file
    return scratch
