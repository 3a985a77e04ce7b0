"""The download stage: the official file names under data/raw, whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tiny_archives
import yaml
from filelock import FileLock
from http_server import DATA, MD5, Handler, Server, serve

from pipeline import download, prepare
from pipeline.config import resolve
from pipeline.fetch import checksums, http
from refinenet.data.split import Split
from refinenet.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
STORE, RAW = Path("data/archives/voc"), Path("data/raw/voc")


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder, which is the working folder."""
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    monkeypatch.setattr(http, "BACKOFF", 0.001)
    return tmp_path / "project"


@pytest.fixture
def lab(tmp_path: Path) -> Path:
    """A folder with VOC's archives beside the project."""
    tiny_archives.pack(tiny_archives.voc()[0], tmp_path / "lab")
    return tmp_path / "lab"


@pytest.fixture
def server() -> Iterator[Server]:
    with serve() as server:
        yield server


def use(archives: dict[str, dict[str, Any]], mirror: tuple[str, ...] = (), name: str = "voc") -> None:
    """Write settings.json with these archives for the data set `name`, beside those of others."""
    path = Path("settings.json")
    settings = json.loads(path.read_text()) if path.exists() else {"download": {}, "prepare": {}}
    settings["download"][name] = {"archives": archives, "mirror": mirror}
    settings["prepare"][name] = {"official_counts": False}
    path.write_text(json.dumps(settings))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes()).hexdigest()


def test_from_a_lab_mirror_to_prepared_splits(lab: Path) -> None:
    use({path.name: {"url": f"file://../lab/{path.name}", "md5": md5(path)} for path in lab.iterdir()})
    download.run("voc")
    assert names(RAW) == names(lab)
    for path in lab.iterdir():
        assert (RAW / path.name).readlink().resolve() == path, "linked, not copied"
        assert path.stat().st_nlink == 1
    prepare.run("voc")
    assert [sample.name for sample in Split(Path("data/voc/train.arrow"))] == ["a", "b", "d", "e"]


def test_what_has_come_survives_and_all_reasons_are_told(server: Server) -> None:
    server.answer = lambda handler, n: handler.fail(404) if "gone" in handler.path else handler.send()
    good = {"url": server.url, "md5": MD5}
    use(
        {
            "gone.tar": {"url": f"http://{server.host}/gone"},
            "a.tar": good,
            "wrong.tar": {"url": server.url, "md5": "0" * 32},
            "b.tar": good,
        }
    )
    with pytest.raises(UserError) as caught:
        download.run("voc")
    assert str(caught.value) == (
        f"gone.tar: http://{server.host}/gone: 404 Not Found; "
        f"wrong.tar: {server.url}: md5 {MD5} found, {'0' * 32} expected"
    )
    assert not RAW.exists()
    assert names(STORE) == [checksums.MEMORY, "a.tar", "b.tar"]
    before = len(server.requests)
    use({"a.tar": good, "b.tar": good})
    download.run("voc")
    assert len(server.requests) == before
    assert names(RAW) == ["a.tar", "b.tar"]


