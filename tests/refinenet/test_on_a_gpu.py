"""What a GPU is given to do, as far as it can be known without one: how many operators, how much memory, repeatable.

Counted on the meta device, which knows shapes and computes nothing; but for processors everything takes its road.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from toy_training import write

from refinenet import RefineNet
from refinenet.config import Recipe
from refinenet.inference import multiscale
from refinenet.model import blocks
from refinenet.training.memory import held_bytes
from refinenet.training.step import make_optimiser, pixel_loss

ROOT = Path(__file__).resolve().parents[2]
# What torch.use_deterministic_algorithms refuses on CUDA tensors, by its documentation, and the operators that are
# meant. Of the losses only the two-dimensional one is refused (aten/src/ATen/native/cuda/NLLLoss2d.cu).
REFUSED: dict[str, set[str]] = {
    "nn.AvgPool3d": {"avg_pool3d_backward"},
    "nn.AdaptiveAvgPool2d": {"_adaptive_avg_pool2d_backward"},
    "nn.AdaptiveAvgPool3d": {"_adaptive_avg_pool3d_backward"},
    "nn.AdaptiveMaxPool2d": {"adaptive_max_pool2d_backward"},
    "nn.FractionalMaxPool2d": {"fractional_max_pool2d_backward"},
    "nn.FractionalMaxPool3d": {"fractional_max_pool3d_backward"},
    **{f"nn.MaxUnpool{n}d": {"max_unpool2d", "max_unpool3d"} for n in (1, 2, 3)},
    "nn.functional.interpolate": {
        f"{kind}_backward"
        for kind in (
            *("upsample_linear1d", "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d"),
            *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
        )
    },
    **{f"nn.ReflectionPad{n}d": {f"reflection_pad{n}d_backward"} for n in (1, 2, 3)},
    "nn.NLLLoss": {"nll_loss2d_forward", "nll_loss2d_backward"},
    "nn.CTCLoss": {"_ctc_loss_backward", "_cudnn_ctc_loss"},
    "nn.EmbeddingBag": {"_embedding_bag_dense_backward"},
    "Tensor.put_": {"put", "put_"},
    "histc": {"histc"},
    "bincount": {"bincount"},
    "median": {"median", "nanmedian"},
    "nn.functional.grid_sample": {"grid_sampler_2d_backward", "grid_sampler_3d_backward"},
    "Tensor.scatter_reduce": {"scatter_reduce", "scatter_reduce_"},
    "Tensor.resize_": set(),  # quantised only
}


class Launches(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that a device is given; views cost the host little and the device nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = function._schema.name.split("::")
        if namespace == "aten" and not function.is_view and name != "detach":
            self.counts[name] += 1
        return function(*args, **(kwargs or {}))


def step(model: RefineNet, side: int, batch: int = 1) -> Launches:
    """Count a training step by the authors' recipe; the optimiser as several tensors at once, as on a GPU."""
    images, labels = torch.zeros(batch, 3, side, side), torch.zeros(batch, side, side, dtype=torch.uint8)
    optimiser = make_optimiser(model, Recipe(1))
    for group in optimiser.param_groups:
        group["foreach"] = True
    for _ in range(2):  # the first step makes the momentum
        optimiser.zero_grad()
        with Launches() as launches:
            pixel_loss(model(images), labels).backward()  # type: ignore[no-untyped-call]
            optimiser.step()
    return launches


def test_a_step_launches_few_operators() -> None:
    """1,050; 2,205 until November 2026, 1,352 of them for norms, each folded by itself."""
    with torch.device("meta"):
        launches = step(RefineNet(21, backbone="resnet101", pools=4).train(), 480)
    assert launches.counts["convolution"] == launches.counts["convolution_backward"] > 100
    assert launches.counts.total() <= 1300, launches.counts.most_common()


