"""One writer for each training: a lease, a small file that names the process at work and is renewed while it lives.

A cluster's head that died and was started again submits running trainings a second time, perhaps on another node. The
second process finds the lease of the first. It says so and ends with EXIT_HELD, or waits; and takes the lease over when
the first is dead: at once where that can be seen (the same machine), else when the file has not been renewed for
GONE periods. Clocks of two machines are never compared: the file's time, as its server has it, changes or does not.

The file appears whole by link(2), which NFS does at once or not at all, without a daemon for locks.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from pipeline.runtime.cli import EXIT_HELD, HeldError, Terminated, terminated
from refinenet.atomic import alive, process_start_time

PERIOD = 20.0  # seconds between two renewals
GONE = 3  # periods without a renewal after which the holder of another machine is taken for dead
LOOK = 1.0  # seconds between two looks at somebody else's lease
MINE = "REFINENET_LEASE"  # environment variable: the token of the lease that a parent of this process holds


@dataclass(frozen=True)
class Holder:
    """Who holds a lease. `what`: a digest of what it makes; `since`: by its own clock, to be read by people only."""

    host: str
    machine: str  # this boot of this machine, and the namespace in which `pid` is a number
    pid: int
    started: str  # the process's start time: a later process with the number has another
    since: str
    what: str
    token: str

    def dead(self) -> bool:
        """Return whether the process, one of this machine, has ended."""
        return process_start_time(self.pid) != self.started if self.started != "?" else not alive(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host} since {self.since}"


class _Seen(NamedTuple):
    content: bytes
    time: int  # the file's, ns


def _machine() -> str:
    """Return what tells machines and containers apart; one that was started again is another."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:
        return f"{socket.gethostname()} {os.name}"


@contextmanager
def only_one(path: Path, name: str, what: str, wait: bool = False) -> Iterator[str]:
    """Hold the lease `path` while the block runs, and remove it in the end, however that comes.

    Args:
        path: of the lease.
        name: of the training, for messages.
        what: a digest of what is made under the lease.
        wait: wait while another process holds it, instead of giving up.

    Yields the `what` of the process that was waited for and that has removed its lease itself, "" if there was none.
    A child of the holder, such as the processes of one training, comes in without a lease of its own.

    Raises:
        HeldError: another process that lives holds it, and `wait` is off.
        Terminated: a SIGTERM came while it waited.
    """
    lease = _Lease(path, name, what)
    if (mine := os.environ.get(MINE)) and lease.held_by(mine):
        yield ""
        return
    waited_for = lease.take(wait)
    before = os.environ.get(MINE)
    os.environ[MINE] = lease.token
    try:
        yield waited_for
    finally:
        lease.give_back()
        os.environ.pop(MINE)
        if before is not None:
            os.environ[MINE] = before


