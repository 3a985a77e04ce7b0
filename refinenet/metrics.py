"""One confusion matrix over the set, and the scores the paper prints (authors' seg_eva_gen_result_from_con_mat.m)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from refinenet.data import IGNORE_INDEX, Array

Counts = npt.NDArray[np.int64]


def confusion(truth: Array, prediction: Array, classes: int) -> Counts:
    """Pixel counts, truth in rows, prediction in columns: classes x (classes + 1), int64.

    truth, prediction: uint8 of one shape. Pixels whose truth is void (255) do not count. The last column holds
    predictions that are no class: they are false negatives of the truth and nobody's false positives.
    """
    if truth.shape != prediction.shape:
        raise ValueError(f"truth is {truth.shape}, prediction {prediction.shape}")
    # Both bytes in one 16-bit key: void rows fall out by slicing, no boolean mask is made.
    key = (truth.astype(np.uint16) << 8) | prediction
    counts = np.bincount(key.ravel(), minlength=1 << 16).reshape(256, 256)
    if counts[classes:IGNORE_INDEX].any():
        raise ValueError(f"truth has labels from {classes} to 254, expected classes 0 to {classes - 1} or 255")
    table = np.zeros((classes, classes + 1), np.int64)
    table[:, :classes] = counts[:classes, :classes]
    table[:, classes] = counts[:classes, classes:].sum(axis=1)
    return table


@dataclass(frozen=True)
class Scores:
    """Fractions. `iou` has one entry a class, None where the truth has no pixel of it; means are over the others."""

    pixel_accuracy: float
    mean_accuracy: float
    mean_iou: float
    iou: tuple[float | None, ...]


def scores(counts: Counts) -> Scores:
    """Pixel accuracy, mean class accuracy, mean IoU of `confusion`'s counts. Classes absent from the truth are out."""
    truth = counts.sum(axis=1)
    if not truth.any():
        raise ValueError("no labelled pixel to score")
    hits = np.diagonal(counts)
    union = truth + counts[:, : len(counts)].sum(axis=0) - hits
    present = truth > 0
    iou = hits[present] / union[present]
    every: list[float | None] = [None] * len(counts)
    for index, value in zip(np.flatnonzero(present), iou, strict=True):
        every[index] = float(value)
    return Scores(
        pixel_accuracy=float(hits.sum() / truth.sum()),
        mean_accuracy=float((hits[present] / truth[present]).mean()),
        # One after the other, as cityscapesScripts sums: np.mean sums in pairs, another last bit.
        mean_iou=float(np.cumsum(iou)[-1] / len(iou)),
        iou=tuple(every),
    )


def most_frequent(counts: Counts) -> tuple[int, Scores]:
    """The most frequent class of the truth, and what answering it everywhere scores on the same pixels."""
    truth = counts.sum(axis=1)
    winner = int(truth.argmax())
    constant = np.zeros_like(counts)
    constant[:, winner] = truth
    return winner, scores(constant)
