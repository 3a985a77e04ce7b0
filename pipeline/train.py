"""Stage `train`: one experiment -> models/<experiment>.safetensors and curves/<experiment>.csv.

Killed at any moment and started again it goes on from checkpoints/<experiment>/ and ends in the same bytes.
An experiment whose finished weights the profile names (`models`) is not trained: they are converted, and the curve has
no points.
"""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import progress, settings
from pipeline.files import dvc_md5
from pipeline.stage import main
from pipeline.tracking import track
from refinenet.data import Split
from refinenet.files import UserError, whole_file

if TYPE_CHECKING:
    from refinenet.training import Point


def run(name: str) -> None:
    """Train the experiment `name` as settings.json says."""
    choice = settings.load("train", name)
    if choice.source is not None:
        bring_in(name, choice, choice.source)
        return
    data = Path("data") / choice.data
    start = Path("weights") / f"{choice.network['backbone']}.safetensors"
    split = Split(data / "train.arrow")
    if not start.is_file():
        raise UserError(f"{start}: no such file; `weights {choice.network['backbone']}` makes it")
    schema = split.schema

    import torch

    from pipeline.start import load_start
    from refinenet import training
    from refinenet.device import choose_device, reproducible
    from refinenet.network import RefineNet, save

    device = choose_device(choice.device)
    reproducible(choice.seed, choice.threads)
    model = RefineNet(len(schema.classes), **choice.network)
    model.load_backbone(load_start(start, model), str(start))
    model.initialise(choice.recipe.initial, torch.Generator().manual_seed(choice.seed))
    model.to(device)

    # Of all that the result depends on: a checkpoint of anything else is no place to go on from.
    digests = {str(path): dvc_md5(path) for path in (data, start)}
    versions = {"torch": torch.__version__, "device": choice.device}
    told = json.dumps([asdict(choice), digests, versions], sort_keys=True)
    fingerprint = hashlib.sha256(told.encode()).hexdigest()
    checkpoints = Path("checkpoints") / name

    params = {**choice.network, **asdict(choice.recipe), "profile": choice.profile, "seed": choice.seed, **versions}
    with (
        track(
            "train", name, choice.data, params, {"training data": data, "initial weights": start}, checkpoints
        ) as log,
        progress.bar(name, "step", total=choice.recipe.steps) as bar,
    ):

        def on_step(done: training.Progress) -> None:
            bar.update(done.step - bar.n)
            if done.point is not None:
                bar.set_postfix(loss=f"{done.point.loss:.3f}", refresh=False)
                log.log(done.step, loss=done.point.loss, lr=done.point.lr)

        curve = training.train(model, split, choice.recipe, choice.seed, checkpoints, fingerprint, on_step)
        target = Path("models") / f"{name}.safetensors"
        about = {
            "dataset": schema.dataset,
            "classes": schema.classes,
            "palette": schema.palette,
            "input_scale": choice.recipe.input_scale,
            "short_edge": choice.recipe.short_edge,
            "profile": choice.profile,
            "experiment": name,
        }
        write_curve(name, curve)
        save(model, target, about, getattr(torch, choice.dtype))
        log.wrote(target)
    shutil.rmtree(checkpoints, ignore_errors=True)


def bring_in(name: str, choice: settings.Train, source: settings.Source) -> None:
    """Convert the finished weights of the experiment `name`. All but the backbone of its network is as in the file."""
    data, wanted = Path("data") / choice.data, choice.network["backbone"]
    classes = Split(data / "train.arrow").schema.classes

    import torch

    from pipeline import foreign, sources
    from refinenet.network import save

    with sources.brought(source, Path("data/archives/models")) as file:
        found = foreign.read(file, choice.data)
        if not isinstance(found, foreign.Model) or found.network.config.backbone != wanted:
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
    with whole_file(Path("curves") / f"{name}.csv") as part, part.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(("step", "loss", "lr"))
        writer.writerows((p.step, f"{p.loss:.6g}", f"{p.lr:.6g}") for p in points)


if __name__ == "__main__":
    main(run, __doc__, "EXPERIMENT")
