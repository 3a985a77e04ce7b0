"""The picture of the README: images of a prepared split, their truth, and what a trained network says.

    python docs/picture.py networks/camvid-lite0.safetensors data/camvid/test.arrow

takes every 58th image, whatever it looks like, and writes docs/camvid.jpg, two images to a row.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image
from skimage.util import montage

from refinenet.data.split import Split
from refinenet.inference.predictor import Predictor

EVERY, SHOWN = 58, 4
WIDTH = 1440  # pixels of the page


def main(model: str, split: str) -> None:
    """Photograph, truth and prediction of `SHOWN` images; white is void."""
    data = Split(Path(split))
    predictor = Predictor(Path(model))
    colours = np.full((256, 3), 255, np.uint8)
    colours[: len(predictor.palette)] = predictor.palette
    tiles = []
    for index in range(EVERY // 2, len(data), EVERY)[:SHOWN]:
        sample = data[index]
        tiles += [sample.image, colours[sample.label], colours[predictor(sample.image)]]
    page = Image.fromarray(
        montage(tiles, fill=(255, 255, 255), grid_shape=(SHOWN // 2, 6), padding_width=4, channel_axis=-1)
    )
    page.resize((WIDTH, round(page.height * WIDTH / page.width)), Image.Resampling.LANCZOS).save(
        "docs/camvid.jpg", quality=85, optimize=True
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
