"""Fetch official archives: verified and complete, or not at all."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from threading import Event, Thread
from typing import TYPE_CHECKING, TypeVar

from pipeline.fetch import checksums, local
from pipeline.fetch.checksums import NEVER, ChecksumCache, CopyError
from pipeline.fetch.http import DiskBudget, Transfer, forget
from refinenet.errors import UserError

if TYPE_CHECKING:
    from pipeline.config.schema import Source


def fetch(
    source: Source,
    target: Path,
    known: ChecksumCache | None = None,
    room: DiskBudget | None = None,
    stop: Event = NEVER,
) -> None:
    """Fetch the file of `source` to `target`, which appears only when size and checksum are right.

    Addresses are `source.url`, then its mirrors. `$NAME` and `${NAME}` in them are environment variables.
    file:// takes an absolute path (file:///mnt/voc/x.tar), one below the home folder (file://~/voc/x.tar) or one
    relative to the working folder, which is the project's root (file://../voc/x.tar); `target` becomes a link to it.

    A download resumes where it stopped, also after the process was killed, from `.<name>.partial` next to the target
    and `.<name>.partial.from` (address and entity tag of its origin). A `target` that exists is verified and kept.

    Args:
        source: addresses, size and checksums.
        target: the file to make.
        known: remembers checksums.
        room: space that other downloads to the same disk need.
        stop: when it is set, StoppedError is raised.

    Raises:
        UserError: no address works; one line with the reason for each.
    """
    known = known if known is not None else ChecksumCache()
    if already_there(source, target, known, stop):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    room = room if room is not None else DiskBudget(target.parent)
    reasons = []
    try:
        for url in (source.url, *source.mirrors):
            try:
                _from(url, source, target, known, room, stop)
                if url != source.url and not checksums.has_checksum(source):
                    checksums.say(
                        f"warning: {target.name} comes from the mirror {url}: no checksum is published, so it may be "
                        f"another version than that of {source.url}"
                    )
                return
            except CopyError as reason:
                path = local.folder(url) if url.startswith("file://") else None
                reasons.append(f"{path or url}: {reason}")
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from None
    finally:
        room.settled(target)
    raise UserError(f"{target.name}: {'; '.join(reasons)}")


def already_there(source: Source, target: Path, known: ChecksumCache, stop: Event = NEVER) -> bool:
    """Return whether `target` exists and is valid. An invalid file of this name is removed with a warning.

    Args:
        source: size and checksums.
        target: the file.
        known: remembers checksums and where files came from.
        stop: when it is set, StoppedError is raised.
    """
    if not target.is_file():
        target.unlink(missing_ok=True)  # a dangling link
        return False
    before = known.recorded(target)
    origin = before.get("origin") or source.url
    try:
        found = checksums.verify(target, source, known, stop)
        if not checksums.has_checksum(source):
            if before.get("md5", found["md5"]) != found["md5"]:
                raise CopyError(f"md5 {found['md5']} found, {before['md5']} when it was downloaded")
            if "://" in origin and origin not in (source.url, *source.mirrors):
                raise CopyError(f"comes from {origin}, no checksum published")
    except CopyError as reason:
        checksums.say(f"warning: {target}: {reason}; {'link ' if target.is_symlink() else ''}removed")
        target.unlink()
        return False
    forget(target)  # left by a download that was killed right after its rename
    return True


def _from(url: str, source: Source, target: Path, known: ChecksumCache, room: DiskBudget, stop: Event) -> None:
    path = local.folder(url)
    if path is None:
        raise CopyError("an environment variable is not set")
    if url.startswith("file://"):
        if not path.is_file():
            raise CopyError("no such file")
        try:
            found = checksums.verify(path, source, known, stop)
        except OSError as error:
            raise CopyError(f"not readable ({error.strerror})") from None
        local.link(path, target)
    elif url.startswith(("http://", "https://")):
        found = Transfer(os.path.expandvars(url), source, target, room, stop).run()
    else:
        raise CopyError("expected https://, http:// or file://")
    known.note(target, found, url)


AT_ONCE = 4  # files
_T = TypeVar("_T")


def run_parallel(jobs: Mapping[str, Callable[[], _T]], stop: Event) -> tuple[dict[str, _T], dict[str, UserError]]:
    """Run the jobs, AT_ONCE at a time; return their results, and the UserErrors of those that failed.

    A job that fails does not stop the others; errors other than UserError are raised once all have ended. Ctrl-C sets
    `stop` and does not wait for a server.
    """
    waiting = deque(jobs.items())
    results: dict[str, _T] = {}
    errors: dict[str, Exception] = {}

    def work() -> None:
        while waiting:
            try:
                name, job = waiting.popleft()
            except IndexError:
                return
            try:
                results[name] = job()
            except Exception as error:
                errors[name] = error

    threads = [Thread(target=work, daemon=True) for _ in range(min(AT_ONCE, len(jobs)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException:
        waiting.clear()
        stop.set()
        end = time.monotonic() + 1.0
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        raise
    failed: dict[str, UserError] = {}
    for name in jobs:
        error = errors.get(name)
        if isinstance(error, UserError):
            failed[name] = error
        elif error is not None:
            raise error
    return results, failed
