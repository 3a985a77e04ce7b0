"""What a stage does at its edge: Ctrl-C, SIGTERM and their exit codes; its progress; the load it reports."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from pipeline.runtime import cli, device_load, progress

ROOT = Path(__file__).resolve().parents[2]
LONG = 300  # seconds; no test waits for them in vain
CODE = """
import os, signal, sys, time
from pathlib import Path
from pipeline.runtime.cli import Terminated, main, terminated
from pipeline.tracking import track

def ready():
    print("ready", flush=True)

def polls(name):
    ready()
    while not terminated():
        time.sleep(0.01)
    raise Terminated(f"{name}: goes on from step 7")

def never_polls(name):
    ready()
    time.sleep(600)

def loses_it(name):
    try:
        ready()
        time.sleep(600)
    except KeyboardInterrupt:
        pass
    while True:
        time.sleep(0.01)
        terminated()

def forks(name):
    if os.fork():
        ready()
        sys.exit(os.waitstatus_to_exitcode(os.wait()[1]) == -signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(600)

def records(name):
    with track("train", name, "voc", {}, {}, resume=Path("checkpoints")) as run:
        ready()
        for step in range(3, 6) if Path("checkpoints/mlflow.json").exists() else range(3):
            run.log(step, loss=step)
        if step < 5:
            while not (terminated() and Path("checkpoints/mlflow.json").exists()):
                time.sleep(0.01)
            raise Terminated("goes on")
"""


def start(run: str, graceful: bool = True) -> subprocess.Popen[str]:
    """Start the function `run` of CODE as a stage, and wait until it is ready."""
    code = f"{CODE}\nmain({run}, 'A stage.', 'NAME', graceful={graceful})"
    left_out = ("DVC_STAGE", "PIPELINE_ENGINE", "RANK", "MLFLOW_TRACKING_URI")
    environment = {key: value for key, value in os.environ.items() if key not in left_out} | {"PYTHONPATH": str(ROOT)}
    # A caught signal is the default one again in a new program, an ignored one (pytest in the background) is not.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code, "voc-res101"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert process.stdout
    assert process.stdout.readline() == "ready\n", process.communicate()[1]
    return process


def end(process: subprocess.Popen[str], *signals: int) -> tuple[int, str]:
    """Send `signals`; how the process ends: exit code and stderr."""
    try:
        for number in signals:
            process.send_signal(number)
        told = process.communicate(timeout=LONG)[1]
    finally:
        process.kill()
    return process.returncode, told


def test_sigterm_ends_with_the_code_that_says_again() -> None:
    assert end(start("polls"), signal.SIGTERM) == (75, "terminated: voc-res101: goes on from step 7\n")
    assert cli.EXIT_TRY_AGAIN == os.EX_TEMPFAIL == 75


def test_who_does_not_poll_ends_by_the_signal() -> None:
    assert end(start("never_polls", graceful=False), signal.SIGTERM) == (-signal.SIGTERM, "")
    process = start("never_polls")
    process.send_signal(signal.SIGTERM)
    # Two signals at once are one. That the first has been taken shows in that the next would be fatal.
    wanted = 1 << (signal.SIGTERM - 1)
    while int(Path(f"/proc/{process.pid}/status").read_text().split("SigCgt:")[1].split()[0], 16) & wanted:
        pass
    assert end(process, signal.SIGTERM) == (-signal.SIGTERM, "")
    assert end(start("forks")) == (1, "")


@pytest.mark.parametrize("run", ["never_polls", "loses_it"])
def test_ctrl_c_ends_also_a_stage_that_lost_it(run: str) -> None:
    assert end(start(run), signal.SIGINT) == (130, "interrupted\n")


def test_ctrl_c_ends_also_a_stage_whose_parent_holds_it_back() -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        process = start("never_polls")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert end(process, signal.SIGINT) == (130, "interrupted\n")


def test_a_terminated_run_goes_on_in_the_same_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.chdir(tmp_path)
    assert end(start("records"), signal.SIGTERM) == (75, "terminated: goes on\n")
    assert end(start("records")) == (0, "")
    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    assert run.info.status == "FINISHED"
    assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == [0, 1, 2, 3, 4, 5]


def test_into_a_file_each_state_of_a_bar_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    with progress.bar("train", "image", total=20) as bar:
        for step in (1, 2):
            bar.set_postfix(loss=f"{1 / step:.3f}", refresh=False)
            progress.reach(bar, step * 10, 10)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition("|")[0].split() for line in lines] == [["train:", done] for done in ("0%", "50%", "100%")]
    assert all(word in lines[1] for word in ("10/20", "image/s", "<00:", "loss=1.000"))


def test_what_an_earlier_process_did_shows_but_counts_for_no_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0)
    with progress.bar("train", "image", total=1000, smoothing=0) as bar:  # the rate over all the time
        bar.start_t -= 10  # as if it had been at work for ten seconds
        for step in range(90, 101):
            progress.reach(bar, step * 10, 10)
    last = capsys.readouterr().err.splitlines()[-1]
    assert "1000/1000" in last
    # 110 images in 10 seconds and what the loop took.
    assert float(last.rpartition(", ")[2].partition("image/s")[0]) <= 11


def test_load_of_a_cpu_is_the_memory_of_the_process() -> None:
    import torch

    load = device_load.device_load(torch.device("cpu"))
    assert list(load) == ["memory_bytes"]
    held = b"x" * (64 << 20)
    grown = device_load.device_load(torch.device("cpu"))["memory_bytes"]
    assert 1e7 < load["memory_bytes"] <= grown < 1e13
    assert grown >= len(held)


def test_load_of_a_gpu_goes_without_what_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    asked: list[object] = []

    def refuse(device: object) -> int:
        asked.append(device)
        raise ModuleNotFoundError("nvidia-ml-py does not seem to be installed")

    cuda: Any = types.SimpleNamespace(
        max_memory_allocated=lambda device: 300, memory_reserved=lambda device: 400, utilization=lambda device: 87
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    first, second = torch.device("cuda", 0), torch.device("cuda", 1)
    memory = {"memory_bytes": 300.0, "memory_reserved_bytes": 400.0}
    assert device_load.device_load(first) == memory | {"gpu_utilisation": 0.87}
    cuda.utilization = refuse
    assert device_load.device_load(second) == device_load.device_load(second) == memory
    assert asked == [second]  # once refused, not asked again
    device_load._no_utilisation.clear()


@pytest.mark.gpu
def test_load_of_a_real_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    held = torch.zeros(1 << 20, device="cuda")
    load = device_load.device_load(held.device)
    assert load["memory_reserved_bytes"] >= load["memory_bytes"] >= held.nbytes
    assert 0 <= load.get("gpu_utilisation", 0) <= 1
