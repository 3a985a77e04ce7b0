"""Keep memory that was freed, instead of asking the system for it again."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Any

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h
_MOST = (1 << 31) - 1  # what fits in mallopt's int


def keep_freed_memory(most: int = _MOST) -> None:
    """Let this process keep up to `most` bytes that it freed, for its next blocks of any size.

    glibc gives a large block back to the system when it is freed, and the next one comes with a page fault for each
    4 KiB. A training step on a CPU frees and takes all its maps: benchmarks/train.md says what that costs. Results do
    not change. Does nothing where the C library is another one.
    """
    with suppress(OSError, AttributeError):
        library: Any = ctypes.CDLL(None)
        library.mallopt(_M_MMAP_MAX, 0)
        library.mallopt(_M_TRIM_THRESHOLD, most)
