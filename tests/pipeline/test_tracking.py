"""Runs land in MLflow whole, eight at once, through kills; whatever is wrong with MLflow, the stage goes on."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit
from urllib.request import url2pathname

import pytest

from pipeline import tracking
from pipeline.runtime.dvc_md5 import dvc_md5
from pipeline.tracking import Run, __main__, track
from refinenet.atomic import alive, process_start_time
from refinenet.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder to work in, with data, weights and a picture, in git, and no database yet."""
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_TRACKING_URI", "RANK"):
        monkeypatch.delenv(name, raising=False)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.arrow").write_bytes(b"images")
    (tmp_path / "weights").write_bytes(b"numbers")
    (tmp_path / "0.png").write_bytes(b"picture")
    commit(tmp_path)
    return tmp_path


def commit(folder: Path) -> None:
    for command in (["init", "-q"], ["add", "0.png"], ["commit", "-q", "-m", "x"]):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *command], check=True, cwd=folder)


def open_database(root: Path) -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{root}/mlflow.db")


def runs(root: Path) -> list[Any]:
    """All runs, oldest first."""
    client = open_database(root)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    return list(client.search_runs(experiments, order_by=["attributes.start_time ASC"]))


def curve(root: Path, run: Any, name: str) -> list[tuple[int, float]]:
    points = open_database(root).get_metric_history(run.info.run_id, name)
    return [(point.step, point.value) for point in points]


# Seconds, of a machine that has other jobs as well, for what takes a few on an idle one: no test waits for it in vain.
LONG = 300


def until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.1)


def child(code: str, *arguments: object) -> subprocess.Popen[str]:
    """Start Python on `code`, which finds `track`, `Path`, `sys` and `time` imported."""
    head = "import sys, time\nfrom pathlib import Path\nfrom pipeline.tracking import track\n"
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def of_an_older_mlflow(database: Path) -> None:
    """Make the database as MLflow 2.8 did, with a run in it."""
    import alembic.command
    from mlflow.store.db.utils import _get_alembic_config
    from mlflow.store.tracking.dbmodels.initial_models import Base
    from sqlalchemy import create_engine

    config = _get_alembic_config(f"sqlite:///{database}")  # type: ignore[no-untyped-call]
    with create_engine(f"sqlite:///{database}").begin() as connection:
        Base.metadata.create_all(connection)
        config.attributes["connection"] = connection
        alembic.command.upgrade(config, "acf3f17fdcc7")
    folder, run = (database.parent / "mlruns/7").as_uri(), "0" * 32
    rows: dict[str, dict[str, object]] = {
        "experiments": {"experiment_id": 7, "name": "voc", "artifact_location": folder, "lifecycle_stage": "active"},
        "runs": {"run_uuid": run, "name": "old", "user_id": "me", "experiment_id": 7, "status": "FINISHED"}
        | {"artifact_uri": f"{folder}/{run}/artifacts", "start_time": 1, "lifecycle_stage": "active"},
    }
    with sqlite3.connect(database) as connection:
        for table, row in rows.items():
            places = ", ".join("?" * len(row))
            connection.execute(f"INSERT INTO {table} ({', '.join(row)}) VALUES ({places})", [*row.values()])


