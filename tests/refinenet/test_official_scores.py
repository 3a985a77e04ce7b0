"""Scores equal those of the official tools and of torchmetrics: on random and on real labels."""

from __future__ import annotations

import importlib
import io
import math
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from label_maps import Pair, of_voc
from PIL import Image
from torchmetrics.functional.classification import (
    multiclass_accuracy,
    multiclass_confusion_matrix,
    multiclass_jaccard_index,
)

from pipeline.datasets.cityscapes import CLASSES as CITYSCAPES
from pipeline.datasets.cityscapes import LABEL_IDS
from refinenet.data.split import Array
from refinenet.metrics import Counts, alternatives, confusion, grouped, scores

LABELS = st.lists(st.tuples(st.sampled_from([0, 1, 2, 3, 255]), st.sampled_from([0, 1, 2, 3, 4, 9])), min_size=1)


@pytest.fixture(scope="module")
def voc(real: Path) -> list[Pair]:
    return of_voc(real)


# Cityscapes: the official tool itself.

IDS = np.full(256, 0, np.uint8)  # anything else is "unlabeled" there
IDS[list(range(19))] = LABEL_IDS
IDS[19], IDS[20] = 9, 29  # "parking" and "caravan", of the categories flat and vehicle, but not scored
TRAIN_IDS = np.full(256, 255, np.uint8)
TRAIN_IDS[list(LABEL_IDS)] = range(19)


def tool() -> Any:
    return importlib.import_module("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")


def categories() -> dict[str, list[int]]:
    """As the official tool groups the classes."""
    groups: dict[str, list[int]] = {}
    for label in tool().labels:
        if not label.ignoreInEval:
            groups.setdefault(label.category, []).append(label.trainId)
    return groups


def check_cityscapes(counts: Counts, theirs: dict[str, Any]) -> None:
    """Every bit of the class and category scores, absent ones and their means."""
    groups = categories()
    ours = scores(counts, "cityscapes")
    by_group = scores(grouped(counts, list(groups.values())), "cityscapes")
    for names, result, kind in ((CITYSCAPES, ours, "class"), (tuple(groups), by_group, "category")):
        for name, value in zip(names, result.iou, strict=True):
            official = theirs[f"{kind}Scores"][name]
            assert math.isnan(official) if value is None else value == official
    assert alternatives(counts, "cityscapes", groups) == {
        "mean_iou": theirs["averageScoreClasses"],
        "category_iou": theirs["averageScoreCategories"],
    }


def test_cityscapes_on_real_labels(voc: list[Pair], tmp_path: Path) -> None:
    judge = tool()
    files: dict[str, list[str]] = {"truth": [], "prediction": []}
    total = np.zeros((19, 20), np.int64)
    judge.args.quiet, judge.args.JSONOutput, judge.args.evalInstLevelScore = True, False, False
    for index, pair in enumerate(voc):
        for kind, labels in zip(files, pair, strict=True):
            files[kind].append(str(tmp_path / f"{kind}{index}.png"))
            Image.fromarray(IDS[labels]).save(files[kind][-1])
        total += confusion(TRAIN_IDS[IDS[pair[0]]], TRAIN_IDS[IDS[pair[1]]], 19)
        if index in (0, len(voc) - 1):  # after one image many classes are absent
            check_cityscapes(total, judge.evaluateImgLists(files["prediction"], files["truth"], judge.args))
    assert total[:, 19].any()  # void predicted on labelled pixels


@settings(deadline=None, max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 33), st.integers(0, 33)), min_size=1, max_size=60))
def test_cityscapes_on_random_labels(pairs: list[tuple[int, int]]) -> None:
    truth, prediction = np.array(pairs).T
    check_random(truth, prediction)


def check_random(truth: npt.NDArray[np.int64], prediction: npt.NDArray[np.int64]) -> None:
    """Label ids, as the files of Cityscapes hold them."""
    judge = tool()
    matrix = judge.generateMatrix(judge.args)
    np.add.at(matrix, (truth, prediction), 1)
    counts = confusion(TRAIN_IDS[truth], TRAIN_IDS[prediction], 19)
    if not counts.any():
        return
    of_class = {judge.id2label[i].name: judge.getIouScoreForLabel(i, matrix, judge.args) for i in judge.args.evalLabels}
    of_category = {c: judge.getIouScoreForCategory(c, matrix, judge.args) for c in judge.category2labels}
    theirs = {
        "classScores": of_class,
        "categoryScores": of_category,
        "averageScoreClasses": judge.getScoreAverage(of_class, judge.args),
        "averageScoreCategories": judge.getScoreAverage(of_category, judge.args),
    }
    check_cityscapes(counts, theirs)


