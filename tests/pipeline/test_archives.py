"""Fetching: every way a server or a copy can go wrong ends in the right file or in one clear line."""

from __future__ import annotations

import errno
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import pytest
from http_server import DATA, MD5, SHA256, Answer, Handler, Server, serve

from pipeline.config.schema import Source
from pipeline.fetch import http, sources
from pipeline.fetch.checksums import StoppedError
from refinenet.errors import UserError


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(http, "BACKOFF", 0.001)
    monkeypatch.setattr(http, "TIMEOUT", (5, 0.5))
    with serve() as server:
        yield server


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_resumes_where_the_connection_broke(server: Server, tmp_path: Path) -> None:
    server.answer = lambda handler, n: handler.send(keep=100_000 if n < 2 else None)
    sources.fetch(Source(server.url, len(DATA), MD5), tmp_path / "x.tar")
    assert (tmp_path / "x.tar").read_bytes() == DATA
    starts = [int(headers.get("Range", "bytes=0-")[6:-1]) for headers in server.requests]
    assert starts[0] == 0 < starts[1] < starts[2], "each request must go on where the last one stopped"
    assert only(tmp_path) == ["x.tar"]


def test_resumes_after_a_kill(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".x.tar.partial").write_bytes(DATA[:1234])
    sources.fetch(Source(server.url, None, None, SHA256), tmp_path / "x.tar")
    assert (tmp_path / "x.tar").read_bytes() == DATA
    assert server.requests[0]["Range"] == "bytes=1234-"
    assert only(tmp_path) == ["x.tar"]


def test_a_partial_file_of_other_bytes_is_fetched_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".x.tar.partial").write_bytes(b"other" * 100)
    sources.fetch(Source(server.url, None, MD5), tmp_path / "x.tar")
    assert (tmp_path / "x.tar").read_bytes() == DATA


def test_without_checksum_resumes_only_under_the_same_tag(server: Server, tmp_path: Path) -> None:
    """The file changes on the server between two attempts: no mixture of both may result."""
    changed = DATA[::-1]

    def answer(handler: Handler, n: int) -> None:
        if n == 0:
            return handler.send(keep=100_000, ETag='"old"')
        assert handler.headers["If-Range"] == '"old"'
        return handler.send(changed, ranges=False, ETag='"new"')

    server.answer = answer
    sources.fetch(Source(server.url), tmp_path / "x.tar")
    assert (tmp_path / "x.tar").read_bytes() == changed


def test_without_checksum_and_tag_starts_again(server: Server, tmp_path: Path) -> None:
    server.answer = lambda handler, n: handler.send(keep=100_000 if n == 0 else None)
    sources.fetch(Source(server.url, len(DATA)), tmp_path / "x.tar")
    assert (tmp_path / "x.tar").read_bytes() == DATA
    assert ["Range" in headers for headers in server.requests] == [False, False]


@pytest.mark.parametrize("left", [DATA, DATA + b"more"])
def test_everything_had_come_already(server: Server, tmp_path: Path, left: bytes) -> None:
    """Killed between the last byte and the rename: nothing is left to ask for; and what is too long goes."""
    (tmp_path / ".x.tar.partial").write_bytes(left)

    def answer(handler: Handler, n: int) -> None:
        if handler.start() >= len(DATA):
            handler.fail(416, Content_Range=f"bytes */{len(DATA)}")
        else:
            assert left != DATA, "there was no need to fetch it again"
            handler.send()

    server.answer = answer
    sources.fetch(Source(server.url, None, MD5), tmp_path / "x.tar")
    assert (tmp_path / "x.tar").read_bytes() == DATA