@pytest.mark.parametrize("upsample", ["bilinear", "bilinear-aligned", "bicubic"])
@pytest.mark.parametrize("cascade", ["four", "four-two-scale"])
def test_every_operator_of_a_step_is_repeatable(cascade: str, upsample: str, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = set[str]().union(*REFUSED.values())
    thin: dict[str, Any] = {"stem": 2, "width": 4, "coarse_width": 8, "dropout": 0.5}
    with torch.device("meta"):
        model = RefineNet(3, backbone="resnet50", cascade=cascade, upsample=upsample, **thin).train()
        assert not refused & step(model, 70, 2).counts.keys()
        if upsample == "bilinear":  # with PyTorch's own resizing one is among them
            monkeypatch.setattr(blocks, "bilinear_product", lambda x, size, _: F.interpolate(x, size, mode="bilinear"))
            assert refused & step(model, 70, 2).counts.keys() == {"upsample_bilinear2d_backward"}


def test_the_list_of_what_is_refused_is_pytorchs() -> None:
    text = (torch.use_deterministic_algorithms.__doc__ or "").partition(":class:`RuntimeError` when ``mode=True``")[2]
    entries = re.findall(r"^ +\* :\w+:`torch\.([\w.]+)`((?:(?!^ +\* :).)*)", text, re.M | re.S)
    found = {name for name, rest in entries if "CUDA" in rest or "MPS" not in rest.partition("In addition")[0]}
    assert "nn.functional.interpolate" in found
    assert found <= REFUSED.keys(), found - REFUSED.keys()


@pytest.mark.parametrize("aligned", [False, True])
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_two_products_are_interpolation(aligned: bool, order: torch.memory_format) -> None:
    """Result and gradient, of any sizes; in float32 as exactly as PyTorch's own."""
    generator = torch.Generator().manual_seed(0)
    for size, into in (((5, 8), (10, 16)), ((13, 7), (25, 14)), ((1, 3), (9, 3)), ((6, 6), (7, 29)), ((9, 9), (1, 4))):
        exact = torch.randn(2, 3, *size, dtype=torch.float64, generator=generator).to(memory_format=order)
        wanted_from, found_from = (exact.clone().requires_grad_() for _ in range(2))
        wanted = F.interpolate(wanted_from, into, mode="bilinear", align_corners=aligned)
        found = blocks.bilinear_product(found_from, into, aligned)
        assert found.is_contiguous(memory_format=order)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
        direction = torch.randn(wanted.shape, dtype=torch.float64, generator=generator)
        wanted.backward(direction)
        found.backward(direction)
        torch.testing.assert_close(found_from.grad, wanted_from.grad, rtol=1e-12, atol=1e-12)
        single = blocks.bilinear_product(exact.float(), into, aligned).double()
        assert (single - wanted).abs().max() <= 1e-6 * wanted.abs().max()


def test_two_products_take_less_than_what_pytorch_does_instead() -> None:
    """A step's resizing of a map of 256 channels from 60 to 120 pixels a side, with its gradient."""
    from torch._decomp.decompositions import _upsample_linear_vec

    def ours(maps: torch.Tensor) -> torch.Tensor:
        return blocks.resize(maps, (120, 120))

    def deterministic(maps: torch.Tensor) -> torch.Tensor:  # F.interpolate, when asked for deterministic algorithms
        resized: torch.Tensor = _upsample_linear_vec(maps, [120, 120], False, None)
        return resized

    def measured(resize: Callable[[torch.Tensor], torch.Tensor]) -> tuple[float, int]:
        maps = torch.zeros(1, 256, 60, 60, device="meta", requires_grad=True)
        resize(maps).sum().backward()  # type: ignore[no-untyped-call] # the matrices are kept
        with Launches() as launches:
            held = held_bytes(lambda: resize(maps).sum().backward())  # type: ignore[no-untyped-call]
        return held / (4 * 256 * 120 * 120), launches.counts.total()

    memory, launches = measured(ours)
    their_memory, their_launches = measured(deterministic)
    assert memory < 2.6 < 5 < their_memory, (memory, their_memory)
    assert launches < 10 < 20 < their_launches, (launches, their_launches)


@pytest.mark.parametrize("classes", [21, 150])
def test_the_memory_of_the_last_resizing_is_bounded(classes: int) -> None:
    """At the most that is resized at once, and where it is done class by class; also when asked to be deterministic."""
    height = multiscale._AT_ONCE // 21 // 3600
    torch.use_deterministic_algorithms(True)
    scores = torch.zeros(1, classes, height // 4, 900, device="meta")
    held = held_bytes(lambda: multiscale._best(scores, (height, 3600)))
    assert held <= 1.15 * 4 * multiscale._AT_ONCE


PROGRAM = """
import os, signal, sys, time
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import torch
from toy_training import RECIPE, after_steps, model, write

from refinenet.data.split import Split
from refinenet.training.loop import train

device, split, folder, kill, fast = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], sys.argv[5]
change = {"precision": "bfloat16", "channels_last": True} if fast == "fast" else {}
net = model(0.5, "four").to(device)
torch.use_deterministic_algorithms(True, warn_only=False)  # an error, not a warning

def on_step(progress):
    if kill == "kill" and progress.step == 5:
        while not (folder / "step-000000003.pt").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGKILL)

curve = train(net, Split(split), replace(RECIPE, **change), 0, folder, "f", on_step, due=after_steps(3))
state = b"".join(value.cpu().contiguous().numpy().tobytes() for value in net.state_dict().values())
print(sha256(state + repr(curve).encode()).hexdigest())
"""


@pytest.mark.slow
@pytest.mark.parametrize("fast", ["plain", "fast"])
@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
        ),
    ],
)
def test_a_killed_training_ends_in_the_same_bytes_by_repeatable_operators(
    device: str, fast: str, tmp_path: Path
) -> None:
    """Four blocks, each resizing; whole twice, then killed and resumed."""
    split = write(tmp_path / "image.arrow").path
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests/helpers'}"}

    def run(folder: str, kill: str = "") -> tuple[int, str]:
        command = [sys.executable, "-c", PROGRAM, device, str(split), str(tmp_path / folder), kill, fast]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert kill or not done.returncode, done.stderr
        return done.returncode, done.stdout

    whole = run("whole")
    assert run("again") == whole
    assert run("killed", "kill") == (-9, "")
    assert run("killed") == whole
