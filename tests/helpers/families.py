"""Processes that processes start: all of a family, and waiting for what they do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any


def family(process: int) -> Iterator[int]:
    """All descendants of a process."""
    for thread in Path(f"/proc/{process}/task").glob("*/children"):
        for child in map(int, thread.read_text().split()):
            yield child
            yield from family(child)


def wait_for(what: Callable[[], Any]) -> Any:
    """Return what `what` returns once that is true; AssertionError after five minutes."""
    end = time.monotonic() + 300
    while not (found := what()):
        assert time.monotonic() < end
        time.sleep(0.005)
    return found
