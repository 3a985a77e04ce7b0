"""Images a second of a multi-scale evaluation, from the images in memory to the counts of the confusion matrix.

    python benchmarks/evaluate.py --threads 2                                              the full network, one scale
    python benchmarks/evaluate.py --thin --scales 0.8 1.0 1.2 --height 96 --width 128      as in profile mini
    python benchmarks/evaluate.py --device cuda --scales 0.6 0.8 1.0 --images 32 --batch 8 --compile

Plain is what one writes first: float32, eager, image after image, and after each scale the probabilities go to the
host, where numpy averages, labels and counts. Every round takes each variant once, in turn, so that what else the
machine does meets all of them; ratios are of the medians, the spread is of all rounds. "rate" counts the operations of
the plain network, whatever is done instead, against the matrix product of the same number format in the same run.
"moved": pixels that the confusion matrix has elsewhere than that of "ours". Peak memory is the process's on a CPU, each
variant in a process of its own, weights included; on a GPU PyTorch's tensors'.
"""

from __future__ import annotations

import argparse
import platform
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from inference import operations, processor, seconds
from torch import nn
from torch.nn import functional as F

from refinenet import RefineNet
from refinenet.config import Precision, Protocol, Resizing
from refinenet.data.split import Array
from refinenet.inference.multiscale import optimise_for_inference, predict_many, upload
from refinenet.metrics import Confusion, Counts, confusion

CLASSES = 21


class Variant(NamedTuple):
    """A way to evaluate; `run` counts all images."""

    run: Callable[[], Counts]
    precision: Precision = "float32"


def variants(choice: argparse.Namespace) -> tuple[RefineNet, dict[str, Variant]]:
    """The plain network and every variant asked for."""
    torch.set_num_threads(choice.threads)
    torch.manual_seed(0)
    device = torch.device(choice.device)
    widths = {"stem": 3, "width": 8, "coarse_width": 16} if choice.thin else {}
    model = RefineNet(classes=CLASSES, backbone=choice.backbone, pools=4, **widths)
    model.initialise("scaled", torch.Generator().manual_seed(0))
    model = model.to(device).eval()
    rng = np.random.default_rng(0)
    shape = (choice.images, choice.height, choice.width)
    cells = torch.rand(choice.images, 3, 2 + choice.height // 16, 2 + choice.width // 16)
    smooth = F.interpolate(cells, size=shape[1:], mode="bilinear").permute(0, 2, 3, 1)
    images: Array = (smooth * 255).to(torch.uint8).contiguous().numpy()
    truths: Array = rng.integers(0, CLASSES, shape, dtype=np.uint8)
    # Sharp answers, or most pixels would be ties.
    with torch.no_grad():
        model.classifier.weight.mul_(30)

    def ours(net: nn.Module, batch: int, precision: Precision = "float32", tile: int | None = None) -> Variant:
        def run() -> Counts:
            total = Confusion(CLASSES, device)
            protocols = {"it": Protocol(tuple(choice.scales))}
            for first in range(0, len(images), batch):
                part = slice(first, first + batch)
                answers = predict_many(net, list(images[part]), protocols, Resizing(), "probability", precision, tile)
                for truth, answer in zip(truths[part], answers, strict=True):
                    total.add(upload(truth, device), answer["it"])
            return total.counts()

        return Variant(run, precision)

    made = {"plain": Variant(lambda: plain(model, images, truths, choice.scales))}
    made["ours"] = ours(model, 1)
    fast = optimise_for_inference(model, fast=True)
    made["ours, fast"] = ours(fast, 1)
    made[f"ours, fast, {choice.batch} at once"] = ours(fast, choice.batch)
    if not choice.thin:
        made["ours, fast, bfloat16"] = ours(
            optimise_for_inference(model, fast=True, precision="bfloat16"), 1, "bfloat16"
        )
    if choice.tile:
        made[f"ours, fast, tiles of {choice.tile}"] = ours(fast, 1, tile=choice.tile)
    if choice.compile:
        compiled = optimise_for_inference(model, fast=True, compile=True)
        made["ours, compiled"] = ours(compiled, choice.batch)
        made["ours, compiled, bfloat16"] = ours(compiled, choice.batch, "bfloat16")
    return model, made


@torch.inference_mode()
def plain(model: RefineNet, images: Array, truths: Array, scales: Sequence[float]) -> Counts:
    """The usual loop: enlarged by PyTorch's bicubic, the probabilities of each scale fetched at the image's size."""
    device = next(model.parameters()).device
    counts = np.zeros((CLASSES, CLASSES + 1), np.int64)
    for image, truth in zip(images, truths, strict=True):
        height, width = truth.shape
        pixels = torch.from_numpy(image).to(device).permute(2, 0, 1)[None].float()
        total = np.zeros((CLASSES, height, width), np.float32)
        for scale in scales:
            size = [max(32, round(side * scale)) for side in (height, width)]
            scaled = F.interpolate(pixels, size=size, mode="bicubic", antialias=True).clamp(0, 255)
            probabilities = F.interpolate(model(scaled).softmax(1), size=[height, width], mode="bilinear")
            total += probabilities[0].cpu().numpy()
        counts += confusion(truth, total.argmax(0).astype(np.uint8), CLASSES)
    return counts


def matrix_rate(device: torch.device, dtype: torch.dtype) -> Callable[[], float]:
    """A function that measures operations a second of one square matrix product."""
    side = 8192 if device.type == "cuda" else 4096
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))

    def product() -> None:
        left @ right
        wait(device)

    product()
    return lambda: 2 * side**3 / seconds(product)


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak(choice: argparse.Namespace, name: str, variant: Variant) -> float:
    """Bytes: on a GPU of tensors in one more run, on a CPU of a process that does nothing else."""
    if choice.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        variant.run()
        return float(torch.cuda.max_memory_allocated())
    again = subprocess.run([sys.executable, *sys.argv, "--only", name], check=True, capture_output=True, text=True)
    return float(again.stdout)


