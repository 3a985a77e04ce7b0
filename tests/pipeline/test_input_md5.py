"""The md5 of what a training reads: taken once, noted, and taken again when the file has changed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pipeline.fetch import input_md5 as module
from pipeline.fetch.input_md5 import NOTES, SMALL, input_md5
from pipeline.runtime.dvc_md5 import dvc_md5
from refinenet.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """data/voc with two large splits and a small one, written long ago."""
    monkeypatch.chdir(tmp_path)
    folder = Path("data/voc")
    folder.mkdir(parents=True)
    for place, size in (("train", SMALL), ("val", SMALL + 1), ("test", 3)):
        file = folder / f"{place}.arrow"
        file.write_bytes(place.encode())
        os.truncate(file, size)  # a hole: it costs no space
        os.utime(file, (10**9, 10**9))
    return folder


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the large files that are read, in order."""
    names: list[str] = []
    whole = module.digests

    def noted(path: Path, kinds: list[str]) -> dict[str, str]:
        names.append(path.name)
        return whole(path, kinds)

    monkeypatch.setattr(module, "digests", noted)
    return names


def test_it_is_dvc_s_and_each_large_file_is_read_once(data: Path, read: list[str]) -> None:
    md5 = dvc_md5(data)
    assert input_md5(data) == md5
    assert read == ["train.arrow", "val.arrow"]
    assert input_md5(data) == input_md5(data.absolute()) == md5
    assert read == ["train.arrow", "val.arrow"]
    assert [file.name for file in NOTES.iterdir()] == ["data%2Fvoc.json"]


@pytest.mark.parametrize("how", ["time", "size", "another file", "renamed over with the old time"])
def test_a_changed_file_is_read_again(data: Path, read: list[str], how: str) -> None:
    file = data / "train.arrow"
    before = input_md5(data)
    if how == "size":
        os.truncate(file, SMALL + 5)
        os.utime(file, (10**9, 10**9))
    elif how == "time":
        with file.open("r+b") as stream:
            stream.write(b"other")
    else:
        other = data.parent / "other"
        other.write_bytes(b"other")
        os.truncate(other, SMALL)
        if how != "another file":
            os.utime(other, (10**9, 10**9))
        other.replace(file)
    read.clear()
    assert input_md5(data) == dvc_md5(data) != before
    assert read == ["train.arrow"]


def test_a_file_that_was_just_written_is_not_yet_trusted(data: Path, read: list[str]) -> None:
    """A second change within the same tick of the clock would have the same time."""
    now = time.time() + 60  # however long the reading takes
    os.utime(data / "train.arrow", (now, now))
    input_md5(data)
    read.clear()
    input_md5(data)
    assert read == ["train.arrow"]


def test_broken_notes_and_none_at_all_cost_a_reading_only(data: Path, read: list[str]) -> None:
    md5 = input_md5(data)
    (note,) = NOTES.iterdir()
    note.write_bytes(note.read_bytes()[:-20])
    read.clear()
    assert input_md5(data) == md5
    assert read == ["train.arrow", "val.arrow"]
    note.unlink()
    NOTES.rmdir()
    NOTES.write_text("a file where the folder belongs")
    assert input_md5(data) == md5


def test_processes_at_once_leave_whole_notes(data: Path, read: list[str]) -> None:
    """Six trainings that start together on the same data."""
    code = (
        "from pathlib import Path; from pipeline.fetch.input_md5 import input_md5; print(input_md5(Path('data/voc')))"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(6)
    ]
    assert {process.communicate(timeout=200)[0].strip() for process in running} == {dvc_md5(data)}
    assert input_md5(data) == dvc_md5(data)
    assert read == []
    assert not list(NOTES.glob(".*"))


def test_a_file_that_is_gone() -> None:
    with pytest.raises(UserError, match=r"data/coco: cannot be read .*expected a file to take the md5 of"):
        input_md5(Path("data/coco"))
