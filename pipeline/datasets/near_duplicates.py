"""Images of val that have nearly the same image in train: frames of one video, crops of one photo, copies.

By difference hashes (imagehash.dhash): of a grey image, made small, whether each pixel is darker than its right
neighbour. Two such images differ in few of these bits. All in whole numbers, so they are the same on every machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from refinenet.data.split import Array

SIDE = 16  # of the small image, pixels: SIDE * SIDE bits
# Bits in which near-duplicates differ at most. Measured on CamVid (docs/how-to/own-data.md).
DISTANCE = 56
_BLOCK = 1 << 22  # comparisons at once, which bounds memory
_EXAMPLES = 3


class Pair(NamedTuple):
    """An image of val, the nearest of train, and the number of bits in which they differ."""

    val: str
    train: str
    distance: int


def fingerprint(image: Array) -> bytes:
    """Return the difference hash of an image (H x W x 3 uint8), SIDE * SIDE bits."""
    import imagehash
    from PIL import Image

    bits = imagehash.dhash(Image.fromarray(image), SIDE).hash
    return np.packbits(bits).tobytes()


def nearest(train: Sequence[bytes], val: Sequence[bytes]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return for each fingerprint of `val` the place of the nearest in `train`, the first of several, and its distance.

    In blocks of bounded memory; 16,000 x 4,000 take a second.
    """
    words = [_words(train), _words(val)]
    places, distances = np.zeros(len(val), np.int64), np.zeros(len(val), np.int64)
    step = max(_BLOCK // max(len(train), 1), 1)
    for start in range(0, len(val), step):
        part = words[1][start : start + step]
        different = np.zeros((len(part), len(train)), np.uint16)
        for word in range(part.shape[1]):
            different += np.bitwise_count(part[:, word, None] ^ words[0][None, :, word])
        here = slice(start, start + len(part))
        places[here] = different.argmin(axis=1)
        distances[here] = different.min(axis=1)
    return places, distances


def _words(fingerprints: Sequence[bytes]) -> npt.NDArray[np.uint64]:
    return np.frombuffer(b"".join(fingerprints), np.uint64).reshape(len(fingerprints), -1)


def pairs(train: Sequence[tuple[str, bytes]], val: Sequence[tuple[str, bytes]]) -> list[Pair]:
    """Return the images of val that have a near-duplicate in train, nearest first. Both: name and fingerprint."""
    places, distances = nearest([print_ for _, print_ in train], [print_ for _, print_ in val])
    near = [
        Pair(val[at][0], train[place][0], distance)
        for at, (place, distance) in enumerate(zip(places.tolist(), distances.tolist(), strict=True))
        if distance <= DISTANCE
    ]
    return sorted(near, key=lambda pair: (pair.distance, pair.val))


def report(near: Sequence[Pair], images: int) -> dict[str, Any]:
    """Return what prepared data says of the pairs: number of images of val, of those with one, and three examples."""
    return {"val": images, "found": len(near), "examples": [list(pair) for pair in near[:_EXAMPLES]]}
