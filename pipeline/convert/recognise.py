"""Recognise and convert other projects' weights, by the content of the file, strictly. No code in a file is executed.

    torchvision     state dicts of ResNet-50, -101 and -152 (.pth, .safetensors), V1 or V2
    DrSleep         state dicts of DrSleep/refinenet-pytorch (models/resnet.py, utils/layer_factory.py), 50, 101 and
                    152: stride in the 3 x 3, torchvision's mean and deviation, chained pooling in the paper's order,
                    bilinear with align_corners, the image as it is (examples/notebooks/VOC.ipynb), no void
    MatConvNet      imagenet-resnet-{50,101,152}-dag.mat, imported from the Caffe models (utils/import-resnet.sh of
                    vlfeat/matconvnet): RGB filters, mean image in the file, deviation 1
    the authors     refinenet_res{101,152}_*.mat (main/*.m of guosheng/refinenet): RGB - 128 (demo_*.m), bicubic
                    (my_resize.m), image times 1.2 (gen_net_opts_model_type1.m), dropout 0.5

Not yet tested with the released files: neither a MatConvNet nor a DrSleep file was available. Their structure is taken
from the code that writes and reads them, and tests/pipeline/test_foreign.py writes files of that structure.

Read from the .mat files themselves: where a ResNet has its stride, order and number of the pooling blocks (from the
DagNN's graph), depth, widths, outputs. Differences from this project's networks:

- A fusion of the authors has the previous block's output first; here it is last. A sum has no order, but the names of
  the filters depend on it.
- Batch norm has moments (mean, sigma), sigma = sqrt(variance + epsilon) (import-caffe.py, bnorm_cpu.cpp).
  ResNet-50's first convolution has a bias, which goes into the mean.
- Void is an output where gen_class_info_*.m has it among the classes: the last on VOC, Cityscapes and NYUDv2, the
  first on SUN-RGBD and ADE20K; here it is the last. The classes proper are in the order of pipeline/datasets: compared
  name by name where gen_class_info_*.m lists them. For SUN-RGBD, ADE20K and Context it loads the official lists
  (seg37list; the 150 names; 59_labels.txt after the background), which were not available.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from pipeline import datasets
from pipeline.convert import matconvnet, matlab_structs
from pipeline.fetch.checksums import digest
from refinenet.atomic import atomic_file
from refinenet.config import AS_IT_IS, RESNETS, Stride
from refinenet.errors import UserError
from refinenet.model.backbones import ResNet
from refinenet.model.network import RefineNet, load_tensors, save

RGB = tuple[float, float, float]

_AUTHORS_MEAN: RGB = (128.0, 128.0, 128.0)
_ONES: RGB = (1.0, 1.0, 1.0)

# Position of void among the outputs in gen_class_info_*.m.
_VOID: Mapping[str, Literal["first", "last", "none"]] = {
    "voc": "last",
    "context": "none",
    "person": "none",
    "nyud": "last",
    "sunrgbd": "first",
    "cityscapes": "last",
    "ade20k": "first",
}
# Short edges of the released demos (demo_predict_mscale_*.m).
_SHORT_EDGE = {"cityscapes": (600, 1100)}
_SHORT_EDGE_ELSE = (450, 800)


@dataclass(frozen=True)
class Backbone:
    """ImageNet weights: `tensors` under the names of a backbone's state dict, and what they were trained with.

    `stride` is None for other networks than ResNets; `mean` and `std` are RGB in 0..255. `what`: a description.
    """

    backbone: str
    tensors: Mapping[str, Tensor]
    stride: Stride | None
    mean: RGB
    std: RGB
    what: str

    @property
    def place(self) -> Path:
        """Return the path at which the graph expects it."""
        return Path("weights", f"{self.backbone}.safetensors")

    def save(self, path: Path) -> None:
        """Write the tensors, with stride, mean and std as metadata (refinenet.training.initial.check_fit)."""
        from safetensors.torch import save_file

        trained = {"backbone": self.backbone, "stride": self.stride, "mean": self.mean, "std": self.std}
        tensors = {name: tensor.float().contiguous() for name, tensor in self.tensors.items()}
        with atomic_file(path) as part:
            save_file(tensors, part, {"trained": json.dumps(trained, sort_keys=True)})


@dataclass(frozen=True)
class Model:
    """A trained RefineNet, with `about` for `refinenet.model.network.save`. `what`: a description."""

    network: RefineNet
    about: Mapping[str, Any]
    what: str

    @property
    def place(self) -> Path:
        """Return its path in models/, named like the experiments of params.yaml."""
        depth = self.network.config.backbone.removeprefix("resnet")
        return Path("models", f"{self.about['dataset']}-res{depth}.safetensors")

    def save(self, path: Path) -> None:
        """Write what `refinenet.model.network.load` reads."""
        save(self.network, path, self.about)


def read(file: Path, dataset: str | None = None) -> Backbone | Model:
    """Recognise and convert `file`.

    dataset: of a RefineNet; None: the data set with its number of classes. Raises UserError, which names the file and
    the tensor, where anything is missing, left over or of another shape.
    """
    try:
        with file.open("rb") as stream:
            start = stream.read(16)
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None
    if matlab_structs.is_matlab(start):
        return _of_matconvnet(file, dataset)
    tensors, trained = state_dict(file, start)
    if any(name.startswith("mflow_conv_g") for name in tensors):
        return _drsleep(tensors, file, dataset)
    if {"conv1.weight", "layer1.0.conv1.weight"} <= tensors.keys():
        kept = {name: tensor for name, tensor in tensors.items() if name not in ("fc.weight", "fc.bias")}
        mean, std = (tuple(trained.get(name, getattr(ResNet, name))) for name in ("mean", "std"))
        return _resnet(kept, trained.get("stride", "3x3"), mean, std, "torchvision", file)
    raise UserError(
        f"{file}: tensors {', '.join([*tensors][:3])}, ...: neither a ResNet of torchvision nor a RefineNet of DrSleep"
    )


def state_dict(file: Path, start: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors by name, without batch norm's counters, and the metadata of `Backbone.save` (else {}).

    start: the first 16 bytes of the file. Raises UserError for any other file than a state dict.
    """
    trained: dict[str, Any] = {}
    try:
        if start[8:9] == b"{":
            from safetensors import safe_open

            with safe_open(str(file), framework="pt") as opened:
                trained = json.loads((opened.metadata() or {}).get("trained", "{}"))
                state: Any = {key: opened.get_tensor(key) for key in opened.keys()}  # noqa: SIM118 - not a mapping
        else:
            with warnings.catch_warnings(action="ignore"):  # about the age of a pickle
                state = torch.load(file, map_location="cpu", weights_only=True)  # tensors only, nothing is executed
    except pickle.UnpicklingError:
        raise UserError(f"{file}: not a pickle of tensors only, expected a state dict") from None
    except Exception as error:  # a file cut short raises nearly anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{file}: neither a MATLAB file nor whole safetensors nor a whole PyTorch file ({reason})"
        ) from None
    if not isinstance(state, Mapping) or not state:
        raise UserError(f"{file}: holds {type(state).__name__}, expected tensors by name")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"{file}: {name!r} is {type(value).__name__}, expected a tensor: a plain state dict")
    tensors = {name.removeprefix("module."): value for name, value in state.items()}  # "module.": of DataParallel
    return {n: t for n, t in tensors.items() if not n.endswith("num_batches_tracked")}, trained


