"""Prepared images to batches: splits on disk, which crops a step sees, how they reach the device."""

from __future__ import annotations

IGNORE_INDEX = 255  # void: neither trained on nor scored, in every data set
