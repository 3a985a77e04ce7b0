"""Scores from pixel counts, by the paper's rule and by those of two official tools, with bootstrap intervals.

The paper's rule is that of the authors' seg_eva_gen_result_from_con_mat.m: one confusion matrix over the set, void
pixels ignored, means over the classes present in the ground truth.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from refinenet.data import IGNORE_INDEX
from refinenet.data.split import Array

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Counts = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Rule = Literal["paper", "cityscapes", "ade20k"]

PIXELS = 1 << 18  # counted at once, so that intermediate arrays stay in the processor's cache
WEIGHTS = 1 << 20  # image weights of bootstrap draws held at once: 8 MB


def confusion(truth: Array, prediction: Array, classes: int) -> Counts:
    """Count pixels, truth in rows, prediction in columns: classes x (classes + 1), int64.

    truth, prediction: uint8 of one shape; at most 254 classes. Pixels whose truth is void (255) are ignored. The last
    column holds predictions that are no class: false negatives of the true class, false positives of none.
    Raises ValueError where a label of the truth is neither a class nor 255.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth is {truth.shape}, prediction {prediction.shape}")
    if truth.dtype != np.uint8 or prediction.dtype != np.uint8:
        raise ValueError(f"truth is {truth.dtype}, prediction {prediction.dtype}, expected uint8")
    truth, prediction = truth.ravel(), prediction.ravel()
    changes = np.empty(min(PIXELS, truth.size), np.bool_)
    table = np.zeros((classes + 2) * (classes + 1), np.int64)
    for start in range(0, truth.size, PIXELS):
        left, right = truth[start : start + PIXELS], prediction[start : start + PIXELS]
        # Label maps are long runs of one pair of labels. Finding where they end costs a tenth of counting pixels:
        # runs are counted, each with its length, and pixels only where runs are too short to gain from.
        end = changes[: left.size]
        np.not_equal(left[1:], left[:-1], out=end[:-1])
        end[:-1] |= right[1:] != right[:-1]
        end[-1] = True
        if 4 * np.count_nonzero(end) > end.size:
            table += np.bincount(_keys(left, right, classes), minlength=table.size)
        else:
            last = np.flatnonzero(end)
            runs = _keys(left[last], right[last], classes)
            # bincount adds weights as float64, exact up to 2**53.
            table += np.bincount(runs, np.diff(last, prepend=-1), table.size).astype(np.int64)
    return _checked(table.reshape(classes + 2, classes + 1))


def _keys(truth: Array, prediction: Array, classes: int) -> npt.NDArray[np.uint16]:
    """Return row * columns + column of each pixel; rows: void, the classes, other; columns: the classes, other."""
    # np.minimum of two arrays takes a tenth of the time of np.minimum of an array and a number.
    row = np.minimum(truth + np.uint8(1), np.full_like(truth, classes + 1))  # 255 + 1 is 0
    column = np.minimum(prediction, np.full_like(prediction, classes))
    key: npt.NDArray[np.uint16] = row.astype(np.uint16)
    key *= np.uint16(classes + 1)
    key += column.astype(np.uint16)
    return key


def _checked(table: Counts) -> Counts:
    """Return the rows of the classes. Raises ValueError where the last row, of invalid labels, is not empty."""
    classes = len(table) - 2
    if table[-1].any():
        expected = f"expected classes 0 to {classes - 1} or {IGNORE_INDEX}"
        raise ValueError(f"truth has labels from {classes} to {IGNORE_INDEX - 1}, {expected}")
    return table[1:-1]


def confusion_on_device(truth: Tensor, prediction: Tensor, classes: int) -> Tensor:
    """Count pixels of each image: B x (classes + 2) x (classes + 1), int64, on the images' device, without a sync.

    truth, prediction: B x H x W, uint8. Row 0 counts pixels whose truth is void, the last row those whose truth is
    neither void nor a class; checking it here would wait for the device. `Confusion.counts` checks it.
    """
    import torch

    # torch.bincount waits for the device to learn the largest key; scatter_add_ and index_add_ are slow with
    # deterministic algorithms on. Sorting 16-bit keys is exact and repeatable, and the size of its result is known.
    lowest = torch.iinfo(torch.int16).min
    size = (classes + 2) * (classes + 1)
    key = (truth + 1).clamp(max=classes + 1).int() * (classes + 1) + prediction.clamp(max=classes)  # 255 + 1 is 0
    key = (key + lowest).to(torch.int16).flatten(1).sort().values
    bounds = torch.arange(lowest, lowest + size, dtype=torch.int16, device=key.device)
    until = torch.searchsorted(key, bounds.expand(len(key), -1).contiguous(), right=True)
    return until.diff(prepend=until.new_zeros(len(key), 1)).reshape(-1, classes + 2, classes + 1)


