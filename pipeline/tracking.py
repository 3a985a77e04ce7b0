"""Every training and evaluation in MLflow: parameters, curves, scores, pictures, and which bytes went in.

    with track("train", "voc-res101", "voc", params, {"training data": Path("data/voc/train.arrow")}) as run:
        run.log(step, loss=0.7)
        run.wrote(Path("models/voc-res101.safetensors"))

This is the only file that imports mlflow, and it does so in a process of its own, fed by the stage through a pipe.
So the import (3 s), the hashing of the inputs and a slow or locked database never hold a training up; nothing that
MLflow sets up or prints (logging, warnings, threads) reaches the stage; and when a stage is killed, even by SIGKILL,
somebody is left to write KILLED over its run. Whatever goes wrong there ends in one line on stderr, never in the stage.

    python -m pipeline.tracking ui       MLflow's pages over the same database, on this machine only
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import getpass
import json
import math
import os
import queue
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.files import dvc_md5
from refinenet.files import whole_file

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric
    from mlflow.entities import Run as Recorded

PATIENCE = 30.0  # seconds that a stage, once it is done, lets the database keep it waiting
HANGING = 600.0  # seconds after which a writer that is neither done nor has given up is taken for hung

Message = dict[str, Any]

_QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "GIT_PYTHON_REFRESH": "quiet"}
_QUIET |= {"MLFLOW_LOGGING_LEVEL": "WARNING", "PYTHONWARNINGS": "ignore"}
_DEFAULTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "OMP_NUM_THREADS": "1"}


class Run:
    """What a stage tells about itself while it runs. No call waits for anything or raises."""

    def __init__(self, writer: _Writer | None) -> None:
        self._writer = writer

    def _tell(self, **message: object) -> None:
        if self._writer:
            self._writer.send(message)

    def log(self, step: int, **values: float) -> None:
        """Points of curves, one a keyword, at `step`. What a killed run had logged already is not logged again."""
        self._tell(do="log", step=step, time=_now(), values=values)

    def scores(self, values: Mapping[str, float | None]) -> None:
        """Final numbers, e.g. "single/mean_iou", "single/iou/aeroplane"; None (no such class in the truth) is left out.

        Characters that MLflow refuses in a name become "_".
        """
        told = {name: value for name, value in values.items() if value is not None}
        self._tell(do="log", step=0, time=_now(), values=told)

    def artifact(self, path: Path, folder: str = "") -> None:
        """A copy of the file `path` under `folder` of the run's artifacts. It has to stay until the block ends."""
        self._tell(do="artifact", path=str(path.absolute()), folder=folder)

    def wrote(self, weights: Path) -> None:
        """The training ended in the file `weights`: evaluations of these very bytes will hang under it."""
        self._tell(do="wrote", path=str(weights.absolute()))


@contextmanager
def track(
    kind: Literal["train", "evaluate"],
    experiment: str,
    dataset: str,
    params: Mapping[str, object],
    inputs: Mapping[str, Path],
    resume: Path | None = None,
    weights: Path | None = None,
) -> Iterator[Run]:
    """Record the block as one run, in the database of MLFLOW_TRACKING_URI, else mlflow.db in the working folder.

    `dataset` names MLflow's experiment; a training runs there as "voc-res101", an evaluation as "evaluate voc-res101".
    `params` may nest (mappings, dataclasses); `inputs`: what for -> file or folder, logged as a dataset whose digest
    is the md5 that DVC knows it by. `resume`: the folder of a training's checkpoints, where mlflow.json keeps its run
    id, so that one that was killed goes on in the same run, as long as its params are the same; the file is gone once
    the block has ended well. `weights`: what an evaluation evaluates, an input as well; its run hangs under the
    training in this database that wrote them.

    An error in the block ends the run as FAILED, Ctrl-C or a kill as KILLED. Of several distributed processes only the
    one with RANK 0 records.
    """
    if os.environ.get("RANK", "0") != "0":
        yield Run(None)
        return
    writer = _Writer()
    begin: Message = {"kind": kind, "experiment": experiment, "dataset": dataset, "params": _flat(params)}
    begin |= {"time": _now(), "patience": PATIENCE}
    everything = {**inputs, "weights": weights} if weights else inputs
    begin["inputs"] = {context: str(path.absolute()) for context, path in everything.items()}
    begin |= {"resume": resume and str(resume.absolute()), "weights": weights and str(weights.absolute())}
    writer.send(begin)
    try:
        yield Run(writer)
    except (Exception, SystemExit):
        writer.end("FAILED")
        raise
    except BaseException:
        writer.end("KILLED", wait=False)
        raise
    writer.end("FINISHED")


def _now() -> int:
    return int(time.time() * 1000)  # MLflow's milliseconds


