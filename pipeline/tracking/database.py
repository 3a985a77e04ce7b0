"""MLflow's database: where it is, how many processes write to it at once, and what people ask of it.

python -m pipeline.tracking ui                   MLflow's pages, on this machine only
python -m pipeline.tracking find data/voc        the runs that data, weights or an md5 went into or came out of
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.runtime.dvc_md5 import dvc_md5
from pipeline.tracking import PATIENCE, QUIET
from refinenet.atomic import atomic_file
from refinenet.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run


def address() -> str:
    """The URI of MLflow's database: MLFLOW_TRACKING_URI, else mlflow.db in the working folder."""
    return os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{Path('mlflow.db').absolute()}"


def file(uri: str) -> Path | None:
    """The file behind an sqlite URI; None where it is a server or another database."""
    path = uri.removeprefix("sqlite:///").partition("?")[0]
    return Path(path).absolute() if uri.startswith("sqlite:///") and path not in {"", ":memory:"} else None


@contextmanager
def exclusive(database: Path | None, patience: float) -> Iterator[None]:
    """Hold the database alone, and have it exist; TimeoutError or sqlite3.Error if that can't be had.

    All writers take turns at a lock file beside it. sqlite's own locks would do for plain writes, but not for creating
    it: four processes that open a database that is not there yet break it for good. So it is made once, under another
    name, and appears whole. (No WAL: it corrupts on the network file systems of clusters.)

    `patience`: seconds without any progress. A queue is no reason to give up: as long as the database changes, others
    get their turn, and so will this one.
    """
    if database is None:
        yield
        return
    import sqlite3

    from filelock import FileLock, Timeout

    database.parent.mkdir(parents=True, exist_ok=True)
    changed, since = _changed(database), time.monotonic()
    while True:
        try:
            lock = FileLock(f"{database}.lock", timeout=min(patience, 1.0)).acquire()
            break
        except Timeout:
            if (now := _changed(database)) != changed:
                changed, since = now, time.monotonic()
            elif time.monotonic() - since >= patience:
                raise TimeoutError(f"{database}.lock is held by another process") from None
    with lock:
        if not database.exists() or database.stat().st_size == 0:
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            with atomic_file(database) as part:
                store = SqlAlchemyStore(f"sqlite:///{part}", (database.parent / "mlruns").as_uri())  # type: ignore[no-untyped-call]
                store.engine.dispose()
        # MLflow waits 20 s for a locked database, with a page of traceback: ask beforehand.
        try:
            with contextlib.closing(sqlite3.connect(database, timeout=patience)) as probe:
                probe.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise type(error)(f"{database}: {error}") from None
        yield


def _changed(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def serve(port: int) -> None:
    """Become MLflow's server over the database that `track` writes, which is made if there is none yet."""
    # Job execution is for MLflow's language-model pages: eight processes that nobody here needs.
    os.environ.update(QUIET, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    uri = address()
    with exclusive(file(uri), PATIENCE):
        print(f"MLflow over {uri}: open http://127.0.0.1:{port}, choose 'Model training' at the top left", flush=True)
    options = ["--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    options += ["--uvicorn-opts", "--log-level warning"]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "ui", *options])


def find(what: str) -> list[tuple[str, Run]]:
    """The runs that `what` went into or, weights, came out of, with MLflow's experiment of each, oldest first.

    `what`: a file or folder, or an md5 as DVC writes it (.dir of a folder may be left out). UserError for anything
    else, and where there is no database.
    """
    os.environ.update(QUIET)
    uri = address()
    database = file(uri)
    if database and not database.is_file():
        raise UserError(f"{database}: no such file; the first training makes it")
    if re.fullmatch(r"[0-9a-f]{32}(\.dir)?", what):
        md5s = {what, f"{what.removesuffix('.dir')}.dir"}
    elif Path(what).exists():
        md5s = {dvc_md5(Path(what))}
    else:
        raise UserError(f"{what}: no file or folder, expected one or an md5 of 32 hexadecimal digits")
    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=uri)
    experiments = {experiment.experiment_id: experiment.name for experiment in client.search_experiments()}
    found: dict[str, Run] = {}
    for md5 in md5s:
        for query in (f"dataset.digest = '{md5}'", f"tags.`weights.md5` = '{md5}'"):
            found |= {run.info.run_id: run for run in _all_runs(client, list(experiments), query)}
    runs = sorted(found.values(), key=lambda run: (run.info.start_time or 0, run.info.run_id))
    return [(experiments[run.info.experiment_id], run) for run in runs]


def _all_runs(client: MlflowClient, experiments: list[str], query: str) -> Iterator[Run]:
    page = client.search_runs(experiments, query)
    yield from page
    while page.token:
        page = client.search_runs(experiments, query, page_token=page.token)
        yield from page


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line of `python -m pipeline.tracking`."""
    parser = argparse.ArgumentParser(prog="python -m pipeline.tracking", description="MLflow for this project.")
    commands = parser.add_subparsers(dest="command", required=True)
    pages = commands.add_parser("ui", help="serve MLflow's pages")
    pages.add_argument("--port", type=int, default=5000)
    finder = commands.add_parser("find", help="list the runs that data, weights or an md5 went into or came out of")
    finder.add_argument("what", help="a file, a folder, or an md5 as DVC writes it")
    options = parser.parse_args(arguments)
    if options.command == "ui":
        serve(options.port)
        return
    runs = find(options.what)
    if not runs:
        raise UserError(f"{options.what}: no run in {address()} has seen it")
    for experiment, run in runs:
        commit = run.data.tags.get("mlflow.source.git.commit", "no commit")[:9]
        score = run.data.metrics.get("mean_iou")
        told = [experiment, run.info.run_name or "", run.info.status, commit]
        told += [f"{100 * score:.1f} % mean IoU"] if score is not None else []
        print(run.info.run_id, *told, sep="  ")
