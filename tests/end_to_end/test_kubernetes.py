"""profiles/snakemake/kubernetes against a stand-in for kubectl, which runs a Job here. No Kubernetes was seen."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import small_project

ROOT = Path(__file__).resolve().parents[2]
JOB = ROOT / "profiles" / "snakemake" / "kubernetes" / "job.py"
# Keeps what it is given in $FAKE, runs a new Job's command to its end and says afterwards how that went.
KUBECTL = f"""#!{sys.executable}
import json, os, pathlib, subprocess, sys
kept, (verb, *rest) = pathlib.Path(os.environ["FAKE"]), sys.argv[3:]
with (kept / "calls").open("a") as calls:
    print(json.dumps(sys.argv[1:]), file=calls)
if verb == "create":
    job = json.load(sys.stdin)
    name = f"{{job['metadata']['generateName']}}{{len(list(kept.glob('*.json')))}}"
    (kept / f"{{name}}.json").write_text(json.dumps(job))
    container = job["spec"]["template"]["spec"]["containers"][0]
    if "RUN" in os.environ:
        done = subprocess.run(container["command"], cwd=container["workingDir"], capture_output=True)
        (kept / name).write_text("SuccessCriteriaMet Complete" if done.returncode == 0 else "FailureTarget Failed")
    print(name, end="")
elif verb == "get":
    if not (kept / rest[1]).exists():
        sys.exit(os.environ.get("TROUBLE", 'Error from server (NotFound): jobs.batch "x" not found'))
    print((kept / rest[1]).read_text(), end="")
"""


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the stand-in, which is the first kubectl on the PATH."""
    kept = tmp_path / "fake"
    kept.mkdir()
    (kept / "kubectl").write_text(KUBECTL)
    (kept / "kubectl").chmod(0o755)
    monkeypatch.setenv("PATH", f"{kept}:{small_project.BIN}:{os.environ['PATH']}")
    monkeypatch.setenv("FAKE", str(kept))
    return kept


def job(*arguments: str) -> str:
    done = subprocess.run([sys.executable, str(JOB), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def submitted(fake: Path, gpus: int) -> dict[str, Any]:
    name = job("submit", "--gpus", str(gpus), "--memory", "16000", "--minutes", "4320", "--cores", "1", "script.sh")
    made: dict[str, Any] = json.loads((fake / f"{name}.json").read_text())
    return made


def test_a_training_is_a_job_with_its_gpus(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    spec = submitted(fake, 2)["spec"]
    assert (spec["backoffLimit"], spec["activeDeadlineSeconds"]) == (0, 4320 * 60)
    container = spec["template"]["spec"]["containers"][0]
    assert container["resources"]["limits"] == {"cpu": 16, "memory": "16000M", "nvidia.com/gpu": 2}
    assert container["workingDir"] == str(Path.cwd())
    assert container["env"] == [{"name": "MLFLOW_TRACKING_URI", "value": "http://mlflow:5000"}]
    limits = submitted(fake, 0)["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": 1, "memory": "16000M"}


def test_words_for_snakemake(fake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for told, word in (("", "running"), ("Complete", "success"), ("FailureTarget Failed", "failed")):
        (fake / "a").write_text(told)
        assert job("status", "a") == word
    assert job("status", "gone") == "failed"
    monkeypatch.setenv("TROUBLE", "Unable to connect to the server: net/http: TLS handshake timeout")
    assert job("status", "gone") == "running"
    subprocess.run([str(JOB.with_name("cancel")), "a", "b"], check=True, cwd=ROOT)
    *_, last = (fake / "calls").read_text().splitlines()
    assert json.loads(last)[2:] == ["delete", "job", "--wait=false", "--ignore-not-found", "a", "b"]


@pytest.mark.slow
def test_snakemake_hands_its_jobs_over(fake: Path, tmp_path: Path) -> None:
    if importlib.util.find_spec("snakemake_executor_plugin_cluster_generic") is None:
        pytest.skip("snakemake-executor-plugin-cluster-generic is not installed")
    project = tmp_path / "project"
    project.mkdir()
    small_project.make(project, "base: mini\n")
    more = {"RUN": "1", "PATH": os.environ["PATH"]}
    more["PYTHONPATH"] = f"{project}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
    command = ["snakemake", "weights/resnet101.safetensors", "--profile", "profiles/snakemake/kubernetes"]
    small_project.call(project, *command, "--seconds-between-status-checks", "1", **more)
    (made,) = (json.loads(path.read_text()) for path in fake.glob("*.json"))
    limits = made["spec"]["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert limits == {"cpu": 1, "memory": "2000M"}
    assert small_project.call(project, "dvc", "status", "weights@resnet101").stdout.endswith("up to date.\n")
