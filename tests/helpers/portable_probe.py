"""Train each backbone and cascade for two steps, evaluate it, print digests: to be compared between processors.

    python portable_probe.py FOLDER [--default]

The arithmetic is that of `portable: true`; --default: this processor's own.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

from refinenet.portable import portable_arithmetic

if "--default" not in sys.argv:
    portable_arithmetic()

import torch
import toy_training

from pipeline import evaluate, weights
from refinenet import RefineNet
from refinenet.config import Protocol, Recipe, Resizing
from refinenet.device import reproducible
from refinenet.inference.predictor import Predictor
from refinenet.metrics import Confusion
from refinenet.model.network import save
from refinenet.training.loop import train

NETWORKS = [("resnet50", cascade) for cascade in ("single", "two", "four", "four-two-scale")]
NETWORKS += [("resnet101", "four"), ("resnet152", "four")]
RECIPE = Recipe(
    steps=2, batch_size=2, crop=48, input_scale=1.0, lr=0.05, init="scaled", schedule="cosine", warmup=1, grad_clip=1.0
)
PROTOCOLS = {"single": Protocol((1.0,)), "multi": Protocol((0.8, 1.0, 1.2), flip=True)}


def digest(*parts: bytes) -> str:
    """Return the first 16 digits of the SHA-256."""
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


def main(folder: Path) -> dict[str, dict[str, str]]:
    """Return network -> digests of its weights in float32, its file, its scores on six images, and of the metrics."""
    images = toy_training.write(folder / "train.arrow")
    found = {}
    for backbone, cascade in NETWORKS:
        reproducible(0, 1)
        model = RefineNet(3, backbone=backbone, cascade=cascade, stem=3, width=8, coarse_width=16, dropout=0.5)
        model.load_backbone(weights.seeded(backbone, 3, 0), "seeded")
        model.initialise("scaled", torch.Generator().manual_seed(0))
        curve = train(model, images, RECIPE, 0, folder / f"{backbone}-{cascade}", "")
        file = folder / f"{backbone}-{cascade}.safetensors"
        classes = {"classes": images.schema.classes, "palette": images.schema.palette}
        save(model, file, {"dataset": "toy", "input_scale": 1.0, **classes}, torch.float16)
        model.eval()
        with torch.no_grad():
            logits = model(torch.from_numpy(images[0].image.copy()).permute(2, 0, 1)[None].float())
        trained = Predictor(file, torch.device("cpu"), resizing=Resizing(1.0, None))
        totals = {name: Confusion(3, trained.device) for name in PROTOCOLS}
        for index in range(len(images)):
            sample = images[index]
            assert sample.label is not None
            for name, labels in trained.many([sample.image], PROTOCOLS)[0].items():
                totals[name].add(torch.from_numpy(sample.label.copy()), labels)
        metrics = {
            name: evaluate.summary("toy", images.schema.classes, total.counts(), total.per_image(), 0)
            for name, total in totals.items()
        }
        found[f"{backbone} {cascade}"] = {
            "weights": digest(toy_training.weights(model)),
            "curve": digest(repr(curve).encode()),
            "file": digest(file.read_bytes()),
            "scores": digest(logits.numpy().tobytes()),
            "metrics": digest(json.dumps(metrics).encode()),
        }
    return found


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
