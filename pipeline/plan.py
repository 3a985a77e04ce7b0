"""Plan a training on images of one's own: looks at them, measures this machine, writes profiles/plans/<NAME>.json.

    refinenet plan leaves                 for the hours that the profile says
    refinenet plan leaves --hours 3

It packs and prepares the images first where that is to do. The plan has a sentence of reason for each value; a profile
overrides any of them. It is an input of the graph like params.yaml, so keep it in git: another machine, which is faster
or slower, trains by the same plan. It stays as it is until this command is given again.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from pipeline import download, graph, planning, prepare, settings
from pipeline.config import profiles, resolve, schema
from pipeline.config.schema import Params, Prepare, Profile, Train
from pipeline.fetch import own_folders
from pipeline.runtime.cli import attach, command_parser, run_cli, warn
from pipeline.runtime.machine import has_gpu
from refinenet.atomic import atomic_file
from refinenet.data.split import Split
from refinenet.errors import UserError, expected_one_of

WARM = 2  # steps that are not timed: one-time work
TIMED = 6  # steps at most
SECONDS = 60.0  # after which no further step is timed


def run(name: str, hours: float | None = None) -> None:
    """Plan for the data set `name`; `hours` of training, None: what the profile says. Raises UserError."""
    params = profiles.read_params()
    profile, where = profiles.read_profile(params.profile)
    check_own(name, params, profile)
    if profile.plan is None:
        raise UserError(f"{where}: has no `plan`, expected a profile with `base: fit`")
    schema.check_folder(name, profile.own[name])
    own_folders.pack(name, profile.own[name], download.RAW / name)
    prepare.run(name, Prepare(own=profile.own[name]))
    split = Split(prepare.DATA / name / "train.arrow")
    seen = planning.look(split)
    made = planning.plan(seen, "cuda" if has_gpu() else "cpu", cores())
    cfg = _training(name, params, made)
    others = cores_of_others()
    rate = measured_rate(split, cfg)
    if cfg.device == "cpu" and (busy := others()) > max(0.0, (psutil.cpu_count() or 1) - cfg.threads) + 0.25:
        warn(
            f"other work kept {busy:.1f} cores of the machine busy while the rate was measured: the plan has fewer "
            "steps than fit; give the command again when it is idle"
        )
    limits = profile.plan if hours is None else replace(profile.plan, hours=hours)
    steps = planning.length(seen, limits.hours, limits.passes, rate, cfg.recipe.batch_size)
    made["train"]["steps"] = steps
    made["train"]["warmup"] = planning.warmup(steps.value, cfg.recipe.warmup)
    write(name, made, seen, rate, cfg, limits.hours)
    settings.run()
    graph.mark_done([f"download-own@{name}", f"prepare-own@{name}"])
    for section, values in made.items():
        for key, one in values.items():
            print(f"  {section}{'.' if section else ''}{key}: {one.value} - {one.reason}")
    print(f"{profiles.plan_file(name)}: written")


def check_own(name: str, params: Params, profile: Profile) -> None:
    """Raise UserError, which says what to do, where `name` is no data set of one's own in the present profile."""
    if name in profile.own and name in params.own:
        return
    if name in params.own and name in profiles.profile_names():
        raise UserError(
            f"profile {params.profile} has no {name}; `refinenet profile {name}` switches to the one that has"
        )
    if not params.own:
        raise UserError(f"{profiles.PARAMS}: own has no {name!r}, and nothing else; `refinenet add {name} DIR` adds it")
    raise UserError(f"{profiles.PARAMS}: own has no {name!r}{expected_one_of(name, params.own, 'refinenet report')}")


def cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of_others() -> Callable[[], float]:
    """Begin to count; what is returned tells how many cores other processes have kept busy since then, on average.

    Not the load: for a minute after it, that still has the work of this very command.
    """

    def now() -> tuple[float, float]:
        machine = psutil.cpu_times()
        idle = machine.idle + getattr(machine, "iowait", 0.0) + getattr(machine, "guest", 0.0)  # guest is in user, too
        guest_nice = getattr(machine, "guest_nice", 0.0)
        return time.monotonic(), sum(machine) - idle - guest_nice - sum(os.times()[:4])

    begin, before = now()

    def since() -> float:
        end, after = now()
        return max(0.0, after - before) / max(end - begin, 1e-9)

    return since


