"""Copies of archives that this machine has already: found, checked once, given a second name instead of fetched."""

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

INCOMING = Path("data/incoming")  # <data set>/<file>: what a person put in place


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


def candidate_paths(name: str, file: str, mirror: Sequence[str] = ()) -> Iterator[Path]:
    """Where a copy of an archive of the data set `name` may lie, other than in its own folder of the store.

    A mirror whose name has an environment variable that is not set is left out.
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
    """Give the first right copy among `candidate_paths` the name `target`; False: there is none.

    A wrong copy is passed over with a line that names it. What nothing vouches for is taken from a mirror or by hand,
    and from another data set only where it came from the same address: its name alone says little.
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
            say(f"warning: {copy}: {reason}; passed over")
            known.wrong.add(copy)
            continue
        link(copy, target)
        known.note(target, found, origin or str(copy))
        note = "" if has_checksum(source) else " (no published checksum to check it with)"
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
