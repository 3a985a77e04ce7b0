"""Every training and evaluation in MLflow: parameters, curves, scores, pictures, and which bytes went in.

    with track("train", "voc-res101", "voc", params, {"training data": Path("data/voc/train.arrow")}) as run:
        run.log(step, loss=0.7)
        run.wrote(Path("models/voc-res101.safetensors"))

This is the stage's side. MLflow runs in a process of its own (pipeline/tracking/writer.py), fed through a pipe.
So its import (3 s), the hashing of the inputs and a slow or locked database never hold a training up; nothing that
MLflow sets up or prints (logging, warnings, threads) reaches the stage; and when a stage is killed, even by SIGKILL,
somebody is left to write KILLED over its run. Whatever goes wrong there ends in one line on stderr, never in the stage.

    python -m pipeline.tracking ui                   MLflow's pages over the same database, on this machine only
    python -m pipeline.tracking find data/voc        the runs that data, weights or an md5 went into or came out of
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from pipeline.runtime.cli import Terminated

PATIENCE = 30.0  # seconds that a stage, once it is done, lets the database keep it waiting
HANGING = 600.0  # seconds after which a writer that is neither done nor has given up is taken for hung
LAST_WORDS = 10.0  # seconds for the writer of a stage that SIGTERM ends: its machine may be gone right after it

Message = dict[str, Any]  # one line of JSON in the pipe

QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "GIT_PYTHON_REFRESH": "quiet"}
QUIET |= {"MLFLOW_LOGGING_LEVEL": "WARNING", "PYTHONWARNINGS": "ignore"}
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

    An error in the block ends the run as FAILED, Ctrl-C, SIGTERM or a kill as KILLED. Of several distributed processes
    only the one with RANK 0 records.
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
    except Terminated:
        writer.end("KILLED", seconds=LAST_WORDS)
        raise
    except BaseException:
        writer.end("KILLED", seconds=0)
        raise
    writer.end("FINISHED")


def _now() -> int:
    return int(time.time() * 1000)  # MLflow's milliseconds


def _flat(params: object, name: str = "") -> dict[str, str]:
    """Nested settings made flat: {"train": {"crop": 96}} -> {"train.crop": "96"}."""
    if dataclasses.is_dataclass(params) and not isinstance(params, type):
        params = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    if not isinstance(params, Mapping):
        return {name: str(params)}
    return {k: v for key, value in params.items() for k, v in _flat(value, f"{name}.{key}" if name else key).items()}


class _Writer:
    """The stage's end of the pipe. A thread of its own empties the queue, so that a full pipe holds nobody up."""

    def __init__(self) -> None:
        self._lines: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        self._problem = ""
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "pipeline.tracking.writer"],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                # The Ctrl-C and the kill that end a stage are not meant for the one who writes down that it ended.
                start_new_session=True,
                env=_DEFAULTS | dict(os.environ) | QUIET,
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

    def end(self, status: str, seconds: float = HANGING) -> None:
        """Say how the run ended, and wait up to `seconds` until it is written; 0: let it be written alone."""
        self.send({"do": "end", "status": status, "time": _now()})
        self._lines.put(None)
        if not seconds:
            return
        if self._process and self._process.stdout:
            self._feeder.join(seconds)
            try:
                code = self._process.wait(1.0 if self._feeder.is_alive() else seconds)
                self._problem = self._process.stdout.read().decode() or (f"exit code {code}" if code else "")
            except subprocess.TimeoutExpired:
                if seconds < HANGING:
                    return  # it goes on alone
                self._process.kill()
                self._problem = f"no answer for {seconds:.0f} seconds"
        if self._problem:
            print(f"warning: MLflow lacks (part of) this run: {self._problem}", file=sys.stderr)