def _training(name: str, params: Params, made: planning.Plan) -> Train:
    """Return the settings of the first experiment on the data set by a plan that is not written yet."""
    planned = {name: planning.as_settings(made)}
    profile, where = profiles.read_profile(params.profile, planned)
    rows = {row: one for row, one in params.experiments.items() if one.data == name}
    if not rows:
        raise UserError(f"{profiles.PARAMS}: no experiment with data: {name}, expected one or more to plan for")
    row, experiment = next(iter(rows.items()))
    values = resolve.training_settings(row, experiment, params, profile, where)
    values |= resolve.machine_settings(name, profile) | {"profile": params.profile, "seed": profile.seed}
    return schema.build(Train, values, f"{where}: train of {row}")


def measured_rate(split: Split, cfg: Train) -> float:
    """Return the images/s of a training with these settings on this machine: the median of a few steps.

    The weights are random, which takes the same time.
    """
    import torch

    from refinenet.allocator import keep_freed_memory
    from refinenet.device import repeatable_device
    from refinenet.model.network import RefineNet
    from refinenet.training import loop

    device = repeatable_device(cfg.device, cfg.seed, cfg.threads)
    if device.type == "cpu":
        keep_freed_memory()  # as `train` does
    model = RefineNet(len(split.schema.classes), **cfg.network)
    model.initialise("scaled", torch.Generator().manual_seed(cfg.seed))
    ends: list[float] = []
    begin = time.monotonic()
    steps = WARM + TIMED

    def on_step(done: loop.Progress) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        ends.append(time.monotonic())

    def enough() -> bool:
        return len(ends) > WARM + 1 and time.monotonic() - begin > SECONDS

    recipe = replace(cfg.recipe, steps=steps, warmup=0, lr=1e-6, num_processes=1, hold_out=0.0)
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(loop.Stopped):
        loop.train(model.to(device), split, recipe, cfg.seed, Path(folder), "rate", on_step, stop=enough)
    took = median(after - before for before, after in itertools.pairwise(ends[WARM - 1 :]))
    return recipe.batch_size / took


def write(name: str, made: planning.Plan, seen: planning.Look, rate: float, cfg: Train, hours: float) -> None:
    """Write the plan with its reasons, for how long, what was seen of the images, and where the rate was measured."""
    import torch

    from refinenet.device import processor

    values: dict[str, Any] = {}
    for section, keys in made.items():
        entries = {key: {"value": one.value, "reason": one.reason} for key, one in keys.items()}
        values |= {section: entries} if section else entries
    classes = {
        klass: {"images": images, "share": round(share, 5), "width": width}
        for klass, images, share, width in zip(seen.classes, seen.found_in, seen.shares, seen.widths, strict=True)
    }
    about = {
        "values": values,
        "hours": hours,
        "seen": {"images": seen.images, "height": seen.height, "width": seen.width, "classes": classes},
        "measured": {
            "images_per_second": float(f"{rate:.3g}"),
            "device": torch.cuda.get_device_name() if cfg.device == "cuda" else processor(),
            "threads": cfg.threads,
            "torch": torch.__version__,
        },
    }
    with atomic_file(profiles.plan_file(name)) as part:
        part.write_text(json.dumps(about, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def add_hours(line: argparse.ArgumentParser) -> None:
    """Add --hours."""
    line.add_argument(
        "--hours", type=hours_of, metavar="H", help="of training on this machine; default: what the profile says"
    )


def hours_of(text: str) -> float:
    """Read a length in hours for argparse."""
    try:
        hours = float(text)
    except ValueError:
        hours = 0.0
    if not 0 < hours < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}, expected hours, a number above 0")
    return hours


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    line = command_parser("plan", __doc__)
    line.add_argument("name", metavar="NAME", help="a data set of params.yaml's `own`")
    add_hours(line)
    given = line.parse_args(arguments)
    attach()

    def plan_and_say() -> None:
        run(given.name, given.hours)
        print(f"next: refinenet fit {given.name}")

    return run_cli(plan_and_say)


if __name__ == "__main__":
    sys.exit(main())
