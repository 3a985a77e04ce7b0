"""Official archives, fetched: whole and verified, or not at all."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from pipeline import progress
from refinenet.files import UserError, sync, whole_file

if TYPE_CHECKING:
    from pipeline.settings import Source

CHUNK = 1 << 20
PIECE = 1 << 16  # read from the network at a time; what a broken connection can lose
ATTEMPTS = 6  # in a row that bring nothing new, for each address
BACKOFF = 1.0  # seconds before the second attempt; doubled each time, 30 at most
TIMEOUT = (15, 60)  # seconds: to connect; between two pieces
PERMANENT = (400, 401, 403, 404, 405, 410, 451)


class _AddressError(Exception):
    """What is wrong with one address; the next mirror may do."""


def fetch(source: Source, target: Path) -> None:
    """Bring the file of `source` to `target`, which appears only when size and checksum are right.

    Addresses are `source.url`, then its mirrors. `$NAME` and `${NAME}` in them are environment variables.
    file:// takes an absolute path (file:///mnt/voc/x.tar), one below the home folder (file://~/voc/x.tar) or one
    relative to the working folder, which is the project's root (file://../voc/x.tar); the file is copied, not
    linked, because the cache of DVC makes its files read-only and those are the user's own.

    A download goes on where it stopped, also after the process was killed: what has come lies in
    `.<name>.partial` beside the target, together with `.<name>.partial.from` (address and entity tag of its origin).
    A `target` that exists already is checked and kept. Raises UserError in one line with each address's reason.
    """
    if target.is_file():
        try:
            _verify(target, source)
            return
        except _AddressError:
            target.unlink()
    target.parent.mkdir(parents=True, exist_ok=True)
    reasons = []
    for url in (source.url, *source.mirrors):
        try:
            address = os.path.expandvars(url)
            if "$" in address:
                raise _AddressError(f"an environment variable in {url} is not set")
            if address.startswith("file://"):
                _copy(address, source, target)
            elif address.startswith(("http://", "https://")):
                _download(address, source, target)
            else:
                raise _AddressError(f"{url}: expected https://, http:// or file://")
            return
        except _AddressError as reason:
            reasons.append(str(reason))
        except OSError as error:
            raise UserError(f"{target}: cannot be written ({error.strerror or error})") from None
    raise UserError(f"{target.name}: {'; '.join(reasons)}")


def _verify(path: Path, source: Source) -> None:
    size = path.stat().st_size
    if source.size is not None and size != source.size:
        raise _AddressError(f"{size} bytes found, {source.size} expected")
    for kind in ("sha256", "md5"):
        expected = getattr(source, kind)
        if expected is not None:
            found = digest(path, kind)
            if not found.startswith(expected.lower()):
                raise _AddressError(f"{kind} {found} found, {expected} expected")


def digest(path: Path, kind: str) -> str:
    """Checksum of a file in hexadecimal digits; `kind` as hashlib calls it."""
    with path.open("rb") as file:
        # Said to be no security, or machines in FIPS mode refuse md5.
        return hashlib.file_digest(file, lambda: hashlib.new(kind, usedforsecurity=False)).hexdigest()


def _need_space(folder: Path, wanted: int | None) -> None:
    free = shutil.disk_usage(folder).free
    if wanted is not None and wanted > free:
        raise UserError(f"{folder}: {free} bytes free, {wanted} needed")


def _copy(address: str, source: Source, target: Path) -> None:
    path = Path(unquote(address.removeprefix("file://"))).expanduser()
    if not path.is_file():
        raise _AddressError(f"{path}: no such file")
    _need_space(target.parent, path.stat().st_size)
    with whole_file(target) as part:
        try:
            shutil.copyfile(path, part)
        except PermissionError:
            raise _AddressError(f"{path}: not readable") from None
        try:
            _verify(part, source)
        except _AddressError as reason:
            raise _AddressError(f"{path}: {reason}") from None


def _download(url: str, source: Source, target: Path) -> None:
    import requests
    from requests.exceptions import InvalidSchema, InvalidURL, SSLError, TooManyRedirects
    from urllib3.exceptions import HTTPError

    partial = target.with_name(f".{target.name}.partial")
    origin = target.with_name(f".{target.name}.partial.from")
    most, failures, reason = _size(partial), 0, ""
    with requests.Session() as session:
        while failures < ATTEMPTS:
            if failures:
                time.sleep(min(BACKOFF * 2 ** (failures - 1), 30.0))
            try:
                resumed = _stream(session, url, source, partial, origin)
            except (SSLError, InvalidURL, InvalidSchema, TooManyRedirects) as error:
                raise _AddressError(f"{url}: {_plain(error)}") from None
            except (requests.RequestException, HTTPError, ConnectionError, TimeoutError) as error:
                reason = f"{url}: {_plain(error)}"
            else:
                try:
                    _verify(partial, source)
                except _AddressError as wrong:
                    _forget(partial, origin)
                    reason = f"{url}: {wrong}"
                    if resumed:  # the first part may be another file's: once more from the start
                        most, failures = 0, failures + 1
                        continue
                    raise _AddressError(reason) from None
                sync(partial)
                partial.replace(target)
                _forget(partial, origin)
                return
            failures = 1 if _size(partial) > most else failures + 1
            most = max(most, _size(partial))
    raise _AddressError(f"{reason} ({failures} attempts)")


def _stream(session: Any, url: str, source: Source, partial: Path, origin: Path) -> bool:
    """Append to `partial` what is still missing. True: it holds bytes of an earlier attempt."""
    import requests

    checked = source.md5 is not None or source.sha256 is not None
    have = _size(partial)
    old_url, _, tag = origin.read_text().partition("\n") if origin.exists() else ("", "", "")
    if source.size is not None and have > source.size:
        have = 0
    if old_url != url:
        tag = ""
    if not checked and not tag:
        have = 0  # nothing would tell whether the two halves belong together
    if have and have == source.size:
        return True
    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={have}-"} if have else {})
    if have and tag:
        headers["If-Range"] = tag
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT) as response:
        if response.status_code == 416:
            if response.headers.get("Content-Range", "") == f"bytes */{have}":
                return True  # killed between the last byte and the rename
            _forget(partial, origin)
            raise requests.ConnectionError("416 to a range request")
        if response.status_code in PERMANENT:
            raise _AddressError(f"{url}: {response.status_code} {response.reason}")
        if response.status_code not in (200, 206):
            raise requests.ConnectionError(f"{response.status_code} {response.reason}")
        if not checked and response.headers.get("Content-Type", "").startswith("text/html"):
            raise _AddressError(f"{url}: a web page (a login, an error?), expected a file")
        if response.status_code == 200 or not response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            if response.status_code == 206:
                _forget(partial, origin)
                raise requests.ConnectionError("another range than asked for")
            have = 0
        length = response.headers.get("Content-Length", "")
        total = have + int(length) if length.isdigit() else None
        if source.size is not None and total is not None and total != source.size:
            raise _AddressError(f"{url}: {total} bytes offered, {source.size} expected")
        total = total if total is not None else source.size
        _need_space(partial.parent, None if total is None else total - have)
        tag = response.headers.get("ETag", "")
        tag = tag if tag and not tag.startswith("W/") else response.headers.get("Last-Modified", "")
        if not have:
            partial.unlink(missing_ok=True)  # before the tag, which must never vouch for older bytes
        origin.write_text(f"{url}\n{tag}")
        name = partial.name[1 : -len(".partial")]
        bar = progress.bar(name, "B", total=total, initial=have, unit_scale=True, unit_divisor=1024)
        with bar, partial.open("ab" if have else "wb") as file:
            done = have
            # decode_content=False: some servers call a .tgz "Content-Encoding: gzip", and would have it unpacked
            for chunk in response.raw.stream(PIECE, decode_content=False):
                file.write(chunk)
                done += len(chunk)
                bar.update(len(chunk))
                if source.size is not None and done > source.size:
                    break
        if total is not None and done < total:
            raise requests.ConnectionError(f"the connection ended at byte {done} of {total}")
    return have > 0


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _plain(error: Exception) -> str:
    import requests

    if isinstance(error, requests.Timeout) or "timed out" in str(error):
        return "no answer in time"
    text = str(error).split("\n")[0]
    return text if len(text) < 120 and "object at 0x" not in text else type(error).__name__


def _forget(*paths: Path) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
