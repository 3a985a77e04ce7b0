"""Several splits as one, for a phase of a training."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np

from refinenet.data.split import Array, Integers, Sample, Split
from refinenet.errors import UserError


class ConcatSplits:
    """The images of `splits`, one after the other. Raises UserError where their classes differ."""

    def __init__(self, splits: Sequence[Split]) -> None:
        self.schema = splits[0].schema
        for split in splits[1:]:
            if split.schema.classes != self.schema.classes:
                raise UserError(
                    f"{split.path}: has the classes {', '.join(split.schema.classes)}, "
                    f"expected those of {splits[0].path}: {', '.join(self.schema.classes)}"
                )
        self._splits = list(splits)
        self._starts = [0, *accumulate(len(split) for split in splits)]

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        split = bisect_right(self._starts, index) - 1
        return self._splits[split][index - self._starts[split]]

    def present(self) -> list[Array]:
        """Return for each image the classes present in its label, ascending, uint8. Reads no pixel."""
        return [present for split in self._splits for present in split.present()]

    def counts(self) -> Integers:
        """Return pixel counts, N x (classes + 1), of each image and class; last column: void. Reads no pixel."""
        return np.concatenate([split.counts() for split in self._splits])
