"""Copies of archives that this machine has already: found, checked once, given a second name instead of fetched."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from pipeline.runtime import progress
from refinenet.atomic import atomic_file

if TYPE_CHECKING:
    from pipeline.config.schema import Source

STORE = Path("data/archives")  # <data set>/<file>: what was fetched, or links to what was found
MEMORY = ".verified.json"
CHUNK = 1 << 20
LARGE = 1 << 28  # bytes; reading more takes long enough for a bar
SETTLED = 100_000_000  # ns. Of a file that was written more recently the time alone does not tell a later change.
NEVER = Event()


class CopyError(Exception):
    """What is wrong with one copy or one address, in one line; another one may do."""


class StoppedError(Exception):
    """Ctrl-C in the main thread: work in the others ends."""


def say(line: str) -> None:
    """A line for the user, between the bars."""
    tqdm.write(line, file=sys.stderr)


def digests(path: Path, kinds: Sequence[str], stop: Event = NEVER) -> dict[str, str]:
    """Checksums of a file in hexadecimal digits, all from one reading; `kinds` as hashlib calls them."""
    # Said to be no security, or machines in FIPS mode refuse md5.
    sums = {kind: hashlib.new(kind, usedforsecurity=False) for kind in kinds}
    size = path.stat().st_size
    buffer = memoryview(bytearray(CHUNK))
    bar = progress.bar(f"check {path.name}", "B", total=size, unit_scale=True, disable=size < LARGE, **first_line())
    with bar, path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            if stop.is_set():
                raise StoppedError
            for made in sums.values():
                made.update(buffer[:count])
            bar.update(count)
    return {kind: made.hexdigest() for kind, made in sums.items()}


def first_line() -> dict[str, Any]:
    """Where no bars are drawn, tqdm must not move the cursor for those that run at the same time."""
    return {} if sys.stderr.isatty() else {"position": 0}


class ChecksumCache:
    """Checksums taken before, so that an unchanged store of archives is not read again at every run.

    `file` (JSON) keeps them: absolute path -> size, mtime_ns, inode, checksums, origin. They count as long as the first
    three are the file's own. Of other data sets' files their memory is read, too. Without a `file` all is forgotten at
    the end. Threads may share one. `wrong`: copies that have been told of and passed over.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.wrong: set[Path] = set()
        self._file = file
        self._lock = Lock()
        self._entries = _read(file)

    def recorded(self, path: Path) -> Mapping[str, Any]:
        """What was once noted of this path, whether or not the file has changed since."""
        absolute = path.absolute()
        with self._lock:
            if (entry := self._entries.get(str(absolute))) is not None:
                return entry
        beside = path.parent / MEMORY
        if path.parent.parent == STORE and beside != self._file:
            return _read(beside).get(str(absolute), {})
        return {}

    def valid(self, path: Path) -> Mapping[str, Any]:
        """What was noted of the file, if it has not changed since."""
        entry = self.recorded(path)
        return entry if _state(path).items() <= entry.items() else {}

    def note(self, path: Path, found: Mapping[str, str], origin: str | None) -> None:
        """Remember the checksums of the file as it is now, and the address or path that it came from."""
        state = _state(path)
        if time.time_ns() - state["mtime_ns"] < SETTLED:
            state["mtime_ns"] = 0  # never equal to the file's: the next run reads it again
        with self._lock:
            self._entries[str(path.absolute())] = {**state, **found, "origin": origin}
            if self._file is not None:
                with atomic_file(self._file) as part:
                    part.write_text(json.dumps(self._entries, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _state(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}


def _read(file: Path | None) -> dict[str, dict[str, Any]]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8")) if file is not None else {}
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in entries.items() if isinstance(v, dict)} if isinstance(entries, dict) else {}


def has_checksum(source: Source) -> bool:
    """Whether a checksum of the file is published."""
    return source.md5 is not None or source.sha256 is not None


def verify(path: Path, source: Source, known: ChecksumCache, stop: Event = NEVER) -> dict[str, str]:
    """The checksums of `path`, its md5 where none is published. Raises CopyError where size or a checksum differs."""
    size = path.stat().st_size
    if source.size is not None and size != source.size:
        raise CopyError(f"{size} bytes found, {source.size} expected")
    published = {"sha256": source.sha256, "md5": source.md5}
    wanted = [kind for kind, value in published.items() if value is not None]
    state, before = _state(path), known.valid(path)
    found = {kind: before[kind] for kind in wanted or ["md5"] if kind in before}
    if missing := [kind for kind in wanted or ["md5"] if kind not in found]:
        found |= digests(path, missing, stop)
    for kind in wanted:
        expected = published[kind]
        if expected is not None and not found[kind].startswith(expected.lower()):
            raise CopyError(f"{kind} {found[kind]} found, {expected} expected")
    if missing and _state(path) == state:
        known.note(path, found, known.recorded(path).get("origin"))
    return found


def digest(path: Path, kind: str) -> str:
    """Checksum of a file in hexadecimal digits; `kind` as hashlib calls it."""
    return digests(path, (kind,))[kind]
