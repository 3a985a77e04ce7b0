"""Fetching: every way a server or a copy can go wrong ends in the right file or in one clear line."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from pipeline import archives
from pipeline.settings import Source
from refinenet.files import UserError

DATA = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8).tobytes()
MD5 = hashlib.md5(DATA).hexdigest()
SHA256 = hashlib.sha256(DATA).hexdigest()

Answer = Callable[["Handler", int], None]


class Handler(BaseHTTPRequestHandler):
    """Answers the n-th request as the test's script says; keeps the headers of each."""

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        server.requests.append(dict(self.headers))
        server.answer(self, len(server.requests) - 1)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def start(self) -> int:
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(found[1]) if found else 0

    def send(self, body: bytes = DATA, *, keep: int | None = None, ranges: bool = True, **headers: str) -> None:
        """`body` from where the range starts; only `keep` bytes of it before the connection ends."""
        start = self.start() if ranges else 0
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - start))
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body[start:] if keep is None else body[start : start + keep])
        self.close_connection = True

    def fail(self, code: int, **headers: str) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Content-Length", "0")
        self.end_headers()


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[dict[str, str]] = []
        self.answer: Answer = lambda handler, n: handler.send()
        self.url = f"http://127.0.0.1:{self.server_port}/x.tar"


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(archives, "BACKOFF", 0.001)
    monkeypatch.setattr(archives, "TIMEOUT", (5, 0.5))
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def only(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_resumes_where_the_connection_broke(server: Server, tmp_path: Path) -> None:
    server.answer = lambda handler, n: handler.send(keep=100_000 if n < 2 else None)
    archives.fetch(Source(server.url, len(DATA), MD5), tmp_path / "x.tar")
    assert (tmp_path / "x.tar").read_bytes() == DATA
    starts = [int(headers.get("Range", "bytes=0-")[6:-1]) for headers in server.requests]
    assert starts[0] == 0 < starts[1] < starts[2], "each request must go on where the last one stopped"
    assert only(tmp_path) == ["x.tar"]


def test_resumes_after_a_kill(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".x.tar.partial").write_bytes(DATA[:1234])
    archives.fetch(Source(server.url, None, None, SHA256), tmp_path / "x.tar")
    assert (tmp_path / "x.tar").read_bytes() == DATA
    assert server.requests[0]["Range"] == "bytes=1234-"
    assert only(tmp_path) == ["x.tar"]


def test_a_partial_file_of_other_bytes_is_fetched_again(server: Server, tmp_path: Path) -> None:
    (tmp_path / ".x.tar.partial").write_bytes(b"other" * 100)
    archives.fetch(Source(server.url, None, MD5), tmp_path / "x.tar")
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
    archives.fetch(Source(server.url), tmp_path / "x.tar")
    assert (tmp_path / "x.tar").read_bytes() == changed


def test_without_checksum_and_tag_starts_again(server: Server, tmp_path: Path) -> None:
    server.answer = lambda handler, n: handler.send(keep=100_000 if n == 0 else None)
    archives.fetch(Source(server.url, len(DATA)), tmp_path / "x.tar")
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
    archives.fetch(Source(server.url, None, MD5), tmp_path / "x.tar")
    assert (tmp_path / "x.tar").read_bytes() == DATA


ANSWERS: dict[str, Answer] = {
    "range ignored": lambda handler, n: handler.send(keep=70_000 if n == 0 else None, ranges=False),
    "503 then 200": lambda handler, n: handler.fail(503) if n < 3 else handler.send(),
    "429 then 200": lambda handler, n: handler.fail(429) if n < 1 else handler.send(),
    "called gzip": lambda handler, n: handler.send(Content_Encoding="gzip"),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_gets_there(server: Server, tmp_path: Path, case: str) -> None:
    server.answer = ANSWERS[case]
    archives.fetch(Source(server.url, len(DATA), MD5, SHA256), tmp_path / "x.tar")
    assert (tmp_path / "x.tar").read_bytes() == DATA
    assert only(tmp_path) == ["x.tar"]


def stall(handler: Handler, n: int) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(DATA)))
    handler.end_headers()
    handler.wfile.flush()
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
    "stalled": (stall, Source("", len(DATA), MD5), r"no answer in time \(6 attempts\)"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_one_clear_line_and_no_file(server: Server, tmp_path: Path, case: str) -> None:
    server.answer, source, expected = FAILURES[case]
    with pytest.raises(UserError, match=expected) as error:
        archives.fetch(Source(server.url, source.size, source.md5, source.sha256), tmp_path / "x.tar")
    assert str(error.value).startswith("x.tar: ")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "x.tar").exists()


def test_mirrors_are_tried_in_order(server: Server, tmp_path: Path) -> None:
    server.answer = lambda handler, n: handler.fail(404) if n < 2 else handler.send()
    mirrors = (server.url + "?2", server.url + "?3", server.url + "?4")
    archives.fetch(Source(server.url, None, MD5, None, mirrors), tmp_path / "x.tar")
    assert len(server.requests) == 3
    assert (tmp_path / "x.tar").read_bytes() == DATA


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
        archives.fetch(Source(url, len(DATA), MD5), target)
        assert target.read_bytes() == DATA
        assert not target.samefile(tmp_path / "my data" / "x.tar"), "DVC would make the user's file read-only"


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
        archives.fetch(source, Path("out/x.tar"))
    assert only(Path("out")) == []


def test_a_target_that_is_there_is_checked_and_kept(server: Server, tmp_path: Path) -> None:
    target = tmp_path / "x.tar"
    target.write_bytes(DATA)
    archives.fetch(Source(server.url, None, MD5), target)
    assert server.requests == []
    target.write_bytes(b"damaged")
    archives.fetch(Source(server.url, None, MD5), target)
    assert target.read_bytes() == DATA
