"""Scores of a network, while it trains, on training images that it never sees."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch

from refinenet.config import Protocol, Recipe, Resizing
from refinenet.data.subset import Subset
from refinenet.errors import UserError

if TYPE_CHECKING:
    from refinenet.data.crops import Samples
    from refinenet.model.network import RefineNet
    from refinenet.training.distributed import ProcessGroup

MOST = 100  # images that a look takes, so that it costs seconds on a GPU whatever the set


class HeldOut:
    """The images a training is scored on: `images`, of more than `MOST` so many at even distances.

    Raises UserError where none of them has a labelled pixel.
    """

    def __init__(self, images: Samples, recipe: Recipe) -> None:
        count = min(len(images), MOST)
        self._images = Subset(images, [place * len(images) // count for place in range(count)])
        self._resizing, self._precision = Resizing(recipe.input_scale, recipe.short_edge), recipe.precision
        if not any(len(present) for present in self._images.present()):
            raise UserError(f"train.hold_out: none of {count} held-out images has a labelled pixel, expected some")

    def __len__(self) -> int:
        return len(self._images)

    def score(self, model: RefineNet, processes: ProcessGroup) -> float:
        """Return the mean IoU of `model` by the paper's rule, a fraction: whole images, one scale, not mirrored.

        Each process predicts a share of the images and all return the same number. `model` is in training mode
        afterwards; no random number is drawn.
        """
        # Late: only a training that holds something out needs them.
        from refinenet.inference.multiscale import predict
        from refinenet.metrics import confusion, scores

        classes = model.config.classes
        counts = np.zeros((classes, classes + 1), np.int64)
        model.eval()
        for index in range(processes.rank, len(self), processes.world):
            name, image, label = self._images[index]
            if label is None:
                raise UserError(f"{name}: no label, expected a training image")
            protocols = {"single": Protocol((1.0,))}
            found = predict(model, image, protocols, self._resizing, precision=self._precision)["single"]
            counts += confusion(label, found, classes)
        model.train()
        return scores(processes.all_reduce_sum(torch.from_numpy(counts)).numpy()).mean_iou
