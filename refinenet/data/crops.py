"""Which crops a training sees: image, position, scale and flip of each (authors' batch_do_data_crop.m).

The authors resize the whole image by the drawn scale and cut the crop from that. Here the window of the crop is cut
first, a view into the memory-mapped split, and resized later (augment.py): the same crop but for a border of the
filter's width, with a fraction of the pixels read. Two other differences: sizes after scaling are not made even, and
crops at random positions (`class_balanced` off) are centred on any pixel, where the authors use a grid of a fifth of
the crop.

Every draw depends on (seed, step) alone, so that training can resume at any step without further state.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from refinenet.config import EPOCH, clamp_short_edge
from refinenet.data.split import Array, Integers, Sample
from refinenet.errors import UserError

IMAGES_PER_CLASS = 100  # of an epoch: images that a class should have (gen_net_opts_model_type1.m)


class Samples(Protocol):
    """What crops are drawn from: a `Split`, `ConcatSplits` or `Subset`.

    A method `counts`, as theirs, makes drawing faster.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...

    def present(self) -> Sequence[Array]: ...


@dataclass(frozen=True)
class Window:
    """A crop before resizing. `image`: h x w x 3, `label`: h x w, both uint8 views; `scale`: to resize it by."""

    name: str
    image: Array
    label: Array
    scale: float
    flip: bool


class Draw(NamedTuple):
    """All that is random in a window. Its centre: pixel number `pixel` of class `klass`; None: of the image."""

    sample: int
    klass: int | None
    pixel: int
    scale: float
    flip: bool