@pytest.mark.slow
@pytest.mark.parametrize(
    "before", [lambda database: None, of_an_older_mlflow], ids=["no database", "an older MLflow's"]
)
def test_eight_at_once(project: Path, before: Callable[[Path], None]) -> None:
    """None finds a database that it could write to, and no run is lost."""
    before(project / "mlflow.db")
    code = """
import pipeline.tracking
pipeline.tracking.PATIENCE = 300.0  # eight import mlflow
number = int(sys.argv[1])
inputs = {"training data": Path("data"), "initial weights": Path("weights")}
with track("train", f"voc-{number}", "voc" if number % 2 else "nyud", {"train": {"seed": number}}, inputs) as run:
    for step in range(200):
        run.log(step, loss=number + step, lr=0.5)
    run.artifact(Path("0.png"), "predictions")
    run.scores({"mean_iou": 0.25, "iou/dining table": 0.5, "iou/door;double door": 0.75, "iou/cow": None})
assert not {"mlflow", "torch", "numpy"} & set(sys.modules)
"""
    children = [child(code, number) for number in range(8)]
    try:
        for process in children:
            assert process.communicate(timeout=LONG) == ("", "")
            assert process.returncode == 0
    finally:
        for process in children:
            process.kill()

    found = {run.info.run_name: run for run in runs(project)}
    old = {"old"} if before is of_an_older_mlflow else set()
    assert set(found) == {f"voc-{number}" for number in range(8)} | old
    for number in range(8):
        run = found[f"voc-{number}"]
        assert run.info.status == "FINISHED"
        assert run.data.params == {"train.seed": str(number)}
        assert sorted(curve(project, run, "loss")) == [(step, float(number + step)) for step in range(200)]
        assert len(curve(project, run, "lr")) == 200
        scores = {name: value for name, value in run.data.metrics.items() if "iou" in name}
        assert scores == {"mean_iou": 0.25, "iou/dining table": 0.5, "iou/door_double door": 0.75}
        pictures = open_database(project).list_artifacts(run.info.run_id, "predictions")
        assert [picture.path for picture in pictures] == ["predictions/0.png"]
        inputs = {given.tags[0].value: given.dataset for given in run.inputs.dataset_inputs}
        assert inputs["training data"].digest == dvc_md5(project / "data")
        assert inputs["initial weights"].digest == dvc_md5(project / "weights")
        assert inputs["training data"].name == "data"
    assert len({run.info.experiment_id for run in found.values()}) == 2
    with sqlite3.connect(project / "mlflow.db") as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    copies = [path.name for path in project.glob("mlflow.db.*") if path.suffix != ".lock"]
    assert copies == (["mlflow.db.acf3f17fdcc7"] if old else [])  # migrated once


def test_a_killed_training_goes_on_in_the_same_run(project: Path) -> None:
    code = """
first, last, crop = map(int, sys.argv[1:])
with track("train", "voc-res101", "voc", {"crop": crop}, {}, resume=Path("checkpoints/voc")) as run:
    for step in range(first, last):
        run.log(step, loss=1000 - step)
    if last < 50:
        print("killed here", flush=True)
        time.sleep(600)
"""
    run_file = project / "checkpoints" / "voc" / "mlflow.json"
    killed = child(code, 0, 30, 96)
    until(run_file.exists)
    killed.kill()
    killed.communicate()
    until(lambda: [run.info.status for run in runs(project)] == ["KILLED"])
    (run,) = runs(project)
    assert json.loads(run_file.read_text()) == {"run": run.info.run_id}

    assert child(code, 20, 50, 96).communicate(timeout=LONG) == ("", "")
    (again,) = runs(project)
    assert (again.info.run_id, again.info.status) == (run.info.run_id, "FINISHED")
    assert curve(project, again, "loss") == [(step, 1000.0 - step) for step in range(50)]
    assert not run_file.exists()

    # With other settings it is another training, whatever the checkpoint folder says; and so it is after a good end.
    run_file.write_text(json.dumps({"run": run.info.run_id}))
    assert child(code, 0, 50, 64).communicate(timeout=LONG) == ("", "")
    assert [run.data.params["crop"] for run in runs(project)] == ["96", "64"]


def test_a_run_whose_stage_and_writer_were_killed_is_closed_by_whoever_looks_next(project: Path) -> None:
    begun = child('with track("train", "voc-res101", "voc", {}, {}) as run: time.sleep(600)')
    try:
        until(lambda: (project / "mlflow.db").exists() and len(runs(project)) == 1)
        (run,) = runs(project)
        host, writer, born = run.data.tags["writer"].split()
        assert born == process_start_time(int(writer))
        os.kill(int(writer), signal.SIGKILL)
        # Its parent sleeps on and asks for no exit code, nor does the first process of many a container: a zombie.
        until(lambda: not alive(int(writer)))
        os.kill(int(writer), 0)
        # One more whose number another process has now, one of another machine, and one that really goes on.
        for tag in (
            f"{host} {os.getpid()} 1",
            "elsewhere 1 1",
            f"{host} {os.getpid()} {process_start_time(os.getpid())}",
        ):
            open_database(project).create_run(run.info.experiment_id, tags={"writer": tag}, run_name="another")
        assert [run.info.status for run in runs(project)] == ["RUNNING"] * 4
        with pytest.raises(UserError, match=r"no run in .* has seen it"):
            __main__.main(["find", "data"])
    finally:
        begun.kill()
        begun.communicate()
    assert [run.info.status for run in runs(project)] == ["KILLED", "KILLED", "RUNNING", "RUNNING"]


