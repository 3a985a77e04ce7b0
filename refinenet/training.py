"""Training with the authors' recipe: optimiser, schedule, step, checkpoint and exact resume (paper, section 4).

Everything random in a step is drawn from (seed, step), so the state of a training is its weights, its momentum and
the number of steps done. A run that is killed and started again ends in the same bytes.
"""

from __future__ import annotations

import math
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from refinenet.augment import Crops, assemble
from refinenet.config import Recipe
from refinenet.data import IGNORE_INDEX, Split
from refinenet.files import UserError, whole_file
from refinenet.network import RefineNet


@dataclass
class Point:
    """One line of the training curve: the mean loss of the steps since the last, and the rate of the new layers."""

    step: int
    loss: float
    lr: float


@dataclass
class Progress:
    """What the outside is told after each step; `point` where a line of the curve was just completed."""

    step: int
    point: Point | None


@dataclass
class _State:
    step: int = 0
    curve: list[Point] = field(default_factory=list)


def loss_of(logits: Tensor, labels: Tensor) -> Tensor:
    """Softmax log loss at the scores' resolution (authors' cnn_layer_dense_softmaxloss).

    logits: N x classes x h x w. labels: N x H x W uint8, resized to h x w by nearest neighbour. Mean over the pixels
    that are not void; 0 where all are.
    """
    truth = F.interpolate(labels[:, None], size=logits.shape[2:], mode="nearest-exact")[:, 0].long()
    # Flattened, because the two-dimensional loss has no deterministic kernel on a GPU.
    flat = logits.permute(0, 2, 3, 1).flatten(0, 2)
    total = F.cross_entropy(flat.float(), truth.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total / (truth != IGNORE_INDEX).sum().clamp_min(1)


def rate(recipe: Recipe, step: int) -> float:
    """Learning rate of the new layers in step `step`, counted from 0."""
    lr = recipe.lr
    if step < recipe.warmup:
        lr *= (step + 1) / recipe.warmup
    if recipe.schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    return lr * 0.1 if step >= recipe.drop_at * recipe.steps else lr


def train(
    model: RefineNet,
    split: Split,
    recipe: Recipe,
    seed: int,
    checkpoints: Path,
    fingerprint: str,
    on_step: Callable[[Progress], None] = lambda progress: None,
) -> list[Point]:
    """Train `model` in place and return the curve.

    Checkpoints go to the folder `checkpoints`; the newest whole one with the same `fingerprint` (a digest of all that
    the result depends on) is where training starts. The caller removes the folder once the result is safe.

    Raises UserError where the loss is no longer finite; it names the step and its images.
    """
    device = next(model.parameters()).device
    backbone = model.backbone_parameters()
    known = {id(p) for p in backbone}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in known], "factor": 1.0},
        {"params": backbone, "factor": recipe.backbone_lr},
    ]
    optimiser = torch.optim.SGD(
        groups, lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay, foreach=True
    )
    state = _resume(checkpoints, fingerprint, model, optimiser)
    crops = Crops(split, recipe.crop, recipe.scales, recipe.flip, recipe.balanced, seed, recipe.short_edge)
    model.train()
    pending: list[tuple[tuple[str, ...], Tensor]] = []
    saved = state.step
    for step in range(state.step, recipe.steps):
        # Dropout too must not depend on what this process did before.
        torch.manual_seed(seed * 1_000_003 + step)
        lr = rate(recipe, step)
        for group in optimiser.param_groups:
            group["lr"] = lr * group["factor"]
        batch = assemble(crops.draw(step, recipe.batch), recipe.crop, recipe.input_scale, device)
        loss = loss_of(model(batch.images), batch.labels)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        if recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip, foreach=True)
        optimiser.step()
        state.step = step + 1
        pending.append((batch.names, loss.detach()))
        point = None
        if state.step % recipe.log_every == 0 or state.step == recipe.steps:
            # The only place where the host waits for the device.
            point = Point(state.step, _mean_loss(pending, state.step, checkpoints), lr)
            state.curve.append(point)
            pending.clear()
        # Only where the curve is complete, so that a checkpoint has no half-filled interval to carry along.
        if point is not None and (state.step - saved >= recipe.checkpoint_every or state.step == recipe.steps):
            _save(checkpoints, fingerprint, state, model, optimiser)
            saved = state.step
        on_step(Progress(state.step, point))
    model.eval()
    return state.curve


def _mean_loss(pending: list[tuple[tuple[str, ...], Tensor]], step: int, checkpoints: Path) -> float:
    losses = torch.stack([loss for _, loss in pending]).double().cpu()
    for index, value in enumerate(losses.tolist()):
        if not math.isfinite(value):
            last = max(checkpoints.glob("step-*.pt"), default=None)
            raise UserError(
                f"loss is {value} in step {step - len(pending) + index + 1} on {', '.join(pending[index][0])}; "
                f"last good checkpoint: {last or 'none'}"
            )
    return float(losses.mean())


def _save(folder: Path, fingerprint: str, state: _State, model: RefineNet, optimiser: torch.optim.Optimizer) -> None:
    content = {
        "fingerprint": fingerprint,
        "step": state.step,
        "curve": [(p.step, p.loss, p.lr) for p in state.curve],
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
    }
    with whole_file(folder / f"step-{state.step:09d}.pt") as part:
        torch.save(content, part)
    for old in sorted(folder.glob("step-*.pt"))[:-2]:
        old.unlink()


def _resume(folder: Path, fingerprint: str, model: RefineNet, optimiser: torch.optim.Optimizer) -> _State:
    for path in sorted(folder.glob("step-*.pt"), reverse=True):
        try:
            content: dict[str, Any] = torch.load(path, weights_only=True, map_location="cpu")
        except (RuntimeError, EOFError, ValueError, OSError, pickle.UnpicklingError) as error:
            print(f"{path}: broken checkpoint, taking the one before ({error})", file=sys.stderr)
            continue
        if content["fingerprint"] != fingerprint:
            # Of other settings, data or initial weights.
            path.unlink()
            continue
        model.load_state_dict(content["model"])
        optimiser.load_state_dict(content["optimiser"])
        return _State(content["step"], [Point(*row) for row in content["curve"]])
    return _State()
