"""Counting a confusion matrix: ours, the usual boolean mask with bincount, other libraries, one pass over the bytes.

    python benchmarks/metrics.py --labels data/cityscapes/val.arrow --rounds 15

Every round takes each way once, in turn, over each pair of label maps; ratios are of the medians, the spread is of all
rounds. On a CPU it is one thread and its processor time, which other processes disturb less than the clock; with
`--device cuda` it is the time until the device is done. Each way's counts are compared with ours first.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from inference import processor
from torch import Tensor
from torch.nn import functional as F

from refinenet.data.split import Array, Split
from refinenet.metrics import Confusion, Counts, bootstrap, confusion, confusion_on_device

Maps = dict[str, tuple[Array, Array]]
Way = Callable[[], object]


def regions(classes: int, height: int, width: int) -> tuple[Array, Array]:
    """Smooth regions with a void frame, and a prediction that is wrong at their borders and in some of them."""
    rng = torch.Generator().manual_seed(0)
    fields = torch.randn(2, classes, height // 128, width // 128, generator=rng)
    truth = torch.zeros(height, width)
    best = torch.full((2, height, width), -torch.inf)
    label = torch.zeros(2, height, width, dtype=torch.uint8)
    for index in range(classes):  # one class at a time: all of them would be hundreds of MB
        sure, other = F.interpolate(fields[:, index, None], (height, width), mode="bicubic")[:, 0]
        value = torch.stack((sure, sure + other / 3))
        label[value > best] = index
        best = torch.maximum(best, value)
    truth, prediction = label.numpy()
    truth[: height // 100], truth[-height // 20 :] = 255, 255
    return truth, prediction


def of_split(path: Path, classes: int, height: int, width: int) -> tuple[Array, Array]:
    """The labels of a split side by side until they fill the map, and the same shifted by some pixels."""
    truth = np.zeros((height, width), np.uint8)
    labels = (sample.label for _ in range(1000) for sample in Split(path) if sample.label is not None)
    y = 0
    while y < height:
        x = tallest = 0
        while x < width:
            label = next(labels)[: height - y, : width - x]
            truth[y : y + label.shape[0], x : x + label.shape[1]] = np.where(label == 255, 255, label % classes)
            x, tallest = x + label.shape[1], max(tallest, label.shape[0])
        y += tallest
    shifted = np.roll(truth, (4, 7), (0, 1))
    return truth, np.where(shifted == 255, 0, shifted).astype(np.uint8)


def noise(classes: int, height: int, width: int) -> tuple[Array, Array]:
    """No two pixels alike: the worst case, and no label map."""
    rng = np.random.default_rng(0)
    values = np.array([*range(classes), 255], np.uint8)
    return rng.choice(values, (height, width)), rng.integers(0, classes, (height, width), np.uint8)


def usual(truth: Array, prediction: Array, classes: int) -> npt.NDArray[np.int64]:
    """What most repositories have."""
    mask = (truth >= 0) & (truth < classes)
    key = classes * truth[mask].astype(int) + prediction[mask]
    return np.bincount(key, minlength=classes**2).reshape(classes, classes)


def usual_torch(truth: Tensor, prediction: Tensor, classes: int) -> Tensor:
    """The same on a device."""
    mask = (truth >= 0) & (truth < classes)
    key = classes * truth[mask].long() + prediction[mask]
    return torch.bincount(key, minlength=classes**2).reshape(classes, classes)


def on_cpu(truth: Array, prediction: Array, classes: int) -> dict[str, Way]:
    """Each way by name; the first is what the others are compared with."""
    left, right = torch.from_numpy(truth), torch.from_numpy(prediction)
    ways: dict[str, Way] = {
        "boolean mask, np.bincount": lambda: usual(truth, prediction, classes),
        "confusion": lambda: confusion(truth, prediction, classes),
        "confusion_on_device": lambda: confusion_on_device(left[None], right[None], classes),
        "boolean mask, torch.bincount": lambda: usual_torch(left, right, classes),
    }
    add_torchmetrics(ways, left, right, classes)
    try:
        from sklearn.metrics import confusion_matrix  # type: ignore[import-untyped]

        mask = truth != 255
        ways["scikit-learn"] = lambda: confusion_matrix(truth[mask], prediction[mask], labels=range(classes))
    except ModuleNotFoundError:
        pass
    copies = np.empty((2, *truth.shape), np.uint8)
    ways["floor: a copy of both maps"] = lambda: [np.stack((truth, prediction), out=copies)]
    return ways


def on_cuda(truth: Array, prediction: Array, classes: int) -> dict[str, Way]:
    """As `on_cpu`; the maps lie on the device."""
    left, right = torch.from_numpy(truth).cuda(), torch.from_numpy(prediction).cuda()
    copies = torch.empty_like(left), torch.empty_like(left)
    ways: dict[str, Way] = {
        "boolean mask, torch.bincount": lambda: usual_torch(left, right, classes),
        "confusion_on_device": lambda: confusion_on_device(left[None], right[None], classes),
        "Confusion.add": lambda: Confusion(classes, "cuda").add(left, right),
    }
    add_torchmetrics(ways, left, right, classes)
    ways["floor: a copy of both maps"] = lambda: (copies[0].copy_(left), copies[1].copy_(right))
    return ways


def add_torchmetrics(ways: dict[str, Way], truth: Tensor, prediction: Tensor, classes: int) -> None:
    try:
        from torchmetrics.functional.classification import multiclass_confusion_matrix as count
    except ModuleNotFoundError:
        return
    ways["torchmetrics"] = lambda: count(
        prediction.long(), truth.long(), classes, ignore_index=255, validate_args=False
    )


def check(result: object, expected: Counts) -> None:
    """The counts of the classes among themselves, however they are laid out."""
    if isinstance(result, list | tuple | None):  # the floor, and what keeps its counts
        return
    table = result.cpu().numpy() if isinstance(result, Tensor) else np.asarray(result)
    classes = len(expected)
    table = table[0, 1:-1] if table.ndim == 3 else table
    np.testing.assert_array_equal(table[:, :classes], expected[:, :classes])


def milliseconds(way: Way, cuda: bool) -> float:
    if cuda:
        torch.cuda.synchronize()
    clock = time.perf_counter if cuda else time.thread_time
    start = clock()
    way()
    if cuda:
        torch.cuda.synchronize()
    return 1e3 * (clock() - start)


def spread(values: list[float]) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def run_ends(truth: Array, prediction: Array) -> float:
    """Share of pixels that differ from the next."""
    return float(np.mean((np.diff(truth.ravel()) != 0) | (np.diff(prediction.ravel()) != 0)))


def libraries() -> str:
    names = []
    for name in ("numpy", "torch", "torchmetrics", "scikit-learn"):
        try:
            names.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(names)


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--size", type=int, nargs=2, default=(1024, 2048), metavar=("HEIGHT", "WIDTH"))
    parser.add_argument("--classes", type=int, default=19)
    parser.add_argument("--labels", type=Path, help="a prepared split, such as data/cityscapes/val.arrow")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    choice = parser.parse_args()
    torch.set_num_threads(1)
    cuda = choice.device == "cuda"
    size = (choice.classes, *choice.size)
    maps: Maps = {"made-up regions": regions(*size)}
    if choice.labels:
        maps["labels of the split"] = of_split(choice.labels, *size)
    maps["noise"] = noise(*size)

    times: dict[str, dict[str, list[float]]] = {}
    ways = {name: (on_cuda if cuda else on_cpu)(*pair, choice.classes) for name, pair in maps.items()}
    for name, pair in maps.items():
        expected = confusion(*pair, choice.classes)
        for way in ways[name].values():
            check(way(), expected)
    for _ in range(choice.rounds):
        for name, several in ways.items():
            for label, way in several.items():
                times.setdefault(label, {}).setdefault(name, []).append(milliseconds(way, cuda))

    where = torch.cuda.get_device_name() if cuda else f"{processor()}, 1 thread"
    print(f"{where}; {libraries()}; {choice.rounds} rounds\n")
    print(f"{choice.size[0]} x {choice.size[1]} pixels, {choice.classes} classes and void; milliseconds")
    ends = ", ".join(f"{name} {run_ends(*pair):.1%}" for name, pair in maps.items())
    print(f"Pixels where a run of equal pairs ends: {ends}.\n")
    print("| way | " + " | ".join(f"{name} (least to most) | times usual" for name in maps) + " |")
    print("| :-- " + "| --: " * (2 * len(maps)) + "|")
    base = {name: statistics.median(values) for name, values in next(iter(times.values())).items()}
    for label, values in times.items():
        cells = [f"{spread(values[name])} | {base[name] / statistics.median(values[name]):.2f}" for name in maps]
        print(f"| {label} | {' | '.join(cells)} |")

    rng = np.random.default_rng(0)
    truth = rng.integers(0, 5000, (2000, 150))
    per_image = np.stack([truth // 2, truth, truth], axis=1)
    taken = [milliseconds(lambda: bootstrap(per_image), False) for _ in range(min(choice.rounds, 5))]
    print(
        f"\n`bootstrap`, 1,000 draws of 2,000 images of 150 classes: {spread(taken)} ms, n = {len(taken)}, on the CPU"
    )


if __name__ == "__main__":
    main()
