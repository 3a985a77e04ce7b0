"""A small project of its own for a test: this one's code and graph, VOC's trainings, a profile of the test's."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
BIN = Path(sys.executable).parent
SOURCES = ("pipeline", "refinenet", "profiles", "Snakefile", "dvc.yaml", "params.yaml", ".dvcignore")
# The profile of the smallest project that goes through all stages.
TINY = """\
base: mini
title: the smallest that goes through all stages
rendered: {train: 6, val: 3, height: 64, width: 80}
train: {batch_size: 2, crop: 48, log_every: 1}
datasets: {voc: {train: {steps: 6}}}
"""


def environment(project: Path, **more: str) -> dict[str, str]:
    """Environment variables of a process that finds the commands of the environment, and the project's code."""
    variables = {**os.environ, "PYTHONPATH": str(project), **more}
    variables["PATH"] = f"{BIN}:{variables['PATH']}"
    variables.pop("PYTHONDONTWRITEBYTECODE", None)
    return variables


def call(project: Path, *command: str, check: bool = True, **more: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the environment in the project's folder; `more` are environment variables."""
    done = subprocess.run(
        [str(BIN / command[0]), *command[1:]],
        cwd=project,
        env=environment(project, **more),
        capture_output=True,
        text=True,
        check=False,
        timeout=500,
    )
    assert not check or done.returncode == 0, done.stdout + done.stderr
    return done


def start(project: Path, *command: str, **more: str) -> subprocess.Popen[bytes]:
    """Start a command of the environment in the project's folder and leave it running."""
    nothing = subprocess.DEVNULL
    return subprocess.Popen(
        [str(BIN / command[0]), *command[1:]],
        cwd=project,
        env=environment(project, **more),
        stdout=nothing,
        stderr=nothing,
    )


def git(folder: Path, *arguments: str) -> None:
    """Run git in a folder."""
    subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True)


def make(folder: Path, profile: str) -> Path:
    """Make the project in an empty folder; `profile` is the text of profiles/test.yaml."""
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / name)
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params["profile"] = "test"
    params["datasets"] = ["voc"]
    params["further"] = []
    params["backbones"] = ["resnet50", "resnet101", "resnet152"]
    params["pretrainings"] = {}
    params["experiments"] = {
        k: {**v, "start": k.split("-")[1].replace("res", "resnet")}
        for k, v in params["experiments"].items()
        if v["data"] == "voc"
    }
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    (folder / "profiles" / "test.yaml").write_text(profile)
    shutil.copy(ROOT / ".gitignore", folder)
    for name in ("seeds", "servers"):
        at = Path("metrics", name)
        shutil.copytree(ROOT / at, folder / at, ignore=shutil.ignore_patterns("*.json"))
    git(folder, "init", "--quiet")
    call(folder, "dvc", "init", "--quiet")
    return folder