def _drsleep(tensors: Mapping[str, Tensor], file: Path, dataset: str | None) -> Model:
    """Convert a model of DrSleep, which splits the authors' names: adapt_stage1_b.0.1_conv for adapt_stage1_b1_conv."""
    ours = {}
    for name, tensor in tensors.items():
        module, _, kind = name.rpartition(".")
        if module.partition(".")[0] in ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4"):
            module = f"backbones.0.{module}"
        elif module == "clf_conv":
            module = "classifier"
        elif (found := matconvnet.translate(module.replace(".0.", ""))) is not None:
            module = found
        else:
            raise UserError(f"{file}: tensor {name} is left over, a RefineNet of DrSleep has none of that name")
        ours[f"{module}.{kind}"] = tensor
    dataset = _dataset(_need(ours, "classifier.weight", file).shape[0], dataset, file, void=False)
    settings = {"order": "pool-conv", "upsample": "bilinear-aligned", "stride": "3x3"}
    return _refinenet(ours, settings, dataset, {"input_scale": 1.0, "short_edge": AS_IT_IS}, "DrSleep", file)


def _of_matconvnet(file: Path, dataset: str | None) -> Backbone | Model:
    found = matconvnet.convert(file)
    tensors = {name: torch.from_numpy(np.array(value, np.float32)) for name, value in found.tensors.items()}
    first = found.geometry.get("backbones.0.layer2.0.conv1")
    stride: Stride = "1x1" if first is not None and first[0][0] == 2 else "3x3"
    if all(name.startswith("backbones.0.") for name in tensors):
        cut = len("backbones.0.")
        resnet = {name[cut:]: tensor for name, tensor in tensors.items()}
        made = _resnet(resnet, stride, found.mean or _AUTHORS_MEAN, _ONES, "MatConvNet", file)
        _check_geometry(ResNet(made.backbone, stride=stride), {n[cut:]: g for n, g in found.geometry.items()}, file)
        return made
    weight, bias = (_need(tensors, f"classifier.{kind}", file) for kind in ("weight", "bias"))
    dataset = _dataset(weight.shape[0], dataset, file, void=True)
    if _VOID[dataset] == "first":
        tensors |= {"classifier.weight": weight.roll(-1, 0), "classifier.bias": bias.roll(-1, 0)}
    settings = {
        "void_output": _VOID[dataset] != "none",
        "upsample": "bicubic",
        "stride": stride,
        "mean": _AUTHORS_MEAN,
        "std": _ONES,
        **({} if found.order is None else {"order": found.order}),
    }
    about = {"input_scale": 1.2, "short_edge": _SHORT_EDGE.get(dataset, _SHORT_EDGE_ELSE)}
    model = _refinenet(tensors, settings, dataset, about, "the authors", file)
    _check_geometry(model.network, found.geometry, file)
    return model


