"""Stage `train`: one experiment -> models/<experiment>.safetensors and curves/<experiment>.csv.

A pretraining ends in weights/<pretraining>.safetensors instead, where experiments start. Killed at any moment and
started again it goes on from checkpoints/<experiment>/ and ends in the same bytes; a SIGTERM ends it with exit code 75
after a last checkpoint. With `train: {num_processes: 2}` in the profile it trains on two GPUs. An experiment whose
finished weights the profile names (`models`) is not trained: they are converted, and the curve has no points.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config import resolve
from pipeline.config.schema import PhaseSettings, Source, Train
from pipeline.runtime import progress
from pipeline.runtime.cli import Terminated, main, terminated
from pipeline.runtime.device_load import device_load
from pipeline.runtime.dvc_md5 import dvc_md5
from pipeline.tracking import track
from refinenet.atomic import atomic_file
from refinenet.data.concat import ConcatSplits
from refinenet.data.split import Split
from refinenet.errors import UserError

if TYPE_CHECKING:
    from refinenet.training.loop import Point


def run(name: str) -> None:
    """Train the experiment or pretraining `name` as settings.json says."""
    choice = resolve.load("train", name)
    start = Path("weights") / f"{choice.start}.safetensors"
    if choice.source is not None:
        import_finished_weights(name, choice, choice.source)
        return
    if choice.target == "weights" and not choice.phases:
        skip_pretraining(name, start)
        return
    if choice.recipe.num_processes > 1 and "WORLD_SIZE" not in os.environ:
        from pipeline.runtime.torchrun import together as launch

        launch("pipeline.train", name, choice.recipe.num_processes, choice.device)
        return
    wanted = choice.phases or (PhaseSettings(((choice.data, "train"),), choice.recipe.steps),)
    parts = {(data, split): Split(Path("data") / data / f"{split}.arrow") for p in wanted for data, split in p.parts}
    schema = Split(Path("data") / choice.data / "train.arrow").schema
    ConcatSplits([Split(Path("data") / choice.data / "train.arrow"), *parts.values()])  # complains of other classes

    import torch

    from refinenet.device import choose_device, reproducible
    from refinenet.model.network import RefineNet, save
    from refinenet.training import loop
    from refinenet.training.distributed import processes
    from refinenet.training.initial import load_initial_weights
    from refinenet.training.step import step_bytes

    device = choose_device(choice.device)
    reproducible(choice.seed, choice.threads)
    model = RefineNet(len(schema.classes), **choice.network)
    phases = [loop.Phase(ConcatSplits([parts[part] for part in p.parts]), p.steps, p.lr) for p in wanted]
    load_initial_weights(start, model, phases[0].images, choice.recipe, choice.seed)
    model.to(device)
    steps = sum(phase.steps for phase in phases)

    used = sorted({data for data, _ in parts})
    inputs = {"training data" if len(used) == 1 else f"training data, {data}": Path("data") / data for data in used}
    inputs["initial weights"] = start
    versions = {"torch": torch.__version__, "device": choice.device}
    params = {**choice.network, **asdict(choice.recipe), "profile": choice.profile, "seed": choice.seed, **versions}
    checkpoints = Path("checkpoints") / name
    target = Path(choice.target) / f"{name}.safetensors"
    with (
        processes(device) as together,
        track("train", name, choice.data, params, inputs, checkpoints) as log,
        progress.bar(name, "image", total=steps * choice.recipe.batch_size, disable=not together.first) as bar,
    ):
        # Of all that the result depends on: a checkpoint of anything else is no place to go on from.
        digests = {str(path): dvc_md5(path) for path in inputs.values()} if together.first else {}
        told = json.dumps([asdict(choice), digests, versions], sort_keys=True)
        fingerprint = hashlib.sha256(told.encode()).hexdigest()
        if device.type == "cpu" and together.first:
            log.scores({"activation_bytes": step_bytes(model, choice.recipe)})
        before, at = 0, time.perf_counter()

        def on_step(done: loop.Progress) -> None:
            nonlocal before, at
            progress.reach(bar, done.step * choice.recipe.batch_size, choice.recipe.batch_size)
            if done.point is None:
                return
            now = time.perf_counter()
            values = {"loss": done.point.loss, "lr": done.point.lr}
            if before:  # the first interval also has what is done once
                values["images_per_second"] = (done.step - before) * choice.recipe.batch_size / (now - at)
            values |= device_load(device)
            before, at = done.step, now
            bar.set_postfix(loss=f"{done.point.loss:.3f}", refresh=False)
            log.log(done.step, **values)

        try:
            curve = loop.train(
                model, phases, choice.recipe, choice.seed, checkpoints, fingerprint, on_step, terminated, together
            )
        except loop.Stopped as stopped:
            raise Terminated(f"after step {stopped.step}; the same command goes on from {stopped.path}") from None
        about = {
            "dataset": schema.dataset,
            "classes": schema.classes,
            "palette": schema.palette,
            "input_scale": choice.recipe.input_scale,
            "short_edge": choice.recipe.short_edge,
            "profile": choice.profile,
            "experiment": name,
        }
        if together.first:
            write_curve(name, curve)
            save(model, target, about, getattr(torch, choice.dtype))
            log.wrote(target)
    if together.first:
        shutil.rmtree(checkpoints, ignore_errors=True)


def skip_pretraining(name: str, start: Path) -> None:
    """A pretraining that the profile has no phases for trains nothing: who starts from it starts from its start."""
    if not start.is_file():
        raise UserError(f"{start}: no such file; `python -m pipeline.weights {start.stem}` makes it")
    write_curve(name, [])
    with atomic_file(Path("weights") / f"{name}.safetensors") as part:
        shutil.copyfile(start, part)
    print(f"{name}: no phases in the profile, {start} is passed on")


def import_finished_weights(name: str, choice: Train, source: Source) -> None:
    """Convert the finished weights of the experiment `name`. All but the backbone of its network is as in the file."""
    data, wanted = Path("data") / choice.data, choice.network["backbone"]
    classes = Split(data / "train.arrow").schema.classes

    import torch

    from pipeline.convert import imagenet, recognise
    from refinenet.model.network import save

    with imagenet.fetched_file(source, Path("data/archives/models")) as file:
        found = recognise.read(file, choice.data)
        if not isinstance(found, recognise.Model) or found.network.config.backbone != wanted:
            raise UserError(f"{file}: {found.what}, expected a RefineNet on {wanted}")
        if tuple(found.about["classes"]) != classes:
            raise UserError(f"{file}: {choice.data} has other classes in {data}, expected those of pipeline/datasets")
        target = Path("models") / f"{name}.safetensors"
        params = {"profile": choice.profile, "source": source.url, **asdict(found.network.config)}
        with track("train", name, choice.data, params, {"training data": data, "finished weights": file}) as log:
            write_curve(name, [])
            about = {**found.about, "profile": choice.profile, "experiment": name}
            save(found.network, target, about, getattr(torch, choice.dtype))
            log.wrote(target)
    print(f"{name}: {found.what} from {file.name}, not trained here")


def write_curve(name: str, points: Iterable[Point]) -> None:
    """Write curves/<name>.csv; without a point it has its header only."""
    with atomic_file(Path("curves") / f"{name}.csv") as part, part.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("step", "loss", "lr"))
        writer.writerows((p.step, f"{p.loss:.6g}", f"{p.lr:.6g}") for p in points)


if __name__ == "__main__":
    main(run, __doc__, "EXPERIMENT", graceful=True)
