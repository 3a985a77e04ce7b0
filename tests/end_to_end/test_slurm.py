"""The graph on a SLURM of two nodes (tests/helpers/one_machine_slurm.py), and what the profiles for clusters say."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import one_machine_slurm
import pytest
import small_project
import yaml

ROOT = Path(__file__).resolve().parents[2]
TRAININGS = ("voc-res101", "voc-res152")
# Long enough to be killed on the way, with a checkpoint after each step.
PROFILE = """
base: mini
rendered: {train: 4, val: 2, height: 64, width: 80}
train: {steps: 150, batch_size: 2, crop: 48, log_every: 7, warmup: 0}
running: {checkpoint_minutes: 0}
datasets: {voc: {phases: {pretrain: [], train: []}}}
"""
# Of a machine where nothing takes long: the profile's are for a cluster's. Without a database only squeue knows states.
QUICK = "--slurm-status-command squeue --slurm-init-seconds-before-status-checks 1 --seconds-between-status-checks 1"


def test_profiles_name_options_that_exist() -> None:
    from snakemake.cli import get_argument_parser

    known = {option for action in get_argument_parser()._actions for option in action.option_strings}
    for name in ("slurm", "kubernetes"):
        values = yaml.safe_load((ROOT / "profiles/snakemake" / name / "config.yaml").read_text())
        plugin = values["executor"]
        installed = importlib.util.find_spec(f"snakemake_executor_plugin_{plugin.replace('-', '_')}") is not None
        for key in values:
            assert f"--{key}" in known or (key.startswith(f"{plugin}-") and not installed), f"{name}: {key}"


def skip_without_slurm() -> None:
    if importlib.util.find_spec("snakemake_executor_plugin_slurm") is None:
        pytest.skip("snakemake-executor-plugin-slurm is not installed")
    if absent := one_machine_slurm.missing():
        pytest.skip(f"no SLURM here ({', '.join(absent)}: not found; Debian has them in slurm-wlm and munge)")


@pytest.fixture
def slurm(tmp_path: Path) -> Iterator[dict[str, str]]:
    skip_without_slurm()
    with one_machine_slurm.cluster(tmp_path / "slurm") as more:
        yield more


@pytest.fixture
def roomy(tmp_path: Path) -> Iterator[dict[str, str]]:
    """Each node has a place for two trainings."""
    skip_without_slurm()
    with one_machine_slurm.cluster(tmp_path / "slurm", gpus=2, cpus=16) as more:
        yield more


def until(condition: Callable[[], bool], running: subprocess.Popen[bytes], log: Path) -> None:
    """Wait for something that `running`, which writes `log`, is to bring about."""
    while not condition():
        assert running.poll() is None, log.read_text()
        time.sleep(0.2)


@pytest.mark.slow
@pytest.mark.services
def test_two_nodes_at_once_and_killed_jobs_end_in_the_same_bytes(tmp_path: Path, slurm: dict[str, str]) -> None:
    project = tmp_path / "project"
    project.mkdir()
    small_project.make(project, PROFILE)
    path = f"{project}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    environment = small_project.environment(project, OMP_NUM_THREADS="1", PYTHONPATH=path, **slurm)

    def call(*command: str, folder: Path = project) -> str:
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    models = [f"models/{name}.safetensors" for name in TRAININGS]
    log = tmp_path / "log"

    def jobs(state: str) -> dict[str, dict[str, str]]:
        """Training -> SLURM's words on its job; those in the state `state`."""
        found = {}
        for line in call("scontrol", "show", "job", "--oneliner").splitlines():
            told = dict(pair.split("=", 1) for pair in line.split() if "=" in pair)
            training = told.get("Comment", "").removeprefix("rule_train_").replace("_", "-")
            if training in TRAININGS and told["JobState"] == state:
                found[training] = told
        return found

    command = ["snakemake", *models, "--profile", "profiles/snakemake/slurm", "--cores", "2", *QUICK.split()]
    # Whatever the profile of the project says of GPUs: a cluster's trainings have one each.
    command += ["--set-resources", *(f"train_{name.replace('-', '_')}:gpu=1" for name in TRAININGS)]
    with log.open("wb") as output:
        running = subprocess.Popen(command, cwd=project, env=environment, stdout=output, stderr=subprocess.STDOUT)
        try:
            folders = [project / "checkpoints" / name for name in TRAININGS]
            until(lambda: all(any(folder.glob("step-*.pt")) for folder in folders), running, log)
            at_once = jobs("RUNNING")
            assert set(at_once) == set(TRAININGS), "too few steps for two trainings at once"
            assert {told["NodeList"] for told in at_once.values()} == set(one_machine_slurm.NODES)
            for told in at_once.values():
                assert told["TimeLimit"] == "3-00:00:00"
                assert "mem=16000M" in told["TRES"]
                assert "gpu:1" in told["TresPerJob"]
                assert told["NumCPUs"] == "8"
                assert told["Requeue"] == "1"
            killed, preempted = (at_once[name]["JobId"] for name in TRAININGS)
            call("scancel", "--signal=KILL", "--full", killed)
            call("scontrol", "requeue", preempted)
            again = {"killed": False, "preempted": False}

            def both_again() -> bool:
                for told in jobs("RUNNING").values():
                    again["killed"] |= told["JobId"] not in (killed, preempted)
                    again["preempted"] |= told["JobId"] == preempted and told["Restarts"] == "1"
                return all(again.values())

            until(both_again, running, log)
            assert running.wait(500) == 0, log.read_text()
        finally:
            running.terminate()
            running.wait()
    assert not any(folder.exists() for folder in folders)
    told = log.read_text()
    assert "\nfailed: train voc-res101: " in told
    assert "failed: train voc-res152" not in told
    assert call("dvc", "status", *(f"train@{name}" for name in TRAININGS)) == "Data and pipelines are up to date.\n"

    alone = tmp_path / "alone"
    alone.mkdir()
    for name in ("settings.json", "params.yaml"):
        shutil.copy(project / name, alone)
    for name in ("data", "weights", "profiles"):
        shutil.copytree(project / name, alone / name)
    for name in TRAININGS:
        call("python", "-m", "pipeline.train", name, folder=alone)
        for path in (f"models/{name}.safetensors", f"curves/{name}.csv"):
            assert (project / path).read_bytes() == (alone / path).read_bytes()


