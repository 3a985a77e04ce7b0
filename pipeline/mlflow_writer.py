"""The process beside a stage that writes what `pipeline.tracking` sends it into MLflow's database.

    python -m pipeline.mlflow_writer     started by `track`: messages on stdin, what went wrong on stdout

This is the only file that imports mlflow, and late, so that an import that fails is said like any other failure. The
first message is what `track` was called with; one for every call of `Run`, and the end, follow it. A pipe that closes
without an end is a stage that was killed.
"""

from __future__ import annotations

import contextlib
import getpass
import importlib
import json
import math
import os
import re
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.files import dvc_md5
from pipeline.tracking import PATIENCE, QUIET, Message
from refinenet.files import birth, whole_file

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run


class _Record:
    """One run in the database. `advance` may fail at any point and be called again: each step is done once."""

    def __init__(self, begin: Message) -> None:
        self.begin = begin
        self.params = {_name(name): value[:6000] for name, value in begin["params"].items()}  # as long as MLflow takes
        self.uri = _uri()
        self.database = _file(self.uri)
        self.me = f"{socket.gethostname()} {os.getpid()} {birth(os.getpid())}"
        self.resume = Path(begin["resume"], "mlflow.json") if begin["resume"] else None
        self.run = ""
        self.status = "KILLED"  # unless the stage says otherwise before the pipe closes
        self.ended: int | None = None
        self.pending: list[Message] = []
        self.problems: list[str] = []  # with one file; everything else goes on
        self._logged: dict[str, int] = {}  # curve -> last step that the run had when it was taken up again
        self._tags: dict[str, str] = {}
        self._described = self._inputs_known = False

    def advance(self, patience: float) -> None:
        """Write what is pending. Raises whatever the database raises."""
        if not self._tags:
            self._tags = self._own_tags()
        importlib.import_module("mlflow.store.tracking.sqlalchemy_store")  # seconds that no other writer need wait for
        with _turn(self.database, patience):
            client = self._client()
            if not self.run:
                self._open(client)
            if not self._described:
                self._describe(client)
        if not self._inputs_known:
            datasets = self._inputs()
            with _turn(self.database, patience):
                client.log_inputs(self.run, datasets=datasets or None)
            self._inputs_known = True
        with _turn(self.database, patience):
            self._write(client)

    def close(self, patience: float) -> None:
        """Write the run's end."""
        with _turn(self.database, patience):
            client = self._client()
            if self.status == "KILLED" and client.get_run(self.run).data.tags.get("writer") != self.me:
                return  # The stage has been started again meanwhile, and the run is its successor's.
            if self.status == "FINISHED" and self.resume:
                self.resume.unlink(missing_ok=True)
            client.set_terminated(self.run, self.status, self.ended)

    def _client(self) -> MlflowClient:
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=self.uri)

    def _own_tags(self) -> dict[str, str]:
        begin = self.begin
        tags = {"stage": begin["kind"], "writer": self.me, "mlflow.source.name": f"pipeline.{begin['kind']}"}
        tags |= {"experiment": begin["experiment"], "mlflow.source.type": "LOCAL", **_git()}
        with contextlib.suppress(OSError, KeyError):
            tags["mlflow.user"] = getpass.getuser()
        if begin["weights"]:
            tags["weights.md5"] = dvc_md5(Path(begin["weights"]))
        return tags

    def _open(self, client: MlflowClient) -> None:
        """Find or make MLflow's experiment and the run; what earlier processes left RUNNING is marked."""
        begin = self.begin
        experiment = client.get_experiment_by_name(begin["dataset"])
        if experiment is None:
            folder = (self.database.parent / "mlruns" / begin["dataset"]).as_uri() if self.database else None
            experiment_id = client.create_experiment(begin["dataset"], artifact_location=folder)
        else:
            experiment_id = experiment.experiment_id
            if experiment.lifecycle_stage == "deleted":
                client.restore_experiment(experiment_id)
        name = begin["experiment"] if begin["kind"] == "train" else f"evaluate {begin['experiment']}"
        earlier = self._earlier(client, experiment_id)
        query = f"attributes.status = 'RUNNING' and attributes.run_name = '{name}'"
        for left in client.search_runs([experiment_id], query):
            if _writer_gone(left) and not (earlier and left.info.run_id == earlier.info.run_id):
                client.set_terminated(left.info.run_id, "KILLED")
        if earlier:
            for key in earlier.data.metrics:
                self._logged[key] = max(point.step for point in client.get_metric_history(earlier.info.run_id, key))
            self.run = earlier.info.run_id
            client.update_run(self.run, status="RUNNING")
            return
        if "weights.md5" in self._tags:
            md5 = self._tags["weights.md5"]
            query = f"tags.stage = 'train' and tags.`weights.md5` = '{md5}'"
            wrote = client.search_runs([experiment_id], query, max_results=1, order_by=["attributes.start_time DESC"])
            self._tags["weights.from"] = "a training in this database" if wrote else "elsewhere (pulled)"
            if wrote:
                self._tags["mlflow.parentRunId"] = wrote[0].info.run_id
        run = client.create_run(experiment_id, start_time=begin["time"], tags=self._tags, run_name=name)
        self.run = run.info.run_id

    def _earlier(self, client: MlflowClient, experiment_id: str) -> Run | None:
        """The run that a killed process of the same training began."""
        if not self.resume or not self.resume.is_file():
            return None
        from mlflow.exceptions import MlflowException

        try:
            run = client.get_run(str(json.loads(self.resume.read_text())["run"]))
        except (ValueError, KeyError, TypeError, MlflowException):
            return None  # another database, or a file that is not ours
        same = run.info.experiment_id == experiment_id and run.info.lifecycle_stage == "active"
        return run if same and run.data.params in ({}, self.params) else None

    def _describe(self, client: MlflowClient) -> None:
        from mlflow.entities import Param, RunTag

        if self.resume:
            with whole_file(self.resume) as part:
                part.write_text(json.dumps({"run": self.run}) + "\n")
        params = [Param(name, value) for name, value in self.params.items()]
        tags = [RunTag(name, value) for name, value in self._tags.items()]
        for first in range(0, max(len(params), 1), 100):  # MLflow takes 100 a call
            client.log_batch(self.run, params=params[first : first + 100], tags=tags)
        self._described = True

    def _inputs(self) -> list[Any]:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        datasets = []
        for context, text in self.begin["inputs"].items():
            path = Path(text)
            name = path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else text
            try:
                dataset = Dataset(name, dvc_md5(path), "local", json.dumps({"uri": name}))
            except Exception as error:
                self.problems.append(_line(error))
                continue
            datasets.append(DatasetInput(dataset, tags=[InputTag("mlflow.data.context", context)]))
        return datasets

    def _write(self, client: MlflowClient) -> None:
        metrics = [metric for message in self.pending if message["do"] == "log" for metric in self._metrics(message)]
        for first in range(0, len(metrics), 1000):  # MLflow takes 1,000 a call; the same point twice is one point
            client.log_batch(self.run, metrics=metrics[first : first + 1000])
        self.pending = [message for message in self.pending if message["do"] != "log"]
        while self.pending:
            message = self.pending[0]
            try:
                if message["do"] == "artifact":
                    client.log_artifact(self.run, message["path"], message["folder"] or None)
                elif message["do"] == "wrote":
                    client.set_tag(self.run, "weights.md5", dvc_md5(Path(message["path"])))
            except Exception as error:
                if Path(message["path"]).is_file():
                    raise
                self.problems.append(_line(error))
            self.pending.pop(0)

    def _metrics(self, message: Message) -> list[Metric]:
        from mlflow.entities import Metric

        step, values = message["step"], {_name(name): value for name, value in message["values"].items()}
        new = {name: value for name, value in values.items() if step > self._logged.get(name, -1)}
        return [Metric(name, value, message["time"], step) for name, value in new.items() if not math.isnan(value)]


