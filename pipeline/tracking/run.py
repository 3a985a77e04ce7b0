"""One run in MLflow, written piece by piece by the process beside a stage."""

from __future__ import annotations

import contextlib
import getpass
import json
import math
import re
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.fetch.input_md5 import input_md5
from pipeline.runtime import git
from pipeline.runtime.dvc_md5 import dvc_md5
from pipeline.tracking import database, models
from refinenet.atomic import atomic_file
from refinenet.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Dataset, Metric, Run

Call = dict[str, Any]  # a line of the spool


class Recorder:
    """One run of MLflow. `advance` and `end` may fail at any point and be called again: each step is done once.

    `problems`: what is wrong with single files, in words; everything else goes on. `run`: MLflow's id, "" before it is
    made.
    """

    def __init__(self, begin: Call) -> None:
        self.begin = begin
        self.problems: list[str] = []
        self._params = {_name(name): value for name, value in begin["params"].items()}
        self._uri = database.address()
        self._database = database.file(self._uri)
        self._resume = Path(begin["resume"], "mlflow.json") if begin["resume"] else None
        self._weights = Path(begin["weights"]) if begin["weights"] else None
        self._steps: list[Callable[[], None]] = [self._open, self._describe, self._log_inputs]
        self._metrics: list[Metric] = []
        self._client: MlflowClient
        self._experiment = self.run = ""  # ids of MLflow's
        self._parent: Run | None = None  # of an evaluation: the training that wrote the weights
        self._last: dict[str, int] = {}  # curve -> last step that the run had when it was taken up again
        self._scores: dict[str, float] = {}  # "single/mean_iou", not of single classes
        self._tags: dict[str, str] = {}
        self._data: dict[str, Dataset] = {}  # by tag; "data.md5": the run's own data set

    def take(self, calls: Iterable[Call]) -> None:
        """Have what the stage said among what is to be written."""
        for call in calls:
            self._steps.append(partial(getattr(self, f"_{call['call']}"), call))

    def advance(self, patience: float) -> None:
        """Write what has been said. Raises what MLflow raises, within `patience` seconds where an sqlite is locked."""
        if self._database and self.run and self._steps:
            database.check(self._database, patience)
        while self._steps:
            try:
                self._steps[0]()
            except UserError as error:
                if not self.run:
                    raise
                self.problems.append(str(error))
            del self._steps[0]
        self._client.log_batch(self.run, metrics=self._metrics)
        self._metrics = []

    def end(self, status: str, at: int, patience: float) -> None:
        """Write the rest and how the run ended, at `at` (ms); keep its model if it ended well."""
        self.advance(patience)
        if status == "KILLED" and self._client.get_run(self.run).data.tags["writer"] != database.writer():
            return  # The stage has been started again meanwhile, and the run is its successor's.
        if status == "FINISHED":
            if self._resume:
                self._resume.unlink(missing_ok=True)
            for run in [self.run, *([self._parent.info.run_id] if self._parent else [])]:
                self._client.log_batch(run, metrics=_metrics(self._headline(), at))
        self._client.set_terminated(self.run, status, at)
        if status == "FINISHED" and self._weights:
            self._keep_model(self._weights, at)

    def _open(self) -> None:
        """Find or make MLflow's experiment and the run."""
        begin = self.begin
        if self._database:
            database.prepare(self._database, begin["patience"])
        database.close_killed(self._uri)

        from mlflow import MlflowClient

        client = self._client = MlflowClient(self._uri)
        found = client.get_experiment_by_name(begin["dataset"])
        if found is None:
            folder = (self._database.parent / "mlruns" / begin["dataset"]).as_uri() if self._database else None
            self._experiment = client.create_experiment(begin["dataset"], artifact_location=folder)
        else:
            self._experiment = found.experiment_id
            if found.lifecycle_stage == "deleted":
                client.restore_experiment(self._experiment)
        self._tags = {"stage": begin["kind"], "experiment": begin["experiment"], "writer": database.writer()}
        self._tags |= {"mlflow.source.name": f"pipeline.{begin['kind']}", "mlflow.source.type": "LOCAL"}
        try:
            self._tags |= _git()
        except UserError as error:
            self._tags["git.problem"] = str(error)
            if "not a git repository" not in str(error):  # who has none knows it; the tag says it
                self.problems.append(f"the commit ({error})")
        with contextlib.suppress(OSError, KeyError):
            self._tags["mlflow.user"] = getpass.getuser()
        if self._weights:
            self._find_parent(self._weights)
        if earlier := self._earlier():
            self.run = earlier.info.run_id
            for key in earlier.data.metrics:
                self._last[key] = max(point.step for point in client.get_metric_history(self.run, key))
            client.update_run(self.run, status="RUNNING")
        else:
            name = begin["experiment"] if begin["kind"] == "train" else f"evaluate {begin['experiment']}"
            made = client.create_run(self._experiment, start_time=begin["time"], tags=self._tags, run_name=name)
            self.run = made.info.run_id

    def _earlier(self) -> Run | None:
        """Find the run that a killed process of the same training began, or that was sent in part."""
        if self.begin.get("run"):
            return self._client.get_run(self.begin["run"])
        if not self._resume or not self._resume.is_file():
            return None
        from mlflow.exceptions import MlflowException

        try:
            run = self._client.get_run(str(json.loads(self._resume.read_text())["run"]))
        except (ValueError, KeyError, TypeError, MlflowException):
            return None  # another database, or a file that is not ours
        same = run.info.experiment_id == self._experiment and run.info.lifecycle_stage == "active"
        return run if same and run.data.params in ({}, self._params) else None

    def _find_parent(self, weights: Path) -> None:
        """Find the training that wrote the weights of an evaluation, which then has its parameters, too.

        (A chart of MLflow's sets scores against parameters of the same run.)
        """
        md5 = self._tags["weights.md5"] = dvc_md5(weights)
        query = f"tags.stage = 'train' and tags.`weights.md5` = '{md5}'"
        for found in self._client.search_runs([self._experiment], query, order_by=["start_time DESC"])[:1]:
            self._parent = found
            self._params = {**found.data.params, **self._params}
            self._tags["mlflow.parentRunId"] = found.info.run_id
        self._tags["weights.from"] = "a training in this database" if self._parent else "elsewhere (pulled)"

    def _describe(self) -> None:
        from mlflow.entities import Param, RunTag

        if self._resume:
            with atomic_file(self._resume) as part:
                part.write_text(json.dumps({"run": self.run}) + "\n")
        params = [Param(name, value) for name, value in self._params.items()]
        self._client.log_batch(self.run, params=params, tags=[RunTag(*tag) for tag in self._tags.items()])

    def _log_inputs(self) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        datasets = []
        for purpose, text in self.begin["inputs"].items():
            path = Path(text)
            name = path.relative_to(Path.cwd()).as_posix() if path.is_relative_to(Path.cwd()) else text
            try:
                md5 = input_md5(path)
            except UserError as error:
                self.problems.append(str(error))
                continue
            dataset = Dataset(name, md5, "local", json.dumps({"uri": name}))
            datasets.append(DatasetInput(dataset, tags=[InputTag("mlflow.data.context", purpose)]))
            if purpose.partition(",")[0].endswith(" data"):
                own = path.name == self.begin["dataset"]
                self._data["data.md5" if own else f"data.md5.{_name(path.name)}"] = dataset
        self._client.log_inputs(self.run, datasets=datasets or None)
        for tag, dataset in self._data.items():
            self._client.set_tag(self.run, tag, dataset.digest)

    def _log(self, call: Call) -> None:
        step, values = call["step"], {_name(name): value for name, value in call["values"].items()}
        new = {name: value for name, value in values.items() if step > self._last.get(name, -1)}
        self._metrics += _metrics(new, call["time"], step)
        if self.begin["kind"] == "evaluate":
            self._scores |= {name: value for name, value in values.items() if name.count("/") == 1}

    def _artifact(self, call: Call) -> None:
        if not Path(call["path"]).is_file():
            raise UserError(f"{call['path']}: no such file")
        self._client.log_artifact(self.run, call["path"], call["folder"] or None)

    def _wrote(self, call: Call) -> None:
        self._tags["weights.md5"] = dvc_md5(Path(call["path"]))
        self._client.set_tag(self.run, "weights.md5", self._tags["weights.md5"])
        self._weights = Path(call["path"])

    def _headline(self) -> dict[str, float]:
        """Return the scores that stand for the model, under names without a protocol, the same in every run."""
        of = f"{self.begin['headline']}/"
        return {name.removeprefix(of): value for name, value in self._scores.items() if name.startswith(of)}

    def _keep_model(self, weights: Path, at: int) -> None:
        """Log the model of a training; have the scores of an evaluation at its model, and register that."""
        from mlflow.entities import LoggedModelInput, Metric

        client, name, md5 = self._client, _name(self.begin["experiment"]).replace("/", "_"), self._tags["weights.md5"]
        owner = self._parent.info.run_id if self._parent else self.run
        params = self._parent.data.params if self._parent else self._params
        model = models.log_model(client, self._experiment, name, weights, md5, owner, params)
        if "mean_iou" not in (headline := self._headline()):
            return
        data = self._data.get("data.md5")
        where = (model.model_id, data.name, data.digest) if data else (model.model_id,)
        scores = [Metric(m.key, m.value, at, 0, *where) for m in _metrics(self._scores | headline, at)]
        client.log_batch(self.run, metrics=scores)
        client.log_inputs(self.run, models=[LoggedModelInput(model.model_id)])
        tags = {"protocol": self.begin["headline"], "mean_iou": repr(headline["mean_iou"]), "weights.md5": md5}
        tags |= {"data.md5": data.digest if data else "", "dataset": self.begin["dataset"]}
        tags |= {"trained as": self.begin["experiment"], "profile": self._params.get("profile", "")}
        with database.exclusive(self._database):  # which version is the best, one at a time decides
            models.register(client, model, {key: value for key, value in tags.items() if value})


def _metrics(values: dict[str, float], at: int, step: int = 0) -> list[Metric]:
    from mlflow.entities import Metric

    return [Metric(name, value, at, step) for name, value in values.items() if not math.isnan(value)]


def _name(name: str) -> str:
    """Return `name` as MLflow takes it: letters, digits and "_-. /" only, and as a path its own normal form."""
    parts = [part if part.strip(".") else "_" for part in re.sub(r"[^\w\-. /]", "_", name).split("/") if part]
    return "/".join(parts)[:250] or "_"


def _git() -> dict[str, str]:
    """Return the commit, and whether tracked files differ from it, other than those that the graph itself writes.

    Raises UserError with git's reason where it does not tell: no repository, nothing committed, a folder of another
    user.
    """
    written = [":(exclude)dvc.lock", ":(exclude)metrics", ":(exclude)results"]
    commands = (["rev-parse", "HEAD"], ["status", "--porcelain", "--untracked-files=no", "--", ".", *written])
    commit, changed = (git.ask(*command) for command in commands)
    return {"mlflow.source.git.commit": commit.decode().strip(), "git.dirty": "true" if changed else "false"}


def first_line(error: BaseException) -> str:
    """Return the first line of what an error says."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:400]
