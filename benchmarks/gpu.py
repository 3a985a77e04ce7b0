"""What a GPU does with this project, in one command of less than nine minutes: rates, floors, memory, repeatability.

    python benchmarks/gpu.py --split data/voc/train.arrow        writes benchmarks/gpu.md and benchmarks/gpu.json
    python benchmarks/gpu.py --device cpu --thin --to FOLDER     the same on a thin network in seconds: that it runs

Of this project it imports refinenet/ alone, of others torch, torchvision, numpy, pyarrow, safetensors and scikit-image.
Each section has its own time. One that fails or has no time left says so in one line, keeps the rows it has, and the
next one begins; both files are written anew after each. Rates are medians of rounds, each long enough to be timed, with
the least and the most; no step waits for the device within a round, as in a training. "share" is of the rate at which
this device multiplies large matrices in the same number format; three forward passes are counted for a training step.
`refinenet cost --measured benchmarks/gpu.json` computes with these rates.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torchvision
from inference import operations
from torch import nn
from torch.profiler import ProfilerActivity, profile
from train import step_of

from refinenet import RefineNet
from refinenet.atomic import atomic_file
from refinenet.config import Precision, Protocol, Recipe, Resizing
from refinenet.data.loader import Loader
from refinenet.data.split import Array, Schema, Split
from refinenet.data.writer import write_split
from refinenet.device import processor, reproducible
from refinenet.errors import UserError
from refinenet.inference.multiscale import optimise_for_inference, predict_many, upload
from refinenet.metrics import Confusion
from refinenet.training.checkpoints import Store
from refinenet.training.initial import crops_of
from refinenet.training.loop import Progress, train
from refinenet.training.step import make_optimiser, wrap_for_training

ROOT = Path(__file__).resolve().parents[1]
CLASSES = 21
FULL: dict[str, Any] = {"backbone": "resnet101", "pools": 4}
THIN: dict[str, Any] = {"backbone": "resnet50", "cascade": "two", "stem": 2, "width": 4, "coarse_width": 8}
BEST: dict[str, Any] = {"channels_last": True, "precision": "bfloat16"}
# Name -> change of the recipe, and whether the step is one CUDA graph.
VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {
    "eager, float32": ({}, False),
    "eager, bfloat16": ({"precision": "bfloat16"}, False),
    "channels last, float32": ({"channels_last": True}, False),
    "channels last, bfloat16": (BEST, False),
    "channels last, bfloat16, a CUDA graph": (BEST, True),
    "channels last, float32, a CUDA graph": ({"channels_last": True}, True),
    "channels last, bfloat16, compiled": ({**BEST, "compile": True}, False),
}
# Title -> height, width, classes, the short edge's limits and scales: profile paper's, and five scales.
EVALUATED: dict[str, tuple[int, int, int, tuple[int, int], tuple[float, ...]]] = {
    "VOC": (375, 500, 21, (450, 600), (0.6, 0.8, 1.0)),
    "Cityscapes": (1024, 2048, 19, (450, 1100), (0.6, 0.8, 1.0)),
    "Cityscapes, five scales": (1024, 2048, 19, (450, 1100), (0.6, 0.7, 0.8, 0.9, 1.0)),
}


class OutOfTimeError(Exception):
    """A section has used up its time."""


@dataclass
class Page:
    """What is measured on, and what is found: lines of the page and rates for others to compute with."""

    device: torch.device
    thin: bool
    split: Path | None
    folder: Path
    lines: list[str] = field(default_factory=list)
    rates: dict[str, Any] = field(default_factory=dict)

    @property
    def network(self) -> dict[str, Any]:
        """Return the settings of the network that is measured."""
        return THIN if self.thin else FULL

    @property
    def side(self) -> int:
        """Return the side of a crop as the network sees it, pixels."""
        return 64 if self.thin else 480

    def wait(self) -> None:
        """Wait until the device has done what it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def forget(self) -> None:
        """Give memory back that nothing refers to any more, and count its peak from here."""
        gc.collect()
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self.device)

    def memory(self) -> str:
        """Return the peak of the tensors' memory since `forget`, GB; "" on a CPU."""
        return f"{torch.cuda.max_memory_allocated(self.device) / 1e9:.1f}" if self.device.type == "cuda" else ""

    def table(self, *head: str) -> None:
        """Begin a table; the columns after the first are aligned to the right."""
        self.lines += ["", f"| {' | '.join(head)} |", "| :-- " + "| --: " * (len(head) - 1) + "|"]

    def row(self, *cells: str) -> None:
        """Add a row to the table."""
        self.lines.append(f"| {' | '.join(cells)} |")

    def rounds(self, run: Callable[[], object], work: int = 1) -> list[float]:
        """Return `work` a second in five rounds (two if thin) of a third of a second or more each."""
        run()
        self.wait()
        count = 1
        if not self.thin:
            begin = time.perf_counter()
            run()
            self.wait()
            count = max(1, round(0.35 / (time.perf_counter() - begin)))
        found = []
        for _ in range(2 if self.thin else 5):
            begin = time.perf_counter()
            for _ in range(count):
                run()
            self.wait()
            found.append(work * count / (time.perf_counter() - begin))
        return found

    def model(self, classes: int = CLASSES) -> RefineNet:
        """Return the network on the device, always with the same weights."""
        torch.manual_seed(0)
        model = RefineNet(classes, **self.network)
        model.initialise("scaled", torch.Generator().manual_seed(0))
        return model.to(self.device)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def floors(page: Page) -> None:
    """Measure what bounds everything else: matrix products, copies in memory, launches of operators."""
    page.table("floor", "rate (least to most)", "unit")
    side = 256 if page.thin else 8192
    page.rates["matrix"] = {}
    for precision in ("float32", "bfloat16"):
        left, right = torch.randn(2, side, side, device=page.device).to(getattr(torch, precision))
        torch.set_float32_matmul_precision("high")  # TF32, in which cuDNN convolves float32 by default
        found = page.rounds(lambda left=left, right=right: left @ right, 2 * side**3)  # type: ignore[misc]
        torch.set_float32_matmul_precision("highest")
        page.rates["matrix"][precision] = statistics.median(found)
        how = "float32 (TF32 where there is)" if precision == "float32" else precision
        page.row(f"product of two {side} x {side} matrices, {how}", spread([x / 1e12 for x in found], 2), "TFLOP/s")
    source = torch.empty(1 << (20 if page.thin else 30), dtype=torch.uint8, device=page.device)
    target = torch.empty_like(source)
    copied = page.rounds(lambda: target.copy_(source), 2 * source.nbytes)
    page.rates["bytes"] = statistics.median(copied)
    page.row("a copy in memory, bytes read and written", spread([x / 1e9 for x in copied]), "GB/s")
    small = torch.zeros(1, device=page.device)
    launched = page.rounds(lambda: [small.add_(1) for _ in range(1000)], 1000)
    page.rates["launches"] = statistics.median(launched)
    page.row("operators on one number, one after the other", spread([x / 1e3 for x in launched]), "1,000/s")