class Confusion:
    """The confusion matrix of a set of images, counted on `device`; `add` does not wait for a GPU.

    Also keeps three sums of each class for every image, which `bootstrap` needs: 7 MB for 2,000 images of 150 classes.
    """

    def __init__(self, classes: int, device: torch.device | str = "cpu") -> None:
        self.classes = classes
        self.device = device
        self._on_device = str(device).partition(":")[0] != "cpu"
        self._total: Any = 0  # an array or a tensor from the first image on
        self._images: list[Any] = []  # each B x 3 x classes

    def add(self, truth: Tensor | Array, prediction: Tensor | Array) -> None:
        """Count one image, H x W, or several of one size, B x H x W; uint8, tensors or arrays.

        Raises ValueError where a label of the truth is neither a class nor 255: on a GPU not here, but in `counts`.
        """
        if truth.shape != prediction.shape:
            raise ValueError(f"truth is {tuple(truth.shape)}, prediction {tuple(prediction.shape)}")
        if truth.ndim == 2:
            truth, prediction = truth[None], prediction[None]
        if self._on_device:
            import torch

            # A label of a split is a read-only view, which a tensor may not share: copied if it is an array.
            pair = (x if isinstance(x, torch.Tensor) else torch.tensor(x) for x in (truth, prediction))
            left, right = (x.to(self.device, non_blocking=True) for x in pair)
            tables = confusion_on_device(left, right, self.classes)
            kept = tables[:, 1:-1]
            parts = (kept.diagonal(0, 1, 2), kept.sum(2), kept[:, :, : self.classes].sum(1))
            self._images.append(torch.stack(parts, 1))
            self._total = self._total + tables.sum(0)
        else:
            for left, right in zip(_array(truth), _array(prediction), strict=True):
                table = confusion(left, right, self.classes)
                self._images.append(sums(table)[None])
                self._total = self._total + table

    def counts(self) -> Counts:
        """Return the matrix of all images: classes x (classes + 1), int64, as `confusion`. Waits for the device."""
        total = _checked(_array(self._total)) if self._on_device and self._images else self._total
        return np.zeros((self.classes, self.classes + 1), np.int64) + total

    def per_image(self) -> Counts:
        """Return `sums` of each image in the order added: N x 3 x classes, int64. Waits for the device."""
        if not self._images:
            return np.zeros((0, 3, self.classes), np.int64)
        if self._on_device:
            import torch

            return _array(torch.cat(self._images))
        return np.concatenate(self._images)


def _array(values: Tensor | npt.NDArray[Any]) -> npt.NDArray[Any]:
    return values if isinstance(values, np.ndarray) else values.cpu().numpy()


def sums(counts: Counts) -> Counts:
    """Return what scores need of a confusion matrix: hits, true pixels, predicted pixels; 3 x classes, int64."""
    return np.stack([np.diagonal(counts), counts.sum(axis=1), counts[:, : len(counts)].sum(axis=0)])


@dataclass(frozen=True)
class Scores:
    """Scores as fractions. `iou` has one entry a class, None where the rule leaves it out of the mean."""

    pixel_accuracy: float
    mean_accuracy: float
    mean_iou: float
    iou: tuple[float | None, ...]


def scores(counts: Counts, rule: Rule = "paper") -> Scores:
    """Return the scores of `confusion`'s counts. Raises ValueError without a labelled pixel.

    The rules differ in the IoU of a class that the truth lacks. Both accuracies are the same by all three.

    - paper: left out (authors' seg_eva_gen_result_from_con_mat.m).
    - cityscapes: 0 if predicted on a labelled pixel, else left out (cityscapesScripts, getIouScoreForLabel and
      getScoreAverage in evaluation/evalPixelLevelSemanticLabeling.py).
    - ade20k: always 0, so the mean is over all classes (CSAILVision/sceneparsing, demoEvaluation.m).
    """
    hits, truth, predicted = sums(counts)
    if not truth.any():
        raise ValueError("no labelled pixel to score")
    iou, counted = _iou(hits, truth, predicted, rule)
    return Scores(
        pixel_accuracy=float(hits.sum() / truth.sum()),
        mean_accuracy=float(_mean(hits / np.maximum(truth, 1), truth > 0)),
        mean_iou=float(_mean(iou, counted)),
        iou=tuple(float(value) if counts else None for value, counts in zip(iou, counted, strict=True)),
    )


def _iou(
    hits: npt.NDArray[Any], truth: npt.NDArray[Any], predicted: npt.NDArray[Any], rule: Rule
) -> tuple[Floats, npt.NDArray[np.bool_]]:
    """Return the IoU of each class and whether the mean counts it; all of one shape, ... x classes."""
    if rule not in get_args(Rule):
        raise ValueError(f"no rule {rule!r}, only {', '.join(get_args(Rule))}")
    union = truth + predicted - hits
    if rule == "ade20k":
        # As in demoEvaluation.m, eps avoids 0 / 0; it changes the last bit of a union of one pixel.
        return hits / (union + np.finfo(np.float64).eps), np.ones(union.shape, np.bool_)
    return hits / np.maximum(union, 1), (truth if rule == "paper" else union) > 0


def _mean(values: Floats, counted: npt.NDArray[np.bool_]) -> Floats:
    """Return the mean of the values counted, over the last axis."""
    # Added one after the other, as cityscapesScripts does: np.mean adds in pairs, which changes the last bit.
    total = np.cumsum(np.where(counted, values, 0), axis=-1)[..., -1]
    return np.asarray(total / counted.sum(axis=-1))


