"""One graph, two engines: DVC and Snakemake see the same stages, and each finds the other's work done."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import import_graph
import pytest
import small_project
import yaml
from small_project import ROOT, call, git, start

from pipeline import graph
from pipeline.config import resolve

TINY = small_project.TINY.replace("steps: 6", "steps: 12")


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    yield small_project.make(tmp_path, TINY)
    shutil.rmtree(tmp_path, ignore_errors=True)


def planned(project: Path) -> set[str]:
    """The commands that Snakemake would run for VOC's table."""
    out = call(project, "snakemake", "--cores", "2", "--dry-run", "--", "results/voc_table.csv")
    return set(re.findall(r"^Job \d+: python -m pipeline\.(.*)$", out.stdout + out.stderr, re.MULTILINE))


def changed(project: Path) -> set[str]:
    """The stages of VOC's table that DVC holds to be out of date."""
    status = json.loads(call(project, "dvc", "status", "--json", "--with-deps", "table-voc").stdout)
    return set(status)


def digest(project: Path) -> dict[str, bytes]:
    wanted = ("models/*.safetensors", "curves/*.csv", "metrics/*/*.json", "results/voc_table.*")
    return {str(p.relative_to(project)): p.read_bytes() for pattern in wanted for p in sorted(project.glob(pattern))}


