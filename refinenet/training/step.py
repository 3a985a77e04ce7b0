"""One training step by the recipe: loss, learning rate, optimiser, and how the network is computed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from refinenet.config import Recipe
from refinenet.data import IGNORE_INDEX
from refinenet.device import choose_precision
from refinenet.model.network import RefineNet
from refinenet.training.distributed import ProcessGroup, parameters_without_gradient
from refinenet.training.memory import activation_bytes, activation_checkpointing


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the mean cross-entropy at the logits' resolution (authors' cnn_layer_dense_softmaxloss).

    logits: N x classes x h x w. labels: N x H x W uint8, resized to h x w by nearest neighbour. The mean is over the
    pixels that are not void; 0 where all are void.
    """
    total, count = loss_sum_and_count(logits, labels)
    return total / count.clamp_min(1)


def loss_sum_and_count(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the summed loss of all labelled pixels and their number, scalars; arguments as of `pixel_loss`."""
    truth = F.interpolate(labels[:, None], size=logits.shape[2:], mode="nearest-exact")[:, 0].long()
    # Flattened, because the two-dimensional loss has no deterministic GPU kernel.
    flat = logits.permute(0, 2, 3, 1).flatten(0, 2)
    total = F.cross_entropy(flat.float(), truth.flatten(), ignore_index=IGNORE_INDEX, reduction="sum")
    return total, (truth != IGNORE_INDEX).sum()


def lr_at_step(recipe: Recipe, step: int) -> float:
    """Return the learning rate of the new layers in step `step`, counted from 0."""
    lr = recipe.lr
    if step < recipe.warmup:
        lr *= (step + 1) / recipe.warmup
    if recipe.schedule == "cosine":
        return lr * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
    return lr * 0.1 if step >= recipe.drop_at * recipe.steps else lr


def make_optimiser(model: RefineNet, recipe: Recipe) -> torch.optim.Optimizer:
    """Return the recipe's optimiser of all weights; a group's "factor" multiplies its learning rate."""
    backbone = model.backbone_parameters()
    known = {id(p) for p in backbone}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in known], "factor": 1.0},
        {"params": backbone, "factor": recipe.backbone_lr},
    ]
    # Fused: one kernel for all weights; on a CPU, too, twice as fast as one for each operation.
    fused = next(model.parameters()).device.type in ("cpu", "cuda", "mps")
    if recipe.optimiser == "adamw":
        betas = (recipe.momentum, 0.999)
        return torch.optim.AdamW(groups, recipe.lr, betas, weight_decay=recipe.weight_decay, fused=fused)
    return torch.optim.SGD(groups, recipe.lr, recipe.momentum, weight_decay=recipe.weight_decay, fused=fused)


@contextmanager
def wrap_for_training(
    model: RefineNet, recipe: Recipe, processes: ProcessGroup | None = None
) -> Iterator[Callable[[Tensor], Tensor]]:
    """Yield the network as the recipe computes it: a function from images, N x 3 x H x W, to logits.

    It has the recipe's precision, memory format, activation checkpointing and torch.compile, and averages gradients
    over `processes`. `model` trains in place; after the block only its weights have changed.
    """
    processes = processes or ProcessGroup()
    device = next(model.parameters()).device
    order = torch.channels_last if recipe.channels_last else torch.contiguous_format
    model.to(memory_format=order)
    idle = list[nn.Parameter]()
    if processes.world > 1:
        idle = parameters_without_gradient(model, round(recipe.crop * recipe.input_scale))
    network: nn.Module = model
    if recipe.compile:
        # A batch of one has the size of its image: dynamic=None compiles for any size at the second one.
        network = torch.compile(model, dynamic=None if recipe.batch_size == 1 else False)  # type: ignore[assignment]
    with (
        activation_checkpointing(model, recipe.activation_checkpointing),
        processes.wrap_ddp(network, idle) as wrapped,
    ):
        half = choose_precision(recipe.precision, device) == "bfloat16"

        def logits(images: Tensor) -> Tensor:
            with torch.autocast(device.type, torch.bfloat16, enabled=half):
                scores: Tensor = wrapped(images.contiguous(memory_format=order))
            return scores

        yield logits
    model.to(memory_format=torch.contiguous_format)


def step_bytes(model: RefineNet, recipe: Recipe) -> int:
    """Return the peak bytes of the maps and gradients of one step on a CPU, without weights and momentum."""
    side = round(recipe.crop * recipe.input_scale)
    labels = torch.zeros(recipe.batch_size, side, side, dtype=torch.uint8)
    images = torch.zeros(recipe.batch_size, 3, side, side)
    model.train()
    with wrap_for_training(model, replace(recipe, compile=False)) as network:
        held = activation_bytes(lambda: pixel_loss(network(images), labels))
    model.zero_grad(set_to_none=True)
    return held
