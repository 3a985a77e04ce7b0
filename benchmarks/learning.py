"""Real learning on real images: RefineNet with EfficientNet-Lite0 on PASCAL VOC, and the paper's ablations of it.

Needs prepared data and the weights, no dvc, mlflow or snakemake; what to train is in profiles/learning.yaml, which also
says where the two come from:

    python benchmarks/learning.py                                    # trains, scores, prints: 75 minutes on a core
    python benchmarks/learning.py --device cuda --steps 4000 --batch 16
    python benchmarks/learning.py --variant pools-0 --steps 300      # one network of the ablations, at a budget
    python benchmarks/learning.py --show                             # the tables of all that is done

Weights, curve and scores go to --to, and two sheets of twelve validation images, evenly spaced: NAME-photos.png (image,
truth, prediction) and NAME-labels.png (truth, prediction). A training that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image, ImageOps
from safetensors.torch import load_file
from skimage.util import montage

from pipeline.formats.label_images import colour
from refinenet import metrics
from refinenet.atomic import atomic_file
from refinenet.config import Protocol, Recipe, Resizing
from refinenet.data.split import Array, Split
from refinenet.device import choose_device, reproducible
from refinenet.errors import UserError
from refinenet.inference import multiscale
from refinenet.model.network import RefineNet, load, save
from refinenet.training import initial, loop
from refinenet.training.checkpoints import due_every

BACKBONE = "timm:tf_efficientnet_lite0"
SHOWN = 12  # validation images on a sheet
HEIGHT = 112  # pixels of each there
WHITE = (255, 255, 255)
# Tables 2 and 9 of the paper; each differs from the first in one setting.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "pools-4": {"pools": 4},
    "pools-2": {"pools": 2},
    "pools-0": {"pools": 0},
    "cascade-two": {"pools": 4, "cascade": "two"},
    "cascade-single": {"pools": 4, "cascade": "single"},
}


def main() -> None:
    """Read the command line, train and score what it names, print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--data", type=Path, default=Path("data/voc"), help="folder of train.arrow and val.arrow")
    parser.add_argument("--weights", type=Path, default=Path(f"weights/{BACKBONE}.safetensors"))
    parser.add_argument("--profile", type=Path, default=Path("profiles/learning.yaml"))
    parser.add_argument("--to", type=Path, default=Path("learning"), help="folder of what comes out")
    parser.add_argument("--variant", choices=list(VARIANTS), default="cascade-single")
    parser.add_argument("--name", help="of the files; default: the variant and its steps")
    parser.add_argument("--steps", type=int, help="default: the profile's")
    parser.add_argument("--batch", dest="batch_size", type=int, help="default: the profile's")
    parser.add_argument("--lr", type=float, help="default: the profile's")
    parser.add_argument("--backbone-lr", type=float, help="times lr; default: the profile's")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--show", action="store_true", help="only print")
    parser.add_argument(
        "--picture", type=Path, metavar="PNG", help="also draw curve and classes of the longest training"
    )
    choice = parser.parse_args()
    if not choice.show:
        profile = yaml.safe_load(choice.profile.read_text(encoding="utf-8"))
        voc = profile["datasets"]["voc"]
        recipe = voc["train"]
        changed = ("steps", "batch_size", "lr", "backbone_lr")
        recipe |= {key: given for key in changed if (given := getattr(choice, key)) is not None}
        network = {"backbone": BACKBONE, **voc["network"], **VARIANTS[choice.variant]}
        name = choice.name or f"{choice.variant}-{recipe['steps']}"
        reproducible(choice.seed, choice.threads)
        if not (choice.to / f"{name}.safetensors").exists():
            train(name, network, Recipe(**recipe), choice)
        score(name, {k: Protocol(**v) for k, v in voc["evaluate"]["protocols"].items()}, choice)
    done = finished(choice.to)
    show(done)
    if choice.picture:
        draw(done[0], choice.to, choice.picture)


def train(name: str, network: Mapping[str, Any], recipe: Recipe, choice: argparse.Namespace) -> None:
    """Write <name>.safetensors and the curve <name>.csv."""
    split = Split(choice.data / "train.arrow")
    schema = split.schema
    model = RefineNet(len(schema.classes), **network)
    model.load_backbone(load_file(choice.weights), str(choice.weights))
    initial.initialise(model, split, recipe, choice.seed)
    model.to(choose_device(choice.device))
    start = time.perf_counter()

    def on_step(done: loop.Progress) -> None:
        if done.point is not None:
            minutes = (time.perf_counter() - start) / 60
            print(
                f"{name}: step {done.step}, loss {done.point.loss:.3f}, {minutes:.1f} min", file=sys.stderr, flush=True
            )

    kept = json.dumps([network, asdict(recipe), choice.seed, choice.device, len(split)], sort_keys=True)
    folder, due = choice.to / f"{name}.checkpoints", due_every(600)
    curve = loop.train(model, split, recipe, choice.seed, folder, kept, on_step, due=due)
    with atomic_file(choice.to / f"{name}.csv") as part, part.open("w", newline="", encoding="utf-8") as file:
        rows = ((point.step, f"{point.loss:.6g}", f"{point.lr:.6g}") for point in curve)
        csv.writer(file, lineterminator="\n").writerows([("step", "loss", "lr"), *rows])
    about: dict[str, Any] = {
        "dataset": schema.dataset,
        "classes": schema.classes,
        "palette": schema.palette,
        "experiment": name,
    }
    about |= {"input_scale": recipe.input_scale, "short_edge": recipe.short_edge, "recipe": asdict(recipe)}
    about |= {"variant": choice.variant, "images": len(split), "seen": split.counts().astype(bool).sum(0).tolist()}
    save(model, choice.to / f"{name}.safetensors", about)


