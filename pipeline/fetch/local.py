"""Copies of archives that are already on this machine: found, verified once, linked instead of downloaded."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING
from urllib.parse import unquote

from pipeline.fetch.checksums import NEVER, STORE, ChecksumCache, CopyError, has_checksum, say, verify

if TYPE_CHECKING:
    from pipeline.config.schema import Source

INCOMING = Path("data/incoming")  # <data set>/<file>: archives that a person downloaded


def folder(entry: str) -> Path | None:
    """Expand `~`, `$NAME` and `${NAME}` in a path or file:// address; None where a variable is not set."""
    path = os.path.expandvars(entry)
    if "$" in path:
        return None
    return Path(unquote(path.removeprefix("file://")) if path.startswith("file://") else path).expanduser()


def in_store(name: str, file: str) -> list[Path]:
    """Return where other data sets than `name` may have an archive of this file name."""
    others = sorted(STORE.iterdir()) if STORE.is_dir() else []
    return [other / file for other in others if other.is_dir() and other.name != name]


def candidate_paths(name: str, file: str, mirror: Sequence[str] = ()) -> Iterator[Path]:
    """Yield where a copy of an archive of the data set `name` may be, other than in its own folder of the store.

    A mirror with an environment variable that is not set is skipped.
    """
    yield from in_store(name, file)
    for entry in mirror:
        if (path := folder(entry)) is not None:
            yield path / name / file
            yield path / file
    yield INCOMING / name / file


def link_local_copy(
    name: str, source: Source, target: Path, places: Iterable[Path], known: ChecksumCache, stop: Event = NEVER
) -> bool:
    """Link the first valid copy to `target`; return False where there is none.

    A wrong copy is skipped with a warning. A file without a published checksum is accepted from a mirror or
    data/incoming, and from another data set only if it was downloaded from the same address.

    Args:
        name: the data set.
        source: size and checksums of the file.
        target: the new link, in the store.
        places: `candidate_paths`.
        known: remembers checksums and wrong copies.
        stop: when it is set, StoppedError is raised.
    """
    for copy in places:
        if copy in known.wrong or not copy.is_file():
            continue
        origin = known.recorded(copy).get("origin")
        if copy.parent.parent == STORE and not has_checksum(source) and origin not in (source.url, *source.mirrors):
            continue
        try:
            found = verify(copy, source, known, stop)
        except (CopyError, OSError) as reason:
            say(f"warning: {copy}: {reason}; skipped")
            known.wrong.add(copy)
            continue
        link(copy, target)
        known.note(target, found, origin or str(copy))
        note = "" if has_checksum(source) else " (no published checksum to check it with)"
        say(f"{name}: {target.name} is {copy}{note}")
        return True
    return False


def link(copy: Path, target: Path) -> None:
    """Link a file to `target`: a hard link for files in the store or data/incoming, else an absolute symbolic link.

    Files outside are the user's own and may be on another disk; files in data/incoming may be deleted later.
    """
    target.unlink(missing_ok=True)
    real = copy.resolve()
    if any(real.is_relative_to(inside.resolve()) for inside in (STORE, INCOMING)):
        try:
            os.link(real, target)
            return
        except OSError:  # a disk without hard links, or a folder on another disk
            pass
    target.symlink_to(real if copy.is_symlink() else copy.absolute())
