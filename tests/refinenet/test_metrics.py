"""Counts and scores against counts made in plain Python and NumPy; intervals against a plain loop."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from label_maps import of_voc, squares

from refinenet import metrics
from refinenet.data.split import Array
from refinenet.metrics import (
    Confusion,
    Counts,
    Rule,
    bootstrap,
    confusion,
    confusion_on_device,
    most_frequent,
    scores,
    sums,
)

LABELS = st.lists(st.tuples(st.sampled_from([0, 1, 2, 3, 255]), st.sampled_from([0, 1, 2, 3, 4, 9])), min_size=1)


def plain(truth: Array, prediction: Array, classes: int) -> Counts:
    """Pixel by pixel, with NumPy."""
    table = np.zeros((classes, classes + 1), np.int64)
    labelled = truth != 255
    np.add.at(table, (truth[labelled].astype(int), np.minimum(prediction[labelled], classes).astype(int)), 1)
    return table


@settings(deadline=None, max_examples=200)
@given(LABELS)
def test_scores_equal_a_plain_count(pairs: list[tuple[int, int]]) -> None:
    truth = np.array([[t for t, _ in pairs]], np.uint8)
    prediction = np.array([[p for _, p in pairs]], np.uint8)
    counts = confusion(truth, prediction, 4)
    valid = [(t, p) for t, p in pairs if t != 255]
    assert counts.sum() == len(valid)
    if not valid:
        with pytest.raises(ValueError, match="no labelled pixel"):
            scores(counts)
        return
    present = sorted({t for t, _ in valid})
    either = sorted({c for pair in valid for c in pair if c < 4})
    iou = {c: sum(t == p == c for t, p in valid) / sum(c in (t, p) for t, p in valid) for c in either}
    recall = [sum(t == p == c for t, p in valid) / sum(t == c for t, _ in valid) for c in present]
    means = {"paper": present, "cityscapes": either, "ade20k": [0, 1, 2, 3]}
    for rule in get_args(Rule):
        result = scores(counts, rule)
        expected = {c: iou.get(c, 0.0) for c in means[rule]}
        assert result.iou == pytest.approx([expected.get(c) for c in range(4)], abs=1e-15)
        assert result.mean_iou == pytest.approx(sum(expected.values()) / len(expected), abs=1e-15)
        assert result.mean_accuracy == pytest.approx(sum(recall) / len(present), abs=1e-15)
        assert result.pixel_accuracy == sum(t == p for t, p in valid) / len(valid)


@pytest.mark.parametrize("side", [1, 2, 16])
@pytest.mark.parametrize("size", [0, 1, 2, 999, 1000, 1001, 3003])
def test_counts_in_runs_and_in_pixels(size: int, side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "PIXELS", 1000)
    rng = np.random.default_rng(size)
    for classes in (1, 19, 254):
        truth = squares(rng, (1, size), [*range(classes), 255], side)
        prediction = squares(rng, (1, size), list(range(256)), side)
        np.testing.assert_array_equal(confusion(truth, prediction, classes), plain(truth, prediction, classes))


def test_counts_of_views_and_of_real_labels(real: Path) -> None:
    for truth, prediction in of_voc(real):
        counts = confusion(truth, prediction, 21)
        np.testing.assert_array_equal(counts, plain(truth, prediction, 21))
        np.testing.assert_array_equal(counts, confusion(truth.T, prediction.T, 21))


def test_what_cannot_be_counted() -> None:
    one, two = np.zeros((2, 2), np.uint8), np.zeros((4, 1), np.uint8)
    with pytest.raises(ValueError, match=r"truth is \(2, 2\), prediction \(4, 1\)"):
        confusion(one, two, 3)
    with pytest.raises(ValueError, match="prediction int64, expected uint8"):
        confusion(one, one.astype(np.int64), 3)
    for value in (3, 254):
        with pytest.raises(ValueError, match="labels from 3 to 254, expected classes 0 to 2 or 255"):
            confusion(np.full((2, 2), value, np.uint8), one, 3)
    with pytest.raises(ValueError, match="no rule 'voc'"):
        scores(confusion(one, one, 3), "voc")  # type: ignore[arg-type]


def test_baseline_is_the_score_of_a_constant_answer() -> None:
    rng = np.random.default_rng(0)
    truth = rng.choice(np.array([0, 1, 2, 255], np.uint8), (40, 50), p=[0.2, 0.5, 0.2, 0.1])
    counts = confusion(truth, rng.integers(0, 3, truth.shape, dtype=np.uint8), 3)
    winner, baseline = most_frequent(counts)
    assert winner == 1
    assert baseline == scores(confusion(truth, np.full_like(truth, 1), 3))


# On a device, as far as a CPU shows it; with a GPU, on that.


@pytest.mark.parametrize("classes", [1, 19, 150, 254])
def test_counts_on_a_device(classes: int) -> None:
    rng = np.random.default_rng(classes)
    truth = rng.choice(np.array([*range(classes), 255], np.uint8), (3, 40, 50))
    prediction = rng.integers(0, 256, truth.shape, np.uint8)
    tables = confusion_on_device(torch.from_numpy(truth), torch.from_numpy(prediction), classes)
    assert (tables.shape, tables.dtype) == ((3, classes + 2, classes + 1), torch.int64)
    for table, left, right in zip(tables.numpy(), truth, prediction, strict=True):
        np.testing.assert_array_equal(table[1:-1], plain(left, right, classes))
        assert table[0].sum() == np.count_nonzero(left == 255)
        assert not table[-1].any()


def check_set(device: str, on_device: bool) -> None:
    """Images singly and in batches, arrays and tensors: the same counts as of the images one by one."""
    rng = np.random.default_rng(0)
    total = Confusion(5, device)
    assert not total.counts().any()
    assert total.per_image().shape == (0, 3, 5)
    total._on_device = on_device
    expected = []
    for shape in ((4, 6), (2, 4, 6), (3, 3, 9)):
        truth = rng.choice(np.array([0, 1, 2, 3, 4, 255], np.uint8), shape)
        prediction = rng.integers(0, 7, shape, np.uint8)
        images = (pixels.reshape(-1, *shape[-2:]) for pixels in (truth, prediction))
        expected += [plain(left, right, 5) for left, right in zip(*images, strict=True)]
        total.add(truth, torch.from_numpy(prediction).to(device))
    np.testing.assert_array_equal(total.counts(), sum(expected))
    np.testing.assert_array_equal(total.per_image(), [sums(table) for table in expected])
    assert total.counts().dtype == total.per_image().dtype == np.int64
    with pytest.raises(ValueError, match=r"truth is \(4, 6\), prediction \(6, 4\)"):
        total.add(np.zeros((4, 6), np.uint8), np.zeros((6, 4), np.uint8))


@pytest.mark.parametrize("on_device", [False, True])
def test_counts_of_a_set(on_device: bool) -> None:
    check_set("cpu", on_device)


@pytest.mark.parametrize("value", [5, 254])
def test_no_label_goes_unnoticed(value: int) -> None:
    truth = np.zeros((2, 4, 6), np.uint8)
    truth[1, 3, 5] = value
    with pytest.raises(ValueError, match="labels from 5 to 254"):
        Confusion(5).add(truth, truth)
    total = Confusion(5)
    total._on_device = True
    total.add(truth, truth)
    total.add(truth[:1], truth[:1])
    with pytest.raises(ValueError, match="labels from 5 to 254"):
        total.counts()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_counts_on_a_gpu_wait_for_nothing() -> None:
    check_set("cuda", True)
    total = Confusion(150, "cuda")
    truth = torch.randint(0, 150, (2, 512, 700), dtype=torch.uint8, device="cuda")
    total.add(truth, truth)  # the first call may load code, and wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        total.add(truth, truth.flip(0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    images = [*truth.cpu().numpy()]
    expected = sum(plain(a, b, 150) for a, b in zip(images * 2, images + images[::-1], strict=True))
    np.testing.assert_array_equal(total.counts(), expected)


# Intervals


def some_images(rng: np.random.Generator, count: int, classes: int = 4) -> Counts:
    """`sums` of images that hold most of the classes, of which 40 to 85 of 100 pixels are hit, in some images more."""
    truth = rng.integers(0, 900, (count, classes)) * (rng.random((count, classes)) < 0.9)
    skill = np.clip(np.linspace(0.4, 0.85, classes) + rng.normal(0, 0.1, (count, 1)), 0, 1)
    tables = np.zeros((count, classes, classes + 1), np.int64)
    for table, row, share in zip(tables, truth, skill, strict=True):
        hits = rng.binomial(row, share)
        table[:, :classes] = np.diag(hits) + np.roll(np.diag(row - hits), 1, axis=1)
    return np.array([sums(table) for table in tables])


def total_of(per_image: Counts, rule: Rule) -> tuple[float, float]:
    """Mean IoU and pixel accuracy of added `sums`, class by class."""
    iou = []
    for hits, truth, predicted in per_image.sum(axis=0).T.tolist():
        union = truth + predicted - hits
        if {"paper": truth, "cityscapes": union, "ade20k": 1}[rule]:
            iou.append(hits / union if union else 0.0)
    return sum(iou) / len(iou), per_image[:, 0].sum() / per_image[:, 1].sum()


@pytest.mark.parametrize("rule", get_args(Rule))
def test_interval_equals_a_loop_over_draws(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    per_image = some_images(np.random.default_rng(1), 7, 5)
    per_image[:, :, 2] = 0  # in no image
    per_image[1:, :, 3] = 0  # in one image: absent from a third of the draws
    per_image[4, 1] = per_image[4, 0] = 0  # all void
    result = bootstrap(per_image, 300, seed=5, level=0.9, rule=rule)
    rng = np.random.default_rng(5)
    labelled = np.array(sorted(np.delete(per_image, 4, axis=0), key=lambda image: image.tobytes()))
    values = np.array([total_of(labelled[rng.integers(6, size=6)], rule) for _ in range(300)])
    low, high = np.quantile(values, [0.05, 0.95], axis=0) - values.mean(axis=0) + total_of(per_image, rule)
    assert (*result.mean_iou, *result.pixel_accuracy) == pytest.approx((low[0], high[0], low[1], high[1]), abs=1e-14)
    assert bootstrap(per_image[::-1], 300, seed=5, level=0.9, rule=rule) == result
    monkeypatch.setattr(metrics, "WEIGHTS", 60)  # ten draws at once
    assert bootstrap(per_image, 300, seed=5, level=0.9, rule=rule) == result
    assert bootstrap(per_image, 300, seed=6, level=0.9, rule=rule) != result
    narrower = bootstrap(per_image, 300, seed=5, level=0.5, rule=rule)
    assert result.mean_iou[0] < narrower.mean_iou[0] < narrower.mean_iou[1] < result.mean_iou[1]


def test_interval_of_one_image_is_its_score() -> None:
    table = np.array([[5, 1, 0], [2, 7, 1]])
    score = scores(table)
    result = bootstrap(sums(table)[None])
    assert result.mean_iou == pytest.approx((score.mean_iou, score.mean_iou), abs=1e-12)
    assert result.pixel_accuracy == pytest.approx((score.pixel_accuracy, score.pixel_accuracy), abs=1e-12)
    with pytest.raises(ValueError, match="no labelled pixel"):
        bootstrap(np.zeros((3, 3, 2), np.int64))


def test_interval_holds_the_score_itself_where_draws_lack_most_classes() -> None:
    """Twelve images of 150 classes, each class in one image, where what is found is large: draws see mostly that."""
    rng = np.random.default_rng(3)
    per_image = np.zeros((12, 3, 150), np.int64)
    for index in range(150):
        truth = int(rng.integers(1, 50))
        per_image[rng.integers(12), :, index] = (0, truth, truth)
    per_image[:, :, 0] = (900, 1000, 1000)
    low, high = bootstrap(per_image).mean_iou
    assert low < total_of(per_image, "paper")[0] < high


def test_interval_holds_the_truth_as_often_as_it_says() -> None:
    """The score of very many images lies in the interval of 80 of them in about 90 of 100 experiments."""
    rng = np.random.default_rng(2)
    mean_iou, accuracy = total_of(some_images(rng, 40_000), "paper")
    experiments = 200
    held = np.zeros(2)
    for _ in range(experiments):
        result = bootstrap(some_images(rng, 80), 200, level=0.9)
        held += (
            result.mean_iou[0] <= mean_iou <= result.mean_iou[1],
            result.pixel_accuracy[0] <= accuracy <= result.pixel_accuracy[1],
        )
    # Three standard deviations of so many experiments are 0.064.
    assert held / experiments == pytest.approx(0.9, abs=0.064)