def _name(name: str) -> str:
    """`name` as MLflow takes it: letters, digits and "_-. /" only, and as a path its own normal form."""
    parts = [part if part.strip(".") else "_" for part in re.sub(r"[^\w\-. /]", "_", name).split("/") if part]
    return "/".join(parts)[:250] or "_"


def _uri() -> str:
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"


def _file(uri: str) -> Path | None:
    """The file behind an sqlite URI; None where it is a server or another database."""
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    return Path(path).absolute() if uri.startswith("sqlite:///") and path not in {"", ":memory:"} else None


@contextmanager
def _turn(database: Path | None, patience: float) -> Iterator[None]:
    """Hold the database alone, and have it exist; TimeoutError or sqlite3.Error if that can't be had.

    All writers take turns at a lock file beside it. sqlite's own locks would do for plain writes, but not for creating
    it: four processes that open a database that is not there yet break it for good. So it is made once, under another
    name, and appears whole. (No WAL: it corrupts on the network file systems of clusters.)
    """
    if database is None:
        yield
        return
    import sqlite3

    from filelock import FileLock, Timeout

    database.parent.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(f"{database}.lock", timeout=patience).acquire()
    except Timeout:
        raise TimeoutError(f"{database}.lock is held by another process") from None
    with lock:
        if not database.exists() or database.stat().st_size == 0:
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            with whole_file(database) as part:
                store = SqlAlchemyStore(f"sqlite:///{part}", (database.parent / "mlruns").as_uri())  # type: ignore[no-untyped-call]
                store.engine.dispose()
        # MLflow waits 20 s for a locked database, with a page of traceback: ask beforehand.
        with contextlib.closing(sqlite3.connect(database, timeout=patience)) as probe:
            probe.execute("BEGIN IMMEDIATE")
        yield


