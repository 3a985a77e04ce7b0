"""What every stage and command does at its edge: a name in, one line on an error, an exit code."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from refinenet.files import UserError, alive

# What a path may answer that the user can put right: rights, a file where a folder belongs or the reverse, a full disk.
_OF_THE_DISK = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENOSPC, errno.EDQUOT),
)


def report(run: Callable[[], None]) -> int:
    """Run `run`; what a user can put right ends in one line on stderr and exit code 1, Ctrl-C in 130."""
    try:
        run()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
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
    while True:
        time.sleep(0.5)
        if not alive(engine):
            os._exit(143)


def main(run: Callable[[str], None], description: str | None, metavar: str) -> None:
    """The command line of a stage: `python -m pipeline.<stage> NAME`."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n\n")[0])
    parser.add_argument("name", metavar=metavar)
    name = parser.parse_args().name
    if engine := _engine():
        threading.Thread(target=_end_with, args=(engine,), daemon=True).start()
    sys.exit(report(lambda: run(name)))
