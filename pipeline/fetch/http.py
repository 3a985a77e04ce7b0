"""Resumable download of one file from one address over HTTP; budget of disk space."""

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

PIECE = 1 << 16  # bytes read at a time; a broken connection loses at most one piece
ATTEMPTS = 6  # in a row without a new byte
BACKOFF = 1.0  # seconds before the second attempt; doubled each time, 30 at most
PATIENCE = 300.0  # seconds; longest wait that a server's Retry-After can ask for
TIMEOUT = (15, 60)  # seconds: to connect; between two pieces
PERMANENT = (400, 401, 403, 404, 405, 410, 451)


@dataclass(frozen=True)
class Transfer:
    """The download of one file from one address over HTTP; `room`: what the other downloads to this disk need."""

    url: str
    source: Source
    target: Path
    room: DiskBudget
    stop: Event

    @property
    def partial(self) -> Path:
        """Return the path of the incomplete file."""
        return partial_of(self.target)

    @property
    def origin(self) -> Path:
        """Return the path of the file that has address, entity tag and total size of `partial`."""
        return origin_of(self.target)

    def run(self) -> dict[str, str]:
        """Download the file to its target and return its checksums. Raises CopyError, or StoppedError when stopped."""
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
                    # Parts of two different files, or damage in transit, which TLS would have detected: start again,
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
        """Download the missing part of the partial file; return whether it has bytes of an earlier attempt."""
        import requests

        size, checked = self.source.size, checksums.has_checksum(self.source)
        have = size_of(self.partial)
        old_url, tag, old_total = self._begun()
        if size is not None and have > size:
            have = 0
        if old_url != self.url:
            tag = ""
        if not checked and not tag:
            have = 0  # nothing could show whether the two parts are of one file
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
                # It must start at `have` and be of the same file as the first part; a server may send less.
                given = re.fullmatch(rf"bytes {have}-(\d+)/(\d+|\*)", response.headers.get("Content-Range", ""))
                changed = given is None or (old_total and given[2] not in ("*", old_total))
                if changed or (not checked and _tag(response) != tag):
                    forget(self.target)
                    raise requests.ConnectionError("the server sent another range, or a part of a changed file")
                assert given is not None
                total = int(given[2]) if given[2] != "*" else total and have + total
            else:
                have = 0
            if response.headers.get("Content-Type", "").startswith("text/html") and (total != size or not checked):
                raise CopyError("a web page (a login, an error?), expected a file")
            if size is not None and total is not None and total != size:
                raise CopyError(f"{total} bytes offered, {size} expected")
            if total is None and size is None and not checked and "Transfer-Encoding" not in response.headers:
                raise CopyError("no size and no checksum is known, so a broken download could not be detected")
            total = total if total is not None else size
            if total is not None:
                self.room.expect((self.target, total))
            if not have:
                self.partial.unlink(missing_ok=True)  # before the tag is written, which must not describe older bytes
            self.origin.write_text(f"{self.url}\n{_tag(response)}\n{'' if total is None else total}")
            done = self._pour(response, have, total)
            if total is not None and done < total:
                raise requests.ConnectionError(f"the connection ended at byte {done} of {total}")
        return have > 0

    def _pour(self, response: Any, have: int, total: int | None) -> int:
        """Write the response to the partial file; return its size in bytes."""
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
            # decode_content=False: some servers send a .tgz as "Content-Encoding: gzip", and it would be unpacked
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
    """A response that is worth a retry; `seconds`: how long the server asks to wait first."""

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
    """Return what identifies this version of the content: a strong entity tag, or the time of its last change."""
    tag = str(response.headers.get("ETag", ""))
    return tag if tag and not tag.startswith("W/") else str(response.headers.get("Last-Modified", ""))


def partial_of(target: Path) -> Path:
    """Return where the incomplete download of `target` is kept."""
    return target.with_name(f".{target.name}.partial")


def origin_of(target: Path) -> Path:
    """Return the file with address, entity tag and total size of the incomplete download."""
    return target.with_name(f".{target.name}.partial.from")


def forget(target: Path) -> None:
    """Remove the incomplete download of `target`."""
    for left in (partial_of(target), origin_of(target)):
        if left.exists():  # on a read-only disk unlink fails for a missing file, too
            left.unlink()


def size_of(path: Path) -> int:
    """Return the size of a file in bytes; 0 where there is none."""
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
    """Compares what the downloads to one disk still need with what is free on it. Thread-safe."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._lock = Lock()
        self._expected: dict[Path, tuple[str, int]] = {}  # partial file -> name and size in bytes of the complete one

    def expect(self, *files: tuple[Path, int]) -> None:
        """Reserve space for these files, (target, bytes) each. Raises UserError where what is missing does not fit."""
        with self._lock:
            self._expected |= {partial_of(target): (target.name, size) for target, size in files}
            missing = {name: max(0, size - size_of(partial)) for partial, (name, size) in self._expected.items()}
            free = shutil.disk_usage(self._folder).free
            if sum(missing.values()) <= free:
                return
            for target, _ in files:
                del self._expected[partial_of(target)]
        names = ", ".join(name for name, size in missing.items() if size)
        raise UserError(f"{self._folder}: {amount(sum(missing.values()))} needed for {names}, {amount(free)} free")

    def settled(self, target: Path) -> None:
        """Release the space of this file: it is complete, or has failed."""
        with self._lock:
            self._expected.pop(partial_of(target), None)


def amount(size: int) -> str:
    """Format a number of bytes for people: 1.85GB."""
    return str(tqdm.format_sizeof(size, "B"))
