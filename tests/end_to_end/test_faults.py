"""What goes wrong on real machines, each tried: nothing is lost, nothing half-made has a final name, one clear line."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
import small_project
import yaml
from filelock import FileLock
from small_project import BIN, TINY, call, git

# Loaded by every Python that finds it: right before a file or folder would get its final name, Ctrl-C.
INTERRUPTED = """
import os, signal, sys
def hook(event, arguments):
    # In a stage: Snakemake, which reads the graph, writes files, too.
    if event == "os.rename" and str(arguments[0]).endswith(".part") and "-m" in sys.orig_argv:
        if os.environ["INTERRUPT"] == "group":
            os.killpg(0, signal.SIGINT)
        else:
            os.kill(os.getpid(), signal.SIGINT)
if os.environ.get("INTERRUPT"):
    sys.addaudithook(hook)
"""
SNAKEMAKE = ("snakemake", "--cores", "1", "--", "data/voc")
ENGINES = {"dvc": ("dvc", "repro", "prepare@voc"), "snakemake": SNAKEMAKE}
COMMIT = ("-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "--quiet", "--message", "base")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which everything for VOC's table is made."""
    project = small_project.make(tmp_path_factory.mktemp("finished"), TINY)
    call(project, "snakemake", "--cores", "2", "--", "results/voc_table.csv")
    return project


@pytest.fixture
def project(finished: Path, tmp_path: Path) -> Path:
    """A copy of it, with all times as they were."""
    return shutil.copytree(finished, tmp_path / "project", symlinks=True)


def outputs(project: Path, *paths: str) -> dict[str, bytes]:
    """The files at `paths`, or in the folders there."""
    found = [file for path in paths for file in (project / path, *sorted((project / path).rglob("*")))]
    return {str(f.relative_to(project)): f.read_bytes() for f in found if f.is_file() and f.name[0] != "."}


