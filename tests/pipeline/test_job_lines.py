"""What a run says: one line for each job that has ended."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import pytest
from snakemake_interface_logger_plugins.common import LogEvent
from tqdm import tqdm

from pipeline.runtime import job_lines, progress

COMMANDS = {f"train_{n}": f"python -m pipeline.train {n}" for n in "abcd"}


@pytest.fixture
def lines() -> job_lines.JobLines:
    own = logging.StreamHandler(io.StringIO())
    return job_lines.JobLines(own, lambda: COMMANDS)


def say(handler: job_lines.JobLines, at: float, event: LogEvent | None, text: str = "", **about: Any) -> None:
    record = logging.LogRecord("snakemake", logging.INFO, "", 0, text, (), None)
    record.__dict__ |= {"event": event, **about}
    handler.jobs.clock = lambda: at
    handler.emit(record)


def told(handler: job_lines.JobLines) -> list[str]:
    stream = handler.own.stream  # type: ignore[attr-defined]
    return str(stream.getvalue()).splitlines()


def test_one_line_a_job_with_the_time_left(lines: job_lines.JobLines) -> None:
    say(lines, 0, LogEvent.RUN_INFO, "Job stats: ...")
    say(lines, 0, None, "Select jobs to execute...")
    for job, (rule, begin, end) in enumerate([("train_a", 0, 100), ("train_b", 0, 140), ("train_c", 100, 200)]):
        say(lines, begin, LogEvent.JOB_INFO, jobid=job, rule_name=rule)
        say(lines, end, LogEvent.JOB_FINISHED, job_id=job)
        say(lines, end, LogEvent.PROGRESS, done=job + 1, total=4)
    assert told(lines) == [
        "4 jobs: 4 train",
        "[1/4] train a, 2 min, about 5 min left",  # 3 x 100 s, one at a time as far as it knows
        "[2/4] train b, 2 min, about 2 min left",
        "[3/4] train c, 2 min, about 67 s left",  # 340 s of jobs in 200 s: 1.7 at a time
    ]


def test_nothing_is_said_of_the_time_left_while_it_is_not_known(lines: job_lines.JobLines) -> None:
    lines.decided = lambda: {"download_a": "python -m pipeline.download a", **COMMANDS}
    say(lines, 0, LogEvent.RUN_INFO, "Job stats: ...")
    say(lines, 0, LogEvent.JOB_INFO, jobid=1, rule_name="download_a")
    say(lines, 3, LogEvent.JOB_FINISHED, job_id=1)
    say(lines, 3, LogEvent.PROGRESS, done=1, total=5)
    assert told(lines) == ["5 jobs: 1 download, 4 train", "[1/5] download a, 3 s"]


def test_a_failed_job_shows_its_error_and_its_log(lines: job_lines.JobLines, tmp_path: Path) -> None:
    log = tmp_path / "train_a.log"
    log.write_text("train a: 10%\nerror: data/x.arrow: no such file\nlast words\n")
    say(lines, 0, LogEvent.RUN_INFO, "Job stats: ...")
    say(lines, 0, LogEvent.JOB_INFO, jobid=1, rule_name="train_a")
    say(lines, 5, LogEvent.JOB_ERROR, "Error in rule", rule_name="train_a", log=[str(log)])
    say(lines, 5, None, "RuleException:\nCalledProcessError in file ...")
    say(lines, 5, None, "anything else")
    assert told(lines)[1:] == [f"failed: train a: data/x.arrow: no such file ({log})", "anything else"]


def test_a_rate_is_that_of_its_interval(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The monitor of tqdm must write no line in between, with the rate of the line before."""
    now = 0.0
    bar = progress.bar("train", "image", total=1000)
    monkeypatch.setattr(bar, "_time", lambda: now)
    bar.start_t = bar.last_print_t = 0.0
    with bar:
        for at, done in ((31.0, 310), (45.0, 315), (62.0, 320)):
            now = at
            bar.update(done - bar.n)
            if bar.miniters > 1 and now - bar.last_print_t >= bar.maxinterval:  # as the monitor does
                bar.refresh()
    assert tqdm.monitor_interval > 0
    first, second, *_ = capsys.readouterr().err.splitlines()
    assert "310/1000" in first
    assert "10.00image/s" in first
    assert "320/1000" in second
    assert "3.10s/image" in second