def score(name: str, protocols: Mapping[str, Protocol], choice: argparse.Namespace) -> None:
    """Write <name>.json: the scores of all images of val under each protocol; and the sheets."""
    model, about = load(choice.to / f"{name}.safetensors", choose_device(choice.device))
    net = multiscale.optimise_for_inference(model, fast=choice.device == "cpu")
    split = Split(choice.data / "val.arrow")
    counts = {key: metrics.Confusion(len(about["classes"])) for key in protocols}
    resizing = Resizing(about["input_scale"], about["short_edge"])
    shown = {round((place + 0.5) * len(split) / SHOWN) for place in range(SHOWN)}
    rows: list[list[Array]] = []
    for index, sample in enumerate(split):
        assert sample.label is not None
        labels = multiscale.predict(net, sample.image, protocols, resizing)
        for key, label in labels.items():
            counts[key].add(sample.label, label)
        if index in shown:
            last = labels[list(protocols)[-1]]
            rows.append([sample.image, colour(sample.label, about["palette"]), colour(last, about["palette"])])
    sheet(rows, choice.to / f"{name}-photos.png")
    sheet([row[1:] for row in rows], choice.to / f"{name}-labels.png")
    found = {}
    for key, confusion in counts.items():
        interval = metrics.bootstrap(confusion.per_image())
        found[key] = {**asdict(metrics.scores(confusion.counts())), "interval": interval.mean_iou}
    present = split.counts().astype(bool).sum(0).tolist()
    with atomic_file(choice.to / f"{name}.json") as part:
        part.write_text(json.dumps({**about, "val_images": len(split), "val_seen": present, "scores": found}, indent=1))


def sheet(rows: Sequence[Sequence[Array]], target: Path) -> None:
    """Write rows of H x W x 3 uint8 pictures, two rows on a line; each picture fits into 4/3 HEIGHT x HEIGHT pixels."""
    size = (round(HEIGHT * 4 / 3), HEIGHT)
    tiles = [
        np.asarray(ImageOps.pad(Image.fromarray(picture), size, Image.Resampling.LANCZOS, "white"))
        for row in rows
        for picture in row
    ]
    columns = 2 * len(rows[0])
    page = montage(tiles, fill=WHITE, grid_shape=(-(-len(tiles) // columns), columns), padding_width=4, channel_axis=-1)
    with atomic_file(target) as part:
        Image.fromarray(page).quantize(255).save(part, "png", optimize=True)


def finished(folder: Path) -> list[dict[str, Any]]:
    """What `score` wrote of each network, the one that saw the most crops first."""
    done = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]
    if not done:
        raise UserError(f"{folder}: no scores (*.json) here yet")
    return sorted(done, key=lambda found: -found["recipe"]["steps"] * found["recipe"]["batch_size"])


def show(done: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of all networks scored, and one of the classes of the first."""
    protocols = list(done[0]["scores"])
    print("| network | steps x images | " + " | ".join(protocols) + " | 95 % interval of the first | pixel accuracy |")
    print("| :-- " + "| --: " * (len(protocols) + 3) + "|")
    for found in done:
        scores, recipe = found["scores"], found["recipe"]
        means = " | ".join(f"{100 * scores[key]['mean_iou']:.1f}" for key in protocols)
        low, high = scores[protocols[0]]["interval"]
        print(
            f"| {found['experiment']} | {recipe['steps']} x {recipe['batch_size']} | {means} | {100 * low:.1f} to "
            f"{100 * high:.1f} | {100 * scores[protocols[0]]['pixel_accuracy']:.1f} |"
        )
    longest = done[0]
    print(f"\n| class | training images | val images | {' | '.join(protocols)} |")
    print("| :-- | --: | --: " + "| --: " * len(protocols) + "|")
    for index, label in enumerate(longest["classes"]):
        values = [longest["scores"][key]["iou"][index] for key in protocols]
        if values[0] is not None:
            iou = " | ".join(f"{100 * value:.1f}" for value in values)
            print(f"| {label} | {longest['seen'][index]} | {longest['val_seen'][index]} | {iou} |")


def draw(found: Mapping[str, Any], folder: Path, target: Path) -> None:
    """The curve, and the IoU of each class beside how many training images have it; no photograph."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2, 3))
    with (folder / f"{found['experiment']}.csv").open(newline="", encoding="utf-8") as file:
        points = [(int(row["step"]), float(row["loss"])) for row in csv.DictReader(file)]
    left.plot(*zip(*points, strict=True), color="black", linewidth=1)
    left.set(xlabel=f"steps of {found['recipe']['batch_size']} crops", ylabel="training loss", ylim=(0, None))
    protocol = list(found["scores"])[-1]
    iou = found["scores"][protocol]["iou"]
    order = sorted((i for i, value in enumerate(iou) if value is not None), key=lambda i: -found["seen"][i])
    colours = [tuple(value / 255 for value in found["palette"][i]) for i in order]
    right.bar(range(len(order)), [100 * iou[i] for i in order], color=colours)
    right.set_xticks(range(len(order)), [f"{found['classes'][i]}, {found['seen'][i]}" for i in order], rotation=90)
    mean = 100 * found["scores"][protocol]["mean_iou"]
    right.axhline(mean, color="grey", linewidth=1)
    right.set(
        ylabel="IoU, percent", ylim=(0, 100), title=f"{protocol}: mean IoU {mean:.1f}; training images of each class"
    )
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_file(target) as part:
        figure.savefig(part, format="png", dpi=110)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(str(error))