def isolated(project: Path, prepare: str, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command with mounts of its own, which `prepare` makes and which are gone when it ends."""
    if subprocess.run(["unshare", "-rm", "true"], check=False, capture_output=True).returncode:
        pytest.skip("no namespaces for mounts here")
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(project)}
    run = ["unshare", "-rm", "sh", "-ec", f'{prepare}\nexec "$@"', "sh", *command]
    return subprocess.run(run, cwd=project, env=environment, capture_output=True, text=True, check=False, timeout=500)


def check_one_line(failed: subprocess.CompletedProcess[str], *words: str) -> None:
    """It failed, and its last words are one line for the user."""
    told = failed.stdout + failed.stderr
    assert failed.returncode != 0, told
    assert "Traceback" not in told
    assert 'File "' not in told
    lines = [line for line in told.splitlines() if line.lower().startswith("error:")]
    assert any(all(word in line for word in words) for line in lines), told


def check_settled(project: Path) -> None:
    """Neither engine finds anything to do."""
    assert call(project, "dvc", "status", "--json", "prepare@voc").stdout.strip() == "{}"
    run = call(project, *SNAKEMAKE)
    assert "Nothing to be done" in run.stdout + run.stderr


@pytest.mark.parametrize("engine", ENGINES)
def test_disk_full_while_caching(project: Path, engine: str) -> None:
    truth = outputs(project, "data/voc")
    shutil.rmtree(project / ".dvc/cache")
    shutil.rmtree(project / "data/voc")
    small = "mkdir -p .dvc/cache; mount -t tmpfs -o size=64k none .dvc/cache"
    full = isolated(project, small, ENGINES[engine])
    assert "No space left on device" in full.stderr
    if engine == "snakemake":  # of a folder that is not cached `dvc repro` says so, and yet ends with 0
        check_one_line(full, "data/voc: made, but could not be stored in DVC's cache")
    assert outputs(project, "data/voc") == truth
    call(project, *ENGINES[engine])
    assert outputs(project, "data/voc") == truth
    check_settled(project)
    for path in (project / ".dvc/cache/files/md5").glob("??/*"):
        md5 = hashlib.md5(path.read_bytes()).hexdigest()
        assert md5 == (path.parent.name + path.name).removesuffix(".dir")


@pytest.mark.parametrize("engine", ENGINES)
def test_broken_object_in_the_cache(project: Path, engine: str) -> None:
    """DVC goes by the rights and times of files; what they hold is looked at by a command of ours."""
    truth = outputs(project, "data/voc")
    check = ("python", "-m", "pipeline.verify")
    assert "all files match dvc.lock" in call(project, *check).stdout.splitlines()
    largest = max((project / "data/voc").glob("*.arrow"), key=lambda path: path.stat().st_size)
    md5 = hashlib.md5(largest.read_bytes()).hexdigest()
    broken = project / ".dvc/cache/files/md5" / md5[:2] / md5[2:]
    content = bytearray(broken.read_bytes())
    content[1000] ^= 1
    broken.chmod(0o644)
    broken.write_bytes(content)
    broken.chmod(0o444)
    shutil.rmtree(project / "data/voc")
    call(project, "dvc", "checkout", "prepare@voc")  # brings it as it is
    assert outputs(project, "data/voc") != truth
    found = call(project, *check, check=False)
    check_one_line(found, "data/voc", "`dvc pull` or `dvc repro`")
    assert md5[2:] in found.stdout
    assert not broken.exists()
    call(project, *ENGINES[engine])
    assert outputs(project, "data/voc") == truth
    call(project, *check)
    check_settled(project)


@pytest.mark.parametrize("engine", ENGINES)
def test_read_only_data_folder(project: Path, engine: str) -> None:
    truth = outputs(project, "data/voc")
    (project / "pipeline/prepare.py").open("a").write("# edited\n")
    read_only = "mount --bind data data; mount -o remount,ro,bind data"
    refused = isolated(project, read_only, ENGINES[engine])
    if engine == "snakemake":
        assert refused.returncode != 0
        assert "Write-protected output files for rule prepare_voc" in refused.stderr
    else:
        check_one_line(refused, "data/", "Read-only file system")
    call(project, *ENGINES[engine])
    assert outputs(project, "data/voc") == truth
    check_settled(project)
    if engine == "snakemake":
        # Up to date, but older than the code, as after a fresh clone beside a shared folder of data.
        (project / "pipeline/prepare.py").touch()
        check_one_line(isolated(project, read_only, SNAKEMAKE), "data/voc: the content is up to date", "Read-only")


def test_two_at_once_in_one_clone(project: Path) -> None:
    with FileLock(project / ".snakemake/refinenet.lock"):
        second = call(project, *SNAKEMAKE, check=False)
    check_one_line(second, "error: another snakemake is at work in this folder; wait for it, then again")
    check_settled(project)


def edit(project: Path, path: str, when: str) -> None:
    """Change what a source file does not say to anybody, and give the file a time."""
    with (project / path).open("a") as file:
        file.write(f"# edited {when}\n")
    subprocess.run(["touch", "-d", when, project / path], check=True)


def test_clock_set_back(project: Path) -> None:
    """Files of the future and changes that look older than what was made: each runs what it must, once."""

    def ran() -> set[str]:
        run = call(project, *SNAKEMAKE)
        told = (run.stdout + run.stderr).splitlines()
        check_settled(project)
        return {found[1] for line in told if (found := re.match(r"\[\d+/\d+\] (\w+ \w+), ", line))}

    edit(project, "pipeline/prepare.py", "3 days")
    assert ran() == {"prepare voc"}
    edit(project, "pipeline/prepare.py", "3 days ago")
    assert ran() == {"prepare voc"}
    for path in (project / "data").rglob("*"):
        subprocess.run(["touch", "-h", "-d", "3 days", path], check=True)
    assert ran() == set()
    for path in (project / "data").rglob("*"):
        subprocess.run(["touch", "-h", "-d", "3 days", path], check=True)
    edit(project, "pipeline/prepare.py", "now")
    assert ran() == {"prepare voc"}
    profile = project / "profiles/test.yaml"
    profile.write_text(TINY.replace("train: 6", "train: 5"))
    subprocess.run(["touch", "-d", "3 days ago", profile], check=True)
    assert ran() == {"download voc", "prepare voc"}


def test_ctrl_c_at_every_stage(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dvc.repo import Repo

    from pipeline import graph

    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(INTERRUPTED)
    monkeypatch.chdir(project)
    done = [stage for stage in graph.stages(Repo(project)) if all(Path(path).exists() for path in stage.outputs)]
    assert {stage.address.partition("@")[0] for stage in done} >= {
        *("settings", "download", "prepare", "weights", "train", "evaluate", "table-voc")
    }
    # One training and what is made from it; the others are no different. MLflow's own tests interrupt its runs.
    for stage in (stage for stage in done if not stage.address.endswith(("res152", "res50-demo"))):
        truth = outputs(project, *stage.outputs)
        for path in stage.outputs:
            if Path(path).is_dir():
                shutil.rmtree(path)
            else:
                Path(path).unlink()
        command = stage.command.split()
        modules = f"{tmp_path / 'hook'}:{project}"
        stopped = call(project, *command, check=False, INTERRUPT="process", PYTHONPATH=modules, RANK="1")
        assert (stopped.returncode, stopped.stderr.splitlines()[-1]) == (130, "interrupted"), stopped.stderr
        assert "Traceback" not in stopped.stderr
        assert outputs(project, *stage.outputs) == {}, stage.address
        assert not [part for path in stage.outputs for part in Path(path).parent.glob(".*.part")], stage.address
        call(project, *command, RANK="1")
        assert outputs(project, *stage.outputs) == truth, stage.address


@pytest.mark.parametrize("engine", ENGINES)
def test_ctrl_c_of_a_whole_run(project: Path, tmp_path: Path, engine: str) -> None:
    """As a terminal sends it: to the engine, the shell and the stage at once."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(INTERRUPTED)
    truth = outputs(project, "data/voc")
    with (project / "pipeline/prepare.py").open("a") as file:
        file.write("# edited\n")
    program, *arguments = ENGINES[engine]
    path = f"{BIN}:{os.environ['PATH']}"
    environment = {**os.environ, "PATH": path, "INTERRUPT": "group", "PYTHONPATH": f"{tmp_path / 'hook'}:{project}"}
    stopped = subprocess.run(
        [BIN / program, *arguments],
        cwd=project,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
        start_new_session=True,
    )
    told = stopped.stdout + stopped.stderr
    assert stopped.returncode not in (0, None), told
    # Snakemake speaks for its stages: the pipe through which they speak is interrupted, too.
    assert {"dvc": "interrupted\n", "snakemake": "Terminating processes on user request"}[engine] in told
    assert "Traceback" not in told
    assert outputs(project, "data/voc").items() <= truth.items()
    call(project, *ENGINES[engine])
    assert outputs(project, "data/voc") == truth
    check_settled(project)


def test_eight_jobs_and_dvc_status_at_once(tmp_path: Path) -> None:
    names = ["voc", "context", "person", "nyud", "sunrgbd", "cityscapes", "ade20k", "coco"]
    (tmp_path / "project").mkdir()
    project = small_project.make(tmp_path / "project", TINY)
    params = yaml.safe_load((project / "params.yaml").read_text())
    (project / "params.yaml").write_text(yaml.safe_dump({**params, "datasets": names}))
    git(project, "add", "--all")
    git(project, *COMMIT)
    targets = [f"data/{name}" for name in names]
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(project)}
    log = tmp_path / "log"
    with log.open("w") as file:
        command = [BIN / "snakemake", "--cores", "8", "--", *targets]
        run = subprocess.Popen(command, cwd=project, env=environment, stdout=file, stderr=subprocess.STDOUT)
        asked = 0
        while run.poll() is None:
            status = call(project, "dvc", "status", check=False)
            assert status.returncode == 0, status.stderr
            assert "lock" not in status.stderr
            asked += 1
    told = log.read_text()
    assert run.returncode == 0, told
    assert "Unable to acquire lock" not in told
    assert asked > 2
    assert call(project, "dvc", "status", "--json", *(f"prepare@{name}" for name in names)).stdout.strip() == "{}"
