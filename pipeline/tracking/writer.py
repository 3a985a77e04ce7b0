"""The process beside a stage that writes to MLflow what the stage says: `python -m pipeline.tracking.writer SPOOL`.

Started by `track`. SPOOL is the number of an open file, to which the stage appends a line of JSON for each call of
`Run`. On stdin comes how the stage ended; stdin that closes without a word is a stage that was killed. What went wrong
goes to stdout in one line; a refusal, which waiting does not mend, goes to stderr at once, while there is something to
save. What could not be sent is kept in UNSENT, and `refinenet tracking send` sends it.
"""

from __future__ import annotations

import json
import os
import re
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path

from pipeline.tracking.run import Call, Recorder, first_line
from refinenet.atomic import atomic_file
from refinenet.errors import UserError

UNSENT = Path("mlflow-unsent")
# Of what MLflow raises: nobody answers, or not now. A name that no server has is no outage.
_OUTAGE = re.compile(
    "is locked|Connection(Refused|Reset)|NewConnection|ConnectTimeout|timed out|unreachable|(code|many) 5[0-9][0-9]"
)
OFTEN, SELDOM = 0.3, 5.0  # seconds between looks at the spool; where MLflow has just refused something


def main(spool: int) -> None:
    """Record what stands in `spool` until the stage ends or is killed."""
    answer, stderr = os.dup(1), os.dup(2)
    for stream in (1, 2):
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)  # MLflow prints
    read = 0

    def calls() -> list[Call]:
        nonlocal read
        data = os.pread(spool, os.fstat(spool).st_size - read, read)
        data = data[: data.rfind(b"\n") + 1]
        read += len(data)
        return [json.loads(line) for line in data.splitlines()]

    begin, *rest = calls()
    recorder = Recorder(begin)
    recorder.take(rest)
    pause, told = 0.0, False
    while not select.select([0], [], [], pause)[0]:
        recorder.take(calls())
        try:
            recorder.advance(1.0)
            pause = OFTEN
        except Exception as error:  # no loss yet: it is tried again, and once more at the end
            pause = SELDOM
            if not told and not _OUTAGE.search(str(error)):
                told = True
                line = f"warning: MLflow refuses this run: {first_line(error)}; tried again until the stage ends\n"
                os.write(stderr, line.encode())
    os.close(stderr)  # of a stage that may be gone: whoever reads it need not wait
    status, _, at = os.read(0, 100).decode().partition(" ")
    recorder.take(calls())
    how: Call = {"call": "end", "status": status or "KILLED", "at": int(at or time.time() * 1000)}
    patience = recorder.begin["patience"]
    problem = _until_done(lambda: recorder.end(how["status"], how["at"], patience), patience)
    if problem:
        said = [json.loads(line) for line in os.pread(spool, read, 0).splitlines()]
        problem += _keep([*said, how], recorder.run)
    os.write(answer, "; ".join(filter(None, [*recorder.problems, problem])).encode())


def _keep(said: list[Call], run: str) -> str:
    """Keep what was to be sent; return where, to be told. `run`: of MLflow's, where it has been made."""
    file = UNSENT / f"{said[0]['experiment']}-{said[0]['kind']}-{time.time_ns()}.jsonl"
    try:
        with atomic_file(file) as part:
            part.write_text("".join(json.dumps(call) + "\n" for call in [said[0] | {"run": run}, *said[1:]]))
    except OSError as error:
        return f"; and it could not be kept: {error}"
    return f"; kept in {file}, `refinenet tracking send` sends it"


def send(file: Path) -> list[str]:
    """Send what was kept in `file` and remove it; return what is wrong with single files of the run.

    Raises UserError where it cannot be sent; the file stays.
    """
    try:
        begin, *rest, how = [json.loads(line) for line in file.read_bytes().splitlines()]
        recorder = Recorder(begin)
        recorder.take(rest)
        status, at = how["status"], how["at"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not what a stage has kept ({error!r})") from None
    try:
        recorder.end(status, at, begin["patience"])
    except Exception as error:
        raise UserError(f"{file}: not sent: {first_line(error)}") from None
    file.unlink()
    return recorder.problems


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
    if not sys.argv[1:] or not sys.argv[1].isdigit():
        sys.exit("usage: python -m pipeline.tracking.writer SPOOL; `track` starts it, people do not")
    main(int(sys.argv[1]))
    os._exit(0)  # a second less than to take down all that MLflow has imported, while the stage waits