def test_evaluation_hangs_under_the_training_that_wrote_its_weights(project: Path) -> None:
    (project / "0.png").write_bytes(b"changed")
    with track("train", "voc-res101", "voc", {"pools": 2}, {}) as run:
        run.wrote(project / "weights")
    with track("evaluate", "voc-res101", "voc", {"images": 3}, {}, weights=project / "weights") as run:
        run.scores({"mean_iou": 0.5})
    (project / "weights").write_bytes(b"pulled numbers")
    with track("evaluate", "voc-res101", "voc", {}, {}, weights=project / "weights"):
        pass
    training, nested, alone = runs(project)
    assert nested.info.run_name == alone.info.run_name == "evaluate voc-res101"
    assert nested.data.tags["mlflow.parentRunId"] == training.info.run_id
    assert nested.data.params == {"pools": "2", "images": "3"}
    assert [given.dataset.digest for given in nested.inputs.dataset_inputs] == [nested.data.tags["weights.md5"]]
    assert nested.data.tags["weights.md5"] == training.data.tags["weights.md5"] != alone.data.tags["weights.md5"]
    assert "mlflow.parentRunId" not in alone.data.tags
    assert alone.data.tags["weights.from"] == "elsewhere (pulled)"
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert (training.data.tags["mlflow.source.git.commit"], training.data.tags["git.dirty"]) == (head, "true")


def test_how_the_block_ends_is_how_the_run_ends(project: Path) -> None:
    def leave(error: BaseException) -> None:
        with track("train", "voc-res101", "voc", {}, {}):
            raise error

    with pytest.raises(ValueError, match="its own"):
        leave(ValueError("its own"))
    with pytest.raises(KeyboardInterrupt):
        leave(KeyboardInterrupt())
    until(lambda: [run.info.status for run in runs(project)] == ["FAILED", "KILLED"])


def locked(project: Path) -> object:
    connection = sqlite3.connect(project / "mlflow.db", isolation_level=None)
    connection.execute("CREATE TABLE t (x)")
    connection.execute("BEGIN EXCLUSIVE")
    return connection


def hanging(project: Path) -> object:
    server = socket.create_server(("127.0.0.1", 0))  # the system takes connections, nobody answers
    os.environ.update(
        MLFLOW_TRACKING_URI=f"http://127.0.0.1:{server.getsockname()[1]}", MLFLOW_HTTP_REQUEST_TIMEOUT="1"
    )
    return server


def no_process(project: Path) -> None:
    sys.executable = str(project / "no-python")


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (locked, "/mlflow.db: database is locked"),
        (lambda project: (project / "mlflow.db").mkdir(), "/mlflow.db: unable to open database file"),
        (
            lambda project: (project / "mlflow.db").write_bytes(b"no database" * 100),
            "/mlflow.db: file is not a database",
        ),
        (lambda project: os.environ.update(MLFLOW_TRACKING_URI="sqlite:////proc/mlflow.db"), "proc/mlflow.db.lock"),
        (lambda project: os.environ.update(MLFLOW_TRACKING_URI="http://127.0.0.1:9"), "127.0.0.1"),
        (hanging, "127.0.0.1"),
        (no_process, "no-python"),
    ],
    ids=["locked", "a folder", "garbage", "read-only", "server down", "server hangs", "no process"],
)
def test_whatever_is_wrong_the_stage_ends_well_with_one_line(
    project: Path,
    spoil: Callable[[Path], object],
    reason: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "executable", sys.executable)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.setattr(tracking, "PATIENCE", 0.5)
    held = spoil(project)
    with track("train", "voc-res101", "voc", {}, {"data": project / "data"}) as run:
        run.log(0, loss=1.0)
    out, err = capfd.readouterr()
    assert out == ""
    assert err.startswith("warning: MLflow lacks (part of) this run: ")
    assert reason in err
    assert err.count("\n") == 1
    del held


