"""Files without a name, for what has to be unpacked to be read."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import IO


def anonymous_file(beside: Path, chunks: Iterable[bytes]) -> IO[bytes]:
    """A file of `chunks` without a name: whatever ends the process, SIGKILL too, nothing of it stays on the disk.

    `beside`: a file; its folder's parent is where the bytes go if that can be written. Processes that are forked have
    the file open too, and share the position in it: read it by `os.pread`.
    """
    folder = beside.absolute().parent.parent
    with ExitStack() as stack:
        file = stack.enter_context(tempfile.TemporaryFile(dir=folder if os.access(folder, os.W_OK) else None))
        file.writelines(chunks)
        file.seek(0)  # and so written
        stack.pop_all()
    return file
