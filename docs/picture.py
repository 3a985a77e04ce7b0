"""The picture of the README: for each data set one validation image, its truth and what the trained network says.

python docs/picture.py        writes docs/mini.png from predictions/
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

EXPERIMENTS = (
    ("voc-res101", "person-res101"),
    ("cityscapes-res101", "nyud-res152"),
    ("context-res152", "ade20k-res101"),
)
WIDTH, GAP = 700, 12


def main() -> None:
    """Two data sets a row, every picture scaled to one width."""
    rows = []
    for pair in EXPERIMENTS:
        pictures = []
        for experiment in pair:
            with Image.open(sorted(Path("predictions", experiment).glob("*.png"))[-1]) as file:
                height = round(file.height * WIDTH / file.width)
                pictures.append(file.convert("RGB").resize((WIDTH, height), Image.Resampling.LANCZOS))
        row = Image.new("RGB", (2 * WIDTH + GAP, max(p.height for p in pictures)), "white")
        for i, picture in enumerate(pictures):
            row.paste(picture, (i * (WIDTH + GAP), 0))
        rows.append(np.asarray(row))
        rows.append(np.full((GAP, row.width, 3), 255, np.uint8))
    Image.fromarray(np.concatenate(rows[:-1])).quantize(200).save("docs/mini.png", optimize=True)


if __name__ == "__main__":
    main()
