"""Train on images of your own and see what came of it: plan, then all stages up to results/<NAME>_report.html.

    refinenet fit leaves                 for the hours that the profile says
    refinenet fit leaves --hours 3
    refinenet fit leaves --new-plan      look at images and machine again, and start anew

The plan is made once, and again only for other hours or where --new-plan says so: after an interruption the same
command goes on where it was and ends in the same bytes. A profile without a plan (`--base mini`) trains by its own
values. The stages run in parallel, by Snakemake in this environment; their logs are in .snakemake/stages/.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from pipeline import plan, report
from pipeline.config import profiles
from pipeline.runtime.cli import Terminated, attach, command_parser, run_cli
from pipeline.tables import custom
from refinenet.errors import UserError


def run(name: str, hours: float | None, new_plan: bool, cores: int | None) -> None:
    """Plan where that is to do, run the graph, print the scores and the page. Raises UserError."""
    params = profiles.read_params()
    profile, where = profiles.read_profile(params.profile)
    plan.check_own(name, params, profile)
    if profile.plan is None:
        if hours is not None or new_plan:
            raise UserError(f"{where}: has no `plan`, expected a profile with `base: fit` for --hours and --new-plan")
    elif new_plan or _planned_hours(name) is None or hours not in (None, _planned_hours(name)):
        plan.run(name, hours)
    else:
        print(f"{profiles.plan_file(name)}: is there; --new-plan makes another")
    page = report.path(name)
    code = _snakemake(cores or plan.cores(), page)
    if code:
        raise UserError(f"snakemake ended with exit code {code}, see above; the same command goes on where it stopped")
    print(*_ending(name, page), sep="\n")


def _planned_hours(name: str) -> float | None:
    """Return for how long a training is planned; None where there is no plan, 0 where it does not say."""
    file = profiles.plan_file(name)
    if profiles.read_plan(name) is None:
        return None
    about: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return float(about.get("hours", 0))


def _snakemake(cores: int, target: Path) -> int:
    """Run Snakemake, and in its jobs Python, of this environment; return its exit code.

    Ctrl-C reaches it from the terminal, SIGTERM from here; either way this process waits until its jobs have ended.
    """
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    command = [sys.executable, "-m", "snakemake", "--cores", str(cores), "--", str(target)]
    process = subprocess.Popen(command, env=environment)

    received = []

    def wait_for_it(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if number == signal.SIGTERM:
            process.terminate()

    before = {number: signal.signal(number, wait_for_it) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if signal.SIGTERM in received:
        raise Terminated("the same command goes on where it stopped")
    if received:
        raise KeyboardInterrupt
    return code


def _ending(name: str, page: Path) -> list[str]:
    """Return lines: each experiment's scores, the page, what to do next."""
    table = custom.table(name)
    lines = []
    for row in table.rows:
        low, high = row.interval
        interval = f" (95 % {low} to {high})" if low else ""
        first = row.runs.first
        score = row.measures[list(custom.MEASURES).index("mean_iou")]
        lines.append(f"{row.heading()}: mean IoU {score}{interval} on {first.images} images of {name} {first.split}")
    model = f"models/{table.rows[0].runs.first.experiment}.safetensors"
    return [*lines, f"page: {page.absolute().as_uri()}", f"next: refinenet predict PHOTO --model {model}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    line = command_parser("fit", __doc__)
    line.add_argument("name", metavar="NAME", help="a data set that `refinenet add` made")
    plan.add_hours(line)
    line.add_argument("--new-plan", action="store_true", help="plan again, and train from the start")
    line.add_argument("--cores", type=int, metavar="N", help="default: all")
    given = line.parse_args(arguments)
    if given.cores is not None and given.cores < 1:
        line.error(f"--cores is {given.cores}, expected 1 or more")
    attach()
    return run_cli(lambda: run(given.name, given.hours, given.new_plan, given.cores))


if __name__ == "__main__":
    sys.exit(main())
