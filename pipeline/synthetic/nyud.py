"""NYU Depth v2 in the layout of its labelled archive."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.config.schema import Rendered
from pipeline.datasets import nyud
from pipeline.formats.encode import Mat73, cells, characters, mat, write
from pipeline.synthetic.album import Picture, paint, variant

# The four structural classes (ground, structure, furniture, props) of the 40.
_SUPER = "2133333223422332344442434442424334434234"


def _raw_classes() -> tuple[list[str], NDArray[np.uint8]]:
    """The 894 raw names in their official order, and the class 1 to 40 of each."""
    text = Path(__file__).with_name("nyud_classes.txt").read_text(encoding="utf-8")
    rows = [row.split("\t") for row in text.splitlines()]
    return [name for _, name in rows], np.array([int(klass) for klass, _ in rows], np.uint8)


def render(settings: Rendered, folder: Path) -> None:
    """The labelled subset with its 894 raw classes and white borders, the split, the mapping to 40 classes."""
    names, mapping = _raw_classes()
    # Kinect's images are framed in white, and nothing is labelled there.
    rows, columns = nyud.inside_frame(settings.height, settings.width)
    size = (rows.stop - rows.start, columns.stop - columns.start)
    frame = (rows.start, settings.height - rows.stop), (columns.start, settings.width - columns.stop)
    pictures = paint("nyud", nyud.CLASSES, settings, "indoor", void="seams", size=size)
    options = [[int(raw) for raw in np.flatnonzero(mapping == klass) + 1] for klass in range(1, 41)]

    def labels() -> Iterator[NDArray[np.uint16]]:
        for p in pictures:
            label = np.zeros(p.label.shape, np.uint16)
            for klass in np.unique(p.label[p.label < 40]):
                label += variant(p, p.label == klass, options[klass])
            yield np.pad(label, frame).T

    def images() -> Iterator[NDArray[np.uint8]]:
        for p in pictures:
            yield np.pad(p.image, (*frame, (0, 0)), constant_values=255).transpose(2, 1, 0)

    file = Mat73()
    file.stack("images", images(), len(pictures), "uint8")
    file.stack("labels", labels(), len(pictures), "uint16")
    file.cell("names", ((characters(name), "char") for name in names), (1, len(names)))
    write(folder / "nyu_depth_v2_labeled.mat", file.content())
    splits = {"trainNdxs": _numbers(pictures, "train"), "testNdxs": _numbers(pictures, "val")}
    write(folder / "splits.mat", mat(splits))
    write(folder / "classMapping40.mat", mat(_mapping(names, mapping)))


def _numbers(pictures: list[Picture], split: str) -> NDArray[np.uint16]:
    """Places of a split's images in the archive, counted from 1, N x 1."""
    return np.array([[p.number + 1] for p in pictures if p.split == split], np.uint16)


def _mapping(names: list[str], mapping: NDArray[np.uint8]) -> dict[str, Any]:
    groups = np.array([[int(digit) for digit in _SUPER]], np.uint8)
    return {
        "className": cells(nyud.CLASSES),
        "mapClass": mapping[np.newaxis],
        "mapToNYUSuperClass": groups,
        "mapToNYUSuperClassMat": groups == np.arange(1, 5)[:, np.newaxis],
        "allClassName": cells(names),
    }
