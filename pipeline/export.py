"""Write a trained model as a file that runs without this project: ONNX, or a program of torch.export."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.runtime.cli import run_cli
from refinenet.errors import UserError

_EXAMPLES = """\
examples:
  python -m pipeline.export models/voc-res101.safetensors --to voc-res101.onnx
  python -m pipeline.export models/voc-res101.safetensors --to voc-res101.pt2 --uint8

Both take images N x 3 x H x W, RGB in 0..255, any number of any size from 32 pixels a side, and give logits
N x classes x H/4 x W/4, rounded up. Class names, palette and settings are in the file's metadata. The file is run and
compared with the model before it gets its name. What the model was trained on was enlarged by its `input_scale`.
"""


def run(options: argparse.Namespace) -> None:
    """Export what `options` (of `main`) names."""
    target: Path = options.to
    if target.suffix not in (".onnx", ".pt2"):
        raise UserError(f"{target}: expected a name that ends in .onnx or .pt2")

    import torch

    from refinenet.inference import export
    from refinenet.model.network import load

    model, about = load(options.model)
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    line = argparse.ArgumentParser(
        "python -m pipeline.export",
        description=__doc__,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    line.add_argument("model", type=Path, metavar="MODEL", help="a model that `train` made")
    line.add_argument("--to", type=Path, required=True, metavar="FILE", help="ends in .onnx or .pt2")
    line.add_argument("--uint8", action="store_true", help="images of uint8; default: float32, 0 to 255 both times")
    options = line.parse_args(arguments)
    return run_cli(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
