"""Progress of long work: a bar with rate and time left; where a bar cannot be drawn, a line now and then."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class _Lines:
    """Each state of a bar as a line of its own. tqdm draws the last one again as it closes the bar: that is none."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ""

    def write(self, text: str) -> None:
        line = text.strip("\r\n ")
        # "train:  50%|####    | 10/20 [00:30<00:30, 3.3image/s]": what is done, without the time and the rate.
        done = line.rpartition("|")[2].partition(" [")[0]
        if line and done != self._last:
            self._stream.write(f"{line}\n")
            self._last = done

    def flush(self) -> None:
        self._stream.flush()


def bar(description: str, unit: str, of: Iterable[Any] | None = None, total: int | None = None, **more: Any) -> Any:
    """A tqdm bar over `of`, or up to `total` of `unit`.

    Bars need a terminal to themselves: into a file, or beside the other jobs of a Snakemake run, go lines, and work
    that is done before the first of them is due says nothing.
    """
    if sys.stderr.isatty() and "PIPELINE_ENGINE" not in os.environ:
        return tqdm(of, description, total, unit=unit, mininterval=0.2, dynamic_ncols=True, **more)
    quiet = SECONDS_BETWEEN_LINES
    lines = _Lines(sys.stderr)
    return tqdm(of, description, total, unit=unit, mininterval=quiet, delay=quiet, file=lines, ncols=100, **more)


def reach(bar: Any, done: int, each: int = 1) -> None:
    """Move the bar to `done`. The first step, of `each`, may follow others that an earlier process did.

    Those show, but the rate and the time left are of this process alone.
    """
    if not bar.n and done > each:
        bar.initial = bar.n = bar.last_print_n = done - each
    bar.update(done - bar.n)
