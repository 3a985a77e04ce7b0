"""Links in data/raw under both engines: they stay links, and the user's files behind them stay as they are."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import small_project
import tiny_archives
from small_project import call

from pipeline import download
from pipeline.config import resolve

PROFILE = """\
base: mini
title: archives from a mirror
mirror: ["{mirror}"]
sources:
  voc:
    VOCtrainval_11-May-2012.tar: {{url: "https://127.0.0.1:1/a.tar", md5: {md5}}}
    VOC2012test.tar: {{url: "https://127.0.0.1:1/b.tar"}}
    benchmark.tgz: {{url: "https://127.0.0.1:1/c.tgz"}}
    missing.tar: {{url: "file:///nowhere/d.tar", optional: true}}
"""


def states(folder: Path) -> dict[str, tuple[int, ...]]:
    found = {path: path.stat() for path in sorted(folder.iterdir())}
    return {path.name: (s.st_mode, s.st_mtime_ns, s.st_ino, s.st_size, s.st_nlink) for path, s in found.items()}


@pytest.mark.slow
def test_dvc_and_snakemake_leave_a_mirror_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lab = tmp_path / "lab"
    tiny_archives.pack(tiny_archives.voc()[0], lab)
    for path in lab.iterdir():
        os.utime(path, (10**9, 10**9))
    before = states(lab)
    md5 = hashlib.md5((lab / "VOCtrainval_11-May-2012.tar").read_bytes()).hexdigest()
    (tmp_path / "project").mkdir()
    project = small_project.make(tmp_path / "project", PROFILE.format(mirror=lab, md5=md5))
    raw = project / "data/raw/voc"

    def linked() -> None:
        for path in lab.iterdir():
            assert (raw / path.name).readlink() == path
        assert states(lab) == before
        sizes = {path.stat().st_size for path in (project / ".dvc/cache").rglob("*") if path.is_file()}
        assert not sizes & {path.stat().st_size for path in lab.iterdir()}, "an archive is in DVC's cache"

    call(project, "dvc", "repro", "prepare@voc")
    linked()
    monkeypatch.chdir(project)
    call(project, "dvc", "commit", "--force", "download@voc", "prepare@voc")
    linked()
    assert json.loads(call(project, "dvc", "status", "--json", "prepare@voc").stdout) == {}
    planned = call(project, "snakemake", "--cores", "1", "--dry-run", "--", "data/voc")
    assert "pipeline.download" not in planned.stdout + planned.stderr
    linked()
    wanted = resolve.load("download", "voc")
    record = download.record("voc")
    assert download._recorded("voc", wanted) == download.dvc_md5(record), "dvc.lock is not as the stage reads it"
    assert sorted(json.loads(record.read_bytes())) == sorted(path.name for path in lab.iterdir())

    for path in (raw, project / "data/voc"):
        shutil.rmtree(path)
    record.unlink()
    call(project, "snakemake", "--cores", "1", "--", "data/voc")
    linked()
    assert json.loads(call(project, "dvc", "status", "--json", "prepare@voc").stdout) == {}
    again = call(project, "dvc", "repro", "prepare@voc")
    assert "Running stage" not in again.stdout
    linked()
    # Who has only the record, as after `dvc pull`, has the archives linked once they are wanted.
    shutil.rmtree(raw)
    assert "Running stage" not in call(project, "dvc", "repro", "prepare@voc").stdout
    call(project, "dvc", "repro", "--force", "--single-item", "prepare@voc")
    linked()
    # A stage that runs again takes the place of the old links, whichever engine asks for it.
    call(project, "dvc", "repro", "--force", "--single-item", "download@voc")
    linked()
    call(project, "dvc", "gc", "--workspace", "--force")
    linked()
