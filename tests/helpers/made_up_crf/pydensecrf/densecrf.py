"""Stands for pydensecrf2 where that is not built, and is slow on request.

It takes MADE_UP_CRF_SECONDS an image, or until the file MADE_UP_CRF_GATE is there.
An image's number, the red of its first pixel, goes with this process's id into the folder MADE_UP_CRF_NOTES.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class DenseCRF2D:
    """Smooths along the rows, the more the brighter a pixel is."""

    def __init__(self, width: int, height: int, labels: int) -> None:
        self._shape = labels, height, width

    def setUnaryEnergy(self, unary: Floats) -> None:  # noqa: N802 - the package's
        self._unary = unary

    def addPairwiseGaussian(self, **kernel: object) -> None:  # noqa: N802
        pass

    def addPairwiseBilateral(self, rgbim: npt.NDArray[np.uint8], **kernel: object) -> None:  # noqa: N802
        self._image = rgbim

    def inference(self, iterations: int) -> Floats:
        end = time.monotonic() + float(os.environ.get("MADE_UP_CRF_SECONDS", "0"))
        while time.monotonic() < end and not os.path.exists(os.environ.get("MADE_UP_CRF_GATE", "")):  # noqa: PTH110
            time.sleep(0.01)
        if notes := os.environ.get("MADE_UP_CRF_NOTES"):
            (Path(notes) / f"{self._image[0, 0, 0]}.{os.getpid()}").touch()
        share = self._image.mean(2, dtype=np.float32) / 255
        belief = np.exp(-self._unary).reshape(self._shape)
        for _ in range(iterations):
            belief = (1 - share) * belief + share * np.roll(belief, 1, 2)
        return belief