def _need(tensors: Mapping[str, Tensor], name: str, file: Path) -> Tensor:
    if name not in tensors:
        raise UserError(f"{file}: tensor {name} is missing")
    return tensors[name]


def _kind(tensors: Mapping[str, Tensor], at: str, file: Path) -> str:
    """Return which ResNet the tensors under `at` belong to, by the units of its stages."""
    units: list[set[str]] = [set(), set(), set(), set()]
    for name in tensors:
        if found := re.match(re.escape(at) + r"layer([1-4])\.(\d+)\.", name):
            units[int(found[1]) - 1].add(found[2])
    counts = tuple(map(len, units))
    kind = next((name for name, expected in RESNETS.items() if expected == counts), None)
    if kind is None:
        known = ", ".join(f"{name} {list(expected)}" for name, expected in RESNETS.items())
        raise UserError(f"{file}: a ResNet of {list(counts)} units, expected {known}")
    return kind


def _resnet(tensors: Mapping[str, Tensor], stride: Stride, mean: RGB, std: RGB, whose: str, file: Path) -> Backbone:
    kind = _kind(tensors, "", file)
    load_tensors(ResNet(kind, _need(tensors, "conv1.weight", file).shape[0], stride), tensors, str(file))
    listed = ", ".join(f"{value:g}" for value in mean)
    return Backbone(kind, tensors, stride, mean, std, f"{kind} of {whose}, stride in the {stride}, mean {listed}")


def _refinenet(
    tensors: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    dataset: str,
    about: Mapping[str, Any],
    whose: str,
    file: Path,
) -> Model:
    """Return the RefineNet of four blocks with these tensors; `settings` has what cannot be read from them."""
    count = {
        setting: sum(re.fullmatch(pattern, name) is not None for name in tensors)
        for setting, pattern in (
            ("pools", r"blocks\.0\.pooling\.convs\.\d+\.weight"),
            ("last_units", r"blocks\.3\.output\.\d+\.conv1\.weight"),
        )
    }
    data = datasets.load(dataset)
    network = RefineNet(
        len(data.CLASSES),
        backbone=_kind(tensors, "backbones.0.", file),
        stem=_need(tensors, "backbones.0.conv1.weight", file).shape[0],
        width=_need(tensors, "adapt.0-1.weight", file).shape[0],
        coarse_width=_need(tensors, "adapt.0-4.weight", file).shape[0],
        **count,
        **settings,
    )
    load_tensors(network, {name: tensor.float() for name, tensor in tensors.items()}, str(file))
    config = network.config
    metadata = {
        "dataset": dataset,
        "classes": data.CLASSES,
        "palette": data.PALETTE,
        **about,
        "source": {"file": file.name, "sha256": digest(file, "sha256")},
    }
    what = (
        f"RefineNet of {whose}, {config.backbone}, {dataset} ({config.classes} classes"
        f"{' and void' if config.void_output else ''}), {config.pools} pooling blocks {config.order}, "
        f"{config.upsample}, stride in the {config.stride}"
    )
    return Model(network.eval(), metadata, what)


def _dataset(outputs: int, name: str | None, file: Path, void: bool) -> str:
    """Return the data set with this number of outputs, which is unique; raise UserError unless it is `name`."""
    counts = {known: len(datasets.load(known).CLASSES) + (void and kind != "none") for known, kind in _VOID.items()}
    if name is not None and name not in counts:
        raise UserError(f"{file}: no data set {name!r} with released models, expected one of {', '.join(counts)}")
    if name is not None and counts[name] != outputs:
        raise UserError(f"{file}: tensor classifier.weight has {outputs} outputs, expected {counts[name]} of {name}")
    dataset = next((known for known, count in counts.items() if count == outputs), None)
    if dataset is None:
        listed = ", ".join(f"{count} ({known})" for known, count in counts.items())
        raise UserError(f"{file}: tensor classifier.weight has {outputs} outputs, expected one of {listed}")
    return dataset


def _check_geometry(
    network: torch.nn.Module, geometry: Mapping[str, tuple[Sequence[int], Sequence[int]]], file: Path
) -> None:
    """Raise UserError where a convolution of the file has another stride or padding than in `network`."""
    for name, (stride, pad) in geometry.items():
        conv: Any = network.get_submodule(name)
        expected = [*conv.stride], [conv.padding[0]] * 2 + [conv.padding[1]] * 2
        if ([*stride], [*pad]) != expected:
            raise UserError(
                f"{file}: tensor {name}.weight has stride {[*stride]} and padding {[*pad]}, "
                f"expected {expected[0]} and {expected[1]}"
            )