def test_a_rerun_reads_and_fetches_nothing(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    use({"a.tar": {"url": server.url, "md5": MD5}, "b.tar": {"url": server.url, "size": len(DATA)}})
    download.run("voc")
    time.sleep(0.15)  # until the files' times prove something
    download.run("voc")
    count = len(server.requests)

    def read(*_: object) -> dict[str, str]:
        raise AssertionError("read again")

    monkeypatch.setattr(checksums, "digests", read)
    monkeypatch.setattr(download, "dvc_md5", read)
    shutil.rmtree(RAW)
    download.run("voc")
    assert len(server.requests) == count
    assert (RAW / "b.tar").samefile(STORE / "b.tar")


def test_four_at_once(server: Server) -> None:
    """The server answers none before four have asked, and never has more than four at a time."""
    four, now, most = threading.Barrier(4, timeout=300), [0], [0]

    def answer(handler: Handler, n: int) -> None:
        with server.lock:
            now[0] += 1
            most[0] = max(most[0], now[0])
        four.wait()
        with server.lock:
            now[0] -= 1
        handler.send()

    server.answer = answer
    use({f"{n}.tar": {"url": f"http://{server.host}/{n}", "md5": MD5} for n in range(8)})
    download.run("voc")
    assert most == [4]
    assert len(names(RAW)) == 8


def test_two_data_sets_fetch_one_address_once(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    begun, waiting = threading.Event(), threading.Event()

    def answer(handler: Handler, n: int) -> None:
        begun.set()
        assert waiting.wait(300)
        handler.send()

    server.answer = answer
    for name in ("context", "person"):
        use({"voc2010.tar": {"url": server.url, "md5": MD5}}, name=name)
    first, second = (threading.Thread(target=download.run, args=(name,)) for name in ("context", "person"))
    first.start()
    assert begun.wait(300)
    second.start()
    said = ""
    while "waiting" not in said:
        assert second.is_alive()
        time.sleep(0.02)
        said += capsys.readouterr().err
    waiting.set()
    first.join()
    second.join()
    assert len(server.requests) == 1
    assert Path("data/raw/person/voc2010.tar").samefile("data/raw/context/voc2010.tar")
    assert "voc2010.tar: another stage is fetching it; waiting\n" in said


def test_the_sum_must_fit_before_the_first_byte(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil._ntuple_diskusage(10**7, 10**7, 500_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    use({name: {"url": server.url, "md5": MD5, "size": len(DATA)} for name in ("a.tar", "b.tar")})
    with pytest.raises(UserError, match=r"^data/archives/voc: 600kB needed for a\.tar, b\.tar, 500kB free$"):
        download.run("voc")
    assert server.requests == []
    # What has come already is not needed again: here all of one and a third of the other.
    (STORE / "a.tar").write_bytes(DATA)
    (STORE / ".b.tar.partial").write_bytes(DATA[:100_000])
    download.run("voc")
    assert names(RAW) == ["a.tar", "b.tar"]


def test_what_needs_a_person(server: Server, capsys: pytest.CaptureFixture[str]) -> None:
    """One line with the page, the names and the folder; once they are there, they are used."""
    server.answer = lambda handler, n: handler.send(b"<html>", Content_Type="text/html")
    page = "https://www.example.org/downloads"
    use(
        {
            "a.zip": {"url": server.url, "md5": MD5, "page": page, "size": len(DATA)},
            "b.zip": {"url": server.url, "page": page},
            "c.zip": {"url": server.url, "optional": True, "sha256": "0" * 64},
        }
    )
    with pytest.raises(UserError) as caught:
        download.run("voc")
    line = str(caught.value)
    assert "\n" not in line
    assert "a.zip: " in line
    assert "web page" in line
    assert "c.zip" not in line
    assert line.endswith(
        f"By hand: take a.zip (300kB, md5 {MD5}) and b.zip from {page} and put them into data/incoming/voc/"
    )
    for name in ("a.zip", "b.zip"):
        Path("data/incoming/voc", name).write_bytes(DATA)
    download.run("voc")
    assert names(RAW) == ["a.zip", "b.zip"]
    told = capsys.readouterr().err
    assert "voc: b.zip is data/incoming/voc/b.zip (no published checksum to check it with)\n" in told
    assert "voc: without c.zip, which is optional: " in told


def test_what_nothing_vouches_for_is_recorded_and_a_change_is_told(
    server: Server, capsys: pytest.CaptureFixture[str]
) -> None:
    archives = {"a.tar": {"url": server.url, "md5": MD5}, "labels.txt": {"url": f"http://{server.host}/labels.txt"}}
    use(archives)
    server.answer = lambda handler, n: handler.send(DATA if handler.path == "/x.tar" else b"1: dog\n")
    download.run("voc")
    first = hashlib.md5(b"1: dog\n").hexdigest()
    told = f"voc: labels.txt: no published checksum; md5 {first}, recorded in data/raw/voc.json\n"
    assert told in capsys.readouterr().err

    recorded = json.loads(json.dumps(asdict(resolve.load("download", "voc"))))
    entry = {
        "params": {"settings.json": {"download.voc": recorded}},
        "outs": [{"path": "data/raw/voc.json", "md5": (before := md5(download.record("voc")))}],
    }
    Path("dvc.lock").write_text(yaml.safe_dump({"stages": {"download@voc": entry}}))
    shutil.rmtree("data")
    download.run("voc")
    assert capsys.readouterr().err == ""

    server.answer = lambda handler, n: handler.send(DATA if handler.path == "/x.tar" else b"1: cat\n")
    shutil.rmtree("data")
    download.run("voc")
    (line,) = capsys.readouterr().err.splitlines()
    now = md5(download.record("voc"))
    assert line.startswith(f"warning: data/raw/voc.json: md5 {now}, dvc.lock recorded {before} for the same settings")
    assert f"labels.txt (md5 {md5(RAW / 'labels.txt')})" in line
    assert "a.tar" not in line

    # Recorded with other settings: nothing to compare with.
    use(archives | {"labels.txt": {"url": f"http://{server.host}/labels.txt?2"}})
    download.run("voc")
    assert "warning: data/raw" not in capsys.readouterr().err


def test_ctrl_c_stops_at_once_and_keeps_what_has_come(server: Server) -> None:
    def answer(handler: Handler, n: int) -> None:
        handler.send(keep=200_000)
        handler.wfile.flush()
        time.sleep(600)

    server.answer = answer
    use({f"{n}.tar": {"url": f"http://{server.host}/{n}", "md5": MD5} for n in range(6)})
    command = [sys.executable, "-m", "pipeline.download", "voc"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while sum(path.stat().st_size > 100_000 for path in STORE.glob(".*.partial")) < 4:
        assert child.poll() is None
        assert time.monotonic() < end
        time.sleep(0.02)
    child.send_signal(signal.SIGINT)
    start = time.monotonic()
    _, said = child.communicate(timeout=300)
    assert (child.returncode, said) == (130, "interrupted\n")
    assert time.monotonic() - start < 60
    assert [path.stat().st_size > 100_000 for path in STORE.glob(".*.partial")] == [True] * 4
    assert len(server.requests) == 4


def test_two_at_once(server: Server) -> None:
    use({"a.tar": {"url": server.url}})
    Path("data/archives").mkdir(parents=True)
    with FileLock("data/archives/voc.lock"), pytest.raises(UserError, match="held by another `download voc`"):
        download.run("voc")


def test_file_names_stay_inside() -> None:
    use({"../a.tar": {"url": "file:///a.tar"}})
    with pytest.raises(UserError, match=r"'../a.tar', expected the plain name of an archive"):
        download.run("voc")
    assert not Path("data").exists()