def test_snakemake_sees_the_stages_of_dvc(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rules, commands, files and parameter values, as Snakemake parsed them, against DVC's own words."""
    from dvc.repo import Repo
    from snakemake.api import SnakemakeApi
    from snakemake.settings.types import ResourceSettings

    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(graph, "register_engine", lambda: None)
    with SnakemakeApi() as api:
        workflow = api.workflow(resource_settings=ResourceSettings(cores=1), snakefile=ROOT / "Snakefile")._workflow
        rules = {rule.name: rule for rule in workflow.rules if rule.name != "all"}
    stages = [stage for stage in Repo(".").index.stages if not stage.is_data_source]
    resolved = resolve.resolve()
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    loops = {"datasets": 2, "own": 4, "further": 2, "backbones": 1, "pretrainings": 1, "experiments": 2, "tables": 1}
    assert len(rules) == len(stages) == sum(count * len(params[key]) for key, count in loops.items()) + 2
    for stage in stages:
        rule = rules[stage.addressing.replace("@", "_").replace("-", "_")]
        params = dict(rule.params.items())
        assert params["command"] == stage.cmd
        assert rule.shellcmd.startswith("(export PIPELINE_CORES={threads}; {params.command}) ")
        assert {str(o) for o in rule.output} == {o.def_path for o in stage.outs}
        files, values = set(), {}
        for dep in stage.deps:
            if hasattr(dep, "params"):
                for key in dep.params:
                    kind, _, name = key.partition(".")
                    values[key] = resolved[kind][name] if name else resolved[kind]
            else:
                files.add(dep.def_path)
        assert params["values"] == values
        inputs = {str(i) for i in rule.input} - {str(i) for i in rule.input if ".snakemake" in str(i)}
        for file in files:
            assert file in inputs or any(i.startswith(f"{file}/") for i in inputs), (stage.addressing, file)
        for given in inputs:
            assert given in files or any(given.startswith(f"{file}/") for file in files), (stage.addressing, given)


def test_lint() -> None:
    """Snakemake's own lint; the environment is the locked one of the Makefile, not one of conda for each rule."""
    lints = call(ROOT, "snakemake", "--lint", check=False)
    titles = {line.strip() for line in (lints.stdout + lints.stderr).splitlines() if line.startswith("    * ")}
    assert titles <= {"* Specify a conda environment or container for each rule.:"}


# Rooms and files that decide no byte of any result. What is fetched, settings.json names with its checksum.
NEUTRAL = frozenset(
    {
        *("pipeline.config", "pipeline.fetch", "pipeline.preflight", "pipeline.runtime", "pipeline.tracking"),
        *("refinenet.atomic", "refinenet.device", "refinenet.errors"),
    }
)
# What a stage may import without depending on it: others' finished weights are converted by what no training runs, and
# a change of a reader shall not cost days of training; a data set's names go into imported networks, into no backbone;
# the paper's data need nothing of what a user's own do; images are held out and scored where a profile asks for it, and
# a faster inference shall not cost days of training.
LAZY = {
    "train": {"pipeline.convert", "refinenet.inference", "refinenet.metrics"},
    "weights": {"pipeline.datasets"},
    "prepare": {"pipeline.datasets.custom"},
}


def missing_dependencies(stages: dict[str, Any], graph: dict[str, set[str]]) -> dict[str, list[str]]:
    """For each stage of dvc.yaml the modules that its command imports and that are not among its deps."""
    files = {name: str(file.relative_to(ROOT)) for name, file in import_graph.modules().items()}
    missing = {}
    for name, entry in stages.items():
        stage = entry.get("do", entry)
        if stage.get("always_changed"):
            continue  # runs each time, whatever has changed
        module = stage["cmd"].split()[2]
        command = module.removeprefix("pipeline.")
        neutral = NEUTRAL - ({"pipeline.config", "pipeline.fetch"} if command == "settings" else set())
        lazy = LAZY[command] if command in LAZY and name != "prepare-own" else set()
        # The package refinenet imports its network only when asked for it: not by importing a room of it.
        own = {**graph, "refinenet": set()}
        # Drawers and readers are imported by name.
        further = {"download": "pipeline.synthetic.", "prepare": "pipeline.datasets."}.get(name, "?")
        starts = [module, *(one for one in graph if one.startswith(further) and one != "pipeline.datasets.custom")]
        found = set().union(*(import_graph.reached(start, own, frozenset(neutral | lazy)) for start in starts))
        for one in sorted(found - {"pipeline", "refinenet", "pipeline.datasets.custom" if name == "prepare" else ""}):
            if any(one == room or one.startswith(f"{room}.") for room in neutral | lazy):
                continue
            if files[one].endswith("__init__.py") and len(ast.parse((ROOT / files[one]).read_text()).body) == 1:
                continue  # a room's docstring
            deps = [dep.replace("${item}", one.rpartition(".")[2]) for dep in stage["deps"]]
            if not any(files[one] == dep or files[one].startswith(f"{dep}/") for dep in deps):
                missing.setdefault(name, []).append(one)
    return missing


def test_every_import_of_a_stage_is_a_dependency() -> None:
    """What a stage runs, its stage in dvc.yaml depends on; else a change of code would not rerun it."""
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert missing_dependencies(stages, import_graph.imports()) == {}
    stages["settings"]["deps"].remove("pipeline/config")
    stages["train"]["do"]["deps"].remove("refinenet/training")
    found = missing_dependencies(stages, import_graph.imports())
    assert "pipeline.config.schema" in found["settings"]
    assert "refinenet.training.loop" in found["train"]


def test_imports_go_one_way() -> None:
    """No circle, also none hidden in a function or from all but a type checker; refinenet/ imports no pipeline/."""
    graph = import_graph.imports(typed=True)
    assert import_graph.circles(graph) == []
    assert not [one for one in graph if one.startswith("refinenet") for other in graph[one] if other.startswith("pipe")]
    stages = {f"pipeline.{name}" for name in ("settings", "download", "prepare", "weights", "train", "evaluate")}
    stages |= {"pipeline.tabulate", "pipeline.report"}
    assert not [(one, other) for one in stages for other in graph[one] & stages]


@pytest.mark.slow
def test_each_engine_finds_the_others_work_done(project: Path) -> None:
    call(project, "snakemake", "--cores", "2", "--", "results/voc_table.csv")
    assert changed(project) == set()
    assert planned(project) == set()
    by_snakemake = digest(project)
    assert len(by_snakemake) == 12

    # DVC agrees, and finds the same bytes when it runs all of it itself.
    before = (project / "dvc.lock").read_bytes()
    again = call(project, "dvc", "repro", "table-voc")
    assert "Running stage" not in again.stdout
    call(project, "dvc", "repro", "--force", "--single-item", "train@voc-res101")
    assert digest(project) == by_snakemake
    assert (project / "dvc.lock").read_bytes() == before
    assert planned(project) == set()

    # A parameter that only the evaluation reads: both rerun evaluation and table, and DVC's rerun satisfies Snakemake.
    profile = project / "profiles" / "test.yaml"
    profile.write_text(TINY + "evaluate: {pictures: 1}\n")
    evaluations = {f"evaluate voc-{name}" for name in ("res50-demo", "res101", "res152")}
    assert planned(project) == {*evaluations, "tabulate voc"}
    call(project, "dvc", "repro", "table-voc")
    assert planned(project) == set()
    assert changed(project) == set()

    # And back: nothing is trained again.
    profile.write_text(TINY)
    back = call(project, "dvc", "repro", "table-voc")
    assert "pipeline.train" not in back.stdout
    assert digest(project) == by_snakemake


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["dvc", "snakemake"])
def test_killed_and_started_again_ends_in_the_same_bytes(project: Path, engine: str) -> None:
    command = {
        "dvc": ("dvc", "repro", "train@voc-res101"),
        "snakemake": ("snakemake", "--cores", "1", "--", "models/voc-res101.safetensors"),
    }[engine]
    profile = project / "profiles" / "test.yaml"
    profile.write_text(TINY.replace("steps: 12", "steps: 60") + "running: {checkpoint_minutes: 0}\n")
    # A shell that does not turn into its command, but stays between the engine and the stage.
    shell = project / "slow.sh"
    shell.write_text('#!/bin/sh\n/bin/sh "$@"\nexit $?\n')
    shell.chmod(0o755)
    process = start(project, *command, SHELL=str(shell))
    checkpoints = project / "checkpoints" / "voc-res101"
    end = time.monotonic() + 600
    while not list(checkpoints.glob("step-*.pt")):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while any(Path(cwd).resolve() == project for cwd in Path("/proc").glob("[0-9]*/cwd") if os.access(cwd, os.R_OK)):
        assert time.monotonic() < end, "the stage outlives its engine"
        time.sleep(0.1)
    left = sorted(checkpoints.glob("step-*.pt"))
    assert left
    assert not (project / "models" / "voc-res101.safetensors").exists()
    time.sleep(1.0)
    assert sorted(checkpoints.glob("step-*.pt")) == left, "the stage went on after its engine was killed"

    call(project, *command)
    resumed = digest(project)
    assert not checkpoints.exists()
    assert len(resumed) == 2
    curve = resumed["curves/voc-res101.csv"].decode().splitlines()
    assert [int(line.split(",")[0]) for line in curve[1:]] == list(range(1, 61))

    for file in resumed:
        (project / file).unlink()
    shutil.rmtree(project / ".dvc" / "cache")
    (project / "dvc.lock").unlink(missing_ok=True)
    call(project, *command)
    assert digest(project) == resumed


