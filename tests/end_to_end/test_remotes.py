"""`dvc push` and `dvc pull` over SSH and S3 on the loopback device; broken objects and broken lines are noticed."""

from __future__ import annotations

import configparser
import hashlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import loopback
import pytest
import small_project
import yaml
from loopback import Remote
from small_project import ROOT, TINY, call, git

STAGES = ("weights@resnet101", "weights@resnet152", "prepare@voc")
WEIGHTS = "weights/resnet101.safetensors"


@pytest.fixture(scope="module")
def pushable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project with three stages done and committed, one of which makes a folder."""
    project = small_project.make(tmp_path_factory.mktemp("pushable"), TINY)
    call(project, "dvc", "repro", *STAGES)
    git(project, "add", "--all")
    git(project, "-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "--quiet", "--message", "base")
    return project


@pytest.fixture(params=["folder", "ssh", "s3"])
def remote(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Remote]:
    with getattr(loopback, request.param)(tmp_path / "remote") as made:
        yield made


def clone(origin: Path, to: Path, remote: Remote) -> Path:
    """A fresh clone that has the remote as the README says, and nothing of what DVC keeps."""
    git(origin, "clone", "--quiet", str(origin), str(to))
    call(to, "dvc", "remote", "add", "--default", "lab", remote.url)
    call(to, "dvc", "remote", "modify", "lab", "verify", "true")
    for key, value in remote.options.items():
        call(to, "dvc", "remote", "modify", "--local", "lab", key, value)
    return to


def dvc(project: Path, remote: Remote, *command: str) -> subprocess.CompletedProcess[str]:
    return call(project, "dvc", *command, check=False, **remote.environment)


def outputs(project: Path) -> dict[str, bytes]:
    files = [path for folder in ("weights", "data/voc") for path in (project / folder).rglob("*") if path.is_file()]
    return {str(path.relative_to(project)): path.read_bytes() for path in files}


def recorded(project: Path, output: str) -> str:
    """The path in the remote of what an output consists of."""
    stages = yaml.safe_load((project / "dvc.lock").read_text())["stages"].values()
    (md5,) = (out["md5"] for stage in stages for out in stage["outs"] if out["path"] == output)
    return f"files/md5/{md5[:2]}/{md5[2:]}"


def check_only_whole(project: Path, truth: dict[str, bytes]) -> None:
    """Nothing wrong under a final name, neither in the working folder nor in the cache."""
    assert outputs(project).items() <= truth.items()
    for path in (project / ".dvc/cache/files/md5").glob("??/*"):
        if path.suffix != ".tmp":
            content = hashlib.md5(path.read_bytes()).hexdigest()
            assert content == (path.parent.name + path.name).removesuffix(".dir")


def check_told(failed: subprocess.CompletedProcess[str], *words: str) -> None:
    """It failed, in words that name what is missing, and in no traceback."""
    assert failed.returncode != 0, failed.stdout + failed.stderr
    assert "Traceback" not in failed.stderr
    errors = [line for line in failed.stderr.splitlines() if line.startswith("ERROR:")]
    assert errors, failed.stderr
    assert any(word in failed.stderr for word in words), failed.stderr


def test_remotes_of_this_repository_are_verified() -> None:
    """By default DVC believes what a remote sends: a broken object would end in the cache under a good name."""
    config = configparser.ConfigParser()
    config.read_string((ROOT / ".dvc/config").read_text().replace("    ", ""))
    remotes = [name for name in config.sections() if "remote" in name]
    assert remotes
    assert all(config.getboolean(name, "verify", fallback=False) for name in remotes)


@pytest.mark.slow
@pytest.mark.services
def test_pushed_is_pulled(pushable: Path, remote: Remote, tmp_path: Path) -> None:
    truth = outputs(pushable)
    assert len(truth) == 6
    here = clone(pushable, tmp_path / "here", remote)
    shutil.copytree(pushable / ".dvc/cache", here / ".dvc/cache")
    pushed = dvc(here, remote, "push", *STAGES)
    assert pushed.returncode == 0, pushed.stderr
    assert remote.read(recorded(pushable, WEIGHTS)) == truth[WEIGHTS]
    assert dvc(here, remote, "push", *STAGES).stdout.strip() == "Everything is up to date."

    there = clone(pushable, tmp_path / "there", remote)
    pulled = dvc(there, remote, "pull", *STAGES)
    assert pulled.returncode == 0, pulled.stderr
    assert outputs(there) == truth
    # Nothing to do: `download` alone, whose archives no remote has.
    assert {line for line in call(there, "dvc", "repro", *STAGES).stdout.splitlines() if line.startswith(">")} == {
        "> python -m pipeline.download voc"
    }

    # Broken objects: one byte is another; half of it; of a folder, half of the list of its files.
    good = {path: remote.read(path) for path in (recorded(pushable, WEIGHTS), recorded(pushable, "data/voc"))}
    (one, folder) = good
    flipped = good[one][:1000] + bytes([good[one][1000] ^ 1]) + good[one][1001:]
    broken = ((one, flipped, WEIGHTS), (one, good[one][:1000], WEIGHTS), (folder, good[folder][:90], Path(folder).name))
    for number, (path, content, named) in enumerate(broken):
        remote.write(path, content)
        other = clone(pushable, tmp_path / f"broken{number}", remote)
        check_told(dvc(other, remote, "pull", *STAGES), named)
        check_only_whole(other, truth)
        assert outputs(other) != truth
        remote.write(path, good[path])
        again = dvc(other, remote, "pull", *STAGES)
        assert again.returncode == 0, again.stderr
        assert outputs(other) == truth


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.parametrize("remote", ["ssh", "s3"], indirect=True)
def test_remote_gone_in_the_middle(pushable: Path, remote: Remote, tmp_path: Path) -> None:
    truth = outputs(pushable)
    here = clone(pushable, tmp_path / "here", remote)
    shutil.copytree(pushable / ".dvc/cache", here / ".dvc/cache")
    assert dvc(here, remote, "push", *STAGES).returncode == 0
    assert remote.line
    there = clone(pushable, tmp_path / "there", remote)
    remote.line.cut_after(len(truth[WEIGHTS]))
    check_told(dvc(there, remote, "pull", *STAGES), "failed to transfer", "failed to connect")
    assert remote.line.dead
    check_only_whole(there, truth)
    assert outputs(there) != truth
    remote.line.cut_after(None)
    again = dvc(there, remote, "pull", *STAGES)
    assert again.returncode == 0, again.stderr
    assert outputs(there) == truth
