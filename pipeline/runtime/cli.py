"""What every stage and command does at its edge: a name in, one line on an error, an exit code; Ctrl-C and SIGTERM.

A scheduler that wants its machine back sends SIGTERM and waits a while before it kills (SLURM: KillWait, 30 s). A stage
that asks for it (`main(..., graceful=True)`) polls `terminated()`, keeps what it has and raises `Terminated`; it ends
with AGAIN. A second SIGTERM ends it at once.
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType

from refinenet.atomic import process_start_time
from refinenet.errors import UserError

# What a path may answer that the user can put right: rights, a file where a folder belongs or the reverse, a full disk.
_OF_THE_DISK = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENOSPC, errno.EDQUOT),
)

# EX_TEMPFAIL of sysexits.h: nothing is wrong, the same command again goes on. No shell or signal gives this number (143
# is also what an unprepared process dies with), so that a scheduler can tell it (SLURM: RequeueExit=75).
EXIT_TRY_AGAIN = 75


class Terminated(BaseException):
    """A stage has stopped because it was asked to, and goes on when it is started again. Its text says where.

    Like KeyboardInterrupt no Exception: for `pipeline.tracking.track` the run was killed, it has not failed.
    """


_received: set[int] = set()


def terminated() -> bool:
    """Whether a SIGTERM has asked this process to stop. To be polled by long work; costs nothing.

    Raises KeyboardInterrupt after a Ctrl-C: whoever asks is still at work, so the one that the signal raised was lost.
    (It may be raised inside whatever Python runs at that moment, also a callback whose caller drops every error.)
    """
    if signal.SIGINT in _received:
        raise KeyboardInterrupt
    return signal.SIGTERM in _received


def _interrupt(number: int, frame: FrameType | None) -> None:
    _received.add(number)
    raise KeyboardInterrupt


def _terminate(number: int, frame: FrameType | None) -> None:
    _received.add(number)
    # The second ends at once. Not where a parent passes on the signal that a scheduler sends to all processes of a job.
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _listen(graceful: bool) -> None:
    """Install the handlers, but for signals that whoever started this process has it ignore, as nohup does."""
    _received.clear()
    # A new program inherits also which signals are held back, even where nobody meant it to.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    if graceful and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
        # A forked worker polls nothing; who ends it sends the signal once.
        os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def run_cli(run: Callable[[], None]) -> int:
    """Run `run`; what a user can put right ends in one line on stderr and exit code 1.

    Ctrl-C ends in 130, Terminated in AGAIN.
    """
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except Terminated as stopped:
        print(f"terminated: {stopped}", file=sys.stderr)
        return EXIT_TRY_AGAIN
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        print(f"error: {error.filename or 'disk'}: {error.strerror}", file=sys.stderr)
        return 1
    return 0


def _engine() -> int:
    """The process that runs the graph and started this one; 0 where it was started by hand."""
    if "PIPELINE_ENGINE" in os.environ:  # Snakemake says which it is
        return int(os.environ["PIPELINE_ENGINE"])
    if "DVC_STAGE" not in os.environ:
        return 0
    engine = os.getppid()
    # DVC goes through the user's shell. Most shells turn into the command, others stay and wait for it.
    while (name := _of_process(engine, "comm").strip()) and name.endswith("sh"):
        engine = int(_of_process(engine, "stat").rpartition(")")[2].split()[1])
    return engine


def _of_process(process: int, what: str) -> str:
    try:
        return Path(f"/proc/{process}/{what}").read_text()
    except OSError:
        return ""


def _end_with(engine: int) -> None:
    """End this process when the process `engine` has ended.

    A killed `dvc repro` or `snakemake` would leave its stage running, and the next one would start a second on the
    same files.
    """
    born = process_start_time(engine)
    while born and process_start_time(engine) == born:
        time.sleep(0.5)
    os._exit(143)


def attach(graceful: bool = False) -> None:
    """Listen to signals, and end with the engine that started this process. `graceful`: it polls `terminated`."""
    _listen(graceful)
    if engine := _engine():
        threading.Thread(target=_end_with, args=(engine,), daemon=True).start()


def main(run: Callable[[str], None], description: str | None, metavar: str, graceful: bool = False) -> None:
    """The command line of a stage: `python -m pipeline.<stage> NAME`. `graceful`: it polls `terminated`."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n\n")[0])
    parser.add_argument("name", metavar=metavar)
    name = parser.parse_args().name
    attach(graceful)
    sys.exit(run_cli(lambda: run(name)))
