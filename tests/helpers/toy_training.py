"""A training of seconds: six small noise images, one block on a ResNet of four units, a thirtieth as wide."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from unittest import mock

import numpy as np
import torch

from refinenet import RefineNet
from refinenet.config import RESNETS, Recipe
from refinenet.data.crops import Samples
from refinenet.data.split import Schema, Split
from refinenet.data.writer import write_split
from refinenet.device import reproducible
from refinenet.training.loop import Phase, Point, Progress, train

RECIPE = Recipe(
    steps=7,
    batch_size=2,
    crop=32,
    input_scale=1.0,
    lr=0.01,
    init="scaled",
    log_every=2,
    grad_clip=1.0,
)


def write(path: Path, seed: int = 0, classes: tuple[str, ...] = ("a", "b", "c")) -> Split:
    """A split of six images; class c is not in the first."""
    rng = np.random.default_rng(seed)
    with write_split(path, Schema("toy", "train", classes, ((0, 0, 0), (1, 1, 1), (2, 2, 2)))) as writer:
        for i in range(6):
            size = (48 + i, 60 - i)
            label = rng.integers(0, 3 if i else 2, size, dtype=np.uint8)
            label[:3] = 255
            writer.add(f"{path.stem}{i}", rng.integers(0, 256, (*size, 3), dtype=np.uint8), label)
    return Split(path)


def model(dropout: float = 0.5, cascade: Any = "single", **more: Any) -> RefineNet:
    """The network, always with the same weights; `more`: further settings of it, or others."""
    reproducible(0, 1)
    settings = {"backbone": "resnet50", "stem": 8, "width": 4, "coarse_width": 8} | more
    with mock.patch.dict(cast("dict[str, Any]", RESNETS), resnet50=(1, 1, 1, 1)):
        net = RefineNet(3, cascade=cascade, dropout=dropout, **settings)
    net.initialise("scaled", torch.Generator().manual_seed(0))
    return net


def weights(net: RefineNet) -> bytes:
    """All of them."""
    return b"".join(v.detach().contiguous().numpy().tobytes() for v in net.state_dict().values())


def after_steps(count: int) -> Callable[[], bool]:
    """A checkpoint is due after every `count` steps."""
    steps = itertools.count(1)
    return lambda: next(steps) % count == 0


def run(
    images: Samples | list[Phase],
    folder: Path,
    recipe: Recipe = RECIPE,
    stop_at: int | None = None,
    fingerprint: str = "f",
    stop: Callable[[], bool] = lambda: False,
    every: int = 3,
) -> tuple[bytes, list[Point]]:
    """Train; `stop_at` ends it as a kill would, after that step; a checkpoint `every` steps. Weights, and the curve."""
    net = model()

    def on_step(progress: Progress) -> None:
        if progress.step == stop_at:
            raise KeyboardInterrupt

    curve = train(net, images, recipe, 0, folder, fingerprint, on_step, stop, after_steps(every))
    return weights(net), curve
