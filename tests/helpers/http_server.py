"""A local web server for tests, which answers each request as the test says."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np

DATA = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8).tobytes()
MD5 = hashlib.md5(DATA).hexdigest()
SHA256 = hashlib.sha256(DATA).hexdigest()

Answer = Callable[["Handler", int], None]


class Handler(BaseHTTPRequestHandler):
    """Answers the n-th request as the test's script says; keeps path and headers of each."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        server = self.server
        assert isinstance(server, Server)
        with server.lock:
            server.requests.append(dict(self.headers))
            server.paths.append(self.path)
            n = len(server.requests) - 1
        self.close_connection = True
        server.answer(self, n)

    def do_POST(self) -> None:
        self.do_GET()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def start(self) -> int:
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        return int(found[1]) if found else 0

    def head(self, code: int, **headers: str) -> None:
        self.send_response(code)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), value)
        self.send_header("Connection", "close")
        self.end_headers()

    def send(self, body: bytes = DATA, *, keep: int | None = None, ranges: bool = True, **headers: str) -> None:
        """`body` from where the range starts; only `keep` bytes of it before the connection ends."""
        start = self.start() if ranges else 0
        headers = {"Content_Length": str(len(body) - start)} | headers
        if start:
            headers = {"Content_Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} | headers
        self.head(206 if start else 200, **headers)
        self.wfile.write(body[start:] if keep is None else body[start : start + keep])

    def fail(self, code: int, **headers: str) -> None:
        self.head(code, Content_Length="0", **headers)


class Server(ThreadingHTTPServer):
    """`answer` is called for each request with its number; `url` is an address of it."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock = threading.Lock()
        self.requests: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.answer: Answer = lambda handler, n: handler.send()
        self.host = f"127.0.0.1:{self.server_port}"
        self.url = f"http://{self.host}/x.tar"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that hangs up is no error here."""


@contextmanager
def serve() -> Iterator[Server]:
    """A server that runs in a thread."""
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
