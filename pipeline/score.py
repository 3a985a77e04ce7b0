"""Score a model file on a prepared split: mean IoU with its interval, each class, images a second.

The same code as `evaluate`, for any file: another model than an experiment's, an ONNX file, one in 8-bit integers.
Nothing is written.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from pipeline.evaluate import summary
from pipeline.predict import device_named, machine_options, scales_of
from pipeline.runtime import progress
from pipeline.runtime.cli import command_parser, run_cli
from refinenet.config import Protocol
from refinenet.data.split import Split
from refinenet.errors import UserError
from refinenet.metrics import Confusion

_EXAMPLES = """\
examples:
  refinenet score models/leaves-lite0.safetensors data/leaves/val.arrow
  refinenet score leaves.int8.onnx data/leaves/val.arrow --scales 0.8,1,1.25 --flip
"""


def run(options: argparse.Namespace) -> None:
    """Score what `options` (of `main`) names. Raises UserError where model and data do not fit."""
    split = Split(options.split)
    if not len(split):
        raise UserError(f"{split.path}: no image to score on")

    import torch

    from refinenet.inference.multiscale import upload
    from refinenet.inference.predictor import Predictor, trained_resizing

    if options.threads:
        torch.set_num_threads(options.threads)
    trained = Predictor(options.model, device_named(options.device))
    trained.expect_classes(split.schema.classes, split.schema.dataset)
    # As it was trained and is evaluated; a photograph of unknown size is brought to a usual one instead.
    trained.resizing = trained_resizing(trained.about)
    protocols = {"given": Protocol(options.scales, options.flip)}
    confusion = Confusion(len(split.schema.classes), trained.device)
    begin = time.perf_counter()
    for sample in progress.bar("score", "image", split, len(split)):
        if sample.label is None:
            raise UserError(f"{split.path}: {sample.name} has no label to score against")
        (labels,) = trained.many([sample.image], protocols)
        confusion.add(upload(sample.label, trained.device), labels["given"])
    rate = len(split) / (time.perf_counter() - begin)
    found = summary(split.schema.dataset, split.schema.classes, confusion.counts(), confusion.per_image(), 0)
    low, high = found["interval"]["mean_iou"]
    print(
        f"{options.model}: mean IoU {100 * found['mean_iou']:.2f} (95 % {100 * low:.1f} to {100 * high:.1f}), pixel "
        f"accuracy {100 * found['pixel_accuracy']:.2f}, on {len(split)} images of {split.path}, {rate:.2f} images/s"
    )
    for name, iou in found["iou"].items():
        print(f"  {name}: {'not in the truth' if iou is None else f'{100 * iou:.1f}'}")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    line = command_parser("score", __doc__, _EXAMPLES)
    line.add_argument("model", type=Path, metavar="MODEL", help="a model that `train` made, or an .onnx of `export`")
    line.add_argument("split", type=Path, metavar="SPLIT", help="data/<name>/val.arrow")
    line.add_argument("--scales", type=scales_of, default=(1.0,), metavar="S,S", help="sizes to average; default: 1.0")
    line.add_argument("--flip", action="store_true", help="average with the mirrored image, too")
    machine_options(line)
    options = line.parse_args(arguments)
    return run_cli(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