@torch.inference_mode()
def measure(choice: argparse.Namespace) -> None:
    """Print the table."""
    model, made = variants(choice)
    device = torch.device(choice.device)
    work = 0.0
    for scale in choice.scales:
        size = [max(32, round(side * scale)) for side in (choice.height, choice.width)]
        work += operations(model, torch.zeros(1, 3, *size, device=device))
    products = {v.precision: matrix_rate(device, getattr(torch, v.precision)) for v in made.values()}
    rates: dict[str, list[float]] = {kind: [] for kind in products}
    times: dict[str, list[float]] = {name: [] for name in made}
    counted = {name: variant.run() for name, variant in made.items()}  # also the first time of everything
    for _ in range(choice.rounds):
        for kind, product in products.items():
            rates[kind].append(product())
        for name, variant in made.items():
            times[name].append(seconds(variant.run) / choice.images)
    middle = {name: statistics.median(values) for name, values in times.items()}
    network = f"{choice.backbone}{', a thirtieth as wide' if choice.thin else ''}"
    sizes = " ".join(map(str, choice.scales))
    print(f"{network}, {choice.images} images of {choice.height} x {choice.width}, scales {sizes}, {CLASSES} classes:")
    print(f"{work / 2e9:.3g} GMAC an image\n")
    print("| variant | images/s (least to most) | times plain | rate, GFLOP/s | of the matrix rate | moved | memory |")
    print("| :-- | --: | --: | --: | --: | --: | --: |")
    for name, variant in made.items():
        rate, bound = work / middle[name], statistics.median(rates[variant.precision])
        moved = np.abs(counted[name] - counted["ours"]).sum() / 2 / counted["ours"].sum()
        print(
            f"| {name} | {1 / middle[name]:.3g} ({1 / max(times[name]):.3g} to {1 / min(times[name]):.3g}) "
            f"| {middle['plain'] / middle[name]:.2f} | {rate / 1e9:.3g} | {rate / bound:.0%} | {moved:.2%} "
            f"| {peak(choice, name, variant) / 1e9:.2f} GB |"
        )
    for form, measured in rates.items():
        bound = statistics.median(measured)
        print(
            f"| floor: a matrix product, {form} | {bound / work:.3g} | {bound / work * middle['plain']:.2f} "
            f"| {bound / 1e9:.3g} ({min(measured) / 1e9:.3g} to {max(measured) / 1e9:.3g}) | 100% | | |"
        )


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--backbone", default="resnet101")
    parser.add_argument("--thin", action="store_true", help="the width of profile mini")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--scales", type=float, nargs="+", default=[1.0])
    parser.add_argument("--height", type=int, default=480, help="pixels")
    parser.add_argument("--width", type=int, default=480)
    parser.add_argument("--images", type=int, default=4)
    parser.add_argument("--batch", type=int, default=4, help="images at once, where that is a variant")
    parser.add_argument("--tile", type=int, help="also in tiles of so many pixels")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also torch.compile, minutes on a CPU")
    parser.add_argument("--only", metavar="VARIANT", help="run one variant once and print the process's peak memory")
    choice = parser.parse_args()
    if choice.only:
        with torch.inference_mode():
            variants(choice)[1][choice.only].run()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return
    where = processor() if choice.device == "cpu" else torch.cuda.get_device_name()
    cores = f", {choice.threads} threads" if choice.device == "cpu" else ""
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{where}{cores}, {versions}, {choice.rounds} rounds\n")
    measure(choice)


if __name__ == "__main__":
    main()
