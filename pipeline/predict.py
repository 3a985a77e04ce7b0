"""Label your own images with a trained model. Needs the model file and nothing else of this project's data.

For each image, in the folder --to:

    labels/NAME.png     its size, upright; pixel value = class index (255 = void), colours = the data set's palette
    overlays/NAME.jpg   to look at: the image under the colours, and which classes occur on how much of it
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from PIL import Image

from pipeline.formats.label_images import indexed, overlay
from pipeline.formats.photo import decoded
from pipeline.runtime import progress
from pipeline.runtime.cli import add_to, command_parser, marked, run_cli
from refinenet.atomic import atomic_file
from refinenet.config import Protocol
from refinenet.data.split import Array
from refinenet.errors import UserError

if TYPE_CHECKING:
    import torch

_EXAMPLES = """\
examples:
  refinenet predict holiday.jpg --model models/voc-res101.safetensors
  refinenet predict photos/ --model models/voc-res101.safetensors --scales 0.6,0.8,1.0 --flip
  find photos -name '*.jpg' | refinenet predict - --model models/voc-res101.safetensors --to labelled

A folder's structure is kept there; files of an earlier run are overwritten. Images are turned as their EXIF data
say; transparent pixels count as white; of an animation the first frame is taken. What cannot be read is named, the rest
is done, and the exit code is 1.
"""

# Searched for in folders; a file named on the command line may have any suffix. HEIC: to report that it is unsupported.
SUFFIXES = frozenset(
    f".{suffix}"
    for suffix in "jpg jpeg jfif mpo png webp gif bmp tif tiff ppm pgm pnm jp2 avif heic heif".split()  # noqa: SIM905
)


class Found(NamedTuple):
    """An image to label: its path, and its name relative to the folder on the command line."""

    path: Path
    name: Path


def find(arguments: Sequence[str], skip: Sequence[Path]) -> tuple[list[Found], list[str]]:
    """Return the images that the command line names, each once, in its order, folders sorted; and error lines.

    "-" is a list on stdin. Hidden files and the folders `skip` (earlier results) are ignored.
    """
    found: dict[str, Found] = {}
    wrong: list[str] = []
    skipped = {os.path.realpath(folder) for folder in skip}
    given = [word for argument in arguments for word in (_listed() if argument == "-" else [argument])]
    for path in map(Path, filter(None, given)):
        if not os.path.isdir(path):  # noqa: PTH112 - never raises
            found.setdefault(os.path.abspath(path), Found(path, Path(path.name)))  # noqa: PTH100 - links keep names
            continue
        images, before = [], len(wrong)
        for folder, folders, files in os.walk(path, onerror=lambda e: wrong.append(f"{e.filename}: {e.strerror}")):
            folders[:] = [f for f in folders if f[0] != "." and os.path.realpath(Path(folder, f)) not in skipped]
            images += [Path(folder, f) for f in files if f[0] != "." and Path(f).suffix.lower() in SUFFIXES]
        if not images and len(wrong) == before:
            wrong.append(f"{path}: no image in this folder, expected files that end in {', '.join(sorted(SUFFIXES))}")
        for image in sorted(images):
            found.setdefault(os.path.abspath(image), Found(image, image.relative_to(path)))  # noqa: PTH100
    return list(found.values()), wrong


def _listed() -> list[str]:
    """Return the paths on stdin: one a line, or separated by NUL (`find -print0`)."""
    data = sys.stdin.buffer.read()
    lines = data.split(b"\0") if b"\0" in data else data.splitlines()
    return [os.fsdecode(line) for line in lines if line.strip()]


def names(found: Sequence[Found]) -> list[Path]:
    """Return for each image its name under `--to`, without a suffix; all different.

    Where two would be equal, all names are relative to the images' common folder. Where two are still equal (a.jpg and
    a.png), all keep their suffix.
    """
    short = [image.name.with_suffix("") for image in found]
    if len(set(short)) == len(short):
        return short
    whole = [Path(os.path.abspath(image.path)) for image in found]  # noqa: PTH100 - links keep their names
    common = os.path.commonpath([path.parent for path in whole])
    whole = [path.relative_to(common) for path in whole]
    short = [path.with_suffix("") for path in whole]
    return short if len(set(short)) == len(short) else whole


def read_image(path: Path) -> Array:
    """Read an image upright: H x W x 3 uint8 RGB. Raises UserError where it is not a whole image."""
    try:
        if not path.is_file():
            raise UserError(f"{path}: no such file")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    try:
        return decoded(path, str(path))
    except UserError as error:
        if path.suffix.lower() in (".heic", ".heif") and "Pillow" in str(error):
            raise UserError(f"{path}: HEIC cannot be read, expected it as JPEG") from None
        raise


def device_named(name: str | None) -> torch.device:
    """Return the device called `name` on a command line; None: a GPU where there is one. Raises UserError."""
    import torch

    count = torch.cuda.device_count()
    try:
        device = torch.device(name or ("cuda" if count else "cpu"))
    except RuntimeError:
        raise UserError(f"--device {name}: not a device of PyTorch, expected cpu, cuda or cuda:N") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device {name}: not supported, expected cpu, cuda or cuda:N")
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UserError(
            f"--device {name}: PyTorch finds {count} GPUs here; without --device one is used if there is one"
        )
    return device


def _write(target: Path, picture: Image.Image, kind: str, **options: Any) -> None:
    try:
        with atomic_file(target) as part:
            picture.save(part, kind, **options)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        raise UserError(f"{target}: the name is too long for this disk") from None


def run(options: argparse.Namespace) -> None:
    """Label what `options` (of `parser`) names. Raises UserError with a count where some images failed."""
    output: Path = options.to or Path("predictions/photos") / options.model.stem
    labels, overlays = output / "labels", output / "overlays"
    found, wrong = find(options.images, (labels, overlays))
    for line in wrong:
        print(marked(f"error: {line}"), file=sys.stderr)
    inputs = {os.path.realpath(image.path) for image in found}
    targets = [(Path(f"{labels / name}.png"), Path(f"{overlays / name}.jpg")) for name in names(found)]
    for target in (path for pair in targets for path in pair):
        if os.path.realpath(target) in inputs:
            raise UserError(f"{target}: the result would overwrite an image to label; set --to")
    if not found:
        raise UserError("no image to label" if wrong else "an empty list, expected paths of images")

    import torch

    from refinenet.inference.predictor import Predictor

    device = device_named(options.device)
    if options.threads:
        torch.set_num_threads(options.threads)
    predictor = Predictor(options.model, device)
    protocol = Protocol(options.scales, options.flip)
    if options.short_edge:
        predictor.resizing = replace(predictor.resizing, short_edge=tuple(options.short_edge))
    failed = 0
    with progress.bar("predict", "image", total=len(found)) as bar:
        for image, (label_file, overlay_file) in zip(found, targets, strict=True):
            bar.set_postfix_str(image.path.name, refresh=sys.stderr.isatty())
            try:
                pixels = read_image(image.path)
                label = predictor.label_photo(pixels, protocol, str(image.path))
                _write(label_file, indexed(label, predictor.palette), "png")
                if not options.no_overlay:
                    picture = overlay(pixels, label, predictor.classes, predictor.palette)
                    _write(overlay_file, picture, "jpeg", quality=90, subsampling=0)
            except UserError as error:
                failed += 1
                bar.write(marked(f"error: {error}"), sys.stderr)
            bar.update()
    if done := len(found) - failed:
        where = f"{labels}" if options.no_overlay else f"{labels}, {overlays}"
        print(f"{done} {'image' if done == 1 else 'images'}: {where}")
    if failed or wrong:
        empty = f", {len(wrong)} {'folder' if len(wrong) == 1 else 'folders'} gave none" if wrong else ""
        raise UserError(f"{failed} of {len(found)} images not labelled{empty}")


def scales_of(text: str) -> tuple[float, ...]:
    """Read "0.8,1,1.25" for argparse."""
    try:
        scales = tuple(float(part) for part in text.split(","))
    except ValueError:
        scales = (0.0,)
    if not all(0 < scale <= 8 for scale in scales):
        raise argparse.ArgumentTypeError(f"{text!r}, expected numbers above 0 (8 at most) with commas between them")
    return scales


def machine_options(line: argparse.ArgumentParser) -> None:
    """Add --device and --threads, which every command that runs a model has."""
    line.add_argument("--device", metavar="NAME", help="cpu, cuda or cuda:N; default: cuda where there is a GPU")
    line.add_argument("--threads", type=int, metavar="N", help="of the CPU; default: PyTorch's choice")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    parser = command_parser("predict", __doc__, _EXAMPLES)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="an image, a folder of images, or - for a list of paths on stdin")
    add("--model", type=Path, required=True, metavar="FILE", help="a model that `train` made, or an .onnx of `export`")
    add_to(parser, "FOLDER", "default: predictions/photos/<the model's name>")
    add("--scales", type=scales_of, default=(1.0,), metavar="S,S", help="sizes to average over; default: 1.0")
    add("--flip", action="store_true", help="average with the mirrored image, too; twice the time")
    add(
        "--short-edge",
        type=int,
        nargs=2,
        metavar=("MIN", "MAX"),
        help="the network sees an image with its short edge brought between these, in pixels; time and memory grow "
        "with the square of MAX; default: what the model's file says, else 450 800",
    )
    machine_options(parser)
    add("--no-overlay", action="store_true", help="labels only")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    line = parser()
    options = line.parse_intermixed_args(arguments)
    if options.short_edge and not 1 <= options.short_edge[0] <= options.short_edge[1]:
        line.error(f"--short-edge is {' '.join(map(str, options.short_edge))}, expected 1 <= MIN <= MAX")
    if options.threads is not None and options.threads < 1:
        line.error(f"--threads is {options.threads}, expected 1 or more")
    return run_cli(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
