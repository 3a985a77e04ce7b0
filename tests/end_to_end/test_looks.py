"""Snakemake's looks (-n, --summary, --dag): they write nothing, wait for nobody and say what a run would do."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import small_project
from small_project import TINY, call, environment, git, start

MADE = "weights/resnet50.safetensors"
DRY_RUN = ("snakemake", "--dry-run", "--", MADE)
NOTHING = "Nothing to be done"
SLOW = pytest.mark.slow
LOOKS = (
    DRY_RUN,
    ("snakemake", "--summary", "--", MADE),
    ("snakemake", "--detailed-summary", "--", MADE),
    ("snakemake", "--dag", "--", MADE),
    ("snakemake", "--rulegraph", "--", MADE),
    ("snakemake", "--list-rules"),
    ("snakemake", "--lint"),
)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which nothing has run; DVC has not been asked, either."""
    folder = small_project.make(tmp_path_factory.mktemp("fresh"), TINY)
    shutil.rmtree(folder / ".dvc/tmp", ignore_errors=True)
    return folder


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which one stage and the settings have run, and DVC was told."""
    folder = small_project.make(tmp_path_factory.mktemp("whole"), TINY)
    call(folder, "snakemake", "--cores", "1", "--", MADE)
    return folder


def state(project: Path) -> dict[str, tuple[str, int]]:
    """Each file's content and time; but for byte code, which every process of Python writes."""
    found = {}
    for folder, folders, names in os.walk(project):
        folders[:] = [name for name in folders if name not in (".git", "__pycache__")]
        for name in (*names, *folders):
            path = Path(folder, name)
            about = path.lstat()
            content = hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else "folder"
            found[str(path.relative_to(project))] = content, 0 if path.is_dir() else about.st_mtime_ns
    return found


def look(project: Path, *command: str) -> str:
    """Let a command look at the project; return what it said."""
    before = state(project)
    done = call(project, *command, check="--lint" not in command)
    assert state(project) == before
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    "command", [*LOOKS[:2], *(pytest.param(command, marks=SLOW) for command in LOOKS[2:])], ids=lambda it: it[1]
)
def test_a_look_at_a_fresh_folder_writes_nothing(fresh: Path, command: tuple[str, ...]) -> None:
    look(fresh, *command)


@SLOW
def test_a_report_writes_itself_only(whole: Path, tmp_path: Path) -> None:
    look(whole, "snakemake", "--report", str(tmp_path / "report.html"), "--", MADE)
    assert (tmp_path / "report.html").is_file()


def test_a_dry_run_says_what_a_run_would_do(whole: Path) -> None:
    """The states in which a run first makes times or dvc.lock right: the look sees them as the run would."""
    assert NOTHING in look(whole, *DRY_RUN)
    # A newer input, in which Snakemake finds the content of its last run; and beside it an edit with an old time.
    code = (whole / "pipeline/weights.py").read_text()
    os.utime(whole / "refinenet/config.py")
    assert NOTHING in look(whole, *DRY_RUN)
    (whole / "pipeline/weights.py").write_text(f"{code}# edited\n")
    os.utime(whole / "pipeline/weights.py", (10**9, 10**9))
    assert "pipeline.weights resnet50" in look(whole, *DRY_RUN)
    (whole / "pipeline/weights.py").write_text(code)
    # As after `dvc pull` into a fresh clone: what Snakemake wrote is gone, the inputs are the newest.
    shutil.rmtree(whole / ".snakemake")
    os.utime(whole / MADE, (10**9, 10**9))
    assert NOTHING in look(whole, *DRY_RUN)
    assert not (whole / ".snakemake").exists()
    # Settings that differ, in a value that this stage does not read, and in one that it does.
    profile = whole / "profiles/test.yaml"
    profile.write_text(TINY + "evaluate: {pictures: 1}\n")
    assert NOTHING in look(whole, *DRY_RUN)
    profile.write_text(TINY + "seed: 7\n")
    assert "pipeline.weights resnet50" in look(whole, *DRY_RUN)
    profile.write_text(TINY)
    # A clock that was set back.
    os.utime(whole / "pipeline/weights.py", (time.time() + 9000,) * 2)
    assert NOTHING in look(whole, *DRY_RUN)
    # An edit with an old time, which only DVC sees.
    (whole / "pipeline/weights.py").write_text(f"{code}# edited\n")
    os.utime(whole / "pipeline/weights.py", (10**9, 10**9))
    os.utime(whole / MADE)
    assert "pipeline.weights resnet50" in look(whole, *DRY_RUN)
    (whole / "pipeline/weights.py").write_text(code)
    # And the run agrees.
    ran = call(whole, "snakemake", "--cores", "1", "--", MADE)
    assert NOTHING in ran.stdout + ran.stderr


