"""Crops a second: ours, beside torchvision's data set with the same augmentation on the same cores.

    python benchmarks/loader.py                   archives drawn for it
    python benchmarks/loader.py --voc FOLDER      the official archives, whole or cut down

Both see the same images with the same labels: ours as `prepare` leaves them, torchvision's as the JPEG and PNG files
of the official release (SBD's labels written as PNG like VOC's). Of each crop an image, a class in it, a pixel of the
class, one of seven scales and flip are drawn; a window is cut out, enlarged to the network's input (400 x 1.2) and
padded to a batch. torchvision's window, too, is cut first and resized once, as bytes, which is its fast way and spares
it the authors' resizing of whole images; its class is one of those in the image, as it has no list of images by class.

Each round takes each variant once, in turn, so that what else the machine does meets all of them; ratios are of the
same round. Where other work takes its share of the cores, the time that the processes had on them (user and system,
with their workers) says more than the time that went by. Files have been read before: none of this is the disk.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from inference import processor
from PIL import Image
from torch.utils.data import DataLoader
from torchvision import tv_tensors
from torchvision.datasets import VOCSegmentation
from torchvision.transforms.v2 import functional as tv

from pipeline import datasets, synthetic
from pipeline.config.schema import Rendered
from pipeline.formats.archive import Archive
from refinenet.data import augment
from refinenet.data.augment import copy_windows
from refinenet.data.crops import Crops
from refinenet.data.loader import Loader
from refinenet.data.split import Schema, Split
from refinenet.data.writer import write_split
from refinenet.model.blocks import imresize

SCALES = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
CROP, INPUT_SCALE = 400, 1.2
FULL = round(CROP * INPUT_SCALE)


def make(raw: Path, folder: Path) -> Split:
    """Write the training set of the archives in `raw` twice: as a split, and as files for torchvision."""
    dataset = datasets.load("voc")
    voc = folder / "VOCdevkit/VOC2012"
    for name in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (voc / name).mkdir(parents=True)
    archives = [
        (Archive(raw / "VOCtrainval_11-May-2012.tar"), "VOCdevkit/VOC2012/JPEGImages"),
        (Archive(raw / "benchmark.tgz"), "benchmark_RELEASE/dataset/img"),
    ]
    palette = [value for colour in dataset.PALETTE for value in colour]
    with (
        dataset.Reader(raw) as reader,
        write_split(folder / "train.arrow", Schema("voc", "train", dataset.CLASSES, dataset.PALETTE)) as writer,
    ):
        names = reader.names("train")
        for name in names:
            image, label = reader.read("train", name)
            writer.add(name, image, label)
            file = reader.where("train", name)
            archive, place = archives[file.endswith(".mat")]
            (voc / "JPEGImages" / f"{name}.jpg").write_bytes(archive.read(f"{place}/{name}.jpg"))
            png = Image.fromarray(np.asarray(label))
            png.putpalette(palette)
            png.save(voc / "SegmentationClass" / f"{name}.png")
        (voc / "ImageSets/Segmentation/train.txt").write_text("\n".join(names))
    return Split(folder / "train.arrow")


def augmented(image: Image.Image, target: Image.Image) -> tuple[torch.Tensor, torch.Tensor]:
    """An image and its label, both PIL, to 3 x FULL x FULL float32 and FULL x FULL uint8."""
    pixels, label = tv.pil_to_tensor(image), tv_tensors.Mask(tv.pil_to_tensor(target))
    height, width = pixels.shape[1:]
    present = np.flatnonzero(target.histogram()[:255])
    found = np.flatnonzero(np.asarray(target) == present[int(torch.randint(len(present), ()))])
    y, x = divmod(int(found[int(torch.randint(len(found), ()))]), width)
    scale = SCALES[int(torch.randint(len(SCALES), ()))]
    side = round(CROP / scale)
    box = (
        min(max(y - side // 2, 0), max(height - side, 0)),
        min(max(x - side // 2, 0), max(width - side, 0)),
        min(side, height),
        min(side, width),
    )
    size = [min(FULL, round(length * scale * INPUT_SCALE)) for length in box[2:]]
    pixels = tv.resized_crop(pixels, *box, size, tv.InterpolationMode.BICUBIC, antialias=True)
    label = tv.resized_crop(label, *box, size)
    if torch.rand(()) < 0.5:
        pixels, label = tv.horizontal_flip(pixels), tv.horizontal_flip(label)
    padding = [0, 0, FULL - size[1], FULL - size[0]]
    pixels, label = tv.pad(pixels, padding, fill=128), tv.pad(label, padding, fill=255)
    return tv.to_dtype(pixels, torch.float32), label[0].as_subclass(torch.Tensor)


class Ours:
    """The stages of our input path, each for `count` crops in batches."""

    def __init__(self, split: Split, batch: int, device: torch.device) -> None:
        self.crops = Crops(split, CROP, SCALES, flip=True, balanced=True, seed=0)
        self.batch, self.device, self.step = batch, device, 0
        self.map = np.memmap(split.path, np.uint8, "r")
        self.sizes = [window.label.size * 4 for step in range(50) for window in self.crops.draw(step, batch)]

    def steps(self, count: int) -> range:
        """The next steps, so that no round meets the images of the one before."""
        first = self.step
        self.step += count // self.batch
        return range(first, self.step)

    def copy(self, count: int) -> None:
        """As many bytes as `count` windows have, from as many places in the file."""
        rng = np.random.default_rng(count)
        target = np.empty(max(self.sizes), np.uint8)
        for place, size in zip(
            rng.integers(len(self.map) - max(self.sizes), size=count), np.resize(self.sizes, count), strict=True
        ):
            np.copyto(target[:size], self.map[place : place + size])

    def draw(self, count: int) -> None:
        """Draws only."""
        for step in self.steps(count):
            self.crops.draw(step, self.batch)

    def bytes(self, count: int) -> None:
        """What the loader's thread does, in this one."""
        for step in self.steps(count):
            copy_windows(self.crops.draw(step, self.batch), self.device)

    def loader(self, count: int) -> None:
        """Batches on the device."""
        steps = self.steps(count)
        with Loader(
            self.crops, self.batch, CROP, INPUT_SCALE, self.device, start=steps.start, stop=steps.stop
        ) as loader:
            for _ in loader:
                pass
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def floats(self, count: int) -> None:
        """The same with windows resized in float32, as a GPU has them."""
        on_bytes, augment.ON_BYTES = augment.ON_BYTES, ()
        try:
            self.loader(count)
        finally:
            augment.ON_BYTES = on_bytes

    def dense(self, count: int) -> None:
        """The plain way: each window resized by two dense matrices."""
        for step in self.steps(count):
            for window in self.crops.draw(step, self.batch):
                size = [min(FULL, round(side * window.scale * INPUT_SCALE)) for side in window.label.shape]
                image = torch.from_numpy(window.image.copy()).to(self.device).permute(2, 0, 1)[None]
                imresize(image.float(), size)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def loaded(data: Any, batch: int, workers: int) -> Callable[[int], None]:
    """A DataLoader over random images of `data`; its processes stay from call to call."""
    loader: dict[int, DataLoader[Any]] = {}

    def run(count: int) -> None:
        if count not in loader:
            sampler = torch.utils.data.RandomSampler(data, replacement=True, num_samples=count)
            loader[count] = DataLoader(
                data, batch, sampler=sampler, num_workers=workers, persistent_workers=workers > 0
            )
        for _ in loader[count]:
            pass

    return run