class Crops:
    """Draws the windows of a training step.

    Args:
        split: the training images.
        crop: side of the crop in pixels, after scaling; smaller where the scaled image is.
        scales: one of these is drawn for each crop.
        flip: whether to mirror half of the crops.
        class_balanced: True: the crop is centred on a random pixel of a drawn class (the authors' "type 1"). False: an
            image and a position are drawn ("type 2").
        seed: of all draws.
        short_edge: limits, in pixels, to which each image's short edge is clamped before it is scaled.
        epoch_sampling: with `class_balanced`, how image and class are drawn. True: the authors' way
            (my_epoch_run_config.m): epochs of 1000 to 2000 images, which prefer images not seen yet and take an image
            while one of its classes is in fewer than 100; then any class of the image. False: any class, then an image
            that has it, which teaches all classes in few steps. On 1,440 images of VOC background is at the centre of
            39 % of the authors' crops and of 5 % of these; in ten times as many crops as images, the most frequent
            image comes 15 times there and 355 times here, being one of two that have its class.
        class_sampling_power: without `epoch_sampling`: a class is drawn with a probability proportional to its number
            of images to this power. 0: all classes alike, so that the few images of a rare class come over and over;
            0.5: the square root; 1: as frequent as in the images. Ours.
        square_crops: True: the crop is a square, no larger than the scaled image's short edge rounded down to an even
            number (the authors' way). False: in the longer direction it may exceed the short edge.

    Raises:
        UserError: `class_balanced`, and no label has a class.
    """

    def __init__(
        self,
        split: Samples,
        crop: int,
        scales: Sequence[float],
        flip: bool,
        class_balanced: bool,
        seed: int,
        short_edge: tuple[int, int] | None = None,
        epoch_sampling: bool = False,
        square_crops: bool = False,
        class_sampling_power: float = 0.0,
    ) -> None:
        self._split, self._crop, self._scales = split, crop, tuple(scales)
        self._flip, self._balanced, self._seed, self._short_edge = flip, class_balanced, seed, short_edge
        self._square = square_crops
        count = getattr(split, "counts", None)
        self._counts: Integers | None = None if count is None else count()
        if self._counts is None:
            self._present = list(split.present())
        else:  # the last column is void
            self._present = [np.flatnonzero(row).astype(np.uint8) for row in self._counts[:, :-1]]
        images: dict[int, list[int]] = {}
        for index, present in enumerate(self._present):
            for klass in present.tolist():
                images.setdefault(klass, []).append(index)
        self._images = sorted(images.items())  # class, the images that have it
        if class_balanced and not images:
            raise UserError(f"{getattr(split, 'path', 'training images')}: no label has a class, expected one or more")
        self._up_to: npt.NDArray[np.float64] | None = None  # of the classes, in the order of `_images`
        if class_sampling_power:
            shares = np.array([len(found) for _, found in self._images], np.float64) ** class_sampling_power
            self._up_to = shares.cumsum() / shares.sum()
        self._epochs = Epochs(self._present, seed) if class_balanced and epoch_sampling else None

    def draw(self, step: int, batch: int) -> list[Window]:
        """Return the `batch` windows of step `step`; they depend on the seed and the step only."""
        return [self.window(draw) for draw in self.plan(step, batch)]

    def plan(self, step: int, batch: int) -> list[Draw]:
        """Return the draws of step `step`. Reads no pixel if the split has `counts`."""
        rng = np.random.Generator(np.random.PCG64([self._seed, step]))
        return [self._draw(rng, step * batch + place) for place in range(batch)]

    def _draw(self, rng: np.random.Generator, place: int) -> Draw:
        klass = None
        if self._epochs is not None:
            index = self._epochs[place]
            if present := self._present[index].tolist():
                klass = present[rng.integers(len(present))]
        elif self._balanced:
            klass, found = self._images[self._class(rng)]
            index = found[rng.integers(len(found))]
        else:
            index = int(rng.integers(len(self._split)))
        if klass is None:
            height, width = self._sample(index)[1].shape
            pixel = int(rng.integers(height)) * width + int(rng.integers(width))
        elif self._counts is not None:
            pixel = int(rng.integers(self._counts[index, klass]))
        else:
            pixel = int(rng.integers(np.count_nonzero(self._sample(index)[1] == klass)))
        scale = self._scales[rng.integers(len(self._scales))]
        return Draw(index, klass, pixel, scale, bool(self._flip and rng.integers(2)))

    def _class(self, rng: np.random.Generator) -> int:
        if self._up_to is None:
            return int(rng.integers(len(self._images)))
        return min(int(np.searchsorted(self._up_to, rng.random(), side="right")), len(self._images) - 1)

    def _sample(self, index: int) -> tuple[Sample, Array]:
        sample = self._split[index]
        if sample.label is None:
            raise UserError(f"{sample.name}: no label, expected a training image")
        return sample, sample.label

    def window(self, draw: Draw) -> Window:
        """Cut out a draw. Reads no pixel of the image yet, and of the label those up to the centre."""
        sample, label = self._sample(draw.sample)
        height, width = label.shape
        pixel = draw.pixel
        if draw.klass is not None:
            found = nth_pixel_of_class(label, draw.klass, draw.pixel)
            if found is None:
                raise UserError(f"{sample.name}: label and stored pixel counts differ; run prepare again")
            pixel = found
        y, x = divmod(pixel, width)
        scale = draw.scale * clamp_short_edge(height, width, self._short_edge)
        side = self._crop
        if self._square:
            short = round(min(height, width) * scale)
            side = min(side, max(short - short % 2, 1))
        side = round(side / scale)
        if self._square:
            side = max(min(side, height, width), 1)
        top = min(max(y - side // 2, 0), max(height - side, 0))
        left = min(max(x - side // 2, 0), max(width - side, 0))
        here = (slice(top, top + side), slice(left, left + side))
        return Window(sample.name, sample.image[here], label[here], scale, draw.flip)


def nth_pixel_of_class(label: Array, klass: int, n: int) -> int | None:
    """Return the position, row by row, of pixel number `n` (from 0) of class `klass`; None where there are fewer."""
    flat = label.reshape(-1)
    for start in range(0, flat.size, 1 << 16):
        found = flat[start : start + (1 << 16)] == klass
        count = int(np.count_nonzero(found))
        if n < count:
            return start + int(np.flatnonzero(found)[n])
        n -= count
    return None


class Epochs:
    """The authors' class-balanced epochs (my_epoch_run_config.m) one after the other: place -> image.

    present: the classes of each image. An epoch follows from the one before; an earlier place than the last one
    recomputes from the first epoch, which takes seconds at most.
    """

    def __init__(self, present: Sequence[Array], seed: int) -> None:
        self._present = [one.tolist() for one in present]
        self._seed = seed
        self._lock = threading.Lock()  # the loader's thread draws, and so does code that reports what was drawn
        self._restart()

    def _restart(self) -> None:
        self._epoch, self._start = -1, 0
        self._order: Integers = np.zeros(0, np.int64)
        self._unseen = np.ones(len(self._present), bool)

    def __getitem__(self, place: int) -> int:
        with self._lock:
            if place < self._start:
                self._restart()
            while place >= self._start + len(self._order):
                self._start += len(self._order)
                self._epoch += 1
                # The 1 makes it differ from the draws of the step with this number.
                rng = np.random.Generator(np.random.PCG64([self._seed, self._epoch, 1]))
                self._order = rng.permutation(self._choose(rng))
            return int(self._order[place - self._start])

    def _choose(self, rng: np.random.Generator) -> Integers:
        least, most = EPOCH
        if len(self._present) <= least:
            return np.arange(len(self._present))
        shuffled = rng.permutation(len(self._present))
        unseen = self._unseen[shuffled]
        candidates = np.concatenate([shuffled[unseen], shuffled[~unseen]])
        counts = dict.fromkeys((one for present in self._present for one in present), 0)
        lacking = len(counts)  # classes with too few images so far
        selected = np.zeros(len(self._present), bool)
        for index in candidates.tolist():
            present = self._present[index]
            if any(counts[one] < IMAGES_PER_CLASS for one in present):
                selected[index] = True
                for one in present:
                    counts[one] += 1
                    lacking -= counts[one] == IMAGES_PER_CLASS
                if not lacking:
                    break
        missing = least - int(selected.sum())
        if missing > 0:
            selected[candidates[~selected[candidates]][:missing]] = True
        order = np.flatnonzero(selected)
        if len(order) > most:
            order = rng.permutation(order)[:most]
        self._unseen[order] = False
        if not self._unseen.any():
            self._unseen[:] = True
        return order