@pytest.fixture
def slow(tmp_path: Path) -> Iterator[Path]:
    """A project whose stage waits, once it has begun, until it is let go on."""
    folder = small_project.make(tmp_path, TINY)
    code = folder / "pipeline/weights.py"
    waits = (
        "    import time\n\n    Path('begun').touch()\n    while not Path('go on').exists():\n        time.sleep(0.1)\n"
    )
    code.write_text(code.read_text().replace("    config = Config(1", f"{waits}    config = Config(1"))
    yield folder
    (folder / "go on").touch()  # whatever has failed, no stage is left behind
    shutil.rmtree(folder, ignore_errors=True)


def test_a_look_at_a_run_does_not_disturb_it(slow: Path) -> None:
    run = start(slow, "snakemake", "--cores", "1", "--", MADE)
    end = time.monotonic() + 500
    while not (slow / "begun").exists():
        assert run.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    for command in LOOKS[:2]:
        assert "another snakemake" not in look(slow, *command)
    assert run.poll() is None, "the run ended before the looks did: nothing was shown"
    (slow / "go on").touch()
    assert run.wait() == 0
    assert NOTHING in look(slow, *DRY_RUN)
    assert "weights@resnet50" in (slow / "dvc.lock").read_text()


def test_a_look_at_a_folder_that_cannot_be_written(fresh: Path, tmp_path: Path) -> None:
    """As in somebody else's home: by another number than root's, in a folder without write permission."""
    other = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
    if os.geteuid() == 0 and subprocess.run([*other, "true"], check=False, capture_output=True).returncode:
        pytest.skip("root writes everywhere, and user namespaces are not to be had")
    folder = tmp_path / "project"
    shutil.copytree(fresh, folder)
    subprocess.run(["chmod", "-R", "a-w", folder], check=True)
    try:
        command = [*(other if os.geteuid() == 0 else []), str(small_project.BIN / "snakemake"), *DRY_RUN[1:]]
        done = subprocess.run(
            command, cwd=folder, env=environment(folder), capture_output=True, text=True, check=False, timeout=500
        )
        assert done.returncode == 0, done.stdout + done.stderr
        assert "pipeline.weights resnet50" in done.stdout
    finally:
        subprocess.run(["chmod", "-R", "u+w", folder], check=True)


def test_killed_while_telling_dvc_nothing_is_lost(whole: Path, tmp_path: Path) -> None:
    """All markers stand until dvc.lock has been written; the next run tells DVC and runs nothing."""
    folder = tmp_path / "project"
    shutil.copytree(whole, folder, symlinks=True)
    (folder / "dvc.lock").unlink()
    kill = f"graph._write_lock = lambda *_: os.kill(os.getpid(), {signal.SIGKILL:d})"
    tell = f"""
import os
from pathlib import Path
from dvc.repo import Repo
from pipeline import graph
repo = Repo(".")
known = [stage for stage in graph.stages(repo) if Path(stage.outputs[0]).exists()]
for stage in known:
    stage.done.parent.mkdir(parents=True, exist_ok=True)
    stage.done.write_text(stage.digest())
{kill}
graph.commit(repo, known)
"""
    done = subprocess.run(
        [small_project.BIN / "python", "-c", tell], cwd=folder, env=environment(folder), check=False, timeout=500
    )
    assert done.returncode == -signal.SIGKILL
    assert not (folder / "dvc.lock").exists()
    assert len(list((folder / ".snakemake/done").iterdir())) == 2
    assert NOTHING in look(folder, *DRY_RUN)
    ran = call(folder, "snakemake", "--cores", "1", "--", MADE)
    assert NOTHING in ran.stdout + ran.stderr
    assert "weights@resnet50" in (folder / "dvc.lock").read_text()
    assert not list((folder / ".snakemake/done").iterdir())


def broken(case: str, folder: Path) -> None:
    match case:
        case "no .git":
            shutil.rmtree(folder / ".git")
        case "no .dvc":
            shutil.rmtree(folder / ".dvc")
        case "dvc.yaml is no YAML":
            (folder / "dvc.yaml").write_text("stages: [\n")
        case "dvc.yaml has an unknown key":
            (folder / "dvc.yaml").write_text("stages: {a: {cmd: b, dep: [c]}}\n")
        case "dvc.lock is no YAML":
            (folder / "dvc.lock").write_text("stages: {a: [\n")
        case "dvc.lock lacks a path":
            (folder / "dvc.lock").write_text("schema: '2.0'\nstages:\n  settings: {cmd: x, outs: [{md5: y}]}\n")
        case "dvc.lock is a folder":
            (folder / "dvc.lock").unlink(missing_ok=True)
            (folder / "dvc.lock").mkdir()
        case ".dvc/config is no config":
            (folder / ".dvc/config").write_text("[core\n")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("no .git", "`git clone` the repository instead, or tell DVC that there is none: `dvc config --local"),
        ("no .dvc", ".dvc: missing"),
        pytest.param("dvc.yaml is no YAML", "dvc.yaml", marks=SLOW),
        pytest.param("dvc.yaml has an unknown key", "dvc.yaml", marks=SLOW),
        pytest.param("dvc.lock is no YAML", "dvc.lock", marks=SLOW),
        ("dvc.lock lacks a path", "dvc.lock"),
        pytest.param("dvc.lock is a folder", "dvc.lock", marks=SLOW),
        pytest.param(".dvc/config is no config", "config", marks=SLOW),
    ],
)
def test_what_dvc_raises_while_the_graph_is_loaded_is_one_line(
    fresh: Path, tmp_path: Path, case: str, words: str
) -> None:
    folder = tmp_path / "project"
    shutil.copytree(fresh, folder)
    broken(case, folder)
    done = call(folder, "snakemake", "--cores", "1", "--", MADE, check=False)
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert words in line
    assert "Traceback" not in done.stderr
    assert 'File "' not in done.stderr


