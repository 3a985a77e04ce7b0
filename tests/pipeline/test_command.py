"""The command `refinenet`: what it says to who does not know it yet, and that it works in any folder."""

from __future__ import annotations

import io
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
import tomllib
import zipfile
from collections.abc import Iterator
from pathlib import Path

import own_files
import own_run
import pytest
import small_project
import yaml

from pipeline import __main__ as command
from pipeline import fit, plan, profile
from pipeline.config import profiles
from pipeline.runtime import cli

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Undo what the dispatcher sets for the whole process."""
    monkeypatch.setattr(sys, "argv", ["refinenet"])
    here = Path.cwd()
    yield
    os.chdir(here)
    cli._prefix, cli._stood = "python -m pipeline.", None


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A clone's files, without code, in profile mini; the working folder."""
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = command.main(words)
    told = capsys.readouterr()
    return code, told.out, told.err


# The six who do not know what to type.


def test_make_without_a_target() -> None:
    told = subprocess.run(["make", "--no-print-directory"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert re.search(r"^make repro +Regenerate every table", told, re.M)
    assert told.splitlines()[-1].endswith("source .venv/bin/activate, then refinenet: one command for all the rest")


def test_without_arguments(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told, _ = run(capsys)
    lines = told.splitlines()
    assert (code, lines[0]) == (0, "usage: refinenet WHAT ...")
    assert lines[-1] == f"here: {project}, profile mini"
    names = [line.split()[0] for line in lines if line.startswith("  ")]
    # In the order of use, and nothing that there is is missing.
    assert [names.index(name) for name in ("add", "fit", "predict", "profile", "trace", "train")] == sorted(
        names.index(name) for name in ("add", "fit", "predict", "profile", "trace", "train")
    )
    files = {file.stem for file in (ROOT / "pipeline").glob("*.py") if '"__main__"' in file.read_text()} - {"__main__"}
    assert set(names) == files | {"tracking"}
    assert max(map(len, lines[:-1])) < 105
    os.chdir("/")
    assert run(capsys)[1].splitlines()[-1] == (
        "here: no project (dvc.yaml, params.yaml, profiles) in this folder or above it; predict, score, serve, export "
        "work anywhere"
    )


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("perdict", "no command 'perdict': did you mean predict? `refinenet --help` lists all"),
        ("Trace", "no command 'Trace': did you mean trace? `refinenet --help` lists all"),
        ("repro", "no command 'repro': did you mean `make repro`? `refinenet --help` lists all"),
        ("xyzzy", "no command 'xyzzy': `refinenet --help` lists all"),
        ("--verbose", "no option '--verbose': `refinenet --help` lists all"),
    ],
)
def test_an_unknown_command(word: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, word) == (2, "", f"refinenet: error: {said}\n")


@pytest.mark.parametrize("verb", ["trace", "evaluate", "record"])
def test_an_unknown_experiment(verb: str, project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, told, error = run(capsys, verb, "voc-res11")
    assert (code, told) == (1, "")
    assert re.fullmatch(r"error: .*'voc-res11': did you mean voc-res101\? `refinenet trace` lists them\n", error), error


@pytest.mark.parametrize("words", [("predict", "a.png", "--model"), ("serve",), ("export", "--to", "a.onnx")])
def test_a_missing_model(words: tuple[str, ...], project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("models").mkdir()
    Path("models/voc-res101.safetensors").touch()
    Path("a.png").touch()
    code, told, error = run(capsys, *words, "models/voc-res11.safetensors")
    assert (code, told) == (1, "")
    assert error == (
        "error: models/voc-res11.safetensors: no such file: did you mean models/voc-res101.safetensors? Else "
        "`train voc-res11` makes it, or `dvc pull train`\n"
    )


def test_no_project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(capsys, "verify") == (
        1,
        "",
        f"error: {tmp_path}: no project here or above, `refinenet verify` needs one: a folder with dvc.yaml, "
        "params.yaml, profiles, as `git clone` makes it\n",
    )
    with pytest.raises(SystemExit, match="0"):
        raise SystemExit(command.main(["verify", "--help"]))  # help needs none
    assert capsys.readouterr().out.startswith("usage: refinenet verify [-h]")


# The same commands, from any folder.


def test_code_of_another_clone_is_not_mixed_in(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "pipeline").mkdir()
    code, _, error = run(capsys, "settings")
    assert (code, error.startswith(f"error: {project}: has code of its own, `refinenet` is of {ROOT};")) == (1, True)
    assert not (project / "settings.json").exists()


def test_from_a_folder_below_the_root(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (project / "photos/2024").mkdir(parents=True)
    os.chdir(project / "photos/2024")
    code, told, _ = run(capsys, "settings")
    assert (code, told) == (0, "settings.json: profile mini, 24 trainings\n")
    assert (project / "settings.json").is_file()


def test_paths_are_relative_to_where_one_stands(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    below = project / "photos/2024"
    for name in ("1", "2", "3", "4", "5"):
        image, mask = own_files.draw(name, 48, 64)
        own_files.save(image, below / "images" / f"{name}.jpg")
        own_files.save(mask, below / "masks" / f"{name}.png")
    os.chdir(below)
    words = ("add", "leaves", "--images", "images", "--masks", "../2024/masks", "--base", "mini", "--yes")
    code, told, error = run(capsys, *words)
    assert code == 0, error
    assert told.splitlines()[-1] == "next: refinenet fit leaves"
    own = yaml.safe_load((project / "profiles/leaves.yaml").read_text())["own"]["leaves"]
    assert (own["images"], own["masks"]) == ("photos/2024/images", "photos/2024/masks")


def test_user_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.user_path("a/b") == Path("a/b")
    cli.called_as_refinenet(tmp_path / "below/deep")
    for text, path in (("a", "below/deep/a"), ("../../a", "a"), ("-", "-"), ("/a", "/a"), ("../../../a", "../a")):
        assert cli.user_path(text) == Path(path)


def test_help_imports_nothing_that_takes_time() -> None:
    """PyTorch, numpy, pydantic and YAML cost seconds on a cold disk; a page of text needs none of them."""
    code = (
        "import sys, pipeline.__main__ as m; m.main(['--help'])\n"
        "slow = {'torch', 'numpy', 'pydantic', 'yaml', 'dvc', 'mlflow', 'PIL', 'tqdm'}\n"
        "assert not slow & set(sys.modules), slow & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def test_the_wheel_installs_the_command(tmp_path: Path) -> None:
    builder = runpy.run_module("hatchling.builders.wheel")["WheelBuilder"]
    (wheel,) = builder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        (entry,) = [name for name in archive.namelist() if name.endswith("/entry_points.txt")]
        assert "refinenet = pipeline.__main__:main" in archive.read(entry).decode().splitlines()
        assert {"pipeline/__main__.py", "pipeline/fit.py", "pipeline/trace.py"} <= set(archive.namelist())
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert scripts == {"refinenet": f"{command.__name__}:{command.main.__name__}"}


def test_colours_are_for_terminals(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stderr", Terminal())
    assert cli.marked("error: a: b") == "\033[31merror:\033[0m a: b"
    assert cli.marked("warning: a") == "\033[33mwarning:\033[0m a"
    assert cli.marked("errors: 2") == "errors: 2"
    monkeypatch.setenv("NO_COLOR", "1")
    assert cli.marked("error: a") == "error: a"
    monkeypatch.delenv("NO_COLOR")
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert cli.marked("error: a") == "error: a"


# fit


@pytest.fixture
def leaves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project whose data set leaves has results, in a profile without a plan."""
    own_run.write_run(tmp_path)
    shutil.copy(ROOT / "dvc.yaml", tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_fit_ends_in_scores_and_the_page(
    leaves: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = []
    monkeypatch.setattr(fit, "_snakemake", lambda cores, page: asked.append((cores, page)) or 0)
    assert fit.main(["leaves", "--cores", "3"]) == 0
    assert asked == [(3, Path("results/leaves_report.html"))]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "leaves-res101, single-scale: mean IoU 37.5 on 12 images of leaves val"
    assert lines[-2:] == [
        f"page: {(leaves / 'results/leaves_report.html').as_uri()}",
        "next: refinenet predict PHOTO --model models/leaves-res101.safetensors",
    ]
    assert fit.main(["leaves", "--hours", "1"]) == 1
    assert "profiles/own.yaml: has no `plan`" in capsys.readouterr().err
    assert fit.main(["leafs"]) == 1
    assert "own has no 'leafs': did you mean leaves? expected one of leaves" in capsys.readouterr().err
    monkeypatch.setattr(fit, "_snakemake", lambda cores, page: 1)
    assert fit.main(["leaves"]) == 1
    assert "snakemake ended with exit code 1" in capsys.readouterr().err


def test_fit_plans_once(leaves: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupted training goes on: the same command does not measure the machine again."""
    values = yaml.safe_load((leaves / "profiles/own.yaml").read_text())
    (leaves / "profiles/own.yaml").write_text(yaml.safe_dump(values | {"base": "fit"}))
    planned: list[float | None] = []

    def make(name: str, hours: float | None) -> None:
        planned.append(hours)
        profiles.plan_file(name).parent.mkdir(exist_ok=True)
        profiles.plan_file(name).write_text(f'{{"values": {{}}, "hours": {hours or 1}}}')

    monkeypatch.setattr(plan, "run", make)
    monkeypatch.setattr(fit, "_snakemake", lambda cores, page: 0)
    monkeypatch.setattr(fit, "_ending", lambda name, page: [])
    for words in ((), (), ("--hours", "1"), ("--hours", "2"), ("--hours", "2"), (), ("--new-plan",)):
        assert fit.main(["leaves", *words]) == 0
    assert planned == [None, 2.0, None]


FAKE = """\
import os, signal, sys, time
def stop(number, frame):
    open("stopped", "w").write(str(number))
    sys.exit(1)
signal.signal(signal.SIGTERM, stop)
open("asked.part", "w").write("\\n".join([*sys.argv[1:], os.environ["PATH"].split(":")[0]]))
os.rename("asked.part", "asked")
time.sleep(600)
"""


def test_sigterm_reaches_snakemake_and_ends_as_try_again(leaves: Path) -> None:
    (leaves / "snakemake.py").write_text(FAKE)
    environment = {**os.environ, "PYTHONPATH": f"{leaves}:{ROOT}"}
    arguments = [sys.executable, "-m", "pipeline", "fit", "leaves", "--cores", "2"]
    process = subprocess.Popen(arguments, cwd=leaves, env=environment, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while not (leaves / "asked").exists():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.05)
    assert (leaves / "asked").read_text().splitlines() == [
        *("--cores", "2", "--", "results/leaves_report.html"),
        str(Path(sys.executable).parent),
    ]
    process.terminate()
    _, told = process.communicate(timeout=300)
    assert (process.returncode, told) == (75, "terminated: the same command goes on where it stopped\n")
    assert (leaves / "stopped").read_text() == str(int(signal.SIGTERM))


@pytest.mark.slow
def test_from_two_folders_to_a_page(tmp_path: Path) -> None:
    """`add` and `fit` from a folder below the root, without an activated environment; the second `fit` does nothing."""
    project = small_project.make(tmp_path / "project", small_project.TINY)
    below = project / "photos"
    for name in map(str, range(8)):
        image, mask = own_files.draw(name, 48, 64)
        own_files.save(image, below / "images" / f"{name}.jpg")
        own_files.save(mask, below / "masks" / f"{name}.png")

    def call(*words: str) -> list[str]:
        environment = small_project.environment(project)
        environment["PATH"] = environment["PATH"].removeprefix(f"{small_project.BIN}:")
        arguments = [sys.executable, "-m", "pipeline", *words]
        done = subprocess.run(arguments, cwd=below, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.splitlines()

    call("add", "leaves", "--images", "images", "--masks", "masks", "--base", "test", "--yes")
    profile = project / "profiles/leaves.yaml"
    profile.write_text(profile.read_text() + "train: {steps: 4, batch_size: 2, crop: 48}\n")
    lines = call("fit", "leaves", "--cores", "2")
    assert re.match(
        r"leaves-res50, single-scale: mean IoU [\d.]+ \(95 % [\d.]+ to [\d.]+\) on \d+ images of", lines[-4]
    )
    assert lines[-2] == f"page: {(project / 'results/leaves_report.html').as_uri()}"
    log = project / ".snakemake/stages/report_own_leaves.log"  # of its last run
    before = log.stat().st_mtime_ns
    assert call("fit", "leaves", "--cores", "2")[-4:] == lines[-4:]
    assert log.stat().st_mtime_ns == before


# profile


def test_profiles_are_listed_and_one_is_in_force(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert profile.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines if not line.startswith("*")][:-1] == sorted(
        file.stem for file in (ROOT / "profiles").glob("*.yaml") if file.stem != "mini"
    )
    assert [line for line in lines if line.startswith("*")] == ["* mini              synthetic images, thin networks"]


def test_switching_changes_one_word(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("params.yaml").read_bytes()
    (project / "profiles/lab.yaml").write_text("base: mini\ntitle: of this lab\nseed: 3\n")
    assert profile.main(["lab", "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert told.startswith("profiles/lab.yaml: of this lab\n")
    assert re.search(r"^  ok +disk ", told, re.M)
    assert Path("params.yaml").read_bytes() == before
    assert profile.main(["lab"]) == 0
    assert Path("params.yaml").read_bytes() == before.replace(b"\nprofile: mini\n", b"\nprofile: lab\n")
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "params.yaml: profile is now lab",
        "next: snakemake --cores all",
    ]


@pytest.mark.parametrize("word", ["mini # as cloned", '"mini"', "'mini'  # quoted"])
def test_what_stands_behind_the_word_stays(word: str) -> None:
    text = f"# profile: one\na: 1\nprofile: {word}\nb: {{profile: 2}}\n"
    changed = profile.switched(text, "paper")
    assert yaml.safe_load(changed) == yaml.safe_load(text) | {"profile": "paper"}
    assert changed == text.replace(word.partition(" ")[0], "paper")


def test_a_profile_that_does_not_fit_is_not_switched_to(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = Path("params.yaml").read_bytes()
    (project / "profiles/lab.yaml").write_text("base: mini\nsources:\n  voc: rendered\ntrain: {stepz: 3}\n")
    assert profile.main(["lab"]) == 1
    assert "stepz" in capsys.readouterr().err
    assert profile.main(["papre"]) == 1
    assert "no profile 'papre': did you mean paper? expected one of " in capsys.readouterr().err
    assert Path("params.yaml").read_bytes() == before
