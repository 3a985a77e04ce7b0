"""Official archives, fetched: whole and verified, or not at all."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING

from tqdm import tqdm

from pipeline import copies
from pipeline.copies import NEVER, CopyError, Known
from pipeline.transfer import Transfer, forget, partial_of, size_of
from refinenet.errors import UserError

if TYPE_CHECKING:
    from pipeline.config.schema import Source


class Room:
    """What the downloads to one disk still need, against what is free on it. Threads share one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = Lock()
        self._wanted: dict[Path, tuple[str, int]] = {}  # partial file -> name and bytes of the whole one

    def expect(self, *wanted: tuple[Path, int]) -> None:
        """Count on these files, (target, bytes) each; UserError where all that is still missing does not fit."""
        with self._lock:
            self._wanted |= {partial_of(target): (target.name, size) for target, size in wanted}
            missing = {name: max(0, size - size_of(partial)) for partial, (name, size) in self._wanted.items()}
            free = shutil.disk_usage(self._folder).free
            if sum(missing.values()) <= free:
                return
            for target, _ in wanted:
                del self._wanted[partial_of(target)]
        files = ", ".join(name for name, size in missing.items() if size)
        raise UserError(f"{self._folder}: {amount(sum(missing.values()))} needed for {files}, {amount(free)} free")

    def settled(self, target: Path) -> None:
        """Count on this file no more: it has come, or will not."""
        with self._lock:
            self._wanted.pop(partial_of(target), None)


def fetch(
    source: Source,
    target: Path,
    known: Known | None = None,
    room: Room | None = None,
    stop: Event = NEVER,
) -> None:
    """Bring the file of `source` to `target`, which appears only when size and checksum are right.

    Addresses are `source.url`, then its mirrors. `$NAME` and `${NAME}` in them are environment variables.
    file:// takes an absolute path (file:///mnt/voc/x.tar), one below the home folder (file://~/voc/x.tar) or one
    relative to the working folder, which is the project's root (file://../voc/x.tar); `target` becomes a link to it.

    A download goes on where it stopped, also after the process was killed: what has come lies in
    `.<name>.partial` beside the target, together with `.<name>.partial.from` (address and entity tag of its origin).
    A `target` that exists already is checked and kept. Raises UserError in one line with each address's reason, and
    StoppedError when `stop` is set. `known` remembers checksums, `room` the other downloads to the same disk.
    """
    known = known if known is not None else Known()
    if kept(source, target, known, stop):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    room = room if room is not None else Room(target.parent)
    reasons = []
    try:
        for url in (source.url, *source.mirrors):
            try:
                _from(url, source, target, known, room, stop)
                return
            except CopyError as reason:
                path = copies.folder(url) if url.startswith("file://") else None
                reasons.append(f"{path or url}: {reason}")
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from None
    finally:
        room.settled(target)
    raise UserError(f"{target.name}: {'; '.join(reasons)}")


def kept(source: Source, target: Path, known: Known, stop: Event = NEVER) -> bool:
    """Whether `target` is there and right. What is wrong under this name is removed, with a line that says so."""
    if not target.is_file():
        target.unlink(missing_ok=True)  # a link to what is gone
        return False
    before = known.recorded(target)
    origin = before.get("origin") or source.url
    try:
        found = copies.verify(target, source, known, stop)
        if not copies.vouched(source):
            if before.get("md5", found["md5"]) != found["md5"]:
                raise CopyError(f"md5 {found['md5']} found, {before['md5']} when it came")
            if "://" in origin and origin not in (source.url, *source.mirrors):
                raise CopyError(f"comes from {origin}, no checksum published")
    except CopyError as reason:
        copies.say(f"warning: {target}: {reason}; {'link ' if target.is_symlink() else ''}removed")
        target.unlink()
        return False
    forget(target)  # of a download killed between its last rename and the tidying up
    return True


def amount(size: int) -> str:
    """A number of bytes for people: 1.85GB."""
    return str(tqdm.format_sizeof(size, "B"))


def digest(path: Path, kind: str) -> str:
    """Checksum of a file in hexadecimal digits; `kind` as hashlib calls it."""
    return copies.digests(path, (kind,))[kind]


def _from(url: str, source: Source, target: Path, known: Known, room: Room, stop: Event) -> None:
    path = copies.folder(url)
    if path is None:
        raise CopyError("an environment variable is not set")
    if url.startswith("file://"):
        if not path.is_file():
            raise CopyError("no such file")
        try:
            found = copies.verify(path, source, known, stop)
        except OSError as error:
            raise CopyError(f"not readable ({error.strerror})") from None
        copies.link(path, target)
    elif url.startswith(("http://", "https://")):
        found = Transfer(os.path.expandvars(url), source, target, room, stop).run()
    else:
        raise CopyError("expected https://, http:// or file://")
    known.note(target, found, url)