@pytest.mark.parametrize("name", ["my clone", "фото", "a$HOME", "100% #1", "what?"])
@pytest.mark.slow
def test_signs_in_the_path(fresh: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name
    shutil.copytree(fresh, folder)
    call(folder, "snakemake", "--cores", "1", "--", MADE)
    assert NOTHING in look(folder, *DRY_RUN)
    assert call(folder, "dvc", "status", "weights@resnet50").stdout.strip() == "Data and pipelines are up to date."


def test_braces_in_the_path_are_refused(fresh: Path, tmp_path: Path) -> None:
    """DVC's progress bar takes them for fields of its text."""
    folder = tmp_path / "100% {x}"
    shutil.copytree(fresh, folder)
    done = call(folder, *DRY_RUN, check=False)
    assert f"error: {folder}: DVC cannot work in a folder with {{ or }} in its path" in done.stderr


@SLOW
def test_neither_a_home_nor_a_name_is_needed(fresh: Path, tmp_path: Path) -> None:
    """A container with a number that /etc/passwd has not, or a cluster's node without homes."""
    other = ["unshare", "--user", "--map-user=12345", "--map-group=12345"]
    if subprocess.run([*other, "true"], check=False, capture_output=True).returncode:
        pytest.skip("user namespaces are not to be had")
    folder = tmp_path / "project"
    shutil.copytree(fresh, folder)
    variables = environment(folder, HOME="/proc/nohome")
    for name in ("USER", "LOGNAME", "LNAME", "USERNAME", "XDG_CACHE_HOME"):
        variables.pop(name, None)
    command = [*other, str(small_project.BIN / "snakemake"), "--cores", "1", "--", MADE]
    done = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, check=False, timeout=500)
    assert done.returncode == 0, done.stderr
    assert (folder / MADE).is_file()
    del variables["HOME"]  # of a number without a name Snakemake cannot do without: it asks for its settings' folder
    done = subprocess.run(
        command[len(other) :], cwd=folder, env=variables, capture_output=True, text=True, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr


def test_stages_run_under_the_python_of_snakemake(fresh: Path, tmp_path: Path) -> None:
    """Where the environment is not activated, and `python` on the PATH is another one, or none as on Debian."""
    folder = tmp_path / "project"
    shutil.copytree(fresh, folder)
    (tmp_path / "python").symlink_to("/bin/false")
    variables = environment(folder) | {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    done = subprocess.run(
        [small_project.BIN / "snakemake", "--cores", "1", "--", MADE],
        cwd=folder,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_links_into_a_colleagues_cache_are_left_alone(whole: Path, tmp_path: Path) -> None:
    """With cache.type symlink: times are those of the links, and no file of the cache is touched."""
    folder = tmp_path / "project"
    shutil.copytree(whole, folder, symlinks=True)
    call(folder, "dvc", "config", "--local", "cache.type", "symlink")
    call(folder, "dvc", "checkout", "--relink", "weights@resnet50")
    made = folder / MADE
    assert made.is_symlink()
    os.utime(made, (10**9, 10**9))
    os.utime(made, (10**9, 10**9), follow_symlinks=False)
    done = call(folder, "snakemake", "--cores", "1", "--", MADE)
    assert NOTHING in done.stdout + done.stderr
    assert made.stat().st_mtime == 10**9
    assert made.lstat().st_mtime > 10**9


def test_autocrlf_changes_no_byte(tmp_path: Path) -> None:
    if not (small_project.ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    git(tmp_path, "clone", "--quiet", "--config", "core.autocrlf=true", str(small_project.ROOT), "clone")
    for name in ("params.yaml", "dvc.lock", "metrics/nyud/nyud-res50.json"):
        assert b"\r" not in (tmp_path / "clone" / name).read_bytes()
