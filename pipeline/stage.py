"""What every stage and command does at its edge: a name in, one line on an error, an exit code."""

from __future__ import annotations

import argparse
import errno
import os
import sys
import threading
import time
from collections.abc import Callable

from refinenet.files import UserError

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


def _end_with(engine: int) -> None:
    """End this process when the process `engine` has ended.

    A killed `dvc repro` or `snakemake` would leave its stage running, and the next one would start a second on the
    same files.
    """
    while True:
        time.sleep(0.5)
        try:
            os.kill(engine, 0)
        except ProcessLookupError:
            os._exit(143)


def main(run: Callable[[str], None], description: str | None, metavar: str) -> None:
    """The command line of a stage: `python -m pipeline.<stage> NAME`."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n\n")[0])
    parser.add_argument("name", metavar=metavar)
    name = parser.parse_args().name
    # Snakemake says which process it is; DVC (which sets DVC_STAGE) starts a stage as its own child.
    engine = int(os.environ.get("PIPELINE_ENGINE", os.getppid() if "DVC_STAGE" in os.environ else 0))
    if engine:
        threading.Thread(target=_end_with, args=(engine,), daemon=True).start()
    sys.exit(report(lambda: run(name)))
