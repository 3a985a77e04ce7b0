"""A finished run of VOC's three experiments, made up: what every step would have left, and a dvc.lock that fits it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from contextlib import chdir
from pathlib import Path

import fake_run
import numpy as np
import yaml

from pipeline import tabulate
from pipeline.deposit import finished
from pipeline.formats import label_images
from pipeline.runtime.dvc_md5 import dvc_md5
from refinenet.data.split import Schema
from refinenet.data.writer import write_split

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENTS = ("voc-res50-demo", "voc-res101", "voc-res152")
PRETRAININGS = ("voc-res101-coco", "voc-res152-coco")
BACKBONES = ("resnet50", "resnet101", "resnet152")
SPLITS = {"voc": ("train", "train_voc", "val", "test"), "coco": ("train",)}
TRACKED = ("pyproject.toml", "CITATION.cff", "LICENSE", "Snakefile", "requirements.lock", "bootstrap.lock", "crf.lock")
DAY = "2026-11-30T12:00:00+0000"


def write_project(root: Path) -> None:
    """The graph of VOC alone: the project's own dvc.yaml without the other tables, params.yaml cut to it."""
    for name in (*TRACKED, "settings.json"):
        shutil.copy(ROOT / name, root)
    shutil.copytree(ROOT / "profiles", root / "profiles")
    graph = yaml.safe_load((ROOT / "dvc.yaml").read_text())
    tables = [name for name in graph["stages"] if name.startswith("table-") and "foreach" not in graph["stages"][name]]
    for name in set(tables) - {"table-voc"}:
        del graph["stages"][name]
    (root / "dvc.yaml").write_text(yaml.safe_dump(graph, sort_keys=False))
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params |= {"profile": "mini", "own": [], "further": [], "seeds": {}, "tables": ["voc"], "datasets": list(SPLITS)}
    params["experiments"] = {name: params["experiments"][name] for name in EXPERIMENTS}
    (root / "params.yaml").write_text(yaml.safe_dump(params, sort_keys=False))


def write_outputs(root: Path) -> None:
    draw = np.random.default_rng(0)
    for folder in ("models", "weights", "curves", "results", "data/raw"):
        (root / folder).mkdir(parents=True)
    weights = [
        *(f"models/{name}" for name in EXPERIMENTS),
        *(f"weights/{name}" for name in (*PRETRAININGS, *BACKBONES)),
    ]
    for name in weights:
        (root / f"{name}.safetensors").write_bytes(draw.bytes(100))
    for name in (*EXPERIMENTS, *PRETRAININGS):
        (root / f"curves/{name}.csv").write_text("step,loss,lr\n1,2.5,5e-4\n")
    classes, palette = tuple(fake_run.classes("voc")), label_images.colour_map(21, start=1)
    for name, splits in SPLITS.items():
        (root / "data" / name).mkdir()
        (root / f"data/raw/{name}.json").write_text(json.dumps({"archive.tar": {"md5": "0" * 32, "size": 1}}))
        for split in splits:
            with write_split(root / f"data/{name}/{split}.arrow", Schema(name, split, classes, palette)) as writer:
                for index in range(6):
                    image, label = fake_run.scene(draw, 21, 24 + index, 32)
                    # Names of digits alone: a reader that takes them for numbers loses the first ones.
                    writer.add(f"{index:06}", image, None if split == "test" else label)
    for name in EXPERIMENTS:
        scores = fake_run.scores(name) | {
            "drawn": True,
            "weights": {"md5": dvc_md5(root / f"models/{name}.safetensors")},
        }
        file = root / f"metrics/voc/{name}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(scores, sort_keys=True, indent=1))
    tabulate.tabulate("voc", root)
    (root / "results/report.html").write_text("<!doctype html><title>made up</title>")


def lock(root: Path) -> None:
    """Write dvc.lock: the project's own entries of these steps, with the md5 of what lies here."""
    entries = yaml.load((ROOT / "dvc.lock").read_bytes(), yaml.CSafeLoader)["stages"]
    with chdir(root):
        wanted = finished.expected_steps()
    entries = {name: entries[name] for name in wanted}
    for entry in entries.values():
        for item in (*entry.get("deps", ()), *entry.get("outs", ())):
            if (root / item["path"]).exists():
                item["md5"] = dvc_md5(root / item["path"])
    (root / "dvc.lock").write_text(yaml.dump({"schema": "2.0", "stages": entries}, Dumper=yaml.CSafeDumper))


def commit(root: Path) -> str:
    """Commit what git would have of a run; the same files give the same commit."""
    made = {**os.environ, "GIT_AUTHOR_DATE": DAY, "GIT_COMMITTER_DATE": DAY}
    who = ("-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false")
    paths = (*TRACKED, "settings.json", "profiles", "dvc.yaml", "params.yaml", "metrics", "results", "dvc.lock")
    for command in (["init", "--quiet"], ["add", *paths], [*who, "commit", "--quiet", "--message", "run"]):
        subprocess.run(["git", *command], cwd=root, env=made, check=True, capture_output=True)
    return subprocess.check_output(["git", "rev-parse", "HEAD"], cwd=root, text=True).strip()


def write(root: Path) -> str:
    """All of it; return the commit."""
    write_project(root)
    write_outputs(root)
    lock(root)
    return commit(root)
