"""Prepared images to batches: splits on disk, which crops a step sees, how they reach the device."""