ANSWERS: dict[str, Answer] = {
    "range ignored": lambda handler, n: handler.send(keep=70_000 if n == 0 else None, ranges=False),
    "503 then 200": lambda handler, n: handler.fail(503) if n < 3 else handler.send(),
    "429 then 200": lambda handler, n: handler.fail(429) if n < 1 else handler.send(),
    "called gzip": lambda handler, n: handler.send(Content_Encoding="gzip"),
    "called a web page": lambda handler, n: handler.send(Content_Type="text/html"),
    "redirected": lambda handler, n: (
        handler.fail(302, Location="/elsewhere/y") if handler.path == "/x.tar" else handler.send()
    ),
    "damaged, then whole": lambda handler, n: handler.send(DATA[:-9] + bytes(9) if n == 0 else DATA),
    "less of the range than asked for": lambda handler, n: (
        handler.send(keep=100_000)
        if n == 0
        else handler.send(
            keep=1000,
            Content_Length="1000",
            Content_Range=f"bytes {handler.start()}-{handler.start() + 999}/{len(DATA)}",
        )
        if n == 1
        else handler.send()
    ),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_gets_there(server: Server, tmp_path: Path, case: str) -> None:
    server.answer = ANSWERS[case]
    sources.fetch(Source(server.url, len(DATA), MD5, SHA256), tmp_path / "x.tar")
    assert (tmp_path / "x.tar").read_bytes() == DATA
    assert only(tmp_path) == ["x.tar"]


def stall(handler: Handler, n: int) -> None:
    handler.head(200, Content_Length=str(len(DATA)))
    threading.Event().wait(0.7)


FAILURES: dict[str, tuple[Answer, Source, str]] = {
    "404": (lambda handler, n: handler.fail(404), Source("", None, MD5), r"404"),
    "503 for ever": (lambda handler, n: handler.fail(503), Source("", None, MD5), r"503.*6 attempts"),
    "wrong md5": (lambda handler, n: handler.send(), Source("", None, "0" * 32), rf"md5 {MD5} found, 0{{32}} expected"),
    "wrong sha256": (
        lambda handler, n: handler.send(),
        Source("", None, MD5, "0" * 64),
        rf"sha256 {SHA256} found, 0{{64}} expected",
    ),
    "wrong size": (lambda handler, n: handler.send(), Source("", 300_001), r"300000 bytes offered, 300001 expected"),
    "a byte flipped": (
        lambda handler, n: handler.send(DATA[:-1] + bytes([DATA[-1] ^ 1])),
        Source("", len(DATA), None, SHA256),
        rf"sha256 .* found, {SHA256} expected",
    ),
    "always cut": (
        lambda handler, n: handler.send(keep=0),
        Source("", len(DATA), MD5),
        r"6 attempts",
    ),
    "cut, range ignored": (
        lambda handler, n: handler.send(keep=70_000, ranges=False),
        Source("", len(DATA), MD5),
        r"6 attempts",
    ),
    "login page": (
        lambda handler, n: handler.send(b"<html>", Content_Type="text/html; charset=utf-8"),
        Source(""),
        r"web page",
    ),
    "web page instead of an archive": (
        lambda handler, n: handler.send(b"<html>", Content_Type="text/html"),
        Source("", None, MD5),
        r"web page",
    ),
    "redirected in a circle": (
        lambda handler, n: handler.fail(301, Location="/x.tar"),
        Source("", None, MD5),
        r"Exceeded 30 redirects",
    ),
    "always another range": (
        lambda handler, n: handler.send(keep=1000, Content_Range=f"bytes 0-{len(DATA) - 1}/{len(DATA)}"),
        Source("", None, MD5),
        r"another range.* \(6 attempts\)",
    ),
    "no length, nothing published": (
        lambda handler, n: (handler.head(200), handler.wfile.write(DATA[:1000]))[0],
        Source(""),
        r"a broken download could not be detected",
    ),
    "stalled": (stall, Source("", len(DATA), MD5), r"no answer in time \(6 attempts\)"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_one_clear_line_and_no_file(server: Server, tmp_path: Path, case: str) -> None:
    server.answer, source, expected = FAILURES[case]
    with pytest.raises(UserError, match=expected) as error:
        sources.fetch(Source(server.url, source.size, source.md5, source.sha256), tmp_path / "x.tar")
    assert str(error.value).startswith("x.tar: ")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x.tar").exists()


def test_mirrors_are_tried_in_order(server: Server, tmp_path: Path) -> None:
    server.answer = lambda handler, n: handler.fail(404) if n < 2 else handler.send()
    mirrors = (server.url + "?2", server.url + "?3", server.url + "?4")
    sources.fetch(Source(server.url, None, MD5, None, mirrors), tmp_path / "x.tar")
    assert len(server.requests) == 3
    assert (tmp_path / "x.tar").read_bytes() == DATA


def test_a_mirror_that_nothing_checks_may_have_another_version(
    server: Server, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Person-Part's zip, of which no checksum is published and several versions are said to be about."""
    server.answer = lambda handler, n: handler.fail(404) if handler.path == "/x.tar" else handler.send()
    mirror = f"http://{server.host}/copy.tar"
    sources.fetch(Source(server.url, mirrors=(mirror,)), tmp_path / "x.tar")
    assert capsys.readouterr().err == (
        f"warning: x.tar comes from the mirror {mirror}: no checksum is published, so it may be another version than "
        f"that of {server.url}\n"
    )
    sources.fetch(Source(server.url, md5=MD5, mirrors=(mirror,)), tmp_path / "checked.tar")
    server.answer = lambda handler, n: handler.send()
    sources.fetch(Source(server.url, mirrors=(mirror,)), tmp_path / "first.tar")
    assert capsys.readouterr().err == ""


def test_file_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "project").mkdir()
    (tmp_path / "my data").mkdir()
    (tmp_path / "my data" / "x.tar").write_bytes(DATA)
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("LAB", str(tmp_path / "my data"))
    urls = (
        "file://../my%20data/x.tar",
        "file://~/my data/x.tar",
        "file://${LAB}/x.tar",
        f"file://{tmp_path}/my data/x.tar",
    )
    for index, url in enumerate(urls):
        target = Path("out") / f"{index}.tar"
        sources.fetch(Source(url, len(DATA), MD5), target)
        assert target.read_bytes() == DATA
        assert target.is_symlink(), "28 GB are not copied"
        assert target.readlink().is_absolute()


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (Source("file:///nowhere/x.tar"), "x.tar: /nowhere/x.tar: no such file"),
        (Source("file://${NOT_SET_AT_ALL}/x.tar"), "NOT_SET_AT_ALL.* is not set"),
        (Source("ftp://host/x.tar"), "expected https://, http:// or file://"),
        (Source("file://x.tar", 300_001), "300000 bytes found, 300001 expected"),
        (Source("file://x.tar", None, "0" * 32), f"md5 {MD5} found, 0{{32}} expected"),
    ],
)
def test_a_file_source_that_will_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Source, expected: str
) -> None:
    (tmp_path / "x.tar").write_bytes(DATA)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=expected):
        sources.fetch(source, Path("out/x.tar"))
    assert only(Path("out")) == []


