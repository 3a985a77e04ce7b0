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
HEIGHT, GAP = 150, 8


def main() -> None:
    """Two data sets a row, every picture scaled to one height."""
    rows = []
    for pair in EXPERIMENTS:
        pictures = []
        for experiment in pair:
            with Image.open(sorted(Path("predictions", experiment).glob("*.png"))[0]) as file:
                width = round(file.width * HEIGHT / file.height)
                pictures.append(np.asarray(file.convert("RGB").resize((width, HEIGHT), Image.Resampling.LANCZOS)))
        gap = np.full((HEIGHT, 3 * GAP, 3), 255, np.uint8)
        rows.append(np.concatenate([pictures[0], gap, pictures[1]], axis=1))
    width = max(row.shape[1] for row in rows)
    page = np.full((len(rows) * (HEIGHT + GAP) - GAP, width, 3), 255, np.uint8)
    for i, row in enumerate(rows):
        page[i * (HEIGHT + GAP) : i * (HEIGHT + GAP) + HEIGHT, : row.shape[1]] = row
    Image.fromarray(page).quantize(200).save("docs/mini.png", optimize=True)


if __name__ == "__main__":
    main()
