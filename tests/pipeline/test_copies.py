"""Archives that are on this machine already: found, checked once, linked; never fetched, copied or changed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from http_server import DATA, MD5

from pipeline.config.schema import Source
from pipeline.fetch import checksums, local, sources
from pipeline.fetch.checksums import ChecksumCache

RIGHT = Source("https://nowhere.invalid/x.tar", len(DATA), MD5)
BARE = Source("https://nowhere.invalid/x.tar")
TARGET = Path("data/archives/voc/x.tar")


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "project" / "data/archives/voc").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "project"


def place(path: str | Path, data: bytes = DATA) -> Path:
    file = Path(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(data)
    os.utime(file, (10**9, 10**9))  # written long ago
    return file


def take(source: Source = RIGHT, *mirror: str, known: ChecksumCache | None = None) -> bool:
    where = local.candidate_paths("voc", "x.tar", mirror)
    return local.link_local_copy("voc", source, TARGET, where, known or ChecksumCache())


@pytest.mark.parametrize("entry", ["{}", "file://{}", "${{LAB}}/my data", "file://${{LAB}}/my%20data", "~/my data"])
@pytest.mark.parametrize("below", ["voc/x.tar", "x.tar"])
def test_mirrors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str, below: str) -> None:
    monkeypatch.setenv("LAB", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    file = place(tmp_path / "my data" / below)
    file.chmod(0o640)
    before = file.stat()
    assert take(RIGHT, "${NOT_SET_AT_ALL}/a", str(tmp_path / "missing"), entry.format(tmp_path / "my data"))
    assert TARGET.readlink() == file
    after = file.stat()
    assert (after.st_mode, after.st_mtime_ns, after.st_nlink) == (before.st_mode, before.st_mtime_ns, 1)


def test_by_hand_and_of_another_data_set_become_hard_links(capsys: pytest.CaptureFixture[str]) -> None:
    by_hand = place("data/incoming/voc/x.tar")
    assert take()
    assert TARGET.samefile(by_hand)
    assert not TARGET.is_symlink()
    by_hand.unlink()  # the folder may be tidied up
    assert TARGET.read_bytes() == DATA
    TARGET.rename(place("data/archives/person/x.tar"))
    assert take()
    assert TARGET.samefile("data/archives/person/x.tar")
    assert "voc: x.tar is data/archives/person/x.tar\n" in capsys.readouterr().err


def test_a_link_of_another_data_set_is_followed_to_the_user_s_file(tmp_path: Path) -> None:
    file = place(tmp_path / "lab/x.tar")
    Path("data/archives/person").mkdir()
    Path("data/archives/person/x.tar").symlink_to(file)
    assert take()
    assert TARGET.readlink() == file
    assert file.stat().st_nlink == 1


def test_a_wrong_copy_is_passed_over_and_named_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    short, damaged = place(tmp_path / "a/x.tar", DATA[:-1]), place(tmp_path / "b/x.tar", DATA[::-1])
    right, known = place(tmp_path / "c/x.tar"), ChecksumCache()
    mirrors = [str(tmp_path / name) for name in "abc"]
    assert take(RIGHT, *mirrors, known=known)
    assert TARGET.readlink() == right
    assert not take(RIGHT, *mirrors[:2], known=known)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 3
    assert lines[0] == f"warning: {short}: 299999 bytes found, 300000 expected; skipped"
    assert lines[1].startswith(f"warning: {damaged}: md5 ")
    assert damaged.read_bytes() == DATA[::-1], "a user's file is never touched"


def test_what_nothing_vouches_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Taken from a mirror, with a line; from another data set only where it came from the same address."""
    other = place("data/archives/person/x.tar", b"of another")
    assert not take(BARE)
    ChecksumCache(other.parent / checksums.MEMORY).note(other, {"md5": "0"}, "https://elsewhere.invalid/x.tar")
    assert not take(BARE)
    ChecksumCache(other.parent / checksums.MEMORY).note(other, {"md5": "0"}, BARE.url)
    assert take(BARE)
    TARGET.unlink()
    other.unlink()
    capsys.readouterr()
    place(tmp_path / "lab/x.tar", b"anything")
    assert take(BARE, str(tmp_path / "lab"))
    assert "no published checksum to check it with" in capsys.readouterr().err


def test_checked_once_and_again_after_a_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    taken = checksums.digests

    def counted(path: Path, *rest: object) -> dict[str, str]:
        read.append(str(path))
        return taken(path, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(checksums, "digests", counted)
    memory = TARGET.parent / checksums.MEMORY
    file = place(tmp_path / "lab/x.tar")
    assert take(RIGHT, str(file.parent), known=ChecksumCache(memory))
    assert sources.already_there(RIGHT, TARGET, ChecksumCache(memory))
    assert sources.already_there(RIGHT, TARGET, ChecksumCache(memory))
    assert read == [str(file)], "one reading for all three"
    # A second data set that wants the same file reads nothing either.
    second = Path("data/archives/person/x.tar")
    second.parent.mkdir()
    known = ChecksumCache(second.parent / checksums.MEMORY)
    assert local.link_local_copy("person", RIGHT, second, local.in_store("person", "x.tar"), known)
    assert sources.already_there(RIGHT, second, known)
    assert len(read) == 1

    # Of the same size and, by the tool that wrote it, the same time to the second.
    file.write_bytes(DATA[::-1])
    os.utime(file, ns=(10**18, 10**18 + 1))
    assert not sources.already_there(RIGHT, TARGET, ChecksumCache(memory))
    assert not TARGET.is_symlink(), "the link is gone"
    assert file.read_bytes() == DATA[::-1], "and the user's file is not"
    assert len(read) == 2
    memory.write_text("{ no JSON")
    place(file)
    assert take(RIGHT, str(file.parent), known=ChecksumCache(memory))


def test_a_file_that_was_written_this_moment_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two writes within one tick of the disk's clock give the same time: it proves nothing yet."""
    memory = TARGET.parent / checksums.MEMORY
    TARGET.write_bytes(DATA)
    before = TARGET.stat()
    assert sources.already_there(RIGHT, TARGET, ChecksumCache(memory))
    with TARGET.open("r+b") as file:
        file.write(b"other")
    os.utime(TARGET, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert not sources.already_there(RIGHT, TARGET, ChecksumCache(memory))


def test_what_has_no_checksum_is_kept_while_it_is_as_it_came(capsys: pytest.CaptureFixture[str]) -> None:
    memory = TARGET.parent / checksums.MEMORY
    place(TARGET)
    ChecksumCache(memory).note(TARGET, {"md5": MD5}, BARE.url)
    assert sources.already_there(BARE, TARGET, ChecksumCache(memory))
    place(TARGET, DATA[::-1])
    os.utime(TARGET)
    time.sleep(0.001)
    assert not sources.already_there(BARE, TARGET, ChecksumCache(memory))
    assert f"{MD5} when it was downloaded" in capsys.readouterr().err

    place(TARGET)
    ChecksumCache(memory).note(TARGET, {"md5": MD5}, "https://elsewhere.invalid/x.tar")
    assert not sources.already_there(BARE, TARGET, ChecksumCache(memory))
    assert "comes from https://elsewhere.invalid/x.tar" in capsys.readouterr().err