@dataclass
class Step:
    """A training step that is ready to run: on a batch that is there already."""

    run: Callable[[], object]
    work: float
    state: Callable[[], dict[str, Any]]


@contextmanager
def ready(page: Page, batch: int, change: dict[str, Any], graph: bool) -> Iterator[Step]:
    """Yield a step by the recipe with `change`; `graph`: replayed as one CUDA graph."""
    model = page.model()
    images = torch.rand(batch, 3, page.side, page.side, device=page.device) * 255
    labels = torch.randint(0, CLASSES, (batch, page.side, page.side), device=page.device, dtype=torch.uint8)
    work = 3 * operations(model.eval(), images[:1]) * batch
    recipe = Recipe(1, batch_size=batch, crop=page.side, input_scale=1.0, **change)
    optimiser = make_optimiser(model, recipe)
    model.train()
    with wrap_for_training(model, recipe) as network:
        step = step_of(network, optimiser, images, labels, wait=False)

        def state() -> dict[str, Any]:
            return {"model": model.state_dict(), "optimiser": optimiser.state_dict()}

        yield Step(captured(step) if graph else step, work, state)


def captured(step: Callable[[], None]) -> Callable[[], None]:
    """Return `step` as one CUDA graph: the host launches it as a whole."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(3):  # momentum, plans of cuDNN
            step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def training(page: Page, batches: Sequence[int] = (1, 8, 16, 32), only: Sequence[str] = ()) -> None:
    """Measure training steps: every variant at every batch size."""
    page.table("batch", "variant", "images/s (least to most)", "share", "peak memory, GB")
    rows = page.rates.setdefault("training", [])
    for name, (change, graph) in VARIANTS.items():
        if name not in only:
            continue
        for batch in (1, 2) if page.thin else batches:
            page.forget()
            try:
                with ready(page, batch, change, graph) as step:
                    found = page.rounds(step.run, batch)
            except (RuntimeError, AssertionError) as error:  # of memory, of a capture, of a compiler
                page.row(str(batch), name, f"failed: {one_line(error)}", "", "")
                continue
            precision = str(change.get("precision", "float32"))
            rate = statistics.median(found)
            floor = page.rates.get("matrix", {}).get(precision)
            share = f"{step.work / batch * rate / floor:.0%}" if floor else ""
            page.row(str(batch), name, spread(found), share, page.memory())
            plain = not (graph or change.get("compile"))
            row = {"batch": batch, "variant": name, "precision": precision, "plain": plain, "images_per_second": rate}
            rows.append(row)


def plain_training(page: Page) -> None:
    """Measure eager training steps."""
    training(page, only=list(VARIANTS)[:4])


def graph_training(page: Page) -> None:
    """Measure training steps as one CUDA graph each."""
    if page.device.type != "cuda":
        page.lines += ["", "No CUDA device: not measured."]
        return
    training(page, only=list(VARIANTS)[4:6])


def compiled_training(page: Page) -> None:
    """Measure compiled training steps, at the batch sizes where they may pay."""
    if page.thin:
        page.lines += ["", "Not compiled for a thin network."]
        return
    training(page, (16, 1), only=list(VARIANTS)[6:])


def where(page: Page) -> None:
    """Find where the time of a step goes: share of the time in which the device computes, and the dearest kernels."""
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if page.device.type == "cuda" else [])
    which = "self_device_time_total" if page.device.type == "cuda" else "self_cpu_time_total"
    for batch in (2,) if page.thin else (1, 16):
        page.forget()
        with ready(page, batch, BEST, False) as step:
            for _ in range(3):
                step.run()
            page.wait()
            begin = time.perf_counter()
            step.run()
            page.wait()
            took = time.perf_counter() - begin
            with profile(activities=activities) as profiled:
                step.run()
                page.wait()
        events = [row for row in profiled.key_averages() if getattr(row, which) > 0]
        if page.device.type == "cuda":  # kernels only: operators have the time of theirs as well
            events = [row for row in events if row.device_type == torch.autograd.DeviceType.CUDA]
        total = sum(getattr(row, which) for row in events) or 1
        busy, count = min(1.0, total / 1e6 / took), sum(row.count for row in events)
        page.lines += ["", f"Batch {batch}, channels last, bfloat16: {1e3 * took:.1f} ms a step,"]
        page.lines += [f"in {busy:.0%} of which the device computes; {count:,} kernels."]
        page.table("kernel", "calls", "share")
        for row in sorted(events, key=lambda row: -getattr(row, which))[:10]:
            page.row(f"`{row.key[:70].replace('|', '/')}`", str(row.count), f"{getattr(row, which) / total:.1%}")


def new_sizes(page: Page) -> None:
    """Measure what an image costs whose size was not seen before: cuDNN has to plan its convolutions first."""
    height, width, classes, edges, scales = EVALUATED["VOC"]
    if page.thin:
        height, width = height // 8, width // 8
    page.forget()
    net = optimise_for_inference(page.model(classes).eval(), fast=True)
    rng = np.random.default_rng(0)
    # No two have an input in common at any scale.
    widths = [width - 8 * index for index in range(3 if page.thin else 13)]
    images = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for width in widths]
    took: dict[str, list[float]] = {"new": [], "seen": []}
    for kind in took:
        for image in images:
            begin = time.perf_counter()
            predict_many(net, [image], {"it": Protocol(scales)}, Resizing(1.2, None if page.thin else edges))
            page.wait()
            took[kind].append(1e3 * (time.perf_counter() - begin))
    page.table("VOC, float32, an image of a size that is", "images", "ms (least to most)")
    for kind, found in took.items():
        # The first image of all pays for more than its size.
        page.row(kind, str(len(found) - 1), spread(found[1:]))
        page.rates.setdefault("size_ms", {})[kind] = statistics.median(found[1:])


def evaluation(page: Page) -> None:
    """Measure multi-scale evaluation, from images in memory to the counts of the confusion matrix."""
    new_sizes(page)
    page.table("images", "scales", "variant", "images/s (least to most)", "share", "peak memory, GB")
    rows = page.rates.setdefault("evaluation", [])
    rng = np.random.default_rng(0)
    for title, (height, width, classes, edges, scales) in EVALUATED.items():
        if page.thin:
            height, width = height // 8, width // 8
        model = page.model(classes).eval()
        resizing = Resizing(1.2, None if page.thin else edges)
        images = [rng.integers(0, 256, (height, width, 3), dtype=np.uint8) for _ in range(2 if page.thin else 4)]
        truth = rng.integers(0, classes, (height, width), dtype=np.uint8)
        factor = resizing.factor(height, width)
        work = 0.0
        with torch.no_grad():
            for scale in scales:
                size = [max(32, round(side * factor * scale)) for side in (height, width)]
                work += operations(model, torch.zeros(1, 3, *size, device=page.device))
        kinds: tuple[Precision, ...] = ("float32",) if page.thin else ("float32", "bfloat16")
        for precision in kinds:
            page.forget()
            net = optimise_for_inference(model, fast=True, precision=precision)

            found = page.rounds(counting(net, images, truth, Protocol(scales), resizing, precision), len(images))
            rate, floor = statistics.median(found), page.rates.get("matrix", {}).get(precision)
            share = f"{work * rate / floor:.0%}" if floor else ""
            told = f"{title}, {height} x {width}"
            page.row(told, " ".join(map(str, scales)), f"fast, {precision}", spread(found), share, page.memory())
            rows.append({"images": title, "precision": precision, "images_per_second": rate})


def counting(
    net: nn.Module,
    images: Sequence[Array],
    truth: Array,
    protocol: Protocol,
    resizing: Resizing,
    precision: Precision,
) -> Callable[[], None]:
    """Return what labels every image and counts its pixels; all have the labels `truth`."""
    device = next(net.parameters()).device

    def run() -> None:
        total = Confusion(int(truth.max()) + 1, device)
        for image in images:
            (answers,) = predict_many(net, [image], {"it": protocol}, resizing, precision=precision)
            total.add(upload(truth, device), answers["it"])
        total.counts()

    return run


def images_of(page: Page) -> tuple[Split, str]:
    """Return the images to train on: those of --split, or noise."""
    if page.split is not None:
        split = Split(page.split)
        return split, f"{len(split):,} images of {page.split.name} ({split.schema.dataset})"
    rng = np.random.default_rng(0)
    path, count = page.folder / "noise.arrow", 8 if page.thin else 64
    size = (96, 128) if page.thin else (375, 500)
    palette = tuple((index, index, index) for index in range(CLASSES))
    names = tuple(f"class {index}" for index in range(CLASSES))
    with write_split(path, Schema("noise", "train", names, palette)) as writer:
        for index in range(count):
            label = np.repeat(rng.integers(0, CLASSES, (1, size[1]), dtype=np.uint8), size[0], 0)
            writer.add(f"noise{index}", rng.integers(0, 256, (*size, 3), dtype=np.uint8), label)
    return Split(path), f"{count} images of noise, for want of --split"


def loader(page: Page) -> None:
    """Measure how many crops a second the input path gives, beside what the fastest training takes."""
    split, told = images_of(page)
    crop, batch = (53, 2) if page.thin else (400, 16)
    crops = crops_of(split, Recipe(1, crop=crop), 0)
    first, steps = 0, 3 if page.thin else 60

    def run() -> None:
        nonlocal first
        with Loader(crops, batch, crop, 1.2, page.device, start=first, stop=first + steps) as batches:
            for _ in batches:
                pass
        first += steps

    found = page.rounds(run, batch * steps)
    page.rates["crops_per_second"] = statistics.median(found)
    fastest = max((row["images_per_second"] for row in page.rates.get("training", [])), default=0.0)
    page.lines += ["", f"{told}; batches of {batch}, crops of {crop} enlarged by 1.2: {spread(found, 0)} crops/s"]
    if fastest:
        page.lines[-1] += f", {statistics.median(found) / fastest:.1f} times what the fastest training step above takes"
    page.lines[-1] += "."


def real_training(page: Page) -> None:
    """Train for a few steps, loader and checkpoints included; twice, to compare the bytes. Then a checkpoint's cost."""
    split, told = images_of(page)
    batch, steps = (2, 4) if page.thin else (16, 60)
    recipe = Recipe(
        steps=steps,
        batch_size=batch,
        crop=53 if page.thin else 400,
        lr=0.01,
        backbone_lr=1.0,  # nothing is pretrained here
        init="scaled",
        schedule="cosine",
        warmup=steps // 4,
        grad_clip=1.0,
        log_every=max(1, steps // 6),
        precision="auto",
        channels_last=True,
    )
    page.lines += ["", f"{told}; {steps} steps of {batch} crops, from random weights:"]
    page.table("training", "images/s", "loss at its first and last point", "SHA-256 of the weights")
    digests = []
    for kind, change in (("first", {}), ("again", {}), ("batch of 1", {"batch_size": 1})):
        page.forget()
        model, times = page.model(len(split.schema.classes)), list[float]()

        def on_step(progress: Progress, times: list[float] = times) -> None:
            if progress.point is not None:
                times.append(time.perf_counter())

        own = replace(recipe, **change)
        curve = train(model, split, own, 0, page.folder / f"checkpoints {kind}", kind, on_step)
        # From the first point of the curve on: by then everything is warm, and at a point the host waits.
        rate = own.batch_size * (curve[-1].step - curve[0].step) / (times[-1] - times[0])
        state = b"".join(value.cpu().contiguous().numpy().tobytes() for value in model.state_dict().values())
        digests.append(hashlib.sha256(state).hexdigest()[:16])
        page.row(
            f"{kind}, batch {own.batch_size}", f"{rate:.1f}", f"{curve[0].loss:.3f}, {curve[-1].loss:.3f}", digests[-1]
        )
        page.rates.setdefault("whole_training", []).append({"batch": own.batch_size, "images_per_second": rate})
    same = digests[0] == digests[1]
    page.rates["same_bytes"] = same
    page.lines += ["", f"The first two have {'the same' if same else '**other**'} bytes."]
    beside_a_checkpoint(page, batch)


def beside_a_checkpoint(page: Page, batch: int) -> None:
    """Measure what a checkpoint costs the five steps that follow it, and how long it takes until it is on disk."""
    page.forget()
    alone, beside, begun, written = (list[float]() for _ in range(4))
    with ready(page, batch, BEST, False) as step, Store(page.folder / "beside a checkpoint") as store:
        for number in range(2 if page.thin else 3):
            for _ in range(2):
                step.run()
            for saving in (False, True):
                page.wait()
                begin = time.perf_counter()
                if saving:
                    path = store.save(number, step.state)
                    begun.append(time.perf_counter() - begin)
                for _ in range(5):
                    step.run()
                page.wait()
                (beside if saving else alone).append(time.perf_counter() - begin)
            store.wait()
            written.append(time.perf_counter() - begin)
    begins, plain, more, done = (statistics.median(times) for times in (begun, alone, beside, written))
    page.rates["checkpoint"] = {
        "bytes": path.stat().st_size,
        "begun_seconds": begins,
        "alone_seconds": plain,
        "beside_seconds": more,
        "written_seconds": done,
    }
    page.lines += [
        "",
        f"A checkpoint of {path.stat().st_size / 1e6:,.1f} MB, batch {batch}, channels last, bfloat16: the host begins "
        f"it in {1e3 * begins:.1f} ms, the five steps after it take {1e3 * more:.1f} ms where they take "
        f"{1e3 * plain:.1f} without it, on disk it is after {done:.2f} s.",
    ]


def gpu_tests(page: Page) -> None:
    """Run the tests that need a GPU."""
    if page.device.type != "cuda":
        page.lines += ["", "No CUDA device: not run."]
        return
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "--continue-on-collection-errors", "tests/refinenet"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    told = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    page.lines += ["", *(f"    {line[:160]}" for line in told if line.startswith(("FAILED", "ERROR")))]
    page.lines += [f"    {told[-1] if told else 'pytest said nothing'}"]


# In the order of what one would miss most. Seconds that each may take on a GPU; they add up to less than nine minutes.
SECTIONS: dict[str, tuple[str, float, Callable[[Page], None]]] = {
    "floors": ("What bounds everything", 20, floors),
    "training": ("A training step", 120, plain_training),
    "real": ("A short training", 75, real_training),
    "evaluation": ("Multi-scale evaluation", 60, evaluation),
    "where": ("Where the time of a step goes", 25, where),
    "loader": ("The input path", 15, loader),
    "graphs": ("A training step as one CUDA graph", 60, graph_training),
    "tests": ("Tests that need a GPU", 60, gpu_tests),
    "compiled": ("A compiled training step", 90, compiled_training),
}


@contextmanager
def limited(seconds: float) -> Iterator[None]:
    """Raise OutOfTimeError in this block after so many seconds; also where it waits for a process or a compiler."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def one_line(error: BaseException) -> str:
    """Return an error as a line that fits into a table."""
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}".replace("|", "/")


def hardware(page: Page) -> list[str]:
    """Return the page's head: what it was measured on, with what."""
    name = processor()
    if page.device.type == "cuda":
        properties = torch.cuda.get_device_properties(page.device)
        name = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB, on {name}"
    versions = {"Python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    versions |= {"CUDA": str(torch.version.cuda), "cuDNN": str(torch.backends.cudnn.version()), "NumPy": np.__version__}
    network = ", ".join(map(str, page.network.values()))
    page.rates |= {"device": name, "versions": versions, "network": page.network, "side": page.side, "thin": page.thin}
    rounds = "2 rounds" if page.thin else "5 rounds of a third of a second or more"
    return [
        "# On a GPU"
        if page.device.type == "cuda"
        else "# On a CPU, to see that it runs: no number of it means anything",
        "",
        f"{name}; {', '.join(f'{key} {value}' for key, value in versions.items())}.",
        f"RefineNet ({network}), {page.side} x {page.side}, {rounds}, deterministic algorithms.",
        "Written by `benchmarks/gpu.py`.",
    ]


def write(to: Path, head: Sequence[str], page: Page) -> None:
    """Write the page and the rates as they are now."""
    for name, text in (("gpu.md", "\n".join([*head, *page.lines])), ("gpu.json", json.dumps(page.rates, indent=1))):
        with atomic_file(to / name) as part:
            part.write_text(text + "\n", encoding="utf-8")


def main() -> None:
    """Read the command line; run the sections; write the page after each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--thin", action="store_true", help="a thin network and small images: seconds on a CPU")
    parser.add_argument("--split", type=Path, help="prepared images to train on, data/<set>/<split>.arrow")
    parser.add_argument("--to", type=Path, help="folder of gpu.md and gpu.json; on a GPU: benchmarks")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="sections; all")
    given = parser.parse_args()
    device = torch.device(given.device)
    if given.to is None and device.type != "cuda":
        parser.error("--to FOLDER is missing: benchmarks/gpu.md is for numbers of a GPU")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device here; --device cpu --thin --to FOLDER shows that the command runs")
    to = given.to or ROOT / "benchmarks"
    to.mkdir(parents=True, exist_ok=True)
    # torch 2.15 on a CPU with two threads: gradients of such thin convolutions, channels last in bfloat16, corrupt
    # memory.
    reproducible(0, 1 if given.thin else torch.get_num_threads())
    with tempfile.TemporaryDirectory() as folder:
        page = Page(device, given.thin, given.split, Path(folder))
        head = hardware(page)
        for name in given.only:
            title, seconds, run = SECTIONS[name]
            page.lines += ["", f"## {title}"]
            begin = time.perf_counter()
            try:
                with limited(seconds if device.type == "cuda" else 3600):
                    run(page)
            except OutOfTimeError:
                page.lines += ["", f"Out of time: its {seconds:g} seconds were over."]
            except Exception as error:  # whatever it is, the next section is worth its time
                kind = str(error) if isinstance(error, UserError) else one_line(error)
                page.lines += ["", f"Failed: {kind}"]
            write(to, head, page)
            print(f"{name}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
    print((to / "gpu.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
