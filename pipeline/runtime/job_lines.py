"""Snakemake's words about its jobs in one line for each that has ended, with what is left to do."""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Said by Snakemake before, between and after jobs, whose lines tell all of it.
_IDLE = (
    *("Select jobs to execute", "Building DAG", "Using shell", "Assuming unrestricted", "Complete log"),
    *("RuleException:\nCalledProcessError", "Exiting because a job execution failed"),
)


def words(command: str) -> str:
    """Return what a stage's command is called in a line: "train person-res101"."""
    return command.removeprefix("python -m pipeline.")


def duration(seconds: float) -> str:
    """Return seconds in words: "39 s", "9 min", "2 h 05 min"."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02} min"


@dataclass
class Jobs:
    """The jobs of a run.

    Attributes:
        left: commands of the jobs that have not ended.
        clock: seconds, of any origin.
    """

    left: set[str]
    clock: Callable[[], float] = time.monotonic
    began: dict[str, float] = field(default_factory=dict)
    took: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # by kind: train, evaluate
    start: float | None = None

    def begin(self, command: str) -> None:
        """Note that a job starts."""
        now = self.clock()
        self.start = now if self.start is None else self.start
        self.began[command] = now

    def end(self, command: str) -> float:
        """Note that a job has ended; return how many seconds it took."""
        seconds = self.clock() - self.began.pop(command, self.clock())
        self.left.discard(command)
        self.took[words(command).partition(" ")[0]].append(seconds)
        return seconds

    def seconds_left(self) -> float:
        """Return an estimate of the time left: by the jobs' kinds so far, at as many at once as so far.

        nan while it is not known of half the jobs left how long one of their kind takes.
        """
        now = self.clock()
        done = [seconds for kind in self.took.values() for seconds in kind]
        known = sum(words(command).partition(" ")[0] in self.took for command in self.left)
        if self.start is None or now <= self.start or 2 * known < len(self.left):
            return math.nan
        total = 0.0
        for command in self.left:
            kind = self.took.get(words(command).partition(" ")[0]) or done
            expected = sum(kind) / len(kind)
            total += max(expected - (now - self.began.get(command, now)), 0.0)
        at_once = (sum(done) + sum(now - began for began in self.began.values())) / (now - self.start)
        return total / max(at_once, 1.0)


class JobLines(logging.Handler):
    """Writes one line for each job that has ended, and leaves all else to Snakemake's own handler.

    Args:
        own: Snakemake's handler for the terminal.
        commands: returns rule -> command of all jobs of the run; asked when Snakemake has decided what to run.
    """

    def __init__(self, own: logging.Handler, commands: Callable[[], Mapping[str, str]]) -> None:
        super().__init__()
        self.own, self.decided = own, commands
        self.commands: Mapping[str, str] = {}
        self.jobs = Jobs(set())
        self.rules: dict[int, str] = {}
        self.ended: list[tuple[str, float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Write, keep or drop what Snakemake says."""
        from snakemake_interface_logger_plugins.common import LogEvent

        about: dict[str, Any] = record.__dict__
        match about.get("event"):
            case LogEvent.JOB_INFO:
                self.rules[about["jobid"]] = about["rule_name"]
                self.jobs.begin(self._command(about["rule_name"]))
            case LogEvent.JOB_FINISHED:
                command = self._command(self.rules.get(about["job_id"], ""))
                self.ended.append((command, self.jobs.end(command)))
            case LogEvent.PROGRESS:
                for command, seconds in self.ended:
                    left = self.jobs.seconds_left() if self.jobs.left else math.nan
                    more = f", about {duration(left)} left" if left >= 1 else ""
                    self._say(f"[{about['done']}/{about['total']}] {words(command)}, {duration(seconds)}{more}")
                self.ended.clear()
            case LogEvent.JOB_ERROR:
                command = self._command(about["rule_name"])
                self.jobs.end(command)
                self._say(f"failed: {words(command)}: {_why([Path(file) for file in about['log']])}")
            case LogEvent.RUN_INFO:
                self.commands = self.decided()
                self.jobs = Jobs(set(self.commands.values()))
                kinds = Counter(words(command).partition(" ")[0] for command in self.commands.values())
                self._say(f"{len(self.jobs.left)} jobs: {', '.join(f'{n} {kind}' for kind, n in kinds.items())}")
            case LogEvent.JOB_STARTED | LogEvent.RESOURCES_INFO | LogEvent.SHELLCMD:
                pass
            case _:
                if not str(about.get("msg")).startswith(_IDLE):
                    self.own.handle(record)

    def _command(self, rule: str) -> str:
        return self.commands.get(rule, rule)

    def _say(self, line: str) -> None:
        print(line, file=getattr(self.own, "stream", sys.stderr), flush=True)


def _why(logs: list[Path]) -> str:
    """Return the error in one of a failed job's logs, and where they are."""
    for log in logs:
        try:
            lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        except OSError:
            continue
        if lines:
            said = [line for line in lines if line.startswith(("error: ", "terminated: "))] or lines
            return f"{said[-1].removeprefix('error: ')} ({', '.join(map(str, logs))})"
    return f"it wrote no log (expected {', '.join(map(str, logs))})"
