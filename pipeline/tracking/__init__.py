"""Record trainings and evaluations: parameters, curves, scores, pictures, models, and which bytes went in.

    with track("train", "voc-res101", "voc", params, {"training data": Path("data/voc")}) as run:
        run.log(step, loss=0.7)
        run.wrote(Path("models/voc-res101.safetensors"))

This is all that stages see of MLflow; for another tracker, replace what stands behind it. MLflow itself is called in a
process of its own (pipeline/tracking/writer.py), for what it cannot do inside a stage. There `track` would hold the
stage up until MLflow is imported and the database opened (4 s of CPU and 240 MB; 20 s more where the database is
locked), a batch that its asynchronous logging fails to write is lost, and nobody would be left to close the run of a
stage that SIGKILL ends. Here a call appends a line to a file that the other process reads.

    refinenet tracking ui                   MLflow's pages over the same database, on this machine only
    refinenet tracking find data/voc        the runs that data, weights or an md5 went into or came out of
    refinenet tracking send                 what could not be sent when its stage ended
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Literal

from pipeline.runtime.cli import Terminated

KEPT = "PIPELINE_SPOOL"  # environment variable: a file that keeps what the stage says (pipeline/rehearse.py)
PATIENCE = 30.0  # seconds for which what MLflow refuses is tried again once the stage is done
HANGING = 600.0  # seconds after which a writer that is neither done nor has given up is taken for hung
LAST_WORDS = 10.0  # seconds for the writer of a stage that SIGTERM ends: its machine may be gone right after it

QUIET = {"MLFLOW_DISABLE_TELEMETRY": "true", "DO_NOT_TRACK": "true", "GIT_PYTHON_REFRESH": "quiet"}
QUIET |= {"MLFLOW_LOGGING_LEVEL": "WARNING", "PYTHONWARNINGS": "ignore"}
_DEFAULTS = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "20", "OMP_NUM_THREADS": "1"}


class Run:
    """What a stage says of itself while it runs. No call waits for MLflow, and none raises."""

    def __init__(self, spool: IO[bytes] | None = None) -> None:
        self._spool = spool  # None: nobody records

    def log(self, step: int, **values: float) -> None:
        """Log points of curves, one a keyword, at `step`. Those that a killed run logged already are left out."""
        self._send("log", step=step, values=values)

    def scores(self, values: Mapping[str, float | None]) -> None:
        """Log final numbers, e.g. "single/mean_iou"; None (no such class in the truth) is left out.

        Characters that MLflow refuses in a name become "_".
        """
        self._send("log", step=0, values={name: value for name, value in values.items() if value is not None})

    def artifact(self, path: Path, folder: str = "") -> None:
        """Copy the file `path` to `folder` of the run's artifacts. It has to stay until the block ends."""
        self._send("artifact", path=str(path.absolute()), folder=folder)

    def wrote(self, weights: Path) -> None:
        """Say that the training ended in the file `weights`: evaluations of these very bytes will hang under it."""
        self._send("wrote", path=str(weights.absolute()))

    def close(self) -> None:
        """Take nothing more; `track` calls it."""
        if self._spool:
            self._spool.close()
            self._spool = None

    def _send(self, call: str, **values: object) -> None:
        if self._spool:
            line = json.dumps({"call": call, "time": _now(), **values}, default=float) + "\n"
            with contextlib.suppress(OSError):  # a full disk
                self._spool.write(line.encode())


