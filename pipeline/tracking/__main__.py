"""What people ask of the runs in MLflow.

refinenet tracking ui               MLflow's pages, on this machine only
refinenet tracking find data/voc    the runs that data, weights or an md5 went into or came out of
refinenet tracking send             what a server did not take when its stage ended
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.runtime.cli import command_parser, run_cli, warn
from pipeline.runtime.dvc_md5 import dvc_md5
from pipeline.tracking import PATIENCE, QUIET
from pipeline.tracking.database import address, close_killed, file, prepare
from refinenet.errors import UserError

if TYPE_CHECKING:
    from mlflow.entities import Run


def serve(port: int) -> None:
    """Become MLflow's server over the database that `track` writes, which is made if there is none yet."""
    # Job execution is for MLflow's language-model pages: eight processes that nobody here needs.
    os.environ.update(QUIET, MLFLOW_SERVER_ENABLE_JOB_EXECUTION="false")
    uri = address()
    if database := file(uri):
        prepare(database, PATIENCE)
    close_killed(uri)
    print(f"MLflow over {uri}: open http://127.0.0.1:{port}, choose 'Model training' at the top left", flush=True)
    options = ["--backend-store-uri", uri, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    options += ["--uvicorn-opts", "--log-level warning"]
    os.execv(sys.executable, [sys.executable, "-m", "mlflow", "ui", *options])


def find(what: str) -> list[tuple[str, Run]]:
    """List the runs that `what` went into or, weights, came out of, with MLflow's experiment of each, oldest first.

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
    import mlflow

    if database:
        prepare(database, PATIENCE)
    close_killed(uri)
    found: dict[str, Run] = {}
    for md5 in md5s:
        for query in (f"dataset.digest = '{md5}'", f"tags.`weights.md5` = '{md5}'"):
            runs = mlflow.search_runs(filter_string=query, search_all_experiments=True, output_format="list")
            found |= {run.info.run_id: run for run in runs}
    experiments = {one.experiment_id: one.name for one in mlflow.search_experiments()}
    runs = sorted(found.values(), key=lambda run: (run.info.start_time or 0, run.info.run_id))
    return [(experiments[run.info.experiment_id], run) for run in runs]


def send_kept() -> None:
    """Send the runs that were kept because MLflow did not take them. Raises UserError for the first it refuses."""
    from pipeline.tracking.writer import UNSENT, send

    os.environ.update(QUIET)
    kept = sorted(UNSENT.glob("*.jsonl"))
    for one in kept:
        for problem in send(one):
            warn(f"{one}: MLflow lacks part of this run: {problem}")
        print(f"{one}: sent to {address()}")
    if not kept:
        print(f"{UNSENT}/: nothing is kept")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line of `refinenet tracking`."""
    parser = command_parser("tracking", __doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    pages = commands.add_parser("ui", help="serve MLflow's pages")
    pages.add_argument("--port", type=int, default=5000)
    finder = commands.add_parser("find", help="list the runs that data, weights or an md5 went into or came out of")
    finder.add_argument("what", help="a file, a folder, or an md5 as DVC writes it")
    commands.add_parser("send", help="send the runs that a server did not take when their stages ended")
    options = parser.parse_args(arguments)
    if options.command == "send":
        send_kept()
        return
    if options.command == "ui":
        serve(options.port)
        return
    runs = find(options.what)
    if not runs:
        raise UserError(f"{options.what}: no run in {address()} has seen it")
    for experiment, run in runs:
        tags = run.data.tags
        commit = tags.get("mlflow.source.git.commit", "")[:9] or f"no commit: {tags.get('git.problem', 'not recorded')}"
        score = run.data.metrics.get("mean_iou")
        fields = [experiment, run.info.run_name or "", run.info.status, commit]
        fields += [f"{100 * score:.1f} % mean IoU"] if score is not None else []
        print(run.info.run_id, *fields, sep="  ")


if __name__ == "__main__":
    sys.exit(run_cli(main))
