"""Label maps for the tests of metrics: made up, and real ones with predictions made of them."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from refinenet.data.split import Array

Pair = tuple[Array, Array]


def squares(rng: np.random.Generator, shape: tuple[int, int], values: list[int], side: int = 8) -> Array:
    """Squares of `side` pixels, each of one of `values`: long runs, as real labels have."""
    small = rng.choice(np.array(values, np.uint8), (-(-shape[0] // side), -(-shape[1] // side)))
    return small.repeat(side, 0).repeat(side, 1)[: shape[0], : shape[1]]


def of_voc(real: Path) -> list[Pair]:
    """Truth of real images, 0 to 20 and void, and a prediction: the truth shifted, void too, and squares over it."""
    rng = np.random.default_rng(0)
    pairs = []
    with tarfile.open(real / "voc" / "VOCtrainval_11-May-2012.tar") as archive:
        names = sorted(n for n in archive.getnames() if "SegmentationClass/" in n and n.endswith(".png"))
        for name in names[::60]:
            file = archive.extractfile(name)
            assert file is not None
            truth = np.array(Image.open(io.BytesIO(file.read())), np.uint8)
            wrong = squares(rng, (truth.shape[0], truth.shape[1]), [*range(40)])
            pairs.append((truth, np.where(wrong < 21, wrong, np.roll(truth, (4, 7), (0, 1)))))
    assert len(pairs) > 10
    return pairs
