"""Command line of stages and commands: one line on an error, exit codes, colours, Ctrl-C and SIGTERM.

A scheduler that needs its machine back sends SIGTERM and waits before it kills (SLURM: KillWait, 30 s). A stage with
`main(..., graceful=True)` polls `terminated()`, saves its work and raises `Terminated`; it exits with EXIT_TRY_AGAIN. A
second SIGTERM ends it at once.
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
from typing import Literal, TextIO

from refinenet.atomic import process_start_time
from refinenet.errors import UserError

# Errors that the user can fix: permissions, a file where a folder belongs or the reverse, a full disk.
_OF_THE_DISK = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST),
    *(errno.ENOTDIR, errno.EISDIR, errno.ENOSPC, errno.EDQUOT),
)

# EX_TEMPFAIL of sysexits.h: no error, the same command resumes. No shell or signal gives this code (143 is also that of
# a process without a handler), so that a scheduler can recognise it (SLURM: RequeueExit=75).
EXIT_TRY_AGAIN = 75
# EX_CANTCREAT: another process writes what this one would (pipeline/runtime/lease.py).
EXIT_HELD = 73


class HeldError(UserError):
    """Another process is at work on the same; its text says who and since when."""


class Terminated(BaseException):
    """A stage stopped because it was asked to, and resumes when it is started again. Its text says where.

    Like KeyboardInterrupt not an Exception: for `pipeline.tracking.track` the run was killed, it has not failed.
    """


_received: set[int] = set()


def terminated() -> bool:
    """Return whether a SIGTERM has asked this process to stop. Long work polls it; it costs nothing.

    Raises KeyboardInterrupt after a Ctrl-C: if the caller is still running, the one that the signal raised was lost.
    (It is raised inside whatever Python runs at that moment, possibly a callback whose caller drops every error.)
    """
    if signal.SIGINT in _received:
        raise KeyboardInterrupt
    return signal.SIGTERM in _received


def _interrupt(number: int, frame: FrameType | None) -> None:
    _received.add(number)
    raise KeyboardInterrupt


def _terminate(number: int, frame: FrameType | None) -> None:
    _received.add(number)
    # The second ends it at once. Not under torchrun, which forwards a signal that a scheduler sends to all processes.
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _listen(graceful: bool) -> None:
    """Install the handlers, except for signals that the parent had this process ignore, as nohup does."""
    _received.clear()
    # A process inherits its parent's blocked signals, even if unintended.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)
    if graceful and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
        signal.signal(signal.SIGTERM, _terminate)
        # A forked worker does not poll `terminated`; its parent sends the signal once.
        os.register_at_fork(after_in_child=lambda: signal.signal(signal.SIGTERM, signal.SIG_DFL))


def run_cli(run: Callable[[], None]) -> int:
    """Run `run` and return the exit code; an error that the user can fix is one line on stderr and 1.

    Ctrl-C gives 130, Terminated EXIT_TRY_AGAIN, HeldError EXIT_HELD.
    """
    try:
        run()
    except HeldError as error:
        print(marked(f"error: {error}"), file=sys.stderr)
        return EXIT_HELD
    except UserError as error:
        print(marked(f"error: {error}"), file=sys.stderr)
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
        print(marked(f"error: {error.filename or 'disk'}: {error.strerror}"), file=sys.stderr)
        return 1
    return 0


def _engine() -> int:
    """Return the id of the engine (DVC, Snakemake) that started this process; 0 where it was started by hand."""
    if "PIPELINE_ENGINE" in os.environ:  # set by Snakemake's side (pipeline/graph.py)
        return int(os.environ["PIPELINE_ENGINE"])
    if "DVC_STAGE" not in os.environ:
        return 0
    engine = os.getppid()
    # DVC starts commands in the user's shell. Most shells exec the command, others stay and wait for it.
    while (name := _of_process(engine, "comm").strip()) and name.endswith("sh"):
        engine = int(_of_process(engine, "stat").rpartition(")")[2].split()[1])
    return engine


def dvc_targets() -> list[str] | None:
    """Return what the `dvc repro` that started this process was asked for, [] for all; None where none has."""
    words = _of_process(engine, "cmdline").split("\0")[:-1] if (engine := _engine()) else []
    at = words.index("repro") if "repro" in words else 0
    return [word for word in words[at + 1 :] if not word.startswith("-")] if at else None


def by_an_engine() -> bool:
    """Return whether DVC or Snakemake started this process, for which a failed stage is the end of many others."""
    return "PIPELINE_ENGINE" in os.environ or "DVC_STAGE" in os.environ


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
    """Install signal handlers, and end with the engine that started this process. graceful: it polls `terminated`."""
    _listen(graceful)
    if engine := _engine():
        threading.Thread(target=_end_with, args=(engine,), daemon=True).start()


_COLOURS = {"red": 31, "yellow": 33, "green": 32}


def coloured(text: str, colour: Literal["red", "yellow", "green"], stream: TextIO) -> str:
    """Return `text` in colour; plain where `stream` is no terminal, or NO_COLOR is set (no-color.org)."""
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return text
    return f"\033[{_COLOURS[colour]}m{text}\033[0m"


def marked(line: str) -> str:
    """Return a line for stderr with its first word in colour, where that is "error:" or "warning:"."""
    word, _, rest = line.partition(" ")
    if word not in ("error:", "warning:"):
        return line
    return f"{coloured(word, 'red' if word == 'error:' else 'yellow', sys.stderr)} {rest}"


def warn(text: str) -> None:
    """Print "warning: <text>" on stderr."""
    print(marked(f"warning: {text}"), file=sys.stderr)


_prefix = "python -m pipeline."
_stood: Path | None = None


def called_as_refinenet(stood: Path | None) -> None:
    """Note that the command `refinenet` runs the module that comes, not `python -m`.

    stood: the folder that the user's paths are relative to, where it is not the working folder any more.
    """
    global _prefix, _stood
    _prefix, _stood = "refinenet ", stood


def program(command: str) -> str:
    """Return how a command was called, for its help: "refinenet predict" or "python -m pipeline.predict"."""
    return f"{_prefix}{command}"


def user_path(text: str) -> Path:
    """Read a path of the command line, for argparse: relative to where the user stands, "-" as it is.

    `refinenet` may have gone to the project's root meanwhile (pipeline/__main__.py).
    """
    path = Path(text)
    if _stood is None or path.is_absolute() or text == "-":
        return path
    return Path(os.path.relpath(_stood / path))


def add_to(line: argparse.ArgumentParser, metavar: str, about: str, required: bool = False) -> None:
    """Add --to, under which every command takes where it writes; --output, as some called it, works as well."""
    where = line.add_mutually_exclusive_group(required=required)
    where.add_argument("--to", type=user_path, metavar=metavar, help=about)
    where.add_argument("--output", dest="to", type=user_path, help=argparse.SUPPRESS)


def command_parser(command: str, description: str | None, epilog: str | None = None) -> argparse.ArgumentParser:
    """Return the parser of the command `refinenet <command>`; --help shows both texts whole, with their line breaks."""
    return argparse.ArgumentParser(
        prog=program(command),
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def main(run: Callable[[str], None], description: str | None, metavar: str, graceful: bool = False) -> None:
    """Run the command line of a stage, `python -m pipeline.<stage> NAME`, and exit.

    Args:
        run: the stage; takes the name.
        description: for --help; its first paragraph is used.
        metavar: what the name is, for --help.
        graceful: `run` polls `terminated`.
    """
    prog = program(Path(sys.argv[0]).stem)
    parser = argparse.ArgumentParser(prog=prog, description=(description or "").partition("\n\n")[0])
    parser.add_argument("name", metavar=metavar)
    name = parser.parse_args().name
    attach(graceful)
    sys.exit(run_cli(lambda: run(name)))