def _git() -> dict[str, str]:
    """The commit, and whether tracked files differ from it, other than those that the graph itself writes."""
    written = [":(exclude)dvc.lock", ":(exclude)metrics", ":(exclude)results"]
    status = ["status", "--porcelain", "--untracked-files=no", "--", ".", *written]
    commands = (["rev-parse", "HEAD"], status)
    try:
        commit, changed = (
            subprocess.run(["git", "--no-optional-locks", *command], capture_output=True, check=True, timeout=60).stdout
            for command in commands
        )
    except (OSError, subprocess.SubprocessError):
        return {}
    return {"mlflow.source.git.commit": commit.decode().strip(), "git.dirty": "true" if changed else "false"}


def _writer_gone(run: Run) -> bool:
    """Whether the process that recorded `run` ran on this machine and is no more."""
    host, pid, born = (*run.data.tags.get("writer", "").split(), "", "", "")[:3]
    if host != socket.gethostname() or not pid.isdigit():
        return False
    now = birth(int(pid))
    return not now or (born.isdigit() and now.isdigit() and born != now)


def _line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:400]


def _batches(seconds: float = 0.3) -> Iterator[list[bytes]]:
    """The lines of stdin, those that come within `seconds` together: a fast loop makes few transactions."""
    unread = b""
    while chunk := os.read(0, 1 << 20):
        deadline = time.monotonic() + seconds
        while chunk:
            unread += chunk
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([0], [], [], left)[0]:
                break
            chunk = os.read(0, 1 << 20)
        *lines, unread = unread.split(b"\n")
        yield lines


def _write() -> None:
    """Record what the stage says on stdin until it ends or is killed; say on stdout what went wrong, if it did."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answer, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    record: _Record | None = None
    problem = ""
    for lines in _batches():
        for message in map(json.loads, lines):
            if record is None:
                record = _Record(message)
            elif message["do"] == "end":
                record.status, record.ended = message["status"], message["time"]
            else:
                record.pending.append(message)
        if record and record.status == "KILLED":
            # A failure here is no loss yet: what is pending is tried again with the next message, and at the end.
            with contextlib.suppress(Exception):
                record.advance(record.begin["patience"])
    if record is None:
        return
    deadline = time.monotonic() + record.begin["patience"]
    while True:
        left = deadline - time.monotonic()
        try:
            record.advance(max(left, 0.1))
            record.close(max(left, 0.1))
            problem = "; ".join(record.problems)
            break
        except Exception as error:
            problem = _line(error)
            if left <= 0:
                break
            time.sleep(min(1.0, left))
    os.write(answer, problem.encode())


def serve(port: int) -> None:
    """Become MLflow's server over the database that `track` writes, which is made if there is none yet."""
    # Job execution is for MLflow's language-model pages: eight processes that nobody here needs.
    os.environ.update(QUIET, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    uri = _uri()
    with _turn(_file(uri), PATIENCE):
        print(f"MLflow over {uri}: open http://127.0.0.1:{port}, choose 'Model training' at the top left", flush=True)
    options = ["--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    options += ["--uvicorn-opts", "--log-level warning"]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "ui", *options])


if __name__ == "__main__":
    _write()
