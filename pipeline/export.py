"""Write a trained model as a file that runs without this project: ONNX, or a program of torch.export."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.runtime.cli import add_to, command_parser, run_cli
from refinenet.data.split import Split
from refinenet.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from refinenet.model.network import RefineNet

_EXAMPLES = """\
examples:
  refinenet export models/voc-res101.safetensors --to voc-res101.onnx
  refinenet export models/voc-res101.safetensors --to voc-res101.pt2 --uint8
  refinenet export models/leaves-lite0.safetensors --to leaves.int8.onnx --int8 data/leaves/train.arrow

Both take images N x 3 x H x W, RGB in 0..255, any number of any size from 32 pixels a side, and give logits
N x classes x H/4 x W/4, rounded up. Class names, palette and settings are in the file's metadata. The file is run and
compared with the model before it gets its name. What the model was trained on was enlarged by its `input_scale`.
With --int8 convolutions compute in 8-bit integers, calibrated on images of the prepared split: faster on a processor
that has instructions for it (VNNI), and labels differ a little; `refinenet score` says what that costs.
"""


def run(options: argparse.Namespace) -> None:
    """Export what `options` (of `main`) names."""
    target: Path = options.to
    if target.suffix not in (".onnx", ".pt2"):
        raise UserError(f"{target}: expected a name that ends in .onnx or .pt2")

    import torch

    from refinenet.inference import export
    from refinenet.inference.predictor import no_such_model
    from refinenet.model.network import load

    if not options.model.is_file():
        raise no_such_model(options.model)
    model, about = load(options.model)
    if options.int8 is not None:
        quantised(options, model, about)
        return
    kinds: Mapping[str, Callable[..., float]] = {".onnx": export.to_onnx, ".pt2": export.save_pt2}
    dtype = torch.uint8 if options.uint8 else torch.float32
    difference = kinds[target.suffix](model, target, about, dtype)
    files = [target, Path(f"{target}.data")] if target.suffix == ".onnx" else [target]
    size = sum(file.stat().st_size for file in files if file.exists()) / 1e6
    kind = f"ONNX, opset {export.OPSET}" if target.suffix == ".onnx" else "torch.export"
    print(
        f"{target}: {kind}, {size:.1f} MB, images N x 3 x H x W {'uint8' if options.uint8 else 'float32'} -> logits "
        f"N x {model.config.outputs} x H/4 x W/4, {difference:.0e} off the model's (limit {export.TOLERANCE:.0e})"
    )


def quantised(options: argparse.Namespace, model: RefineNet, about: Mapping[str, Any]) -> None:
    """Write the model in 8-bit integers. Raises UserError for a .pt2, for --uint8, or for a split of other classes."""
    target: Path = options.to
    if target.suffix != ".onnx" or options.uint8:
        raise UserError(f"{target}: --int8 writes an .onnx file that takes float32 images")

    from refinenet.inference.quantise import to_int8

    split = Split(options.int8)
    if list(split.schema.classes) != list(about.get("classes", ())):
        raise UserError(f"{options.int8}: has other classes than {options.model}, expected a split it was trained on")
    count = min(options.images, len(split))
    print(f"calibrating on {count} images of {options.int8}, a minute or so ...", file=sys.stderr, flush=True)
    agreement = to_int8(model, target, about, calibration_images(split, options.images, about))
    print(
        f"{target}: ONNX, 8-bit integers, {target.stat().st_size / 1e6:.1f} MB, calibrated on "
        f"{count} images of {options.int8}; {100 * agreement:.2f} % of their cells have the "
        "float32 network's class"
    )


def calibration_images(split: Split, count: int, about: Mapping[str, Any]) -> Iterator[Tensor]:
    """Yield `count` images of the split, evenly spaced, as the network sees them: 1 x 3 x H x W float32 in 0..255.

    about: the metadata of the model, which says how it resizes.
    """
    import numpy as np
    import torch

    from refinenet.inference.multiscale import scaled, scaled_size
    from refinenet.inference.predictor import trained_resizing

    resizing = trained_resizing(about)
    for index in np.unique(np.linspace(0, len(split) - 1, min(count, len(split))).astype(int)).tolist():
        pixels = torch.from_numpy(np.array(split[index].image)).permute(2, 0, 1)[None]
        yield scaled(pixels, scaled_size(split[index].image, 1.0, resizing))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    line = command_parser("export", __doc__, _EXAMPLES)
    line.add_argument("model", type=Path, metavar="MODEL", help="a model that `train` made")
    add_to(line, "FILE", "ends in .onnx or .pt2", required=True)
    line.add_argument("--uint8", action="store_true", help="images of uint8; default: float32, 0 to 255 both times")
    line.add_argument(
        "--int8", type=Path, metavar="SPLIT", help="in 8-bit integers, calibrated on data/<name>/train.arrow"
    )
    line.add_argument("--images", type=int, default=32, metavar="N", help="to calibrate on; default: 32")
    options = line.parse_args(arguments)
    return run_cli(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
