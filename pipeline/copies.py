"""Copies of archives that this machine has already: found, checked once, given a second name instead of fetched."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from tqdm import tqdm

from pipeline.runtime import progress
from refinenet.atomic import whole_file

if TYPE_CHECKING:
    from pipeline.config.schema import Source

STORE = Path("data/archives")  # <data set>/<file>: what was fetched, or links to what was found
INCOMING = Path("data/incoming")  # <data set>/<file>: what a person put in place
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


class Known:
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
                with whole_file(self._file) as part:
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


def vouched(source: Source) -> bool:
    """Whether a checksum of the file is published."""
    return source.md5 is not None or source.sha256 is not None


def verify(path: Path, source: Source, known: Known, stop: Event = NEVER) -> dict[str, str]:
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


def folder(entry: str) -> Path | None:
    """A path or file:// address with `~`, `$NAME` and `${NAME}` filled in; None where a name is not set."""
    path = os.path.expandvars(entry)
    if "$" in path:
        return None
    return Path(unquote(path.removeprefix("file://")) if path.startswith("file://") else path).expanduser()


def in_store(name: str, file: str) -> list[Path]:
    """Where other data sets than `name` may have an archive of theirs under this name."""
    others = sorted(STORE.iterdir()) if STORE.is_dir() else []
    return [other / file for other in others if other.is_dir() and other.name != name]


def places(name: str, file: str, mirror: Sequence[str] = ()) -> Iterator[Path]:
    """Where a copy of an archive of the data set `name` may lie, other than in its own folder of the store.

    A mirror whose name has an environment variable that is not set is left out.
    """
    yield from in_store(name, file)
    for entry in mirror:
        if (path := folder(entry)) is not None:
            yield path / name / file
            yield path / file
    yield INCOMING / name / file


def take(name: str, source: Source, target: Path, places: Iterable[Path], known: Known, stop: Event = NEVER) -> bool:
    """Give the first right copy among `places` the name `target`; False: there is none.

    A wrong copy is passed over with a line that names it. What nothing vouches for is taken from a mirror or by hand,
    and from another data set only where it came from the same address: its name alone says little.
    """
    for copy in places:
        if copy in known.wrong or not copy.is_file():
            continue
        origin = known.recorded(copy).get("origin")
        if copy.parent.parent == STORE and not vouched(source) and origin not in (source.url, *source.mirrors):
            continue
        try:
            found = verify(copy, source, known, stop)
        except (CopyError, OSError) as reason:
            say(f"warning: {copy}: {reason}; passed over")
            known.wrong.add(copy)
            continue
        link(copy, target)
        known.note(target, found, origin or str(copy))
        note = "" if vouched(source) else " (no published checksum to check it with)"
        say(f"{name}: {target.name} is {copy}{note}")
        return True
    return False


def link(copy: Path, target: Path) -> None:
    """Give a file a second name: a hard link below data/, a symbolic link to an absolute path outside.

    What lies outside is the user's own and may be on another disk; what lies in data/incoming may be tidied up.
    """
    target.unlink(missing_ok=True)
    real = copy.resolve()
    if any(real.is_relative_to(inside.resolve()) for inside in (STORE, INCOMING)):
        try:
            os.link(real, target)
            return
        except OSError:  # a disk without such links, or a folder that lies on another one
            pass
    target.symlink_to(real if copy.is_symlink() else copy.absolute())
