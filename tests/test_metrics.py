"""Scores against counts made in plain Python."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refinenet.metrics import confusion, most_frequent, scores

LABELS = st.lists(st.tuples(st.sampled_from([0, 1, 2, 3, 255]), st.sampled_from([0, 1, 2, 3, 4, 9])), min_size=1)


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
    result = scores(counts)
    present = sorted({t for t, _ in valid})
    iou = {c: sum(t == p == c for t, p in valid) / sum(c in (t, p) for t, p in valid) for c in present}
    recall = {c: sum(t == p == c for t, p in valid) / sum(t == c for t, _ in valid) for c in present}
    assert result.iou == tuple(iou.get(c) for c in range(4))
    assert result.mean_iou == pytest.approx(sum(iou.values()) / len(iou), abs=1e-15)
    assert result.mean_accuracy == pytest.approx(sum(recall.values()) / len(recall), abs=1e-15)
    assert result.pixel_accuracy == sum(t == p for t, p in valid) / len(valid)


def test_baseline_is_the_score_of_a_constant_answer() -> None:
    rng = np.random.default_rng(0)
    truth = rng.choice(np.array([0, 1, 2, 255], np.uint8), (40, 50), p=[0.2, 0.5, 0.2, 0.1])
    counts = confusion(truth, rng.integers(0, 3, truth.shape, dtype=np.uint8), 3)
    winner, baseline = most_frequent(counts)
    assert winner == 1
    assert baseline == scores(confusion(truth, np.full_like(truth, 1), 3))


def test_label_outside_the_classes() -> None:
    with pytest.raises(ValueError, match="labels from 3 to 254"):
        confusion(np.array([[3]], np.uint8), np.array([[0]], np.uint8), 3)