def on_cores() -> float:
    """Seconds that this process and its workers have had on the cores so far."""
    total = 0
    for process in (os.getpid(), *(child.pid for child in multiprocessing.active_children())):
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        total += int(fields[11]) + int(fields[12])
    return total / os.sysconf("SC_CLK_TCK")


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Median, least and most."""
    return f"{statistics.median(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def main() -> None:
    """Read the command line and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--voc", type=Path, help="a folder with VOC's and SBD's archives")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--threads", type=int, help="of torch in the main process; default: as many as cores")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--crops", type=int, default=400, help="in a round of what is slow; ten times as many else")
    parser.add_argument("--device", default="cpu")
    given = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.cores])
    torch.set_num_threads(given.threads or given.cores)
    device = torch.device(given.device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        raw = given.voc
        if raw is None:
            raw = folder / "raw"
            raw.mkdir()
            synthetic.render("voc", Rendered(train=200, val=4, height=375, width=500), raw)
        split = make(raw, folder)
        ours = Ours(split, given.batch, device)
        data = VOCSegmentation(folder, "2012", "train", transforms=augmented)
        many, few = 10 * given.crops, given.crops
        variants: list[tuple[str, int, Callable[[int], None]]] = [
            ("floor: as many bytes copied, one thread", many, ours.copy),
            ("ours, drawn only", many, ours.draw),
            (f"ours, bytes on the {device.type}", many, ours.bytes),
            (f"ours, batches on the {device.type}", few, ours.loader),
            (f"the same in float32 on the {device.type}", few, ours.floats),
            ("plain: dense matrices, image only", few, ours.dense),
            (f"torchvision, {given.cores} workers", few, loaded(data, given.batch, given.cores)),
            ("torchvision, no worker", few, loaded(data, given.batch, 0)),
        ]
        rates: list[list[float]] = [[] for _ in variants]
        costs: list[list[float]] = [[] for _ in variants]
        for number in range(given.rounds + 1):
            for rate, cost, (_, count, run) in zip(rates, costs, variants, strict=True):
                before, begin = on_cores(), time.perf_counter()
                run(count)
                if number:  # the first is to warm up
                    rate.append(count / (time.perf_counter() - begin))
                    cost.append(1000 * (on_cores() - before) / count)
        size = statistics.mean(ours.sizes)
        print(
            f"{processor()}, {given.cores} cores, {torch.get_num_threads()} torch threads; "
            f"Python {platform.python_version()}, torch {torch.__version__},\n"
            f"torchvision {torchvision.__version__}, NumPy {np.__version__}, Pillow {Image.__version__}; "
            f"{len(split):,} images, batches of {given.batch}, {given.rounds} rounds of {few} or {many:,} crops;\n"
            f"a window has {size / 1000:.0f} kB, the floor is {size * statistics.median(rates[0]) / 1e9:.1f} GB/s\n"
        )
        print(
            "| what | crops/s (least to most) | times torchvision | ms of a core a crop | torchvision's, times this |"
        )
        print("| :-- | --: | --: | --: | --: |")
        for (what, _, _), rate, cost in zip(variants, rates, costs, strict=True):
            faster = [a / b for a, b in zip(rate, rates[6], strict=True)]
            cheaper = [b / a for a, b in zip(cost, costs[6], strict=True)]
            told = (spread(rate), spread(faster, 1), spread(cost, 3), spread(cheaper, 1))
            print(f"| {what} | {' | '.join(told)} |")


if __name__ == "__main__":
    main()
