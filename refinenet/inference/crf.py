"""Dense CRF on averaged probabilities (Krähenbühl and Koltun, NIPS 2011), by the package pydensecrf2.

The paper applies one on VOC and says +0.1 points on its validation images; with which parameters is said nowhere, and
the authors' code has none (`error('TODO')`). The values here stand in for them: DeepLab-v2's for VOC, as in
kazuto1011/deeplab-pytorch, configs/voc12.yaml. It runs on one core of the host, seconds an image.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from refinenet.data.split import Array
from refinenet.errors import UserError

_LEAST = 1e-5  # of a probability, before its logarithm, as in pydensecrf's own unary_from_softmax


@dataclass(frozen=True)
class DenseCRF:
    """Mean-field inference with Potts terms of two Gaussian kernels over all pairs of pixels, normalised on both sides.

    One kernel is of the position (standard deviation in pixels), one of position and colour (in values of 0..255).
    """

    iterations: int = 10
    position_weight: float = 3
    position_std: float = 1
    colour_weight: float = 4
    colour_position_std: float = 67
    colour_std: float = 3

    def __call__(self, image: Array, probabilities: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """image: H x W x 3 uint8 RGB; probabilities: C x H x W, C an output each, void too -> the same, refined.

        An output of probability 0 everywhere keeps it. UserError where the package is missing.
        """
        try:
            library = importlib.import_module("pydensecrf.densecrf")  # has no types
        except ImportError:
            raise UserError(
                "a protocol has crf: true, but the package pydensecrf2 is missing; `make crf`, or pip install "
                "pydensecrf2, compiles it (a C++ compiler, Python's headers, Python 3.12 at most)"
            ) from None
        _, height, width = probabilities.shape
        possible = probabilities.any(axis=(1, 2))
        labels = np.count_nonzero(possible)
        refined = np.zeros_like(probabilities)
        if labels < 2:  # nothing to decide; the package wants two
            refined[possible] = 1
            return refined
        unary = -np.log(probabilities[possible].clip(_LEAST, 1)).reshape(labels, -1)
        field = library.DenseCRF2D(width, height, labels)
        field.setUnaryEnergy(np.ascontiguousarray(unary, np.float32))
        field.addPairwiseGaussian(sxy=self.position_std, compat=self.position_weight)
        field.addPairwiseBilateral(
            sxy=self.colour_position_std,
            srgb=self.colour_std,
            rgbim=np.ascontiguousarray(image),
            compat=self.colour_weight,
        )
        refined[possible] = np.asarray(field.inference(self.iterations)).reshape(labels, height, width)
        return refined
