"""Stage `train`: one experiment -> models/<experiment>.safetensors and curves/<experiment>.csv.

A pretraining is written to weights/<pretraining>.safetensors instead, from where experiments start. An interrupted
training resumes from checkpoints/<experiment>/ when you repeat the command, and the result is bit-identical; a SIGTERM
ends it with exit code 75 after a last checkpoint. While it runs a second start ends with exit code 73; one by an engine
waits (pipeline/runtime/lease.py). With `train: {num_processes: 2}` in the profile it trains on two GPUs. An experiment
whose finished weights the profile names (`models`) is not trained: they are converted, and the curve has no points.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import resolve
from pipeline.config.schema import PhaseSettings, Source, Train
from pipeline.fetch.input_md5 import input_md5
from pipeline.runtime import progress
from pipeline.runtime.cli import Terminated, by_an_engine, main, terminated
from pipeline.runtime.device_load import device_load
from pipeline.runtime.lease import only_one, unchanged_since
from pipeline.runtime.machine import check_training
from pipeline.tracking import track
from refinenet.atomic import atomic_file
from refinenet.data.concat import ConcatSplits
from refinenet.data.split import Split
from refinenet.errors import UserError
from refinenet.portable import portable_arithmetic

if TYPE_CHECKING:
    from refinenet.training.loop import Point


def run(name: str) -> None:
    """Train the experiment or pretraining `name` with its settings in settings.json."""
    cfg = resolve.load("train", name)
    start = Path("weights") / f"{cfg.start}.safetensors"
    if cfg.source is not None:
        import_finished_weights(name, cfg, cfg.source)
        return
    if cfg.target == "weights" and not cfg.phases:
        skip_pretraining(name, start)
        return
    check_training(name, resolve.everything())
    plan = Plan(name, cfg)
    if not start.is_file():
        raise UserError(f"{start}: no such file; `python -m pipeline.weights {start.stem}` makes it")
    if cfg.portable:
        portable_arithmetic()

    import torch

    from refinenet.device import choose_precision

    precision = choose_precision(cfg.recipe.precision, torch.device(cfg.device))
    versions = {"torch": torch.__version__, "device": cfg.device, "precision": precision}
    if "WORLD_SIZE" in os.environ and os.environ.get("RANK", "0") != "0":
        train(plan, versions, "")  # the first process holds the lease, checks and writes
        return
    # A digest of everything that the result depends on: training resumes only from a checkpoint with the same one.
    digests = {str(path): input_md5(path) for path in plan.inputs.values()}
    payload = json.dumps([asdict(cfg), digests, versions], sort_keys=True)
    fingerprint = hashlib.sha256(payload.encode()).hexdigest()
    # An engine's second start, after its first died, waits for the first one's training instead of failing.
    lease = only_one(Path("checkpoints") / f"{name}.lease", name, fingerprint, wait=by_an_engine())
    unchanged = unchanged_since([plan.target, Path("curves") / f"{name}.csv"])
    with lease as waited_for:
        if waited_for == fingerprint and not unchanged():
            print(f"{name}: trained by the process that was waited for")
        elif cfg.recipe.num_processes > 1 and "WORLD_SIZE" not in os.environ:
            from pipeline.runtime.torchrun import together as launch

            launch("pipeline.train", name, cfg.recipe.num_processes, cfg.device)
        else:
            train(plan, versions, fingerprint)


class Plan:
    """What a training reads and writes. Raises UserError where prepared data is missing or its classes differ."""

    def __init__(self, name: str, cfg: Train) -> None:
        self.name, self.cfg = name, cfg
        self.start = Path("weights") / f"{cfg.start}.safetensors"
        self.target = Path(cfg.target) / f"{name}.safetensors"
        self.phases = cfg.phases or (PhaseSettings(((cfg.data, "train"),), cfg.recipe.steps),)
        used = [part for phase in self.phases for part in phase.parts]
        self.parts = {(data, split): Split(Path("data") / data / f"{split}.arrow") for data, split in used}
        first = Split(Path("data") / cfg.data / "train.arrow")
        self.schema = first.schema
        ConcatSplits([first, *self.parts.values()])  # raises where classes differ
        names = sorted({data for data, _ in self.parts})
        self.inputs = {
            "training data" if len(names) == 1 else f"training data, {data}": Path("data") / data for data in names
        } | {"initial weights": self.start}


def train(plan: Plan, versions: Mapping[str, str], fingerprint: str) -> None:
    """Train in this process and, under torchrun, the others of its group; the first one writes the results."""
    import torch

    from refinenet.allocator import keep_freed_memory
    from refinenet.device import repeatable_device
    from refinenet.model.network import RefineNet, save
    from refinenet.training import loop
    from refinenet.training.checkpoints import due_every
    from refinenet.training.distributed import processes
    from refinenet.training.initial import load_initial_weights
    from refinenet.training.step import step_bytes

    name, cfg = plan.name, plan.cfg
    device = repeatable_device(cfg.device, cfg.seed, cfg.threads)
    if device.type == "cpu":
        keep_freed_memory()
    model = RefineNet(len(plan.schema.classes), **cfg.network)
    phases = [loop.Phase(ConcatSplits([plan.parts[part] for part in p.parts]), p.steps, p.lr) for p in plan.phases]
    kept, held_out = loop.hold_out(phases, cfg.recipe, cfg.seed)
    load_initial_weights(plan.start, model, kept[0].images, cfg.recipe, cfg.seed)
    model.to(device)
    steps = sum(phase.steps for phase in phases)

    params = {**cfg.network, **asdict(cfg.recipe), **versions}
    params |= {"profile": cfg.profile, "seed": cfg.seed, "portable": cfg.portable}
    checkpoints = Path("checkpoints") / name
    with (
        processes(device) as together,
        track("train", name, cfg.data, params, plan.inputs, checkpoints) as log,
        progress.bar(name, "image", total=steps * cfg.recipe.batch_size, disable=not together.first) as bar,
    ):
        if device.type == "cpu" and together.first:
            log.scores({"activation_bytes": step_bytes(model, cfg.recipe)})
        before, at = 0, time.perf_counter()

        def on_step(done: loop.Progress) -> None:
            nonlocal before, at
            progress.reach(bar, done.step * cfg.recipe.batch_size, cfg.recipe.batch_size)
            if done.point is None:
                return
            now = time.perf_counter()
            values = {"loss": done.point.loss, "lr": done.point.lr}
            if before:  # the first interval includes one-time work
                values["images_per_second"] = (done.step - before) * cfg.recipe.batch_size / (now - at)
            if done.point.held_out is not None:
                values["held_out_mean_iou"] = done.point.held_out
            values |= device_load(device)
            before, at = done.step, now
            bar.set_postfix(loss=f"{done.point.loss:.3f}", refresh=False)
            log.log(done.step, **values)

        due = due_every(60 * resolve.load("running", "train").checkpoint_minutes)
        try:
            curve = loop.train(
                model, phases, cfg.recipe, cfg.seed, checkpoints, fingerprint, on_step, terminated, due, together
            )
        except loop.Stopped as stopped:
            raise Terminated(f"after step {stopped.step}; the same command goes on from {stopped.path}") from None
        about = {
            "dataset": plan.schema.dataset,
            "classes": plan.schema.classes,
            "palette": plan.schema.palette,
            "input_scale": cfg.recipe.input_scale,
            "short_edge": cfg.recipe.short_edge,
            "profile": cfg.profile,
            "experiment": name,
        }
        if together.first:
            write_curve(name, curve)
            save(model, plan.target, about, getattr(torch, cfg.dtype))
            log.wrote(plan.target)
    if together.first:
        shutil.rmtree(checkpoints, ignore_errors=True)
        line = f"{plan.target}: {steps} steps, loss {curve[-1].loss:.3f}"
        if held_out is not None and (top := loop.best(curve)) is not None and top.held_out is not None:
            line += f", best on {len(held_out)} held-out images at step {top.step}: mean IoU {100 * top.held_out:.1f}"
        print(line)


def skip_pretraining(name: str, start: Path) -> None:
    """Copy the initial weights as the result of a pretraining for which the profile has no phases."""
    if not start.is_file():
        raise UserError(f"{start}: no such file; `python -m pipeline.weights {start.stem}` makes it")
    write_curve(name, [])
    with atomic_file(Path("weights") / f"{name}.safetensors") as part:
        shutil.copyfile(start, part)
    print(f"{name}: no phases in the profile, {start} is copied")


def import_finished_weights(name: str, cfg: Train, source: Source) -> None:
    """Convert the finished weights of the experiment `name`; all network settings but the backbone are the file's.

    Raises UserError where `source` has another network or classes.
    """
    data, backbone = Path("data") / cfg.data, cfg.network["backbone"]
    classes = Split(data / "train.arrow").schema.classes

    import torch

    from pipeline.convert import imagenet, recognise
    from refinenet.model.network import save

    with imagenet.fetched_file(source, Path("data/archives/models")) as file:
        found = recognise.read(file, cfg.data)
        if not isinstance(found, recognise.Model) or found.network.config.backbone != backbone:
            raise UserError(f"{file}: {found.what}, expected a RefineNet on {backbone}")
        if tuple(found.about["classes"]) != classes:
            raise UserError(f"{file}: {cfg.data} has other classes in {data}, expected those of pipeline/datasets")
        target = Path("models") / f"{name}.safetensors"
        params = {"profile": cfg.profile, "source": source.url, **asdict(found.network.config)}
        with track("train", name, cfg.data, params, {"training data": data, "finished weights": file}) as log:
            write_curve(name, [])
            about = {**found.about, "profile": cfg.profile, "experiment": name}
            save(found.network, target, about, getattr(torch, cfg.dtype))
            log.wrote(target)
    print(f"{name}: {found.what} from {file.name}, not trained here")


def write_curve(name: str, points: Iterable[Point]) -> None:
    """Write curves/<name>.csv; without points only its header."""
    with atomic_file(Path("curves") / f"{name}.csv") as part, part.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("step", "loss", "lr"))
        writer.writerows((p.step, f"{p.loss:.6g}", f"{p.lr:.6g}") for p in points)


if __name__ == "__main__":
    main(run, __doc__, "EXPERIMENT", graceful=True)
