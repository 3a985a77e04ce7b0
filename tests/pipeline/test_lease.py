"""One writer for each training: who holds the lease, who is refused, who waits, and when it is taken over."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

import pytest

from pipeline.runtime import cli, lease
from pipeline.runtime.cli import EXIT_HELD, HeldError, Terminated
from pipeline.runtime.lease import Holder, only_one, unchanged_since

ROOT = Path(__file__).resolve().parents[2]
LONG = 300  # seconds; no test waits for them in vain
FOREIGN = Holder("node7", "another boot", 1, "5", "2026-11-29 01:00:00 UTC", "digest", "token")
# What another process runs: holds the lease until its input ends, and says when it has it.
SCRIPT = """
import sys
from pathlib import Path
from pipeline.runtime import lease
from pipeline.runtime.cli import HeldError, run_cli
lease.PERIOD = float(sys.argv[2])
def run():
    with lease.only_one(Path(sys.argv[1]), "voc", "digest", wait=sys.argv[3] == "wait") as waited_for:
        print(f"has it {waited_for}", flush=True)
        sys.stdin.read()
sys.exit(run_cli(run))
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "PERIOD", 0.2)
    monkeypatch.delenv(lease.MINE, raising=False)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "checkpoints" / "voc.lease"


@pytest.fixture
def start(path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start another process that takes the lease."""
    running = []
    pipe = subprocess.PIPE

    def begin(wait: str = "", period: float = 0.2) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", SCRIPT, str(path), str(period), wait]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        running.append(subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=pipe, text=True))
        return running[-1]

    yield begin
    for process in running:
        process.kill()
        process.communicate()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def put(path: Path, holder: Holder) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(asdict(holder)))


def holder(path: Path) -> Holder:
    return Holder(**json.loads(path.read_text()))


def test_a_second_one_is_refused_and_told_who_has_it(path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    first = start()
    assert first_line(first) == "has it"
    before = path.read_bytes()
    who = rf"^voc is already being trained, by process {first.pid} on .* since 2.* UTC \("
    with pytest.raises(HeldError, match=who), only_one(path, "voc", "digest"):
        pass
    second = start()
    _, told = second.communicate("")
    assert second.returncode == EXIT_HELD == os.EX_CANTCREAT == 73
    assert told.startswith("error: voc is already being trained, by process ")
    assert told.count("\n") == 1
    assert path.read_bytes() == before
    first.communicate("")
    assert first.returncode == 0
    assert not any(path.parent.iterdir())


def test_a_killed_one_of_this_machine_is_followed_at_once(
    path: Path,
    start: Callable[..., subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    first = start()
    first_line(first)
    first.kill()
    first.wait()
    monkeypatch.setattr(lease, "PERIOD", 1000.0)
    with only_one(path, "voc", "digest") as waited_for:
        assert (holder(path).pid, waited_for) == (os.getpid(), "")
    assert f"process {first.pid} on " in (told := capsys.readouterr().err)
    assert "taken over" in told
    # Its number belongs to another process by now.
    put(path, replace(FOREIGN, machine=lease._machine(), pid=os.getpid(), started="1"))
    with only_one(path, "voc", "digest"):
        assert holder(path).token != FOREIGN.token


@pytest.mark.parametrize("clock", [-(10**6), 10**6])
def test_another_machine_is_judged_by_its_renewals_not_by_its_clock(
    path: Path, clock: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(path, FOREIGN)
    now = time.time() + clock
    os.utime(path, (now, now))
    sleep, looks = time.sleep, count(1)

    def renewed_meanwhile(seconds: float) -> None:
        sleep(seconds)
        later = now + next(looks)
        os.utime(path, (later, later))

    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", renewed_meanwhile)
        who = "by process 1 on node7 since 2026-11-29 01:00:00 UTC"
        with pytest.raises(HeldError, match=who), only_one(path, "voc", "digest"):
            pass
    begun = time.monotonic()
    with only_one(path, "voc", "digest"):
        assert time.monotonic() - begun >= lease.GONE * lease.PERIOD
        assert holder(path).pid == os.getpid()


@pytest.mark.parametrize("content", ["", "{", '{"host": 1}'])
def test_a_file_that_is_no_lease_belongs_to_somebody_until_it_is_old(path: Path, content: str) -> None:
    path.parent.mkdir()
    path.write_text(content)
    begun = time.monotonic()
    with only_one(path, "voc", "digest"):
        assert time.monotonic() - begun >= lease.GONE * lease.PERIOD


def test_of_many_that_take_over_at_once_one_does(path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    """Six processes find the lease of a machine that is gone; the others are refused, or wait in turn."""
    put(path, FOREIGN)
    running = [start("wait", 1.0) for _ in range(6)]
    end = time.monotonic() + LONG
    done: list[int] = []
    while len(done) < 6:
        assert time.monotonic() < end
        try:  # between two holders there is no file, or one that is not whole yet
            now = lease._parse(path.read_bytes())
        except FileNotFoundError:
            continue
        if now is None:
            continue
        mine = [process for process in running if process.pid == now.pid and process.pid not in done]
        if mine:
            assert first_line(mine[0]).startswith("has it")
            time.sleep(0.3)
            assert holder(path).pid == mine[0].pid
            mine[0].communicate("")
            assert mine[0].returncode == 0
            done.append(mine[0].pid)
    assert not any(path.parent.iterdir())


def test_who_takes_a_living_one_away_puts_it_back(path: Path) -> None:
    put(path, FOREIGN)
    other = lease._Lease(path, "voc", "digest")
    other._take_away(b"what was there a moment ago")
    assert holder(path) == FOREIGN
    other._take_away(path.read_bytes())
    assert not any(path.parent.iterdir())
    other._take_away(b"nothing is there")


def test_it_is_renewed_and_removed_however_the_block_ends(path: Path) -> None:
    with only_one(path, "voc", "digest"):
        before = path.stat().st_mtime_ns
        end = time.monotonic() + LONG
        while path.stat().st_mtime_ns == before:
            assert time.monotonic() < end
            time.sleep(0.05)
    assert not any(path.parent.iterdir())
    for error in (UserWarning("an error"), KeyboardInterrupt(), Terminated("asked to"), SystemExit(1)):
        with suppress(type(error)), only_one(path, "voc", "digest"):
            assert path.is_file()
            raise error
        assert not any(path.parent.iterdir())
        assert lease.MINE not in os.environ


def test_who_waits_learns_what_became_of_it(path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    first = start()
    first_line(first)
    second = start("wait")
    assert second.stderr is not None
    assert second.stderr.readline().startswith(f"voc: waits for process {first.pid} on ")
    first.communicate("")
    assert first_line(second) == "has it digest"
    third = start("wait")
    assert third.stderr is not None
    assert third.stderr.readline().startswith(f"voc: waits for process {second.pid} on ")
    second.kill()
    second.wait()
    assert first_line(third) == "has it"  # killed: it made nothing


def test_a_sigterm_ends_the_waiting(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put(path, replace(FOREIGN, machine=lease._machine(), pid=os.getppid(), started="?"))
    monkeypatch.setattr(cli, "_received", {signal.SIGTERM})
    with (
        pytest.raises(Terminated, match=r"before it began; process .* is at work on voc"),
        only_one(path, "voc", "digest", wait=True),
    ):
        pass
    assert holder(path).pid == os.getppid()


def test_who_was_taken_for_dead_ends(path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    """Suspended for longer than the others wait: it must not write beside the one that has taken over."""
    first = start()
    first_line(first)
    os.kill(first.pid, signal.SIGSTOP)
    put(path, FOREIGN)
    os.kill(first.pid, signal.SIGCONT)
    assert first.wait(LONG) == EXIT_HELD
    assert first.stderr is not None
    assert (
        first.stderr.read()
        == "error: voc: process 1 on node7 since 2026-11-29 01:00:00 UTC has taken over; ends here\n"
    )
    assert holder(path) == FOREIGN


def test_a_lease_that_somebody_removed_comes_back(path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    first = start()
    first_line(first)
    before = path.read_bytes()
    path.unlink()
    path.parent.rmdir()
    end = time.monotonic() + LONG
    while not path.exists():
        assert first.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    assert path.read_bytes() == before
    first.communicate("")
    assert first.returncode == 0


def test_its_own_processes_come_in(path: Path, start: Callable[..., subprocess.Popen[str]]) -> None:
    with only_one(path, "voc", "digest"):
        before = path.read_bytes()
        both = [start(), start()]
        assert [first_line(one) for one in both] == ["has it", "has it"]
        for one in both:
            one.communicate("")
            assert one.returncode == 0
        assert path.read_bytes() == before


@pytest.mark.parametrize("code", [errno.EPERM, errno.EOPNOTSUPP])
def test_without_hard_links(path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def none(*_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "link", none)
    with only_one(path, "voc", "digest"):
        monkeypatch.delenv(lease.MINE)
        with pytest.raises(HeldError), only_one(path, "voc", "digest"):
            pass
        monkeypatch.setenv(lease.MINE, holder(path).token)
    assert not any(path.parent.iterdir())


def test_an_answer_that_got_lost_is_not_taken_for_a_refusal(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """NFS: the link was made, and the repeated request says that it exists."""
    link = os.link

    def twice(source: Path, target: Path) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, "File exists")

    monkeypatch.setattr(os, "link", twice)
    with only_one(path, "voc", "digest"):
        assert holder(path).pid == os.getpid()


def test_whether_files_were_made(tmp_path: Path) -> None:
    model, curve = tmp_path / "model", tmp_path / "curve"
    model.write_text("old")
    unchanged = unchanged_since([model, curve])
    assert unchanged()
    curve.write_text("new")
    assert unchanged()
    other = tmp_path / "other"
    other.write_text("old")
    other.replace(model)
    assert not unchanged()
