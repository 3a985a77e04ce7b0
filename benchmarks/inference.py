"""Inference on a CPU in float32, beside the same model in plain eager NCHW and the machine's own SGEMM rate.

    python benchmarks/inference.py --backbones resnet101 timm:tf_efficientnet_lite0 --threads 2 --rounds 7

Every round takes each variant once, in turn, so that what else the machine does meets all of them; ratios are of the
medians, the spread is of all rounds. "rate" counts the multiplications of the plain convolution, whatever is done
instead of it: it may exceed what the machine's matrix product reaches.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from refinenet import RefineNet
from refinenet.inference.fast import FastRefineNet


def processor() -> str:
    """Name of the processor as Linux gives it."""
    with open("/proc/cpuinfo", encoding="utf-8") as file:  # noqa: PTH123 - no path to speak of
        names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    return names[0] if names else platform.processor()


def seconds(run: Callable[[], object]) -> float:
    """Wall time of one call."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def operations(model: nn.Module, images: Tensor) -> float:
    """Floating-point operations of one forward pass; two to a multiplication with its addition."""
    with FlopCounterMode(display=False) as counter:
        model(images)
    return float(counter.get_total_flops())


@torch.inference_mode()
def measure(backbone: str, size: int, rounds: int, compiled: bool) -> None:
    """Print the rows of one backbone."""
    torch.manual_seed(0)
    model = RefineNet(classes=21, backbone=backbone, pools=4).eval()
    model.initialise("scaled", torch.Generator().manual_seed(0))
    images = torch.rand(1, 3, size, size) * 255
    work = operations(model, images)
    left, right = torch.randn(4096, 4096), torch.randn(4096, 4096)
    variants: dict[str, nn.Module] = {"plain eager, NCHW": model}
    variants["norms folded, channels last"] = FastRefineNet(model, winograd=False)
    variants["FastRefineNet"] = FastRefineNet(model)
    if compiled:
        variants["torch.compile of the plain model"] = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    times: dict[str, list[float]] = {name: [] for name in ("sgemm", *variants)}
    wanted = model(images)
    error = {name: ((net(images) - wanted).abs().max() / wanted.abs().max()).item() for name, net in variants.items()}
    for _ in range(rounds):
        times["sgemm"].append(seconds(lambda: left @ right))
        for name, net in variants.items():
            times[name].append(seconds(lambda net=net: net(images)))  # type: ignore[misc]
    middle = {name: statistics.median(values) for name, values in times.items()}
    sgemm = 2 * 4096**3 / middle["sgemm"]
    plain = middle["plain eager, NCHW"]
    print(f"\n{backbone}, {size} x {size}, 4 pooling blocks, 21 classes: {work / 2e9:.0f} GMAC\n")
    print("| variant | seconds (least to most) | times plain | rate, GFLOP/s | of SGEMM | error |")
    print("| :-- | --: | --: | --: | --: | --: |")
    print(f"| SGEMM 4096 x 4096 | {spread(times['sgemm'])} | | {sgemm / 1e9:.0f} | | |")
    for name in variants:
        rate = work / middle[name]
        print(
            f"| {name} | {spread(times[name])} | {plain / middle[name]:.2f} | {rate / 1e9:.0f} | {rate / sgemm:.0%} "
            f"| {error[name]:.0e} |"
        )


def spread(values: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def main() -> None:
    """Read the command line and print a table for each backbone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--backbones", nargs="+", default=["resnet101", "timm:tf_efficientnet_lite0"])
    parser.add_argument("--size", type=int, default=480, help="pixels a side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which takes a minute or two")
    choice = parser.parse_args()
    torch.set_num_threads(choice.threads)
    print(f"{processor()}, {choice.threads} threads, torch {torch.__version__}, {choice.rounds} rounds")
    for backbone in choice.backbones:
        measure(backbone, choice.size, choice.rounds, choice.compile)


if __name__ == "__main__":
    main()
