"""Progress of long work: a bar with rate and time left; a line every 30 s where a bar cannot be drawn."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import Any, TextIO

from tqdm import tqdm

SECONDS_BETWEEN_LINES = 30.0


class _Lines:
    """Writes each state of a bar as a line; drops the last one, which tqdm repeats when it closes the bar."""

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
    """Return a tqdm bar over `of`, or up to `total`.

    A bar needs a terminal of its own: into a file, or next to other jobs of a Snakemake run, lines are written instead,
    the first after 30 s.

    Args:
        description: in front of the bar.
        unit: what is counted.
        of: an iterable to wrap.
        total: the number of units; None: the length of `of`.
        more: further arguments of tqdm.
    """
    if sys.stderr.isatty() and "PIPELINE_ENGINE" not in os.environ:
        return tqdm(of, description, total, unit=unit, mininterval=0.2, dynamic_ncols=True, **more)
    quiet = SECONDS_BETWEEN_LINES
    lines = _Lines(sys.stderr)
    # miniters=1: or tqdm's monitor writes lines in between, with the rate of the line before. smoothing=1: the rate of
    # the interval that a line ends.
    timing: dict[str, Any] = {"mininterval": quiet, "delay": quiet, "miniters": 1, "smoothing": 1}
    return tqdm(of, description, total, unit=unit, file=lines, ncols=100, **timing | more)


def reach(bar: Any, done: int, each: int = 1) -> None:
    """Move the bar to `done`. Work before the first step (of `each`) was done by an earlier process.

    It is shown, but rate and time left are computed from this process only.
    """
    if not bar.n and done > each:
        bar.initial = bar.n = bar.last_print_n = done - each
    bar.update(done - bar.n)