@pytest.mark.slow
def test_everything_comes_from_the_starter_remote(tmp_path: Path) -> None:
    """On a fresh clone, offline: `dvc pull`, nothing more, and then neither engine has anything to do."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(ROOT), str(clone))
    call(clone, "dvc", "pull", "train@voc-res101")
    assert [p.name for p in (clone / "models").glob("*.safetensors")] == ["voc-res101.safetensors"]
    call(clone, "dvc", "pull")
    experiments = yaml.safe_load((clone / "params.yaml").read_text())["experiments"]
    assert sorted(p.stem for p in (clone / "models").glob("*.safetensors")) == sorted(experiments)
    call(clone, "python", "-m", "pipeline.verify")
    assert call(clone, "dvc", "repro").stdout.splitlines()[-1] == "Data and pipelines are up to date."
    planned = call(clone, "snakemake", "--cores", "1", "--dry-run")
    assert "Nothing to be done" in planned.stdout + planned.stderr
    done = call(clone, "snakemake", "--cores", "1")
    assert "Nothing to be done" in done.stdout + done.stderr
    status = subprocess.run(["git", "status", "--short"], cwd=clone, check=True, capture_output=True, text=True)
    assert status.stdout == ""
    assert not (clone / "data/raw/voc").exists(), "the archives were drawn, which nobody needs"


def test_a_stage_whose_output_has_another_name_is_out_of_date() -> None:
    """dvc.lock has the command and the values; what it says was made is not what the stage makes now."""
    stage = graph.Stage("a@b", "a_b", "make it", (), (), ("data/b.json",), {"a.b": 1}, {}, True)
    entry: dict[str, Any] = {
        "cmd": "make it",
        "params": {"settings.json": {"a.b": 1}},
        "outs": [{"path": "data/b.json"}],
    }
    assert graph._matches_lock(entry, stage)
    assert not graph._matches_lock(entry | {"outs": [{"path": "data/b"}]}, stage)


def test_settings_read_as_a_whole_are_an_input_and_single_values_are_not() -> None:
    """A table of one's own data reads settings.json: without an experiment that was removed it is another table."""
    values = {"changed deps": {"settings.json": {"train.a": "modified"}}}
    whole = {"changed deps": {"settings.json": "modified", "data/a": "modified"}}
    assert graph._without_values(values) is None
    assert graph._without_values(whole) == whole
    assert graph._without_values({"changed outs": {"a": "deleted"}}) == {"changed outs": {"a": "deleted"}}
