"""A process that labels noise with the model in its first argument and slow CRFs, until something ends it."""

from __future__ import annotations

import sys

import numpy as np
import torch

from pipeline.runtime import cli
from refinenet.config import Protocol
from refinenet.inference.crf_processes import CRFProcesses
from refinenet.inference.predictor import Predictor


def label() -> None:
    """Label 10,000 images with two processes for the CRF; a line on stdout for each."""
    torch.set_num_threads(1)
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    images = ([image] for _ in range(10_000))
    with CRFProcesses(2) as crf:
        for _ in Predictor(sys.argv[1], "cpu").stream(images, {"it": Protocol((1.0,), crf=True)}, crf):
            print("labelled", flush=True)


if __name__ == "__main__":
    cli.attach()
    sys.exit(cli.run_cli(label))
