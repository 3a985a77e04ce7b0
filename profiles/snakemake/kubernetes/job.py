"""Hands Snakemake's jobs to Kubernetes through kubectl: submit, status, cancel (see config.yaml next to this file)."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

GRACE = 120  # seconds between the warning and the end

# Starts the command in a process group of its own and hands a SIGTERM to all of it.
FORWARD = """
import os, signal, subprocess, sys
job = subprocess.Popen(sys.argv[1:], start_new_session=True)
signal.signal(signal.SIGTERM, lambda *_: os.killpg(job.pid, signal.SIGTERM))
sys.exit(job.wait() and 1)
"""


def kubectl(*arguments: str, given: str = "") -> subprocess.CompletedProcess[str]:
    """Call kubectl in the cluster's namespace."""
    cluster = yaml.safe_load(Path(__file__).with_name("cluster.yaml").read_text())
    command = ["kubectl", "--namespace", cluster["namespace"], *arguments]
    return subprocess.run(command, input=given, capture_output=True, text=True, check=False)


def manifest(script: Path, gpus: int, memory: int, minutes: int, cores: int) -> dict[str, Any]:
    """The Job that runs `script` in this folder. `memory` in MB; `cores` where there is no GPU."""
    cluster = yaml.safe_load(Path(__file__).with_name("cluster.yaml").read_text())
    wanted: dict[str, Any] = {"cpu": cluster["cores_of_a_gpu"] * gpus or cores, "memory": f"{memory}M"}
    if gpus:
        wanted["nvidia.com/gpu"] = gpus
    environment = [{"name": name, "value": os.environ[name]} for name in cluster["environment"] if name in os.environ]
    container = {
        "name": "stage",
        "image": cluster["image"],
        # Not sh itself: as the first process of a container it would keep the warning from the training.
        "command": ["python", "-c", FORWARD, "/bin/sh", str(script)],
        "workingDir": str(Path.cwd()),
        "env": environment,
        "resources": {"requests": wanted, "limits": wanted},
        "volumeMounts": [
            {"name": "project", "mountPath": cluster["mount"]},
            {"name": "shared-memory", "mountPath": "/dev/shm"},
        ],
    }
    volumes = [
        {"name": "project", "persistentVolumeClaim": {"claimName": cluster["claim"]}},
        # Processes of one training exchange gradients through it; a container's own has 64 MB.
        {"name": "shared-memory", "emptyDir": {"medium": "Memory"}},
    ]
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": GRACE,
        "containers": [container],
        "volumes": volumes,
    }
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"generateName": "refinenet-", "labels": {"app": "refinenet"}},
        "spec": {"backoffLimit": 0, "activeDeadlineSeconds": 60 * minutes, "template": {"spec": pod}},
    }


def submit(given: argparse.Namespace) -> None:
    """Print the name of the new Job."""
    job = manifest(given.script.resolve(), given.gpus, given.memory, given.minutes, given.cores)
    done = kubectl("create", "--filename", "-", "--output", "jsonpath={.metadata.name}", given=json.dumps(job))
    if done.returncode:
        sys.exit(f"error: kubectl create: {done.stderr.strip()}")
    print(done.stdout.strip())


def status(given: argparse.Namespace) -> None:
    """Print one of Snakemake's words: running, success, failed."""
    done = kubectl("get", "job", given.names[0], "--output", "jsonpath={.status.conditions[?(@.status=='True')].type}")
    if done.returncode:  # an API server that does not answer now says nothing of the job
        print("failed" if "NotFound" in done.stderr else "running")
    else:
        conditions = done.stdout.split()
        print("success" if "Complete" in conditions else "failed" if "Failed" in conditions else "running")


def cancel(given: argparse.Namespace) -> None:
    """Delete Jobs and do not wait until they are gone."""
    kubectl("delete", "job", "--wait=false", "--ignore-not-found", *given.names)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    new = commands.add_parser("submit")
    for name in ("gpus", "memory", "minutes", "cores"):
        new.add_argument(f"--{name}", type=int, required=True)
    new.add_argument("script", type=Path)
    new.set_defaults(run=submit)
    for name, run in (("status", status), ("cancel", cancel)):
        command = commands.add_parser(name)
        command.add_argument("names", nargs="+")
        command.set_defaults(run=run)
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
