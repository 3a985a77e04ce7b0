"""The picture of the README: for each data set one validation image, its truth and what the trained network says.

python docs/picture.py        writes docs/mini.png from predictions/
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from skimage.util import montage

EXPERIMENTS = (
    "voc-res101",
    "person-res101",
    "cityscapes-res101",
    "nyud-res152",
    "context-res152",
    "ade20k-res101",
)
SIZE, GAP = (700, 180), 12  # of image, truth and prediction together; white pixels around them


def main() -> None:
    """Two data sets a row, every picture as large as fits."""
    tiles = []
    for experiment in EXPERIMENTS:
        with Image.open(sorted(Path("predictions", experiment).glob("*.png"))[-1]) as file:
            whole = ImageOps.pad(file.convert("RGB"), SIZE, Image.Resampling.LANCZOS, "white")
            tiles.append(np.asarray(whole))
    page = montage(tiles, fill=(255, 255, 255), grid_shape=(3, 2), padding_width=GAP, channel_axis=-1)
    Image.fromarray(page).quantize(200).save("docs/mini.png", optimize=True)


if __name__ == "__main__":
    main()
