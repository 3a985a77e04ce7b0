"""A part of the images of a training, and which part is held out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence

from refinenet.data.crops import Samples
from refinenet.data.split import Array, Integers, Sample


class Subset:
    """The images of `images` at the places `indices`, in this order; nothing is copied."""

    def __init__(self, images: Samples, indices: Sequence[int]) -> None:
        self._images, self._indices = images, list(indices)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> Sample:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._images[self._indices[index]]

    def present(self) -> list[Array]:
        """Return for each image the classes present in its label, ascending, uint8."""
        present = self._images.present()
        return [present[index] for index in self._indices]

    @property
    def counts(self) -> Callable[[], Integers] | None:
        """Return the method `counts` of a split for these images; None where `images` has none."""
        count: Callable[[], Integers] | None = getattr(self._images, "counts", None)
        return None if count is None else lambda: count()[self._indices]


def held_out_names(names: Iterable[str], share: float, seed: int) -> set[str]:
    """Return the names whose hash with `seed`, as a fraction, is below `share`: about that share of them.

    The same on every machine, and no name changes sides because others are added or removed.
    """

    def fraction(name: str) -> float:
        # Not the hash of pipeline/datasets/custom.split: what that has left in train has no low values any more.
        digest = hashlib.sha256(f"held out\0{seed}\0{name}".encode()).digest()
        return int.from_bytes(digest[:8]) / 2**64

    return {name for name in names if fraction(name) < share}
