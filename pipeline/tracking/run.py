"""One run in MLflow's database, written piece by piece by the process beside a stage."""

from __future__ import annotations

import contextlib
import getpass
import importlib
import json
import math
import os
import re
import socket
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.runtime.dvc_md5 import dvc_md5
from pipeline.tracking import Message, database, models
from pipeline.tracking.database import exclusive
from refinenet.atomic import atomic_file, process_start_time

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric, Run

_OVERALL = re.compile(r"[^/]+/(mean_iou|mean_accuracy|pixel_accuracy)")


class Record:
    """One run in the database. `advance` may fail at any point and be called again: each step is done once."""

    def __init__(self, begin: Message) -> None:
        self.begin = begin
        self.params = {_name(name): value[:6000] for name, value in begin["params"].items()}  # as long as MLflow takes
        self.uri = database.address()
        self.database = database.file(self.uri)
        self.me = f"{socket.gethostname()} {os.getpid()} {process_start_time(os.getpid())}"
        self.resume = Path(begin["resume"], "mlflow.json") if begin["resume"] else None
        self.run = ""
        self.status = "KILLED"  # unless the stage says otherwise before the pipe closes
        self.ended: int | None = None
        self.pending: list[Message] = []
        self.problems: list[str] = []  # with one file; everything else goes on
        self.weights: Path | None = Path(begin["weights"]) if begin["weights"] else None
        self._experiment = ""  # MLflow's
        self._parent: Run | None = None  # of an evaluation: the training that wrote the weights
        self._logged: dict[str, int] = {}  # curve -> last step that the run had when it was taken up again
        self._scores: dict[str, float] = {}  # of whole images: "single/mean_iou", not of single classes
        self._tags: dict[str, str] = {}
        self._data_md5s: dict[str, str] = {}  # tag -> md5; "data.md5": of the run's own data set
        self._described = self._inputs_known = self._ended = False

    def advance(self, patience: float) -> None:
        """Write what is pending. Raises whatever the database raises."""
        if not self._tags:
            self._tags = self._own_tags()
        importlib.import_module("mlflow.store.tracking.sqlalchemy_store")  # seconds that no other writer need wait for
        with exclusive(self.database, patience):
            client = self._client()
            if not self.run:
                self._open(client)
            if not self._described:
                self._describe(client)
        if not self._inputs_known:
            datasets = self._inputs()
            with exclusive(self.database, patience):
                client.log_inputs(self.run, datasets=datasets or None)
                for tag, md5 in self._data_md5s.items():
                    client.set_tag(self.run, tag, md5)
            self._inputs_known = True
        with exclusive(self.database, patience):
            self._write(client)

    def close(self, patience: float) -> None:
        """Write the run's end."""
        if self._ended:
            return
        with exclusive(self.database, patience):
            client = self._client()
            if self.status == "KILLED" and client.get_run(self.run).data.tags.get("writer") != self.me:
                return  # The stage has been started again meanwhile, and the run is its successor's.
            if self.status == "FINISHED" and self.resume:
                self.resume.unlink(missing_ok=True)
            if headline := self._metrics_of(self._headline()) if self.status == "FINISHED" else []:
                client.log_batch(self.run, metrics=headline)
                if self._parent:
                    client.log_batch(self._parent.info.run_id, metrics=headline)
            client.set_terminated(self.run, self.status, self.ended)
            self._ended = True

    def keep_model(self, patience: float) -> None:
        """Log the model of a training that has ended well, register that of such an evaluation."""
        if self.status != "FINISHED" or not self.weights:
            return
        md5, about = self._tags["weights.md5"], models.read_about(self.weights)
        experiment, name, client = self._experiment, _name(self.begin["experiment"]).replace("/", "_"), self._client()
        with exclusive(self.database, patience):
            model = models.logged(client, experiment, name, md5)
            if not model:
                params = self._parent.data.params if self._parent else self.params
                owner = self._parent.info.run_id if self._parent else self.run
                model = models.begin(client, experiment, name, md5, owner, params)
        if not models.filled(model):
            models.fill(client, model, self.weights, md5, about)
        with exclusive(self.database, patience):
            models.finish(client, model, self.run if self.begin["kind"] == "train" else model.source_run_id)
            if score := self._score():
                models.compare(client, self.run, model, self._metrics_of(self._scores | self._headline()))
                name = models.experiment_of(name)
                tags = {"weights.md5": md5, "data.md5": self._data_md5s.get("data.md5", "")}
                tags |= {"trained as": self.begin["experiment"], "dataset": self.begin["dataset"]}
                tags |= {"profile": self.params.get("profile", "")}
                models.register(client, name, model, score, {key: value for key, value in tags.items() if value})

    def _score(self) -> models.Score | None:
        """The score of an evaluation that stands for its model."""
        found = {name.partition("/")[0]: value for name, value in self._scores.items() if name.endswith("/mean_iou")}
        return models.table_score(models.experiment_of(self.begin["experiment"]), found)

    def _headline(self) -> dict[str, float]:
        """The scores that stand for the model under names without a protocol, the same in every run."""
        score = self._score()
        of = f"{score.protocol}/" if score else "-"
        return {name.removeprefix(of): value for name, value in self._scores.items() if name.startswith(of)}

    def _metrics_of(self, values: dict[str, float]) -> list[Metric]:
        from mlflow.entities import Metric

        return [Metric(name, value, self.ended or self.begin["time"], 0) for name, value in values.items()]

    def _client(self) -> MlflowClient:
        import mlflow

        mlflow.set_tracking_uri(self.uri)  # where it looks a models:/ address up
        return mlflow.MlflowClient(tracking_uri=self.uri)

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
        self._experiment = experiment_id
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
                self._parent = wrote[0]
                self._tags["mlflow.parentRunId"] = wrote[0].info.run_id
                # A chart of MLflow's sets scores against params of the same run.
                self.params = {**wrote[0].data.params, **self.params}
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
            with atomic_file(self.resume) as part:
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
                md5 = dvc_md5(path)
                dataset = Dataset(name, md5, "local", json.dumps({"uri": name}))
            except Exception as error:
                self.problems.append(line(error))
                continue
            datasets.append(DatasetInput(dataset, tags=[InputTag("mlflow.data.context", context)]))
            if context.partition(",")[0].endswith(" data"):
                own = path.name == self.begin["dataset"]
                self._data_md5s["data.md5" if own else f"data.md5.{_name(path.name)}"] = md5
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
                    weights = Path(message["path"])
                    self._tags["weights.md5"] = dvc_md5(weights)
                    client.set_tag(self.run, "weights.md5", self._tags["weights.md5"])
                    self.weights = weights
            except Exception as error:
                if Path(message["path"]).is_file():
                    raise
                self.problems.append(line(error))
            self.pending.pop(0)

    def _metrics(self, message: Message) -> list[Metric]:
        from mlflow.entities import Metric

        step, values = message["step"], {_name(name): value for name, value in message["values"].items()}
        if self.begin["kind"] == "evaluate":
            told = {name: value for name, value in values.items() if _OVERALL.fullmatch(name)}
            self._scores |= {name: value for name, value in told.items() if not math.isnan(value)}
        new = {name: value for name, value in values.items() if step > self._logged.get(name, -1)}
        return [Metric(name, value, message["time"], step) for name, value in new.items() if not math.isnan(value)]


def _name(name: str) -> str:
    """`name` as MLflow takes it: letters, digits and "_-. /" only, and as a path its own normal form."""
    parts = [part if part.strip(".") else "_" for part in re.sub(r"[^\w\-. /]", "_", name).split("/") if part]
    return "/".join(parts)[:250] or "_"


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
    now = process_start_time(int(pid))
    return not now or (born.isdigit() and now.isdigit() and born != now)


def line(error: BaseException) -> str:
    """The first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:400]
