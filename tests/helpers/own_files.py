"""A user's own images and masks, drawn; and what comes out of them, packed and read."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.config.schema import Folder
from pipeline.datasets import custom
from pipeline.fetch import own_folders
from refinenet.data.split import Array
from refinenet.errors import UserError

ABOUT = Folder("photos", "masks", ("soil", "leaf", "stem"))
COLOURS = ((0, 0, 0), (0, 128, 0), (128, 64, 0))
NAMES = ["a", "b", "field/a", "field/c d", "é"]


def draw(name: str, height: int = 24, width: int = 32) -> tuple[Array, Array]:
    """An image (H x W x 3) and its mask (H x W, 0 to 2 and 255), the same for the same name."""
    random = np.random.default_rng(list(name.encode()))
    return random.integers(0, 256, (height, width, 3), np.uint8), random.choice([0, 1, 2, 255], (height, width)).astype(
        np.uint8
    )


def save(array: Any, path: Path, **more: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path, **more)


def write(folder: Path) -> None:
    """photos/ (PNG, so that they are exact) and masks/ in `folder`."""
    for name in NAMES:
        image, mask = draw(name)
        save(image, folder / "photos" / f"{name}.png")
        save(mask, folder / "masks" / f"{name}.png")


def packed(about: Folder = ABOUT) -> Path:
    own_folders.pack("leaves", about, Path("raw"))
    return Path("raw", "leaves.zip")


def samples(about: Folder = ABOUT) -> dict[str, tuple[Array, Array]]:
    """Every sample of both splits, read from what `pack` packs."""
    packed(about)
    with custom.dataset("leaves", about).Reader(Path("raw")) as reader:
        found = {name: reader.read(split, name) for split in ("train", "val") for name in reader.names(split)}
    return {name: (image, label) for name, (image, label) in found.items() if label is not None}


def lists(about: Folder = ABOUT) -> dict[str, list[str]]:
    packed(about)
    with custom.dataset("leaves", about).Reader(Path("raw")) as reader:
        return {split: reader.names(split) for split in ("train", "val")}


def refused(message: str, about: Folder = ABOUT) -> None:
    """Packing or reading ends in one line."""
    with pytest.raises(UserError) as error:
        samples(about)
    assert re.search(message, str(error.value)), str(error.value)
    assert "\n" not in str(error.value)


def png_of_16_bits() -> bytes:
    """A black PNG of 16 bits a channel in colours, 32 x 24: Pillow reads such, as 8 bits, and writes none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = zlib.compress(bytes(24 * (1 + 32 * 6)))
    head = struct.pack(">IIBBBBB", 32, 24, 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
