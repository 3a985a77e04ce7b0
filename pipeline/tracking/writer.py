"""The process beside a stage that writes to MLflow what the stage says: `python -m pipeline.tracking.writer SPOOL`.

Started by `track`. SPOOL is the number of an open file, to which the stage appends a line of JSON for each call of
`Run`. On stdin comes how the stage ended; stdin that closes without a word is a stage that was killed. What went wrong
goes to stdout in one line.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
from collections.abc import Callable

from pipeline.tracking.run import Recorder, first_line

OFTEN, SELDOM = 0.3, 5.0  # seconds between looks at the spool; where MLflow has just refused something


def main(spool: int) -> None:
    """Record what stands in `spool` until the stage ends or is killed."""
    answer = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # MLflow prints
    read = 0

    def calls() -> list[dict[str, object]]:
        nonlocal read
        data = os.pread(spool, os.fstat(spool).st_size - read, read)
        data = data[: data.rfind(b"\n") + 1]
        read += len(data)
        return [json.loads(line) for line in data.splitlines()]

    begin, *rest = calls()
    recorder = Recorder(begin)
    recorder.take(rest)
    pause = 0.0
    while not select.select([0], [], [], pause)[0]:
        recorder.take(calls())
        try:
            recorder.advance(1.0)
            pause = OFTEN
        except Exception:  # no loss yet: it is tried again, and once more at the end
            pause = SELDOM
    status, _, at = os.read(0, 100).decode().partition(" ")
    recorder.take(calls())
    patience = recorder.begin["patience"]
    problem = _until_done(lambda: recorder.end(status or "KILLED", int(at or time.time() * 1000), patience), patience)
    os.write(answer, "; ".join(filter(None, [*recorder.problems, problem])).encode())


def _until_done(work: Callable[[], None], patience: float) -> str:
    """Do `work`, and again for `patience` seconds while it fails; what it failed of, "" if it did not."""
    deadline = time.monotonic() + patience
    while True:
        try:
            work()
            return ""
        except Exception as error:
            if time.monotonic() >= deadline:
                return first_line(error)
            time.sleep(min(1.0, patience))


if __name__ == "__main__":
    main(int(sys.argv[1]))
    os._exit(0)  # a second less than to take down all that MLflow has imported, while the stage waits
