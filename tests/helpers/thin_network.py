"""Weights of a network that is small enough to be made anew for a test."""

from __future__ import annotations

from pathlib import Path

CLASSES = ["sky", "tree", "house", "road", "person"]
PALETTE = [(40 * i, 255 - 40 * i, 7 * i) for i in range(5)]


def network(path: Path, seed: int) -> None:
    """Weights as `train` writes them, of a thin untrained network that finds several classes in noise."""
    import torch

    from refinenet.model.network import RefineNet, save

    torch.manual_seed(seed)
    model = RefineNet(5, backbone="resnet50", stem=2, width=4, coarse_width=8)
    model.initialise("scaled", torch.Generator().manual_seed(seed))
    with torch.no_grad():
        model.classifier.weight.normal_(generator=torch.Generator().manual_seed(seed + 1))
    save(model, path, {"dataset": "voc", "classes": CLASSES, "palette": PALETTE, "input_scale": 1.0})