def test_a_kill_right_after_the_rename_leaves_nothing_for_ever(server: Server, tmp_path: Path) -> None:
    """The next run tidies up, whether the partial file was the last to go or came from elsewhere meanwhile."""
    (tmp_path / "x.tar").write_bytes(DATA)
    (tmp_path / ".x.tar.partial.from").write_text(f"{server.url}\n\n{len(DATA)}")
    (tmp_path / ".x.tar.partial").write_bytes(DATA[:5])
    sources.fetch(Source(server.url, None, MD5), tmp_path / "x.tar")
    assert server.requests == []
    assert only(tmp_path) == ["x.tar"]


def test_a_target_that_is_there_is_checked_and_kept(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "x.tar"
    target.write_bytes(DATA)
    sources.fetch(Source(server.url, None, MD5), target)
    assert server.requests == []
    target.write_bytes(b"damaged")
    sources.fetch(Source(server.url, None, MD5), target)
    assert target.read_bytes() == DATA


def test_a_server_that_changes_the_file_and_ignores_if_range(server: Server, tmp_path: Path) -> None:
    """Without a checksum the second half must not be of another file, whatever the server makes of If-Range."""
    changed = DATA[::-1]
    server.answer = lambda handler, n: (
        handler.send(keep=100_000, ETag='"old"') if n == 0 else handler.send(changed, ETag='"new"')
    )
    sources.fetch(Source(server.url), tmp_path / "x.tar")
    assert (tmp_path / "x.tar").read_bytes() == changed
    assert ["Range" in headers for headers in server.requests] == [False, True, False]


def test_without_checksum_halves_of_two_mirrors_are_not_joined(server: Server, tmp_path: Path) -> None:
    """Both call their file by the same tag, as servers that count do."""

    def answer(handler: Handler, n: int) -> None:
        if handler.path == "/x.tar":
            return handler.send(keep=100_000, ETag='"1"') if n == 0 else handler.fail(404)
        return handler.send(DATA[::-1], ETag='"1"')

    server.answer = answer
    sources.fetch(Source(server.url, mirrors=(f"http://{server.host}/y.tar",)), tmp_path / "x.tar")
    assert (tmp_path / "x.tar").read_bytes() == DATA[::-1]


def test_without_checksum_a_part_of_the_range_is_not_the_end(server: Server, tmp_path: Path) -> None:
    def answer(handler: Handler, n: int) -> None:
        start = handler.start()
        part = {"Content_Length": "1000", "Content_Range": f"bytes {start}-{start + 999}/{len(DATA)}"}
        handler.send(keep=[100_000, 1000, None][n], ETag='"1"', **(part if n == 1 else {}))

    server.answer = answer
    sources.fetch(Source(server.url), tmp_path / "x.tar")
    assert (tmp_path / "x.tar").read_bytes() == DATA
    assert len(server.requests) == 3


def test_waits_as_long_as_the_server_asks(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    far = "Fri, 31 Dec 9999 23:59:59 GMT"
    server.answer = lambda handler, n: handler.fail(503, Retry_After=["1", far, "x"][n]) if n < 3 else handler.send()
    stop, waits = threading.Event(), []
    monkeypatch.setattr(stop, "wait", waits.append)
    sources.fetch(Source(server.url, None, MD5), tmp_path / "x.tar", stop=stop)
    assert waits == [1.0, http.PATIENCE, http.BACKOFF * 4], "as asked for, of the thousands of years, nothing for x"


def test_no_room_is_said_before_the_first_byte(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil._ntuple_diskusage(10**6, 10**6, len(DATA) - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match=rf"{tmp_path}: 300kB needed for x.tar, 300kB free"):
        sources.fetch(Source(server.url, None, MD5), tmp_path / "x.tar")
    assert only(tmp_path) == []

    # What has come counts: the rest fits.
    (tmp_path / ".x.tar.partial").write_bytes(DATA[:1000])
    sources.fetch(Source(server.url, None, MD5), tmp_path / "x.tar")


def test_a_disk_that_fills_up(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The line says so, and what has come stays for when there is room again."""
    opened = Path.open

    class Full:
        """The file, on a disk that has room for 200,000 bytes of it."""

        def __init__(self, file: Any) -> None:
            self.file = file

        def __enter__(self) -> Self:
            return self

        def __exit__(self, *_: object) -> None:
            self.file.close()

        def write(self, data: bytes) -> None:
            if self.file.tell() + len(data) > 200_000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.file.write(data)

    def full(path: Path, mode: str = "r", **more: Any) -> Any:
        file = opened(path, mode, **more)
        return Full(file) if mode == "wb" else file

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", full)
        with pytest.raises(UserError, match=r"x.tar: cannot be written \(No space left on device\)"):
            sources.fetch(Source(server.url, len(DATA), MD5), tmp_path / "x.tar")
    assert len(server.requests) == 1
    left = (tmp_path / ".x.tar.partial").read_bytes()
    assert 100_000 < len(left) < len(DATA)
    sources.fetch(Source(server.url, len(DATA), MD5), tmp_path / "x.tar")
    assert server.requests[1]["Range"] == f"bytes={len(left)}-"


def test_stops_at_once_and_goes_on_later(server: Server, tmp_path: Path) -> None:
    stop, half = threading.Event(), threading.Event()

    def answer(handler: Handler, n: int) -> None:
        handler.send(keep=150_000)
        if n == 0:
            stop.set()
            half.wait(0.2)

    server.answer = answer
    with pytest.raises(StoppedError):
        sources.fetch(Source(server.url, None, MD5), tmp_path / "x.tar", stop=stop)
    assert len(server.requests) == 1
    server.answer = lambda handler, n: handler.send()
    sources.fetch(Source(server.url, None, MD5), tmp_path / "x.tar")
    assert only(tmp_path) == ["x.tar"]
