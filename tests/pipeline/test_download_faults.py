"""Downloads against servers that do everything wrong at random, and under SIGKILL at random moments."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
from http_server import Handler, Server, serve

from pipeline.config.schema import Source
from pipeline.fetch import http, sources
from refinenet.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
RUNS = 200


class Bad:
    """A server of one file in two versions that answers some requests wrongly, the others well.

    `kind` is what the client can know: with "checked" only one version is right; "tagged" has no checksum, and the
    server never lies about what nothing could tell: the content, a length that is too short, its entity tag.
    """

    def __init__(self, rng: random.Random, server: Server) -> None:
        self.rng = rng
        self.kind = rng.choice(["checked", "checked", "tagged"])
        self.versions = [rng.randbytes(rng.choice([1, 1000, 70_000, 200_000])) for _ in range(2)]
        self.now = 0
        self.well = False
        self.patience = rng.randrange(12) if rng.random() < 0.7 else 10**6  # requests until all go well
        self.luck = 0.3 if rng.random() < 0.7 else 0.0
        self.seen: Counter[str] = Counter()
        server.answer = self.answer
        known = {"md5": hashlib.md5, "sha256": hashlib.sha256}
        kinds = rng.choice([["md5"], ["sha256"], ["md5", "sha256"]]) if self.kind == "checked" else []
        sums = {kind: known[kind](self.versions[0]).hexdigest() for kind in kinds}
        size = len(self.versions[0]) if self.kind == "checked" and rng.random() < 0.5 else None
        mirrors = tuple(f"{server.url}?{n}" for n in range(rng.randrange(3)))
        self.source = Source(server.url, size=size, mirrors=mirrors, **sums)

    def right(self, data: bytes) -> bool:
        return data in (self.versions[:1] if self.kind == "checked" else self.versions)

    def answer(self, handler: Handler, n: int) -> None:
        faults: list[Callable[[Handler], None]] = [
            *(self.drop, self.deaf, self.long, self.other_range, self.status, self.redirect, self.circle),
            *(self.stall, self.change, self.never_satisfied, self.page, self.hang_up, self.pieces, self.called_gzip),
        ]
        if self.kind == "checked":
            faults += [self.short, self.no_length, self.corrupt, self.lying_range]
        if self.well or n >= self.patience or self.rng.random() < self.luck:
            self.now = self.now if self.kind == "tagged" else 0
            return self.good(handler)
        fault = self.rng.choice(faults)
        self.seen[fault.__name__] += 1
        return fault(handler)

    @property
    def body(self) -> bytes:
        return self.versions[self.now]

    def some(self, handler: Handler) -> int:
        return self.rng.randrange(max(1, len(self.body) - handler.start()))

    def good(self, handler: Handler, **more: object) -> None:
        tag = f'"{hashlib.md5(self.body).hexdigest()}"'
        start = handler.start()
        if start >= len(self.body) and start and handler.headers.get("If-Range", tag) == tag:
            handler.fail(416, Content_Range=f"bytes */{len(self.body)}")
        else:
            more.setdefault("ranges", handler.headers.get("If-Range", tag) == tag)
            handler.send(self.body, **{"ETag": tag, **more})  # type: ignore[arg-type]

    def drop(self, handler: Handler) -> None:
        self.good(handler, keep=self.some(handler))

    def deaf(self, handler: Handler) -> None:
        self.good(handler, ranges=False, keep=self.rng.choice([None, self.some(handler)]))

    def long(self, handler: Handler) -> None:
        self.good(handler, ranges=False, Content_Length=str(len(self.body) + self.rng.randrange(1, 9999)))

    def short(self, handler: Handler) -> None:
        self.good(handler, ranges=False, Content_Length=str(self.rng.randrange(len(self.body))))

    def no_length(self, handler: Handler) -> None:
        handler.head(200)
        handler.wfile.write(self.body[: self.rng.choice([None, self.some(handler)])])

    def corrupt(self, handler: Handler) -> None:
        damaged = bytearray(self.body)
        damaged[self.rng.randrange(len(damaged))] ^= 1 << self.rng.randrange(8)
        handler.send(bytes(damaged), ranges=self.rng.random() < 0.5)

    def other_range(self, handler: Handler) -> None:
        start = self.rng.randrange(len(self.body))
        rest = len(self.body) - start
        given = f"bytes {start}-{len(self.body) - 1}/{len(self.body)}"
        handler.head(206, Content_Length=str(rest), Content_Range=given, ETag=f'"{hashlib.md5(self.body).hexdigest()}"')
        handler.wfile.write(self.body[start:])

    def lying_range(self, handler: Handler) -> None:
        """What is said to be the asked-for range is another part of the file."""
        handler.send(self.body[::-1])

    def status(self, handler: Handler) -> None:
        handler.fail(self.rng.choice([404, 500, 503, 429, 429, 503]), Retry_After=self.rng.choice(["0", "", "soon"]))

    def redirect(self, handler: Handler) -> None:
        handler.fail(self.rng.choice([301, 302, 307]), Location=f"/elsewhere/{self.rng.randrange(99)}")

    def circle(self, handler: Handler) -> None:
        handler.fail(302, Location=handler.path)

    def stall(self, handler: Handler) -> None:
        handler.head(200, Content_Length=str(len(self.body)))
        handler.wfile.write(self.body[: self.some(handler)])
        handler.wfile.flush()
        time.sleep(0.15)

    def change(self, handler: Handler) -> None:
        self.now = 1 - self.now
        self.good(handler, keep=self.rng.choice([None, self.some(handler)]))

    def never_satisfied(self, handler: Handler) -> None:
        handler.fail(416, Content_Range=f"bytes */{len(self.body) + 1}")

    def page(self, handler: Handler) -> None:
        handler.send(b"<html>Log in</html>", ranges=False, Content_Type="text/html; charset=utf-8")

    def hang_up(self, handler: Handler) -> None:
        handler.wfile.write(self.rng.choice([b"", b"HTT", b"nothing of the kind\r\n\r\n"]))

    def pieces(self, handler: Handler) -> None:
        """Chunked, without a length; it may end in the middle of one."""
        handler.head(200, Transfer_Encoding="chunked", ETag=f'"{hashlib.md5(self.body).hexdigest()}"')
        cut = self.rng.choice([len(self.body), self.some(handler)])
        for start in range(0, cut, 50_000):
            piece = self.body[start : start + 50_000]
            handler.wfile.write(b"%x\r\n" % len(piece) + piece[: cut - start] + b"\r\n" * (start + 50_000 <= cut))
        if cut == len(self.body):
            handler.wfile.write((b"" if cut % 50_000 == 0 else b"\r\n") + b"0\r\n\r\n")

    def called_gzip(self, handler: Handler) -> None:
        self.good(handler, Content_Encoding="gzip")


def outcome(source: Source, target: Path) -> str:
    """The line in which fetching ends, "" where the file has come."""
    try:
        sources.fetch(source, target)
    except UserError as error:
        return str(error)
    return ""


def test_random_faults_end_in_the_right_file_or_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "BACKOFF", 0.0)
    monkeypatch.setattr(http, "TIMEOUT", (5, 0.1))
    ends: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    with serve() as server:
        for run in range(RUNS):
            rng = random.Random(run)
            server.requests.clear()
            bad = Bad(rng, server)
            folder = tmp_path / str(run)
            folder.mkdir()
            target = folder / "x.tar"
            if rng.random() < 0.3:
                (folder / ".x.tar.partial").write_bytes(bad.body[: rng.randrange(len(bad.body))] + rng.randbytes(3))
            line = outcome(bad.source, target)
            ends[f"{bad.kind}, {'one line' if line else 'right'}"] += 1
            if line:
                assert line.startswith("x.tar: "), line
                assert "\n" not in line
                assert {path.name for path in folder.iterdir()} <= {".x.tar.partial", ".x.tar.partial.from"}, run
            else:
                assert bad.right(target.read_bytes()), run
                assert [path.name for path in folder.iterdir()] == ["x.tar"], run

            # Whatever was left behind, once the server is well the file comes.
            bad.well = True
            assert outcome(bad.source, target) == "", run
            assert bad.right(target.read_bytes()), run
            assert [path.name for path in folder.iterdir()] == ["x.tar"], run
            seen += bad.seen
    assert min(ends["checked, right"], ends["tagged, right"], ends["checked, one line"]) > 15, ends
    assert len(seen) == 18, seen
    assert min(seen.values()) > 8, seen


CHILD = """\
import requests
from pipeline import download
from pipeline.fetch import http
http.BACKOFF = 0.01
print("ready", flush=True)
download.run("voc")
"""


@pytest.mark.slow
def test_sigkill_at_random_moments(tmp_path: Path) -> None:
    """The stage is killed at least 30 times, from its start to its end, on a server that is slow and drops."""
    rng = random.Random(0)
    bodies = {name: rng.randbytes(400_000) for name in ("a.tar", "b.tar", "c.tar")}
    settings = {
        "a.tar": {"md5": hashlib.md5(bodies["a.tar"]).hexdigest()},
        "b.tar": {"size": 400_000, "sha256": hashlib.sha256(bodies["b.tar"]).hexdigest()},
        "c.tar": {},  # nothing published: its entity tag alone
    }
    store, raw = tmp_path / "data/archives/voc", tmp_path / "data/raw/voc"

    def answer(handler: Handler, n: int) -> None:
        body = bodies[handler.path[1:]]
        start = handler.start()
        if start >= len(body):
            return handler.fail(416, Content_Range=f"bytes */{len(body)}")
        handler.send(body, keep=0, ETag='"one"')
        end = len(body) if rng.random() < 0.7 else rng.randrange(start, len(body) + 1)
        for position in range(start, end, 20_000):
            handler.wfile.write(body[position : min(end, position + 20_000)])
            time.sleep(0.01)
        return None

    def check() -> None:
        for folder in (store, raw):
            for path in folder.glob("[!.]*"):
                assert path.read_bytes() == bodies[path.name], path

    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    kills, ends, moments = 0, 0, []
    with serve() as server:
        server.answer = answer
        told = {name: {"url": f"http://{server.host}/{name}", **more} for name, more in settings.items()}
        (tmp_path / "settings.json").write_text(json.dumps({"download": {"voc": {"archives": told}}}))
        # Until the kills have hit different states: on a slow machine most of the first ones come before any byte.
        while kills < 30 or ends < 3 or len(set(moments)) <= 10:
            assert kills < 300, moments
            child = subprocess.Popen(
                [sys.executable, "-c", CHILD],
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            assert child.stdout is not None
            assert child.stdout.readline() == b"ready\n"
            time.sleep(rng.uniform(0.0, 0.5 + kills / 50))  # longer and longer, for machines that are slow
            if child.poll() is None:
                child.send_signal(signal.SIGKILL)
                kills += 1
                moments.append(sum(path.stat().st_size for path in store.glob("*")) if store.exists() else 0)
            _, said = child.communicate()
            check()
            assert child.returncode in (0, -signal.SIGKILL), said.decode()
            if child.returncode == 0:
                ends += 1
                assert sorted(path.name for path in raw.iterdir()) == sorted(bodies)
                assert sorted(path.name for path in raw.parent.iterdir()) == ["voc", "voc.json"]
                assert sorted(path.name for path in store.iterdir()) == [".verified.json", *sorted(bodies)]
                for path in (*raw.iterdir(), *store.iterdir()):
                    path.unlink()
                raw.rmdir()