def grouped(counts: Counts, groups: Sequence[Sequence[int]]) -> Counts:
    """Merge the counts of groups of classes: groups x (groups + 1). Confusion within a group is a hit.

    groups: the class indices of each group; every class is in one, else ValueError. Scored by the rule "cityscapes"
    this is the IoU of Cityscapes' categories (cityscapesScripts, getIouScoreForCategory).
    """
    classes = len(counts)
    if sorted(index for group in groups for index in group) != list(range(classes)):
        raise ValueError(f"groups {groups}: expected each of the classes 0 to {classes - 1} once")
    member = np.zeros((len(groups) + 1, classes + 1), np.int64)
    for row, group in enumerate((*groups, (classes,))):
        member[row, list(group)] = 1
    return np.asarray(member[:-1, :-1] @ counts @ member.T)


def alternatives(counts: Counts, rule: Rule, groups: Mapping[str, Sequence[int]] | None = None) -> dict[str, float]:
    """Return the scores that a data set's official tool reports, by name.

    cityscapes: "mean_iou" and, with `groups` (the categories), "category_iou", their mean. ade20k: "pixel_accuracy",
    "mean_iou" and the mean of the two, "score", by which entries are ranked (README of CSAILVision/sceneparsing).
    """
    result = scores(counts, rule)
    values = {"mean_iou": result.mean_iou}
    if groups is not None:
        values["category_iou"] = scores(grouped(counts, list(groups.values())), rule).mean_iou
    if rule == "ade20k":
        values["pixel_accuracy"] = result.pixel_accuracy
        values["score"] = (result.pixel_accuracy + result.mean_iou) / 2
    return values


def most_frequent(counts: Counts) -> tuple[int, Scores]:
    """Return the most frequent class of the truth, and the scores of predicting it for every pixel."""
    truth = counts.sum(axis=1)
    winner = int(truth.argmax())
    constant = np.zeros_like(counts)
    constant[:, winner] = truth
    return winner, scores(constant)


@dataclass(frozen=True)
class Interval:
    """(low, high) of each score, fractions."""

    mean_iou: tuple[float, float]
    pixel_accuracy: tuple[float, float]


def bootstrap(
    per_image: Counts, draws: int = 1000, seed: int = 0, level: float = 0.95, rule: Rule = "paper"
) -> Interval:
    """Return bootstrap intervals of the scores over images; same `seed`, same result, in any order of images.

    A draw is N of the images, with replacement, scored by `rule` from its summed counts, as the set was: a class whose
    images were not drawn is left out of the paper's mean. Images without a labelled pixel are never drawn. The ends are
    quantiles of the draws, shifted so that their mean is the score: draws without the rare classes, mostly the hard
    ones, score too high.

    The interval covers the choice of validation images. It does not cover training variance (another seed), nor images
    that belong together, such as frames of one video; for a class present in a handful of images it is too narrow. By
    the rule "ade20k" a class that the set lacks is 0 in every draw.

    Args:
        per_image: N x 3 x classes, from `Confusion.per_image`.
        draws: number of bootstrap samples.
        seed: of the draws.
        level: probability that the interval covers, such as 0.95.
        rule: how a draw is scored.

    Raises:
        ValueError: no image has a labelled pixel.
    """
    images = sorted((image for image in per_image if image[1].any()), key=lambda image: image.tobytes())
    if not images:
        raise ValueError("no labelled pixel to score")
    count, classes = len(images), per_image.shape[2]
    rng = np.random.default_rng(seed)
    # Sums of whole numbers below 2**53 are exact in float64: the same in any order.
    flat = np.array(images, np.float64).reshape(count, 3 * classes)
    iou, accuracy = np.empty(draws), np.empty(draws)
    step = max(1, WEIGHTS // count)
    for start in range(0, draws, step):
        rows = slice(start, min(start + step, draws))
        some = rows.stop - start
        drawn = rng.integers(count, size=(some, count)) + count * np.arange(some)[:, None]
        weights = np.bincount(drawn.ravel(), minlength=some * count).reshape(some, count).astype(np.float64)
        hits, truth, predicted = (weights @ flat).reshape(some, 3, classes).swapaxes(0, 1)
        iou[rows] = _mean(*_iou(hits, truth, predicted, rule))
        accuracy[rows] = hits.sum(axis=1) / truth.sum(axis=1)
    ends = ((1 - level) / 2, (1 + level) / 2)
    hits, truth, predicted = per_image.sum(axis=0).astype(np.float64)
    score = float(_mean(*_iou(hits, truth, predicted, rule)))
    return Interval(_about(score, iou, ends), _about(float(hits.sum() / truth.sum()), accuracy, ends))


def _about(score: float, drawn: Floats, ends: tuple[float, float]) -> tuple[float, float]:
    """Return quantiles of the draws, shifted so that the draws' mean is the score, within 0 and 1."""
    low, high = np.clip(np.quantile(drawn, ends) - (drawn.mean() - score), 0.0, 1.0)
    return float(low), float(high)
