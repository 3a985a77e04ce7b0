"""Dense CRF on averaged probabilities (Krähenbühl and Koltun, NIPS 2011), by the package pydensecrf2.

The paper applies one on VOC and reports +0.1 points on its validation images, but not the parameters, and the authors'
code has none (`error('TODO')`). The values here are DeepLab-v2's for VOC, as in kazuto1011/deeplab-pytorch,
configs/voc12.yaml. It runs on one CPU core and takes seconds an image.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from refinenet.data.split import Array
from refinenet.errors import UserError

Floats = npt.NDArray[np.float32]

_LEAST = 1e-5  # floor of a probability before its logarithm, as in pydensecrf's own unary_from_softmax


@dataclass(frozen=True)
class DenseCRF:
    """Mean-field inference with Potts terms of two Gaussian kernels over all pairs of pixels, normalised symmetrically.

    One kernel is over position (standard deviation in pixels), one over position and colour (values in 0..255).
    """

    iterations: int = 10
    position_weight: float = 3
    position_std: float = 1
    colour_weight: float = 4
    colour_position_std: float = 67
    colour_std: float = 3

    def __call__(self, image: Array, probabilities: Floats) -> Floats:
        """Refine `probabilities`, C x H x W with one channel an output (void, too), on `image`, H x W x 3 uint8 RGB.

        Returns the same shape. A channel that is 0 everywhere stays 0. Raises UserError where pydensecrf2 is missing.
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
        if labels < 2:  # nothing to decide; the package needs two
            refined[possible] = 1
            return refined
        unary = -np.log(probabilities[possible].clip(_LEAST, 1)).reshape(labels, -1)
        field = library.DenseCRF2D(width, height, labels)
        field.setUnaryEnergy(np.ascontiguousarray(unary, np.float32))
        field.addPairwiseGaussian(sxy=self.position_std, compat=self.position_weight)
        field.addPairwiseBilateral(
            sxy=self.colour_position_std,
            srgb=self.colour_std,
            rgbim=np.array(image, order="C"),  # a copy: a view into a split is read-only, which it refuses
            compat=self.colour_weight,
        )
        refined[possible] = np.asarray(field.inference(self.iterations)).reshape(labels, height, width)
        return refined


def crf_labels(image: Array, probabilities: Floats) -> Array:
    """Return the class of each pixel, H x W uint8, by a dense CRF; the arguments and errors are those of `DenseCRF`."""
    labels: Array = DenseCRF()(image, probabilities).argmax(0).astype(np.uint8)
    return labels
