"""Fifty stages at once write to one MLflow database, and whoever waits for a turn waits as long as the queue moves."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock

from pipeline.tracking import database as mlflow_database
from pipeline.tracking import track
from pipeline.tracking.database import exclusive

STAGES, POINTS = 50, 100

STAGE = """
import sys
from pathlib import Path
import pipeline.tracking
from pipeline.tracking import track
pipeline.tracking.PATIENCE = 300.0  # fifty processes may have to share a core
number = int(sys.argv[1])
data = "voc" if number % 2 else "nyud"
with track("train", f"voc-{number}", data, {"seed": number}, {"training data": Path("data")}) as run:
    for step in range(int(sys.argv[2])):
        run.log(step, loss=number + step)
    run.artifact(Path("0.png"), "predictions")
    run.scores({"single/mean_iou": number / 100, "single/iou/cow": None})
"""


@pytest.mark.slow
@pytest.mark.services
def test_fifty_at_once_lose_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if _available() < 12e9:
        pytest.skip("less than 12 GB of free memory: fifty processes that import mlflow take 0.2 GB each")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    Path("data").mkdir()
    Path("data", "train.arrow").write_bytes(b"images")
    Path("0.png").write_bytes(b"picture")
    with track("train", "first", "voc", {}, {}):
        pass  # tests/pipeline/test_tracking.py has those that begin before there is a database
    stages = [
        subprocess.Popen(
            [sys.executable, "-c", STAGE, str(number), str(POINTS)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        for number in range(STAGES)
    ]
    try:
        for stage in stages:
            assert stage.communicate(timeout=3000)[0] == b""
            assert stage.returncode == 0
    finally:
        for stage in stages:
            stage.kill()

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{tmp_path}/mlflow.db")
    experiments = {client.get_experiment_by_name(name).experiment_id: name for name in ("voc", "nyud")}
    runs = {run.info.run_name: run for run in client.search_runs(list(experiments))}
    assert set(runs) == {"first"} | {f"voc-{number}" for number in range(STAGES)}
    for number in range(STAGES):
        run = runs[f"voc-{number}"]
        assert run.info.status == "FINISHED"
        assert experiments[run.info.experiment_id] == ("voc" if number % 2 else "nyud")
        assert run.data.params == {"seed": str(number)}
        points = client.get_metric_history(run.info.run_id, "loss")
        assert sorted((point.step, point.value) for point in points) == [(i, float(number + i)) for i in range(POINTS)]
        assert run.data.metrics["single/mean_iou"] == number / 100
        assert [file.path for file in client.list_artifacts(run.info.run_id, "predictions")] == ["predictions/0.png"]
        assert len(run.inputs.dataset_inputs) == 1
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


def _available() -> int:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return int(fields["MemAvailable"].split()[0]) * 1024


@pytest.fixture
def database(tmp_path: Path) -> Path:
    with sqlite3.connect(tmp_path / "mlflow.db") as connection:
        connection.execute("CREATE TABLE t (x)")
    return tmp_path / "mlflow.db"


def look(monkeypatch: pytest.MonkeyPatch, change: Callable[[int], int]) -> list[int]:
    """Have the database change as `change` (number of the look -> time of the last change) says."""
    looks: list[int] = []

    def changed(path: Path) -> int:
        looks.append(change(len(looks)))
        return looks[-1]

    monkeypatch.setattr(mlflow_database, "_changed", changed)
    return looks


def test_who_waits_for_a_turn_waits_while_others_get_theirs(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = FileLock(f"{database}.lock")

    def change(number: int) -> int:
        if number == 12:  # each look comes after a wait as long as patience
            other.release()
        return number

    looks = look(monkeypatch, change)
    with other.acquire(), exclusive(database, 0.1):
        assert len(looks) >= 12


def test_who_waits_for_a_turn_that_never_ends_gives_up(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look(monkeypatch, lambda number: 7)
    held, refused = FileLock(f"{database}.lock"), pytest.raises(TimeoutError, match="lock is held by another process")
    with held.acquire(), refused, exclusive(database, 0.1):
        pass
