"""The download stage: the official file names under data/raw, whole or not at all."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import tiny_archives
import yaml
from filelock import FileLock

from pipeline import download, prepare
from refinenet.data import Split
from refinenet.files import UserError


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with VOC's archives beside an empty project folder, which is the working folder."""
    files, _ = tiny_archives.voc()
    tiny_archives.pack(files, tmp_path / "lab")
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    return tmp_path / "lab"


def write_settings(lab: Path, second: str = "benchmark.tgz", md5: str | None = None) -> None:
    voc = hashlib.md5((lab / "VOCtrainval_11-May-2012.tar").read_bytes()).hexdigest() if md5 is None else md5
    settings = yaml.safe_load(
        f"""\
download:
  voc:
    archives:
      {second}: {{url: "file://../lab/benchmark.tgz"}}
      VOCtrainval_11-May-2012.tar: {{url: "file://../lab/VOCtrainval_11-May-2012.tar", md5: "{voc}"}}
prepare:
  voc: {{official_counts: false}}
"""
    )
    Path("settings.json").write_text(json.dumps(settings))


def test_from_a_lab_mirror_to_prepared_splits(lab: Path) -> None:
    write_settings(lab)
    download.run("voc")
    for path in lab.iterdir():
        assert (Path("data/raw/voc") / path.name).read_bytes() == path.read_bytes()
    assert sorted(path.name for path in Path("data").rglob("*") if path.is_file()) == [
        "VOCtrainval_11-May-2012.tar",
        "VOCtrainval_11-May-2012.tar",  # data/archives/voc, kept since a checksum vouches for it
        "benchmark.tgz",
        "voc.lock",
    ]
    prepare.run("voc")
    assert [sample.name for sample in Split(Path("data/voc/train.arrow"))] == ["a", "b", "d", "e"]


def test_what_has_come_survives_a_failure_outside_the_output(lab: Path) -> None:
    write_settings(lab, md5="0" * 32)
    with pytest.raises(UserError, match=r"VOCtrainval_11-May-2012.tar: .*md5 [0-9a-f]{32} found, 0{32} expected"):
        download.run("voc")
    assert not Path("data/raw/voc").exists()
    assert [path.name for path in Path("data/archives/voc").iterdir()] == ["benchmark.tgz"]
    (lab / "benchmark.tgz").unlink()  # so that a second copy of it would fail
    write_settings(lab)
    download.run("voc")
    assert Path("data/raw/voc/benchmark.tgz").is_file()


def test_two_at_once(lab: Path) -> None:
    write_settings(lab)
    Path("data/archives").mkdir(parents=True)
    with FileLock("data/archives/voc.lock"), pytest.raises(UserError, match="held by another `download voc`"):
        download.run("voc")


def test_file_names_stay_inside(lab: Path) -> None:
    write_settings(lab, second="../benchmark.tgz")
    with pytest.raises(UserError, match=r"'../benchmark.tgz', expected the plain name of an archive"):
        download.run("voc")
    assert not Path("data").exists()
