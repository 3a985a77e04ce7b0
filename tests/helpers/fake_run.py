"""A run's results with made-up numbers, in the formats that the stages write, to test the tables and the report on."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline import tabulate
from pipeline.formats import label_images
from pipeline.tables.paper import published
from refinenet.data.split import Array, Schema
from refinenet.data.writer import write_split

VOC = [
    *("background", "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow"),
    *("diningtable", "dog", "horse", "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor"),
]
COUNTS = {"voc": 21, "context": 60, "person": 7, "nyud": 40, "sunrgbd": 37, "cityscapes": 19, "ade20k": 150, "coco": 21}
SPLITS = {"coco": ("train",), "voc": ("train", "val", "test"), "cityscapes": ("train", "val", "test")}


def classes(dataset: str) -> list[str]:
    """Class names of a data set; only VOC's are real."""
    return VOC if dataset in ("voc", "coco") else [f"class {i}" for i in range(COUNTS[dataset])]


def all_experiments() -> list[str]:
    return sorted({name for table in published().values() for name in table.experiments()})


def scores(experiment: str, profile: str = "mini") -> dict[str, Any]:
    """Metrics as `evaluate` writes them, the same for the same experiment."""
    draw = random.Random(experiment)
    dataset = experiment.partition("-")[0]

    def protocol(scales: list[float]) -> dict[str, Any]:
        return {
            "scales": scales,
            "flip": False,
            "pixel_accuracy": draw.uniform(0.7, 0.9),
            "mean_accuracy": draw.uniform(0.5, 0.7),
            "mean_iou": draw.uniform(0.3, 0.8),
            "iou": {name: draw.uniform(0, 1) for name in classes(dataset)},
        }

    return {
        "experiment": experiment,
        "dataset": dataset,
        "split": "val",
        "profile": profile,
        "drawn": profile == "mini",
        "images": 12,
        "seed": 0,
        "network": {"backbone": "resnet101", "cascade": "four", "pools": 2, "width": 8},
        "most_frequent": {"class": classes(dataset)[0], "mean_iou": 0.03, "pixel_accuracy": 0.6},
        "protocols": {"single": protocol([0.8]), "multi": protocol([0.6, 0.8, 1.0])},
    }


def write_metrics(root: Path, experiments: list[str], profile: str = "mini") -> None:
    for experiment in experiments:
        text = json.dumps(scores(experiment, profile), sort_keys=True, indent=1)
        file = root / "metrics" / experiment.partition("-")[0] / f"{experiment}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    write_comparable(root, profile)


def write_comparable(root: Path, *profiles: str, comparable: bool | None = None) -> None:
    """What the tables read of settings.json: which profiles are comparable; by default all but mini."""
    file = root / "settings.json"
    told = json.loads(file.read_text()) if file.exists() else {}
    told["tables"] = {one: {"comparable": one != "mini" if comparable is None else comparable} for one in profiles}
    file.write_text(json.dumps(told, indent=1))


def scene(draw: np.random.Generator, count: int, height: int, width: int) -> tuple[Array, Array]:
    """Overlapping ellipses of random classes with a void border: image H x W x 3, label H x W."""
    y, x = np.mgrid[:height, :width]
    label = np.full((height, width), draw.integers(count), np.uint8)
    for _ in range(6):
        cy, cx, ry, rx = draw.uniform(0, height), draw.uniform(0, width), *draw.uniform(0.1, 0.4, 2) * (height, width)
        distance = ((y - cy) / ry) ** 2 + ((x - cx) / rx) ** 2
        label[distance < 1.1] = 255
        label[distance < 1] = draw.integers(count)
    colours = draw.integers(30, 226, (256, 3))
    image = colours[label] + draw.normal(0, 12, (height, width, 1)) + 20 * np.sin(x / 5 + y / 7)[..., None]
    return image.clip(0, 255).astype(np.uint8), label


