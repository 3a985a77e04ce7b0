"""The process beside a stage that writes what `pipeline.tracking` sends it into MLflow's database.

    python -m pipeline.tracking.writer     started by `track`: messages on stdin, what went wrong on stdout

mlflow is imported late, so that an import that fails is said like any other failure. The first message is what `track`
was called with; one for every call of `Run`, and the end, follow it. A pipe that closes without an end is a stage that
was killed.

Once a run has ended well its model is kept, too (tracking/models.py): a training's is logged under it, an evaluation's
is registered, with the score.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sqlite3
import time
from collections.abc import Iterator

from pipeline.tracking.run import Record, line
from refinenet.errors import UserError


def _batches(seconds: float = 0.3) -> Iterator[list[bytes]]:
    """The lines of stdin, those that come within `seconds` together: a fast loop makes few transactions."""
    unread = b""
    while chunk := os.read(0, 1 << 20):
        deadline = time.monotonic() + seconds
        while chunk:
            unread += chunk
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([0], [], [], left)[0]:
                break
            chunk = os.read(0, 1 << 20)
        *lines, unread = unread.split(b"\n")
        yield lines


def _write() -> None:
    """Record what the stage says on stdin until it ends or is killed; say on stdout what went wrong, if it did."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answer, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    record: Record | None = None
    problem = ""
    for lines in _batches():
        for message in map(json.loads, lines):
            if record is None:
                record = Record(message)
            elif message["do"] == "end":
                record.status, record.ended = message["status"], message["time"]
            else:
                record.pending.append(message)
        if record and record.status == "KILLED":
            # A failure here is no loss yet: what is pending is tried again with the next message, and at the end.
            with contextlib.suppress(Exception):
                record.advance(record.begin["patience"])
    if record is None:
        return
    deadline = time.monotonic() + record.begin["patience"]
    while True:
        left = deadline - time.monotonic()
        try:
            record.advance(max(left, 0.1))
            record.close(max(left, 0.1))
            try:
                record.keep_model(max(left, 0.1))
            except (TimeoutError, sqlite3.Error):
                raise  # the database, which may be free in a moment
            except UserError as error:
                record.problems.append(line(error))
            except Exception as error:
                record.problems.append(f"its model: {line(error)}")
            problem = "; ".join(record.problems)
            break
        except Exception as error:
            problem = line(error)
            if left <= 0:
                break
            time.sleep(min(1.0, left))
    os.write(answer, problem.encode())


if __name__ == "__main__":
    _write()