class _Lease:
    def __init__(self, path: Path, name: str, what: str) -> None:
        self.path, self.name = path, name
        self.token = secrets.token_hex(8)
        now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
        started = process_start_time(os.getpid())
        holder = Holder(socket.gethostname(), _machine(), os.getpid(), started, now, what, self.token)
        self._content = (json.dumps(asdict(holder)) + "\n").encode()
        self._over = threading.Event()
        self._renewing = threading.Thread(target=self._renew, name="lease", daemon=True)

    def look(self) -> _Seen | None:
        """Return what the file holds; None where there is none.

        It is opened anew each time: only then does an NFS client ask its server whether the file has changed.
        """
        try:
            with self.path.open("rb") as file:
                return _Seen(file.read(), os.fstat(file.fileno()).st_mtime_ns)
        except FileNotFoundError:
            return None

    def held_by(self, token: str) -> bool:
        """Return whether the lease is the one with this token."""
        holder = _parse(seen.content) if (seen := self.look()) else None
        return holder is not None and holder.token == token

    def take(self, wait: bool) -> str:
        """Take the lease; return the `what` of the one that was waited for until it gave its lease back, or ""."""
        watched, since, told, waited_for = None, 0.0, False, ""
        while not self._create():
            if (seen := self.look()) is None:
                continue
            holder = _parse(seen.content)
            if watched is None or seen.content != watched.content:
                watched, since, living = seen, time.monotonic(), False
            elif living := seen != watched:
                watched, since = seen, time.monotonic()
            gone = time.monotonic() - since > GONE * PERIOD
            if here := holder is not None and holder.machine == _machine():
                # Of this machine's processes it is known which live, also suspended ones.
                gone = holder is not None and holder.dead()
            if gone:
                print(f"{self.name}: {holder or 'whoever began it'} has ended; taken over", file=sys.stderr)
                self._take_away(seen.content)
                watched, waited_for = None, ""
                continue
            if (living or here) and not wait:
                raise HeldError(f"{self.name} is already being trained, by {holder or 'another process'} ({self.path})")
            if not told:
                told = True
                how = f"waits for {holder or 'another process'}" if wait else f"looks whether {holder} is alive"
                print(f"{self.name}: {how} ({self.path})", file=sys.stderr)
            if terminated():
                raise Terminated(f"before it began; {holder} is at work on {self.name}")
            waited_for = holder.what if holder else ""
            time.sleep(min(LOOK, PERIOD))
        self._renewing.start()
        return waited_for

    def _create(self) -> bool:
        """Create the file with this process's content; False where there is one."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = self._aside()
        try:
            whole.write_bytes(self._content)
            with contextlib.suppress(OSError):  # it exists; or an answer got lost, and it was made
                os.link(whole, self.path)
                return True
            if whole.stat().st_nlink > 1:
                return True
        finally:
            whole.unlink(missing_ok=True)
        if self.path.exists():
            return False
        # A file system without hard links. A reader may see the file empty for a moment: of nobody, which lives.
        try:
            with self.path.open("xb") as file:
                file.write(self._content)
        except FileExistsError:
            return False
        return True

    def _aside(self) -> Path:
        return self.path.with_name(f".{self.path.name}.{self.token}")

    def _take_away(self, content: bytes) -> None:
        """Remove the lease of somebody who is gone, if it still has this content.

        It is renamed and then looked at: of several that try, one gets it. Who has got another one, of a process that
        was faster, puts that back.
        """
        away = self._aside()
        try:
            self.path.rename(away)
        except FileNotFoundError:
            return
        if away.read_bytes() != content:
            with contextlib.suppress(FileExistsError):
                os.link(away, self.path)
        away.unlink()

    def _renew(self) -> None:
        while not self._over.wait(PERIOD):
            # What the file server does not answer is tried again; others wait for GONE periods.
            with contextlib.suppress(OSError):
                if (seen := self.look()) is not None and seen.content == self._content:
                    os.utime(self.path)
                elif self._over.is_set():
                    return
                elif seen is not None or not self._create():  # without one (the folder was removed): it comes back
                    # Suspended for long, perhaps. Who has taken over goes on from the last checkpoint; two must not.
                    who = _parse(seen.content) if seen else None
                    print(f"error: {self.name}: {who or 'another process'} has taken over; ends here", file=sys.stderr)
                    os._exit(EXIT_HELD)

    def give_back(self) -> None:
        """Remove the file, if it is still this process's."""
        self._over.set()
        self._renewing.join()
        with contextlib.suppress(OSError):
            if (seen := self.look()) is not None and seen.content == self._content:
                self.path.unlink()


def _parse(content: bytes) -> Holder | None:
    """Return whom a lease names; None where it is no lease, or not yet."""
    try:
        return Holder(**json.loads(content))
    except (ValueError, TypeError):
        return None


def unchanged_since(paths: list[Path]) -> Callable[[], bool]:
    """Return a function that tells whether one of the files is missing or still the one that it is now."""

    def state(path: Path) -> tuple[int, int] | None:
        try:
            return path.stat().st_ino, path.stat().st_mtime_ns
        except FileNotFoundError:
            return None

    before = [state(path) for path in paths]
    return lambda: any(now is None or now == then for now, then in zip(map(state, paths), before, strict=True))