@pytest.mark.parametrize("seed", range(20))
def test_cityscapes_on_random_images(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth = rng.integers(0, 34, 4000)
    check_random(truth, np.where(rng.random(4000) < rng.random(34)[truth], truth, rng.integers(0, 34, 4000)))


def test_groups_hold_every_class_once() -> None:
    counts = np.ones((3, 4), np.int64)
    for groups in ([[0, 1]], [[0, 1], [1, 2]], [[0, 1, 2, 3]]):
        with pytest.raises(ValueError, match="each of the classes 0 to 2 once"):
            grouped(counts, groups)


# ADE20K: what the scene parsing challenge's kit computes (it is MATLAB): labels 1 to 150, 0 is other; areas of each
# image, added; IoU is intersection / (eps + union), averaged over all 150.


def test_ade20k_on_real_labels(real: Path) -> None:
    areas = np.zeros((2, 150))
    correct = labelled = 0
    counts = np.zeros((150, 151), np.int64)
    with zipfile.ZipFile(real / "ade20k" / "ADEChallengeData2016.zip") as archive:
        names = [n for n in archive.namelist() if "/annotations/" in n and n.endswith(".png")]
        assert len(names) == 3
        for name in names:
            truth = np.array(Image.open(io.BytesIO(archive.read(name))), np.uint8)
            prediction = np.roll(truth, 21, 1)
            prediction[:9] = 150
            if name == names[0]:
                truth[0, 0] = prediction[0, 0] = 147  # a class of one pixel: there eps is in the last bit
            for label in range(1, 151):
                left, right = truth == label, (prediction == label) & (truth > 0)
                areas[:, label - 1] += (left & right).sum(), (left | right).sum()
            correct += ((truth == prediction) & (truth > 0)).sum()
            labelled += (truth > 0).sum()
            counts += confusion(truth - np.uint8(1), prediction - np.uint8(1), 150)  # 0 becomes 255, void
    iou = areas[0] / (np.spacing(1) + areas[1])
    assert areas[1, 146] == 1
    assert np.count_nonzero(areas[1]) < 150
    assert scores(counts, "ade20k").iou == tuple(iou)
    accuracy, mean = correct / labelled, sum(iou) / 150
    assert alternatives(counts, "ade20k") == {
        "pixel_accuracy": accuracy,
        "mean_iou": mean,
        "score": (accuracy + mean) / 2,
    }


# torchmetrics


def check_torchmetrics(truth: Array, prediction: Array, classes: int) -> None:
    """The same counts; scores to the accuracy of their float32. Predictions of void are one class more there."""
    left, right = torch.from_numpy(prediction.clip(max=classes)).long(), torch.from_numpy(truth).long()
    counts = confusion(truth, prediction, classes)
    theirs = multiclass_confusion_matrix(left, right, classes + 1, ignore_index=255)
    np.testing.assert_array_equal(counts, theirs.numpy()[:classes])
    ours = scores(counts, "cityscapes")
    iou = multiclass_jaccard_index(left, right, classes + 1, average="none", ignore_index=255)
    assert [value or 0.0 for value in ours.iou] == pytest.approx(iou.tolist()[:classes], abs=1e-7)
    accuracy = multiclass_accuracy(left, right, classes + 1, average="micro", ignore_index=255)
    assert ours.pixel_accuracy == pytest.approx(accuracy.item(), abs=1e-7)
    if not counts[:, classes].any():  # their mean leaves out what neither has, as the Cityscapes rule
        mean = multiclass_jaccard_index(left, right, classes, average="macro", ignore_index=255)
        assert f"{ours.mean_iou:.6f}" == f"{mean.item():.6f}"


def test_torchmetrics_on_real_labels(voc: list[Pair]) -> None:
    for truth, prediction in voc[:5]:
        check_torchmetrics(truth, prediction, 21)
        check_torchmetrics(truth, np.where(prediction == 255, 0, prediction).astype(np.uint8), 21)


@settings(deadline=None, max_examples=50)
@given(LABELS.filter(lambda pairs: any(truth != 255 for truth, _ in pairs)))
def test_torchmetrics_on_random_labels(pairs: list[tuple[int, int]]) -> None:
    truth, prediction = np.array(pairs, np.uint8).T
    check_torchmetrics(truth, prediction, 4)