@contextmanager
def track(
    kind: Literal["train", "evaluate"],
    experiment: str,
    dataset: str,
    params: Mapping[str, object],
    inputs: Mapping[str, Path],
    resume: Path | None = None,
    weights: Path | None = None,
    headline: str = "",
) -> Iterator[Run]:
    """Record the block as one run, in the database of MLFLOW_TRACKING_URI, else mlflow.db in the working folder.

    An error in the block ends the run as FAILED, Ctrl-C, SIGTERM or a kill as KILLED. What could not be recorded is one
    line on stderr and nothing else. Of several distributed processes only the one with RANK 0 records.

    Args:
        kind: the stage.
        experiment: names the run, "voc-res101"; of an evaluation "evaluate voc-res101".
        dataset: names MLflow's experiment.
        params: may nest (mappings, dataclasses).
        inputs: what for -> file or folder, logged as a dataset whose digest is the md5 that DVC knows it by.
        resume: folder of a training's checkpoints, where mlflow.json keeps the run's id, so that a killed training goes
            on in the same run as long as its params are the same; the file is gone once the block has ended well.
        weights: what an evaluation evaluates, an input as well; its run hangs under the training that wrote them.
        headline: protocol of an evaluation whose scores stand for the model: `headline`/mean_iou is logged as mean_iou.
    """
    if os.environ.get("RANK", "0") != "0":
        yield Run()
        return
    everything = {**inputs, "weights": weights} if weights else inputs
    run, writer = _start(
        kind=kind,
        experiment=experiment,
        dataset=dataset,
        params=_flat(params),
        inputs={purpose: str(path.absolute()) for purpose, path in everything.items()},
        resume=resume and str(resume.absolute()),
        weights=weights and str(weights.absolute()),
        headline=headline,
        patience=PATIENCE,
    )
    status, seconds = "KILLED", 0.0
    try:
        yield run
        status, seconds = "FINISHED", HANGING
    except Terminated:
        seconds = LAST_WORDS
        raise
    except (Exception, SystemExit):
        status, seconds = "FAILED", HANGING
        raise
    finally:
        if writer:
            _end(writer, status, seconds)
        run.close()


def _start(**begin: object) -> tuple[Run, subprocess.Popen[bytes] | None]:
    """Start the process that writes to MLflow what is said to the run."""
    try:
        kept = os.environ.get(KEPT)
        spool = Path(kept).open("w+b", buffering=0) if kept else tempfile.TemporaryFile(buffering=0)  # noqa: SIM115 - closed with the run
        run = Run(spool)
        run._send("begin", **begin)
        return run, subprocess.Popen(
            [sys.executable, "-m", "pipeline.tracking.writer", str(spool.fileno())],
            pass_fds=[spool.fileno()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,  # stderr is the stage's
            # The Ctrl-C and the kill that end a stage are not meant for the one who writes down that it ended.
            start_new_session=True,
            env=_DEFAULTS | dict(os.environ) | QUIET,
        )
    except OSError as error:
        _warn(f"no process to write it: {error}")
        return Run(), None


def _end(writer: subprocess.Popen[bytes], status: str, seconds: float) -> None:
    """Say how the run ended, and wait up to `seconds` until it is written; 0: leave it to the writer."""
    assert writer.stdin
    if not seconds:
        writer.stdin.close()  # without a word: killed
        return
    try:
        problem = writer.communicate(f"{status} {_now()}".encode(), seconds)[0].decode()
        problem = problem or (f"exit code {writer.returncode}" if writer.returncode else "")
    except subprocess.TimeoutExpired:
        if seconds < HANGING:
            return  # it goes on alone
        writer.kill()
        problem = f"no answer for {seconds:.0f} seconds"
    if problem:
        _warn(problem)


def _warn(problem: str) -> None:
    print(f"warning: MLflow lacks (part of) this run: {problem}", file=sys.stderr)


def _now() -> int:
    return int(time.time() * 1000)  # MLflow's milliseconds


def _flat(params: object, name: str = "") -> dict[str, str]:
    """Flatten nested settings: {"train": {"crop": 96}} -> {"train.crop": "96"}."""
    if dataclasses.is_dataclass(params) and not isinstance(params, type):
        params = {field.name: getattr(params, field.name) for field in dataclasses.fields(params)}
    if not isinstance(params, Mapping):
        return {name: str(params)}
    return {k: v for key, value in params.items() for k, v in _flat(value, f"{name}.{key}" if name else key).items()}