@pytest.mark.slow
@pytest.mark.services
def test_a_training_that_was_warned_is_begun_again(tmp_path: Path, slurm: dict[str, str]) -> None:
    """The sbatch line of docs/how-to/cluster.md: SIGTERM, exit code 75, requeued by RequeueExit=75, the same bytes."""
    page = (ROOT / "docs/how-to/cluster.md").read_text()
    (line,) = re.findall(r"^ +(sbatch .*)$", page, re.M)
    name = TRAININGS[0]
    whole, project = tmp_path / "whole", tmp_path / "project"
    whole.mkdir()
    small_project.make(whole, PROFILE)
    environment = small_project.environment(project, OMP_NUM_THREADS="1", **slurm)

    def told(job: str) -> dict[str, str]:
        command = ["scontrol", "show", "job", "--oneliner", job]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return dict(pair.split("=", 1) for pair in done.stdout.split() if "=" in pair)

    def wait(condition: Callable[[], bool]) -> None:
        end = time.monotonic() + 500
        while not condition():
            assert time.monotonic() < end, [path.read_text() for path in project.glob("slurm-*.out")]
            time.sleep(0.2)

    small_project.call(whole, "snakemake", "--cores", "1", "--", "data/voc", "weights/resnet101.safetensors")
    shutil.copytree(whole, project, symlinks=True)
    small_project.call(whole, "python", "-m", "pipeline.train", name)
    said = subprocess.run(
        shlex.split(line), cwd=project, env=environment, capture_output=True, text=True, check=True
    ).stdout
    job = said.split()[-1]
    wait(lambda: any((project / "checkpoints" / name).glob("step-*.pt")))
    subprocess.run(["scancel", "--signal=TERM", "--batch", job], env=environment, check=True)
    wait(lambda: told(job)["Restarts"] == "1")
    assert not (project / "models" / f"{name}.safetensors").exists()
    wait(lambda: told(job)["JobState"] == "COMPLETED")
    for path in (f"models/{name}.safetensors", f"curves/{name}.csv"):
        assert (project / path).read_bytes() == (whole / path).read_bytes()


@pytest.mark.slow
@pytest.mark.services
def test_a_dead_head_is_followed_by_another_and_nothing_is_written_twice(tmp_path: Path, roomy: dict[str, str]) -> None:
    """It submits both running trainings again; those wait for the first ones, which go on to their end."""
    project, alone = tmp_path / "project", tmp_path / "alone"
    for folder in (project, alone):
        folder.mkdir()
        small_project.make(folder, PROFILE)
    path = f"{project}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    environment = small_project.environment(project, OMP_NUM_THREADS="1", PYTHONPATH=path, **roomy)
    models = [f"models/{name}.safetensors" for name in TRAININGS]
    command = ["snakemake", *models, "--profile", "profiles/snakemake/slurm", "--cores", "2", *QUICK.split()]
    command += ["--set-resources", *(f"train_{name.replace('-', '_')}:gpu=1" for name in TRAININGS)]
    leases = [project / "checkpoints" / f"{name}.lease" for name in TRAININGS]
    stages = [project / ".snakemake" / "stages" / f"train_{name.replace('-', '_')}.log" for name in TRAININGS]

    def head(log: Path) -> subprocess.Popen[bytes]:
        with log.open("wb") as output:
            return subprocess.Popen(command, cwd=project, env=environment, stdout=output, stderr=subprocess.STDOUT)

    first = head(tmp_path / "first")
    pids: list[int] = []
    try:
        until(
            lambda: all(lease.is_file() and any(lease.with_suffix("").glob("step-*.pt")) for lease in leases),
            first,
            tmp_path / "first",
        )
        before = [lease.read_bytes() for lease in leases]
        pids += [int(json.loads(text)["pid"]) for text in before]
        for pid in pids:
            os.kill(pid, signal.SIGSTOP)  # so that they are not done before the second head has submitted its jobs
    finally:
        first.kill()
        first.wait()
    second = head(tmp_path / "second")
    try:
        told = [f"{name}: waits for process {pid} on " for name, pid in zip(TRAININGS, pids, strict=True)]
        until(
            lambda: all(text in stage.read_text() for text, stage in zip(told, stages, strict=True)),
            second,
            tmp_path / "second",
        )
        assert [lease.read_bytes() for lease in leases] == before
        for pid in pids:
            os.kill(pid, signal.SIGCONT)
        assert second.wait(500) == 0, (tmp_path / "second").read_text()
    finally:
        second.terminate()
        second.wait()
    for stage, name in zip(stages, TRAININGS, strict=True):
        assert f"{name}: trained by the process that was waited for" in stage.read_text()
    assert not any((project / "checkpoints").iterdir())
    small_project.call(alone, "snakemake", "--cores", "2", "--", *models)
    for name in TRAININGS:
        for made in (f"models/{name}.safetensors", f"curves/{name}.csv"):
            assert (project / made).read_bytes() == (alone / made).read_bytes()
    status = small_project.call(project, "dvc", "status", *(f"train@{name}" for name in TRAININGS))
    assert status.stdout == "Data and pipelines are up to date.\n"