def test_a_full_disk_is_one_line_and_leaves_no_half_database(project: Path) -> None:
    code = """
import resource
import pipeline.tracking
pipeline.tracking.PATIENCE = 1.0
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
with track("train", "voc-res101", "voc", {}, {}) as run:
    run.log(0, loss=1.0)
"""
    process = child(code)
    out, err = process.communicate(timeout=LONG)
    assert (process.returncode, out) == (0, "")
    assert err.startswith("warning: MLflow lacks")
    assert err.count("\n") == 1
    assert not (project / "mlflow.db").exists()


def test_a_database_locked_for_a_while_loses_nothing(project: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with track("train", "voc-res101", "voc", {}, {}):
        pass
    connection = sqlite3.connect(project / "mlflow.db", isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    tracking_patience, tracking.PATIENCE = tracking.PATIENCE, 1.0
    try:
        with track("train", "voc-res101", "voc", {}, {}) as run:
            for step in range(20):
                run.log(step, loss=1.0)
                time.sleep(0.1)
            connection.execute("ROLLBACK")
    finally:
        tracking.PATIENCE = tracking_patience
    assert capfd.readouterr() == ("", "")
    assert len(curve(project, runs(project)[1], "loss")) == 20


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes beside the stages of a test."""
    started: list[subprocess.Popen[bytes]] = []
    start = tracking._start

    def noted(**begin: object) -> Any:
        run, writer = start(**begin)
        assert writer
        started.append(writer)
        return run, writer

    monkeypatch.setattr(tracking, "_start", noted)
    return started


def test_the_stage_never_waits_for_a_writer_that_stands_still(
    project: Path, writers: list[subprocess.Popen[bytes]]
) -> None:
    with track("train", "voc-res101", "voc", {}, {}) as run:
        writers[0].send_signal(signal.SIGSTOP)
        try:
            before = time.thread_time()
            for step in range(5_000):  # 0.5 MB; a pipe would hold 64 KiB
                run.log(step, loss=1.0 / (step + 1))
            assert time.thread_time() - before < 5_000 * 0.5e-3  # measured: 10 us a step
        finally:
            writers[0].send_signal(signal.SIGCONT)
    assert len(curve(project, runs(project)[0], "loss")) == 5_000


def test_a_writer_that_was_killed_and_a_picture_that_is_missing(
    project: Path, writers: list[subprocess.Popen[bytes]], capfd: pytest.CaptureFixture[str]
) -> None:
    with track("train", "voc-res101", "voc", {}, {}) as run:
        writers[0].kill()
        run.log(0, loss=1.0)
    assert "exit code -9" in capfd.readouterr().err
    with track("train", "voc-res101", "voc", {}, {}) as run:
        run.artifact(project / "gone.png")
        run.artifact(project / "0.png")
        run.log(7, loss=float("nan"))
        run.log(8, loss=1.0)
    assert "gone.png" in capfd.readouterr().err
    (run,) = runs(project)
    assert run.info.status == "FINISHED"
    assert curve(project, run, "loss") == [(8, 1.0)]
    assert [picture.path for picture in open_database(project).list_artifacts(run.info.run_id)] == ["0.png"]


def one_run() -> None:
    with track("train", "voc-res101", "voc", {}, {}) as run:
        run.artifact(Path("0.png"), "predictions")


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_artifacts_follow_the_folder(how: str, project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of runs from before; what a copy records does not go into the original."""
    here = project / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    shutil.copy(project / "0.png", here)
    commit(here)
    one_run()
    there = project / "there? 100% {x} #1 \u0444"
    if how == "moved":
        here.rename(there)
    else:
        shutil.copytree(here, there)
    before = sorted(path for path in here.rglob("*") if ".git" not in path.parts)
    monkeypatch.chdir(there)
    one_run()
    with sqlite3.connect(there / "mlflow.db") as database:
        places = [row[0] for row in database.execute("SELECT artifact_uri FROM runs")]
    assert len(places) == 2
    assert all(place.startswith((there / "mlruns").as_uri() + "/") for place in places)
    assert all(Path(url2pathname(urlsplit(place).path), "predictions/0.png").is_file() for place in places)
    assert sorted(path for path in here.rglob("*") if ".git" not in path.parts) == before
    assert sorted(path.name for path in there.iterdir() if not path.name.startswith(".")) == sorted(
        ["0.png", "mlflow.db", "mlflow.db.lock", "mlruns"]
    )


def no_repository(project: Path) -> str:
    shutil.rmtree(project / ".git")
    return "not a git repository"


def no_commit(project: Path) -> str:
    shutil.rmtree(project / ".git")
    subprocess.run(["git", "init", "-q"], check=True)
    return "HEAD"


def no_git(project: Path) -> str:
    os.environ["PATH"] = str(project)
    return "git is not installed"


def of_another_user(project: Path) -> str:
    if os.getuid() != 0:
        pytest.skip("wants root, to give the folder away")
    for path in (project, project / ".git"):
        os.chown(path, 12345, 12345)
    return "dubious ownership"


@pytest.mark.parametrize("spoil", [no_repository, no_commit, no_git, of_another_user])
def test_a_run_without_its_commit_says_why(
    spoil: Callable[[Path], str],
    project: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", os.environ["PATH"])
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(project.parent))
    monkeypatch.setenv("HOME", str(project))
    reason = spoil(project)
    with track("train", "voc-res101", "voc", {}, {}):
        pass
    err = capfd.readouterr().err
    if spoil is no_repository:  # who has none knows it
        assert err == ""
    else:
        assert err.startswith("warning: MLflow lacks (part of) this run: the commit (")
        assert err.count("\n") == 1
        assert reason in err
    assert reason in runs(project)[0].data.tags["git.problem"]


class Refusing(BaseHTTPRequestHandler):
    """A server that knows nobody, as `mlflow server --app-name basic-auth` says it."""

    def refuse(self) -> None:
        self.send_response(401)
        self.end_headers()
        self.wfile.write(b"You are not authenticated.")

    do_GET = do_POST = refuse  # noqa: N815 - the server's names

    def log_message(self, *_: object) -> None:
        pass


def test_a_refusal_is_told_at_once_and_what_was_not_sent_is_kept(
    project: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(tracking, "PATIENCE", 0.5)
    told = ""

    def hear() -> bool:
        nonlocal told
        told += capfd.readouterr().err
        return "warning: MLflow refuses this run: " in told

    with track("train", "voc-res101", "voc", {"pools": 2}, {}) as run:
        until(hear)  # while there is something to save
        assert "You are not authenticated." in told
        run.log(3, loss=1.0)
        run.artifact(project / "0.png")
        run.wrote(project / "weights")
    server.shutdown()
    assert "`refinenet tracking send` sends it" in capfd.readouterr().err
    (kept,) = (project / "mlflow-unsent").iterdir()

    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=rf"^mlflow-unsent/{kept.name}: not sent: "):
        __main__.main(["send"])
    assert kept.is_file()
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    __main__.main(["send"])
    assert not kept.exists()
    (sent,) = runs(project)
    assert (sent.info.status, sent.data.params) == ("FINISHED", {"pools": "2"})
    assert curve(project, sent, "loss") == [(3, 1.0)]
    assert sent.data.tags["weights.md5"] == dvc_md5(project / "weights")


def test_only_rank_0_records(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with track("train", "voc-res101", "voc", {}, {}) as run:
        run.log(0, loss=1.0)
        run.wrote(project / "weights")
    assert isinstance(run, Run)
    assert not (project / "mlflow.db.lock").exists()