def _flat(params: object, name: str = "") -> dict[str, str]:
    """Nested settings as MLflow's flat ones: {"train": {"crop": 96}} -> {"train.crop": "96"}."""
    if dataclasses.is_dataclass(params) and not isinstance(params, type):
        params = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    if not isinstance(params, Mapping):
        return {_name(name): str(params)}
    return {k: v for key, value in params.items() for k, v in _flat(value, f"{name}.{key}" if name else key).items()}


def _name(name: str) -> str:
    """`name` as MLflow takes it: letters, digits and "_-. /" only, and as a path its own normal form."""
    parts = [part if part.strip(".") else "_" for part in re.sub(r"[^\w\-. /]", "_", name).split("/") if part]
    return "/".join(parts)[:250] or "_"


class _Writer:
    """The stage's end of the pipe. A thread of its own empties the queue, so that a full pipe holds nobody up."""

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        self._problem = ""
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.tracking", "write"],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # The Ctrl-C and the kill that end a stage are not meant for the one who writes down that it ended.
                start_new_session=True,
                env=_DEFAULTS | dict(os.environ) | _QUIET,
            )
        except OSError as error:
            self._problem = f"no process to write it: {error}"
        self._feeder = threading.Thread(target=self._feed, daemon=True, name="tracking")
        self._feeder.start()

    def _feed(self) -> None:
        if not self._process or not self._process.stdin:
            return
        with self._process.stdin as pipe, contextlib.suppress(OSError):  # It has gone; its answer says why.
            while (line := self._lines.get()) is not None:
                while line:
                    line = line[os.write(pipe.fileno(), line) :]

    def send(self, message: Message) -> None:
        if self._feeder.is_alive():
            self._lines.put(json.dumps(message, default=float).encode() + b"\n")

    def end(self, status: str, wait: bool = True) -> None:
        self.send({"do": "end", "status": status, "time": _now()})
        self._lines.put(None)
        if not wait:
            return
        if self._process and self._process.stdout:
            self._feeder.join(HANGING)
            try:
                code = self._process.wait(1.0 if self._feeder.is_alive() else HANGING)
                self._problem = self._process.stdout.read().decode() or (f"exit code {code}" if code else "")
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._problem = f"no answer for {HANGING:.0f} seconds"
        if self._problem:
            print(f"warning: MLflow lacks (part of) this run: {self._problem}", file=sys.stderr)


# From here on: the writer's process.


class _Record:
    """One run in the database. `advance` may fail at any point and be called again: each step is done once."""

    def __init__(self, begin: Message) -> None:
        self.begin = begin
        self.uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"
        self.database = _file(self.uri)
        self.me = f"{socket.gethostname()} {os.getpid()}"
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

    def _earlier(self, client: MlflowClient, experiment_id: str) -> Recorded | None:
        """The run that a killed process of the same training began."""
        if not self.resume or not self.resume.is_file():
            return None
        from mlflow.exceptions import MlflowException

        try:
            run = client.get_run(str(json.loads(self.resume.read_text())["run"]))
        except (ValueError, KeyError, TypeError, MlflowException):
            return None  # another database, or a file that is not ours
        same = run.info.experiment_id == experiment_id and run.info.lifecycle_stage == "active"
        wanted = {name: value[:6000] for name, value in self.begin["params"].items()}
        return run if same and run.data.params in ({}, wanted) else None

    def _describe(self, client: MlflowClient) -> None:
        from mlflow.entities import Param, RunTag

        if self.resume:
            with whole_file(self.resume) as part:
                part.write_text(json.dumps({"run": self.run}) + "\n")
        params = [Param(name, value[:6000]) for name, value in self.begin["params"].items()]
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


def _writer_gone(run: Recorded) -> bool:
    """Whether the process that recorded `run` ran on this machine and is no more."""
    host, _, pid = run.data.tags.get("writer", "").partition(" ")
    if host != socket.gethostname() or not pid.isdigit():
        return False
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False


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


def _ui(port: int) -> None:
    """Become MLflow's server over the database that `track` writes, which is made if there is none yet."""
    # Job execution is for MLflow's language-model pages: eight processes that nobody here needs.
    os.environ.update(_QUIET, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"
    with _turn(_file(uri), PATIENCE):
        print(f"MLflow over {uri}: open http://127.0.0.1:{port}, choose 'Model training' at the top left", flush=True)
    options = ["--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    options += ["--uvicorn-opts", "--log-level warning"]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "ui", *options])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m pipeline.tracking", description="MLflow's pages for this project.")
    parser.add_argument("command", choices=["ui", "write"], help="ui: serve the pages; write: what `track` starts")
    parser.add_argument("--port", type=int, default=5000)
    arguments = parser.parse_args()
    if arguments.command == "write":
        _write()
    else:
        _ui(arguments.port)
