"""Checksums of archives, computed once and remembered."""

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
from pipeline.runtime.cli import marked
from refinenet.atomic import atomic_file

if TYPE_CHECKING:
    from pipeline.config.schema import Source

STORE = Path("data/archives")  # <data set>/<file>: what was fetched, or links to what was found
MEMORY = ".verified.json"
CHUNK = 1 << 20
LARGE = 1 << 28  # bytes; reading more takes long enough for a bar
SETTLED = 100_000_000  # ns; a change right after a more recent write could have the same file time
NEVER = Event()


class CopyError(Exception):
    """What is wrong with one copy or one address, in one line; the next one is tried."""


class StoppedError(Exception):
    """Ctrl-C in the main thread: the other threads stop."""


def say(line: str) -> None:
    """Print a line on stderr without breaking the progress bars."""
    tqdm.write(marked(line), file=sys.stderr)


def digests(path: Path, kinds: Sequence[str], stop: Event = NEVER) -> dict[str, str]:
    """Return checksums of a file in hexadecimal digits, read once; `kinds` are hashlib's names."""
    # usedforsecurity=False: machines in FIPS mode refuse md5 otherwise.
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
    """Return tqdm's arguments that keep it from moving the cursor where no bars are drawn."""
    return {} if sys.stderr.isatty() else {"position": 0}


class ChecksumCache:
    """Known checksums, so that unchanged archives are not read again at every run. Thread-safe.

    `file` (JSON) stores them: absolute path -> size, mtime_ns, inode, checksums, origin. They are valid as long as the
    first three are the file's. For other data sets' archives their files are read, too. Without a `file` nothing is
    kept. `wrong`: copies that were reported and skipped.
    """

    def __init__(self, file: Path | None = None) -> None:
        self.wrong: set[Path] = set()
        self._file = file
        self._lock = Lock()
        self._entries = _read(file)

    @staticmethod
    def state(path: Path) -> dict[str, int]:
        """Return what tells, without reading the file, that it has changed."""
        stat = path.stat()
        return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "inode": stat.st_ino}

    def recorded(self, path: Path) -> Mapping[str, Any]:
        """Return what was noted for this path, whether or not the file has changed since; {} if nothing."""
        absolute = path.absolute()
        with self._lock:
            if (entry := self._entries.get(str(absolute))) is not None:
                return entry
        other = path.parent / MEMORY
        if path.parent.parent == STORE and other != self._file:
            return _read(other).get(str(absolute), {})
        return {}

    def valid(self, path: Path) -> Mapping[str, Any]:
        """Return what was noted for the file, if it has not changed since; else {}."""
        entry = self.recorded(path)
        return entry if self.state(path).items() <= entry.items() else {}

    def note(self, path: Path, found: Mapping[str, str], origin: str | None) -> None:
        """Remember the checksums of the file as it is now, and the address or path that it came from."""
        state = self.state(path)
        if time.time_ns() - state["mtime_ns"] < SETTLED:
            state["mtime_ns"] = 0  # never equal to the file's: the next run reads it again
        with self._lock:
            self._entries[str(path.absolute())] = {**state, **found, "origin": origin}
            if self._file is not None:
                with atomic_file(self._file) as part:
                    part.write_text(json.dumps(self._entries, indent=1, sort_keys=True) + "\n", encoding="utf-8")


def _read(file: Path | None) -> dict[str, dict[str, Any]]:
    try:
        entries = json.loads(file.read_text(encoding="utf-8")) if file is not None else {}
    except (OSError, ValueError):
        return {}
    return {k: v for k, v in entries.items() if isinstance(v, dict)} if isinstance(entries, dict) else {}


def has_checksum(source: Source) -> bool:
    """Return whether a checksum of the file is published."""
    return source.md5 is not None or source.sha256 is not None


def verify(path: Path, source: Source, known: ChecksumCache, stop: Event = NEVER) -> dict[str, str]:
    """Return the checksums of `path`, its md5 where none is published. Raises CopyError where size or checksum differ.

    Args:
        path: the file.
        source: what is published of it.
        known: checksums of unchanged files; the result is noted there.
        stop: when it is set, StoppedError is raised.
    """
    size = path.stat().st_size
    if source.size is not None and size != source.size:
        raise CopyError(f"{size} bytes found, {source.size} expected")
    published = {"sha256": source.sha256, "md5": source.md5}
    kinds = [kind for kind, value in published.items() if value is not None]
    state, before = known.state(path), known.valid(path)
    found = {kind: before[kind] for kind in kinds or ["md5"] if kind in before}
    if missing := [kind for kind in kinds or ["md5"] if kind not in found]:
        found |= digests(path, missing, stop)
    for kind in kinds:
        expected = published[kind]
        if expected is not None and not found[kind].startswith(expected.lower()):
            raise CopyError(f"{kind} {found[kind]} found, {expected} expected")
    if missing and known.state(path) == state:
        known.note(path, found, known.recorded(path).get("origin"))
    return found


def digest(path: Path, kind: str) -> str:
    """Return the checksum of a file in hexadecimal digits; `kind` is hashlib's name."""
    return digests(path, (kind,))[kind]
