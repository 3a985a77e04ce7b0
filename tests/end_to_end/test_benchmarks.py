"""Benchmarks that write what others read: of trainings, and of a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from pipeline import datasets
from pipeline.formats import label_images
from refinenet import RefineNet
from refinenet.data.split import Schema
from refinenet.data.writer import write_split

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_learning_trains_scores_and_shows(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 5), ("val", 3)):
        schema = Schema("voc", split, datasets.VOC_CLASSES, label_images.colour_map(21))
        with write_split(tmp_path / f"{split}.arrow", schema) as writer:
            for index in range(count):
                label = np.repeat(rng.integers(0, 4, (1, 80), dtype=np.uint8), 64, 0)
                writer.add(f"{split}{index}", rng.integers(0, 256, (64, 80, 3), dtype=np.uint8), label)
    profile = yaml.safe_load((ROOT / "profiles/learning.yaml").read_text())
    voc = profile["datasets"]["voc"]
    voc["train"] |= {"batch_size": 2, "crop": 48, "log_every": 1}
    (tmp_path / "profile.yaml").write_text(yaml.safe_dump(profile))
    torch.manual_seed(0)
    net = RefineNet(21, backbone="timm:tf_efficientnet_lite0", **voc["network"])
    save_file(net.backbones[0].state_dict(), tmp_path / "weights.safetensors")

    def run(*more: str) -> str:
        command = [sys.executable, str(ROOT / "benchmarks/learning.py"), "--to", "out", "--steps", "3", *more]
        command += ["--data", ".", "--weights", "weights.safetensors", "--profile", "profile.yaml"]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    told = run()
    assert "| cascade-single-3 | 3 x 2 |" in told
    found = json.loads((tmp_path / "out/cascade-single-3.json").read_text())
    assert found["val_images"] == 3
    assert set(found["scores"]) == {"single", "multi", "multi-flip"}
    assert all(0 <= scores["mean_iou"] <= 1 for scores in found["scores"].values())
    widths = [Image.open(tmp_path / f"out/cascade-single-3-{what}.png").width for what in ("photos", "labels")]
    assert widths[0] > 1.4 * widths[1]
    # From the checkpoint after step 3 nothing is left to train, and the scores are those of the same weights.
    weights = tmp_path / "out/cascade-single-3.safetensors"
    before = weights.read_bytes()
    weights.unlink()
    assert run() == told
    assert weights.read_bytes() == before
    assert "| pools-0-3 | 3 x 2 |" in run("--variant", "pools-0")
    drawn = run("--show", "--picture", "picture.png")
    assert drawn.count("| 3 x 2 |") == 2
    assert (tmp_path / "picture.png").stat().st_size > 0


@pytest.mark.slow
def test_gpu_writes_its_page_and_goes_on_after_a_failure(tmp_path: Path) -> None:
    """On a CPU and a thin network, from refinenet/ alone; a section whose images are missing is a line of the page."""
    folder = str(ROOT / "benchmarks")
    program = f"""
import runpy, sys
sys.path.insert(0, {folder!r})
sys.argv = ["gpu.py", *sys.argv[1:]]
runpy.run_path({folder + "/gpu.py"!r}, run_name="__main__")
there = {{name.partition(".")[0] for name in sys.modules}}
assert not there & {{"pipeline", "dvc", "mlflow", "snakemake", "pydantic", "yaml", "onnxruntime"}}, there
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(*words: str) -> tuple[str, dict[str, Any]]:
        command = [sys.executable, "-c", program, "--device", "cpu", "--thin", "--to", "out", *words]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        page = (tmp_path / "out/gpu.md").read_text()
        assert page.strip() == done.stdout.strip()
        return page, json.loads((tmp_path / "out/gpu.json").read_text())

    page, rates = run()
    assert "failed" not in page.lower()
    assert page.count("\n## ") == 9
    assert {row["batch"] for row in rates["training"]} == {1, 2}
    numbers = [row["images_per_second"] for kind in ("training", "evaluation", "whole_training") for row in rates[kind]]
    assert len(numbers) == 8 + 3 + 3
    assert min(*numbers, *rates["matrix"].values(), rates["bytes"], rates["launches"], rates["crops_per_second"]) > 0
    assert rates["same_bytes"] is True
    assert min(rates["checkpoint"].values()) > 0
    assert "A checkpoint of " in page
    assert min(rates["size_ms"][kind] for kind in ("new", "seen")) > 0
    page, rates = run("--only", "real", "floors", "--split", "missing.arrow")
    assert "Failed: missing.arrow: " in page
    assert page.index("Failed") < page.index("| product of two ")
    assert rates["matrix"]
