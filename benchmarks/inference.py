"""Inference on a CPU, beside the same model in plain eager NCHW and the machine's own SGEMM rate.

    python benchmarks/inference.py --backbones resnet101 timm:tf_efficientnet_lite0 --threads 2 --rounds 7
    python benchmarks/inference.py --backbones fit --sizes 256x256 360x480      the network of profile fit
    pip install openvino                                                        and OpenVINO is in the tables

Every round takes each variant once, in turn, so that what else the machine does meets all of them; ratios are of the
medians, the spread is of all rounds. "rate" counts the multiplications of the plain convolution, whatever is done
instead of it: it may exceed what the machine's matrix product reaches.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from refinenet import RefineNet
from refinenet.device import processor
from refinenet.inference.export import to_onnx
from refinenet.inference.fast import FastRefineNet
from refinenet.inference.onnx_file import OnnxNetwork
from refinenet.inference.quantise import to_int8

# Settings of profile fit (profiles/fit.yaml), with CamVid's classes.
FIT: Mapping[str, Any] = {
    **{"classes": 11, "backbone": "timm:tf_efficientnet_lite0", "cascade": "four", "pools": 2},
    **{"width": 64, "coarse_width": 128},
}
CALIBRATED_ON = 4  # random images: how fast it is does not depend on them


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


def onnx_files(model: RefineNet, images: Tensor, folder: Path) -> dict[str, nn.Module]:
    """Write the model as ONNX in float32 and in 8-bit integers; return what runs them."""
    to_onnx(model, folder / "float32.onnx")
    drawn = [torch.rand_like(images) * 255 for _ in range(CALIBRATED_ON)]
    to_int8(model, folder / "int8.onnx", {}, drawn)
    kinds = ("float32", "int8")
    found: dict[str, nn.Module] = {f"onnxruntime, {kind}": OnnxNetwork(folder / f"{kind}.onnx") for kind in kinds}
    if importlib.util.find_spec("openvino"):
        found |= {f"OpenVINO, {kind}": OpenVino(folder / f"{kind}.onnx", images) for kind in kinds}
    return found


class OpenVino(nn.Module):
    """Runs the same file by OpenVINO on the CPU, compiled for images of this size; float32 where it is not int8."""

    def __init__(self, path: Path, images: Tensor) -> None:
        super().__init__()
        import openvino

        model = openvino.Core().read_model(path)
        model.reshape(list(images.shape))
        settings = {
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",  # by itself bfloat16, where the processor has it
        }
        self._dtype = images.dtype if model.input(0).element_type.to_dtype() == "float32" else torch.uint8
        self._compiled = openvino.Core().compile_model(model, "CPU", settings)

    def forward(self, images: Tensor) -> Tensor:
        (logits,) = self._compiled([images.to(self._dtype).numpy()]).values()
        return torch.from_numpy(logits.copy())


@torch.no_grad()
def measure(backbone: str, height: int, width: int, rounds: int, compiled: bool) -> None:
    """Print the rows of one network; `backbone` "fit" is that of profile fit."""
    torch.manual_seed(0)
    settings = FIT if backbone == "fit" else {"classes": 21, "backbone": backbone, "pools": 4}
    model = RefineNet(**settings).eval()
    model.initialise("scaled", torch.Generator().manual_seed(0))
    images = torch.rand(1, 3, height, width) * 255
    work = operations(model, images)
    left, right = torch.randn(4096, 4096), torch.randn(4096, 4096)
    variants: dict[str, nn.Module] = {"plain eager, NCHW": model}
    variants["norms folded, channels last"] = FastRefineNet(model, winograd=False)
    variants["FastRefineNet"] = FastRefineNet(model)
    with TemporaryDirectory() as folder:
        variants |= onnx_files(model, images, Path(folder))
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
    what = f"{settings['pools']} pooling blocks, {settings['classes']} classes"
    print(f"\n{backbone}, {width} x {height}, {what}: {work / 2e9:.1f} GMAC\n")
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
    return f"{statistics.median(values):.3f} ({min(values):.3f} to {max(values):.3f})"


def main() -> None:
    """Read the command line and print a table for each backbone."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--backbones", nargs="+", default=["resnet101", "timm:tf_efficientnet_lite0"])
    parser.add_argument("--sizes", nargs="+", default=["480x480"], metavar="HxW", help="of the image, pixels")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--compile", action="store_true", help="also torch.compile, which takes a minute or two")
    choice = parser.parse_args()
    torch.set_num_threads(choice.threads)
    print(f"{processor()}, {choice.threads} threads, torch {torch.__version__}, {choice.rounds} rounds")
    for backbone in choice.backbones:
        for size in choice.sizes:
            height, width = map(int, size.split("x"))
            measure(backbone, height, width, choice.rounds, choice.compile)


if __name__ == "__main__":
    main()
