"""A training step: each setting of the recipe beside the plain eager float32 step and the machine's own matrix rate.

    python benchmarks/train.py --threads 2 --compile             a network of medium width, on a CPU
    python benchmarks/train.py --fit --threads 2                 the network of profile fit, 6 crops of 320 x 320
    python benchmarks/train.py --device cuda --compile           RefineNet-101, 480 x 480, batches of 1, 8 and 16

A step is forward pass, loss, backward pass and optimiser, on a batch that is there already. Every round takes each
variant once, in turn, so that what else the machine does meets all of them; ratios are of the medians, the spread is of
all rounds. "memory" is what a step takes beside weights and momentum. "rate" counts three forward passes a step,
whatever is computed again: of the matrix rate in the variant's own precision. The last list says where the time of the
fastest variant goes.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from inference import FIT, operations, seconds, spread
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from refinenet import RefineNet
from refinenet.allocator import keep_freed_memory
from refinenet.config import Precision, Recipe
from refinenet.device import processor, reproducible
from refinenet.training.step import make_optimiser, pixel_loss, step_bytes, wrap_for_training

MEDIUM = {"backbone": "resnet50", "stem": 16, "width": 64, "coarse_width": 128}
CHANGES: dict[str, dict[str, Any]] = {
    "the recipe's defaults": {},
    "channels last": {"channels_last": True},
    "bfloat16": {"precision": "bfloat16"},
    "compiled": {"compile": True},
    "recompute": {"activation_checkpointing": True},
    "channels last, bfloat16": {"channels_last": True, "precision": "bfloat16"},
    "channels last, bfloat16, compiled": {"channels_last": True, "precision": "bfloat16", "compile": True},
    "all of them": {"channels_last": True, "precision": "bfloat16", "compile": True, "activation_checkpointing": True},
}
PLAIN = "plain eager float32"


def step_of(
    network: Callable[[Tensor], Tensor],
    optimiser: torch.optim.Optimizer,
    images: Tensor,
    labels: Tensor,
    wait: bool = True,
) -> Callable[[], None]:
    """One training step; on a GPU it ends when the device has done it, unless it is not to wait."""

    def step() -> None:
        optimiser.zero_grad(set_to_none=True)
        pixel_loss(network(images), labels).backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        if wait and images.is_cuda:
            torch.cuda.synchronize()

    return step


def matrix_rate(device: torch.device, precision: Precision) -> Callable[[], None]:
    """A product of two large matrices."""
    side = 8192 if device.type == "cuda" else 2048
    left, right = torch.randn(2, side, side, device=device, dtype=getattr(torch, precision))

    def product() -> None:
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize()

    return product


def cuda_bytes(step: Callable[[], None], optimiser: torch.optim.Optimizer) -> int:
    """What a step takes on the GPU beside weights and momentum."""
    optimiser.zero_grad(set_to_none=True)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    step()
    return torch.cuda.max_memory_allocated() - before


def measure(
    device: torch.device, network: dict[str, Any], size: int, batch: int, rounds: int, compiled: bool, top: int
) -> None:
    """Print the table of one batch size."""
    model = RefineNet(21, **network)
    model.initialise("scaled", torch.Generator().manual_seed(0))
    images = torch.rand(batch, 3, size, size, device=device) * 255
    labels = torch.randint(0, 21, (batch, size, size), device=device, dtype=torch.uint8)
    model.to(device)
    work = 3 * operations(model, images)
    recipe = Recipe(1, batch_size=batch, crop=size, input_scale=1.0)
    recipes = {
        name: replace(recipe, **change) for name, change in CHANGES.items() if compiled or "compile" not in change
    }
    steps: dict[str, Callable[[], None]] = {}
    memory: dict[str, int | None] = {}
    with ExitStack() as stack:
        plain = copy.deepcopy(model).train()
        optimiser: torch.optim.Optimizer = torch.optim.SGD(plain.parameters(), 1e-3, 0.9, foreach=True)
        steps[PLAIN] = step_of(plain, optimiser, images, labels)
        optimisers = {PLAIN: optimiser}
        memory[PLAIN] = step_bytes(plain, recipe) if device.type == "cpu" else None
        for name, own in recipes.items():
            net = copy.deepcopy(model).train()
            # On a CPU it is counted tensor by tensor, which a compiled step does not show.
            memory[name] = step_bytes(net, own) if device.type == "cpu" and not own.compile else None
            optimisers[name] = make_optimiser(net, own)
            steps[name] = step_of(stack.enter_context(wrap_for_training(net, own)), optimisers[name], images, labels)
        products = {precision: matrix_rate(device, precision) for precision in ("float32", "bfloat16")}  # type: ignore[arg-type]
        times: dict[str, list[float]] = {name: [] for name in (*products, *steps)}
        for run in (*products.values(), *steps.values(), *steps.values()):
            run()  # compiles, allocates
        if device.type == "cuda":
            memory = {name: cuda_bytes(step, optimisers[name]) for name, step in steps.items()}
        for _ in range(rounds):
            for name, run in (*products.items(), *steps.items()):
                times[name].append(seconds(run))
        middle = {name: sorted(values)[len(values) // 2] for name, values in times.items()}
        side = 8192 if device.type == "cuda" else 2048
        floor = {precision: 2 * side**3 / middle[precision] for precision in products}
        described = ", ".join(f"{value}" for value in network.values())
        print(f"\nRefineNet ({described}), {size} x {size}, batch {batch}: {work / 1e9 / batch:.0f} GFLOP an image")
        print(
            f"matrix rate: {floor['float32'] / 1e9:.0f} GFLOP/s in float32, {floor['bfloat16'] / 1e9:.0f} in bfloat16\n"
        )
        print(
            "| variant | seconds a step (least to most) | images/s | times plain | of the matrix rate | memory, MiB |"
        )
        print("| :-- | --: | --: | --: | --: | --: |")
        for name in steps:
            precision = recipes[name].precision if name in recipes else "float32"
            told = "" if memory[name] is None else f"{(memory[name] or 0) / 2**20:.0f}"
            print(
                f"| {name} | {spread(times[name])} | {batch / middle[name]:.2f} | {middle[PLAIN] / middle[name]:.2f} "
                f"| {work / middle[name] / floor[precision]:.0%} | {told} |"
            )
        fastest = min(steps, key=lambda name: middle[name])
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if device.type == "cuda" else [])
        with profile(activities=activities) as profiled:
            steps[fastest]()
    which = "self_device_time_total" if device.type == "cuda" else "self_cpu_time_total"
    rows = sorted(profiled.key_averages(), key=lambda row: -getattr(row, which))
    total = sum(getattr(row, which) for row in rows) or 1
    print(f"\nWhere the time of '{fastest}' goes:\n")
    print("| operation | calls | share |")
    print("| :-- | --: | --: |")
    for row in rows[:top]:
        print(f"| {row.key[:80]} | {row.count} | {getattr(row, which) / total:.1%} |")


def main() -> None:
    """Read the command line and print a table for each batch size."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--size", type=int, help="pixels a side; 480 on a GPU, 160 on a CPU")
    parser.add_argument("--batches", type=int, nargs="+", help="1 8 16 on a GPU, 2 on a CPU")
    parser.add_argument("--full", action="store_true", help="RefineNet-101 on a CPU too")
    parser.add_argument("--fit", action="store_true", help="the network of profile fit")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which takes minutes")
    parser.add_argument("--return-memory", action="store_true", help="freed blocks go to the system, not as in `train`")
    parser.add_argument("--top", type=int, default=10, help="operations that are listed")
    choice = parser.parse_args()
    device = torch.device(choice.device)
    gpu = device.type == "cuda"
    reproducible(0, choice.threads)
    if not gpu and not choice.return_memory:
        keep_freed_memory()  # as `train` does
    name = torch.cuda.get_device_name(device) if gpu else f"{processor()}, {choice.threads} threads"
    print(f"{name}, torch {torch.__version__}, {choice.rounds} rounds")
    network: dict[str, Any] = {"backbone": "resnet101", "pools": 4} if gpu or choice.full else MEDIUM
    batches, size = ([1, 8, 16], 480) if gpu else ([2], 160)
    if choice.fit:
        network, batches, size = {key: FIT[key] for key in FIT if key != "classes"}, [6], 320
    for batch in choice.batches or batches:
        measure(device, network, choice.size or size, batch, choice.rounds, choice.compile, choice.top)


if __name__ == "__main__":
    main()