def write_run(root: Path, profile: str = "mini", train: int = 4, size: tuple[int, int] = (48, 64)) -> None:
    """All that the report reads: metrics, tables, splits, weights, curves and predictions, made up."""
    write_metrics(root, all_experiments(), profile)
    for name in published():
        tabulate.tabulate(name, root)
    for index, (name, count) in enumerate(COUNTS.items()):
        draw = np.random.default_rng(index)
        for split in SPLITS.get(name, ("train", "val")):
            schema = Schema(name, split, tuple(classes(name)), label_images.colour_map(count, start=1))
            (root / "data" / name).mkdir(parents=True, exist_ok=True)
            with write_split(root / "data" / name / f"{split}.arrow", schema) as writer:
                for i in range(train if split == "train" else 2):
                    image, label = scene(draw, count, size[0] + 2 * i, size[1])
                    writer.add(f"{name}_{split}_{i:04}", image, None if split == "test" else label)
    table = np.vstack([np.array(label_images.colour_map(150, start=1)), np.full((106, 3), 224)]).astype(np.uint8)
    for index, experiment in enumerate(all_experiments()):
        draw = np.random.default_rng(index)
        count = COUNTS[experiment.partition("-")[0]]
        (root / "models").mkdir(exist_ok=True)
        (root / "models" / f"{experiment}.safetensors").write_bytes(draw.bytes(100))
        (root / "curves").mkdir(exist_ok=True)
        losses = 0.3 + np.log(count) * np.exp(-np.arange(200) / 40) + draw.normal(0, 0.08, 200)
        lines = [f"{step},{loss:.4f},{5e-4 if step < 150 else 5e-5}" for step, loss in enumerate(losses, start=1)]
        (root / "curves" / f"{experiment}.csv").write_text("\n".join(["step,loss,lr", *lines]) + "\n")
        (root / "predictions" / experiment).mkdir(parents=True, exist_ok=True)
        for i in range(3):
            image, label = scene(draw, count, *size)
            gap = np.full((size[0], 4, 3), 255, np.uint8)
            parts = [image, gap, table[label], gap, table[np.roll(label, 3, axis=1)]]
            Image.fromarray(np.hstack(parts)).save(root / "predictions" / experiment / f"picture_{i}.png")
        matrix = draw.integers(0, 100, (count, count)) + np.diag(draw.integers(0, 100 * count, count))
        matrix = np.hstack([matrix, np.zeros((count, 1), np.int64)])  # nothing was taken for void
        for protocol in ("single", "multi"):
            np.save(root / "predictions" / experiment / f"confusion-{protocol}.npy", matrix)
    write_settings(root, profile)
    for name in ("voc-res101-coco", "voc-res152-coco"):
        shutil.copy(root / "curves" / f"{name.removesuffix('-coco')}.csv", root / "curves" / f"{name}.csv")


def write_settings(root: Path, profile: str = "mini") -> None:
    """What the report reads of settings.json."""

    def training(name: str) -> dict[str, Any]:
        data, backbone = name.split("-")[:2]
        start = f"{name}-coco" if name in ("voc-res101", "voc-res152") else backbone.replace("res", "resnet")
        parts = [["coco", "train"]] if name.endswith("-coco") else []
        return {
            "data": data,
            "network": {"backbone": backbone.replace("res", "resnet")},
            "phases": [{"parts": [*parts, [data, "train"]]}],
            "recipe": {"batch_size": 2, "crop": 100},
            "start": start,
        }

    rendered = {"archives": {}, "rendered": {"height": 48, "width": 64}}
    url = "https://images.example.org/archive.zip"
    archive = {"url": url, "size": 1_234_567, "md5": "0" * 32, "sha256": "1" * 64}
    published = {"archives": {"archive.zip": archive}, "rendered": None}
    told = {
        "tables": {profile: {"comparable": profile != "mini"}},
        "download": dict.fromkeys(COUNTS, rendered if profile == "mini" else published),
        "evaluate": {name: {"protocols": {"multi": {}, "single": {}}, "pictures": 3} for name in all_experiments()},
        "train": {name: training(name) for name in [*all_experiments(), "voc-res101-coco", "voc-res152-coco"]},
    }
    (root / "settings.json").write_text(json.dumps(told, indent=1))
