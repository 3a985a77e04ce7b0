"""One file from one address over HTTP, however often the connection breaks."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from pathlib import Path
from threading import Event, Lock
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from pipeline.fetch import checksums, login
from pipeline.fetch.checksums import ChecksumCache, CopyError, StoppedError
from pipeline.runtime import progress
from refinenet.atomic import sync
from refinenet.errors import UserError

if TYPE_CHECKING:
    from pipeline.config.schema import Source

PIECE = 1 << 16  # read from the network at a time; what a broken connection can lose
ATTEMPTS = 6  # in a row that bring nothing new
BACKOFF = 1.0  # seconds before the second attempt; doubled each time, 30 at most
PATIENCE = 300.0  # seconds at most that a server may ask for (Retry-After)
TIMEOUT = (15, 60)  # seconds: to connect; between two pieces
PERMANENT = (400, 401, 403, 404, 405, 410, 451)


@dataclass(frozen=True)
class Transfer:
    """One file from one address over HTTP."""

    url: str
    source: Source
    target: Path
    room: DiskBudget
    stop: Event

    @property
    def partial(self) -> Path:
        return partial_of(self.target)

    @property
    def origin(self) -> Path:
        """Address, entity tag and size of what `partial` is the beginning of."""
        return origin_of(self.target)

    def run(self) -> dict[str, str]:
        """Bring the file to its target; returns its checksums."""
        import requests
        from requests.exceptions import InvalidSchema, InvalidURL, SSLError, TooManyRedirects
        from urllib3.exceptions import HTTPError

        most, failures, damaged, reason = size_of(self.partial), 0, 0, ""
        pause = 0.0
        while failures < ATTEMPTS:
            if failures and self.stop.wait(max(pause, min(BACKOFF * 2 ** (failures - 1), 30.0))):
                raise StoppedError
            pause = 0.0
            try:
                with requests.Session() as session:
                    if self.source.login is not None:
                        login.log_in(session, self.source.login, self.url)
                    resumed = self._stream(session)
            except _BusyError as busy:
                reason, pause = str(busy), busy.seconds
            except (SSLError, InvalidURL, InvalidSchema, TooManyRedirects) as error:
                raise CopyError(_plain(error)) from None
            except (requests.RequestException, HTTPError, ConnectionError, TimeoutError) as error:
                reason = _plain(error)
            else:
                try:
                    found = checksums.verify(self.partial, self.source, ChecksumCache(), self.stop)
                except CopyError as wrong:
                    forget(self.target)
                    reason, damaged = str(wrong), damaged + 1
                    # Two halves of different files, or damage on the way, which TLS would have noticed: from the start,
                    # once.
                    if damaged > 1 or not (resumed or self.url.startswith("http://")):
                        raise
                    most, failures = 0, failures + 1
                    continue
                sync(self.partial)
                self.room.settled(self.target)
                self.partial.replace(self.target)
                forget(self.target)
                return found
            failures = 1 if size_of(self.partial) > most else failures + 1
            most = max(most, size_of(self.partial))
        raise CopyError(f"{reason} ({failures} attempts)")

    def _stream(self, session: Any) -> bool:
        """Append to the partial file what is still missing. True: it holds bytes of an earlier attempt."""
        import requests

        size, checked = self.source.size, checksums.has_checksum(self.source)
        have = size_of(self.partial)
        old_url, tag, old_total = self._begun()
        if size is not None and have > size:
            have = 0
        if old_url != self.url:
            tag = ""
        if not checked and not tag:
            have = 0  # nothing would tell whether the two halves belong together
        if have and have == size:
            return True
        headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
        if have and tag:
            headers["If-Range"] = tag
        with session.get(self.url, headers=headers, stream=True, timeout=TIMEOUT) as response:
            if response.status_code == 416:
                if have and response.headers.get("Content-Range", "") == f"bytes */{have}":
                    return True  # killed between the last byte and the rename
                forget(self.target)
                raise requests.ConnectionError("416 to a range request")
            if response.status_code in PERMANENT:
                raise CopyError(f"{response.status_code} {response.reason}")
            if response.status_code not in (200, 206):
                raise _BusyError(response)
            length = response.headers.get("Content-Length", "")
            total = int(length) if length.isdigit() else None
            if response.status_code == 206:
                # Asked for from `have` on, and of the file that the first part is of; a server may send less of it.
                given = re.fullmatch(rf"bytes {have}-(\d+)/(\d+|\*)", response.headers.get("Content-Range", ""))
                changed = given is None or (old_total and given[2] not in ("*", old_total))
                if changed or (not checked and _tag(response) != tag):
                    forget(self.target)
                    raise requests.ConnectionError("another range, or of another file, than asked for")
                assert given is not None
                total = int(given[2]) if given[2] != "*" else total and have + total
            else:
                have = 0
            if response.headers.get("Content-Type", "").startswith("text/html") and (total != size or not checked):
                raise CopyError("a web page (a login, an error?), expected a file")
            if size is not None and total is not None and total != size:
                raise CopyError(f"{total} bytes offered, {size} expected")
            if total is None and size is None and not checked and "Transfer-Encoding" not in response.headers:
                raise CopyError("no length told, no checksum published: nothing would tell whether it is whole")
            total = total if total is not None else size
            if total is not None:
                self.room.expect((self.target, total))
            if not have:
                self.partial.unlink(missing_ok=True)  # before the tag, which must never vouch for older bytes
            self.origin.write_text(f"{self.url}\n{_tag(response)}\n{'' if total is None else total}")
            done = self._pour(response, have, total)
            if total is not None and done < total:
                raise requests.ConnectionError(f"the connection ended at byte {done} of {total}")
        return have > 0

    def _pour(self, response: Any, have: int, total: int | None) -> int:
        """Write what comes; the bytes that the partial file then has."""
        bar = progress.bar(
            self.target.name,
            "B",
            total=total,
            initial=have,
            unit_scale=True,
            unit_divisor=1024,
            **checksums.first_line(),
        )
        done = have
        with bar, self.partial.open("ab" if have else "wb") as file:
            # decode_content=False: some servers call a .tgz "Content-Encoding: gzip", and would have it unpacked
            for chunk in response.raw.stream(PIECE, decode_content=False):
                if self.stop.is_set():
                    raise StoppedError
                file.write(chunk)
                done += len(chunk)
                bar.update(len(chunk))
                if total is not None and done > total:
                    break
        return done

    def _begun(self) -> tuple[str, str, str]:
        try:
            url, tag, total = (*self.origin.read_text().split("\n"), "", "", "")[:3]
        except (OSError, ValueError):
            return "", "", ""
        return url, tag, total


class _BusyError(Exception):
    """An answer that may be another one later; `seconds`: what the server asks to wait before."""

    def __init__(self, response: Any) -> None:
        super().__init__(f"{response.status_code} {response.reason}")
        asked = response.headers.get("Retry-After", "")
        try:
            seconds = float(asked) if asked.isdigit() else _until(asked)
        except (ValueError, TypeError):
            seconds = 0.0
        self.seconds = min(max(seconds, 0.0), PATIENCE)


def _until(date: str) -> float:
    return (parsedate_to_datetime(date) - datetime.now(UTC)).total_seconds()


def _tag(response: Any) -> str:
    """What tells this content of an address from a later one: a strong entity tag, or the time of its last change."""
    tag = str(response.headers.get("ETag", ""))
    return tag if tag and not tag.startswith("W/") else str(response.headers.get("Last-Modified", ""))


def partial_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial")


def origin_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.partial.from")


def forget(target: Path) -> None:
    """Remove what has come of `target` so far."""
    for left in (partial_of(target), origin_of(target)):
        if left.exists():  # on a disk that cannot be written, unlink fails for a missing file too
            left.unlink()


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _plain(error: Exception) -> str:
    import requests

    text = str(error).split("\n")[0]
    if isinstance(error, requests.Timeout) or "timed out" in text:
        return "no answer in time"
    if "Failed to resolve" in text:
        return "no such host, or no network"
    return text if len(text) < 120 and "object at 0x" not in text else type(error).__name__


class DiskBudget:
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


def amount(size: int) -> str:
    """A number of bytes for people: 1.85GB."""
    return str(tqdm.format_sizeof(size, "B"))
