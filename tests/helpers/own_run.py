"""A user's own data set with made-up results, in the formats that the stages write, to test its table and page on."""

from __future__ import annotations

import json
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import fake_run
import numpy as np
import yaml
from PIL import Image

from pipeline import tabulate
from pipeline.config import resolve
from pipeline.formats import label_images
from refinenet.data.split import Schema
from refinenet.data.writer import write_split

ROOT = Path(__file__).resolve().parents[2]
CLASSES = ("soil", "leaf", "stem")
EXPERIMENTS = {"leaves-res101": ("resnet101", "four", 4, 8), "best": ("resnet50", "two", 2, 256)}


def write_project(root: Path) -> None:
    """params.yaml and the profiles: two experiments on leaves beside the paper's."""
    shutil.copytree(ROOT / "profiles", root / "profiles")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params |= {"profile": "own", "own": ["leaves"]}
    params["experiments"] |= {
        "leaves-res101": {"data": "leaves", "start": "resnet101", "pools": 4},
        "best": {"data": "leaves", "start": "resnet50", "cascade": "two"},
    }
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def scores(name: str, backbone: str, cascade: str, pools: int, width: int) -> dict[str, Any]:
    """Metrics on leaves, as `evaluate` writes them; no mask has a stem."""
    made = fake_run.scores("voc-res101", "own")
    network = {"backbone": backbone, "cascade": cascade, "pools": pools, "width": width}
    iou = {"leaf": 0.25, "soil": 0.5, "stem": None}  # in the order of the file, which is not that of the classes
    protocols = {key: {**value, "mean_iou": 0.375, "iou": iou} for key, value in made["protocols"].items()}
    return made | {"experiment": name, "dataset": "leaves", "network": network, "protocols": protocols}


def write_metrics(root: Path, metrics: dict[str, Any]) -> Path:
    file = root / "metrics" / metrics["dataset"] / f"{metrics['experiment']}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(metrics, sort_keys=True))
    return file.relative_to(root)


def write_run(root: Path) -> None:
    """All that the page of leaves reads."""
    write_project(root)
    draw = np.random.default_rng(0)
    palette = label_images.colour_map(len(CLASSES))
    table = np.full((256, 3), 224, np.uint8)
    table[: len(CLASSES)] = palette
    for split, count in (("train", 4), ("val", 2)):
        (root / "data/leaves").mkdir(parents=True, exist_ok=True)
        with write_split(root / "data/leaves" / f"{split}.arrow", Schema("leaves", split, CLASSES, palette)) as writer:
            for i in range(count):
                writer.add(f"{split} {i}", *fake_run.scene(draw, len(CLASSES), 48, 64))
    near = {"val": 2, "found": 1, "examples": [["val 1", "train 0", 9]]}
    checks = {"near_duplicates": near, "groups": {"train": 3, "val": 2, "both": ["north"]}}
    (root / "data/leaves/checks.json").write_text(json.dumps(checks))
    for folder in ("data/raw/leaves", "models", "curves", "results"):
        (root / folder).mkdir(parents=True)
    (root / "data/raw/leaves/leaves.zip").write_bytes(draw.bytes(1000))
    for name, network in EXPERIMENTS.items():
        write_metrics(root, scores(name, *network))
        (root / "models" / f"{name}.safetensors").write_bytes(draw.bytes(100))
        lines = [f"{step},{2 / step:.4f},5e-4" for step in range(1, 50)]
        (root / "curves" / f"{name}.csv").write_text("\n".join(["step,loss,lr", *lines]) + "\n")
        (root / "predictions" / name).mkdir(parents=True)
        for i in range(2):
            image, label = fake_run.scene(draw, len(CLASSES), 48, 64)
            gap = np.full((48, 4, 3), 255, np.uint8)
            parts = [image, gap, table[label], gap, table[np.roll(label, 3, axis=1)]]
            Image.fromarray(np.hstack(parts)).save(root / "predictions" / name / f"val {i}.png")
        for protocol in ("single", "multi"):
            matrix = draw.integers(0, 100, (len(CLASSES), len(CLASSES) + 1))
            np.save(root / "predictions" / name / f"confusion-{protocol}.npy", matrix)
    with chdir(root):
        told = json.dumps(resolve.resolve(), indent=1, sort_keys=True)
        (root / "settings.json").write_text(told)
        tabulate.tabulate("leaves")
