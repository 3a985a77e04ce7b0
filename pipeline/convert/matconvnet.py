"""Read MatConvNet's networks from MATLAB files, and convert their tensors to this project's names.

Contents of the files, from the code that writes them:

    imagenet-resnet-*-dag.mat   a DagNN as its saveobj.m leaves it: structs `layers` (name, type, inputs, outputs,
                                params, block), `params` (name, value), `vars`, `meta` (normalization.averageImage)
    refinenet_res*_*.mat        `net_config` (cnn_save_model.m), an object of the class ref_obj (my_utils/ref_obj.m)
                                whose one property has the cell array `group_infos`: the groups of gen_network_main.m.
                                featnet_1 and refinenets have such a DagNN in `dag_net`; loss_group has its layers in
                                `net_info`, again a ref_obj, of which one is the classifier: `filters`, `biases`
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pipeline.convert.matlab_structs import Struct, many, structs
from refinenet.config import PoolOrder
from refinenet.errors import UserError

Numbers = npt.NDArray[Any]

EPSILON = 1e-5  # already added to the variance in the file's sigma; our norms add it again

_NETWORK = {"layers", "params"}
_CONVOLUTION = {"filters", "biases"}
_HEAD = ("pool5", "fc1000", "prob")  # of the ImageNet networks, no part of a backbone
_PASSIVE = ("ReLU", "Sum", "DropOut", "Pooling", "My_sum_layer", "My_copy_layer")  # layers with nothing to convert


# Names of the ResNets' layers -> our names. Stage 2 is 1 here; units are a, b, c ... or a, b1, b2 ...
def _unit(stage: str, letter: str, number: str) -> str:
    return f"backbones.0.layer{int(stage) - 1}.{int(number) if number else ord(letter) - ord('a')}"


# Layers of the decoder (My_net_util.m, gen_network_{refine_group,pool_block}.m) are named after their inputs. The first
# releases have adapt_stage, later ones adapt_input_path. Paths and blocks count from the coarsest, from 1. At a fusion
# the authors have the previous block's output first; here it comes last.
_ADAPT = r"adapt_(?:stage|input_path)(\d)"
_NAMES: Sequence[tuple[str, Callable[..., str]]] = (
    (r"conv1", lambda: "backbones.0.conv1"),
    (r"bn_conv1", lambda: "backbones.0.bn1"),
    (r"res(\d)([a-z])(\d*)_branch1", lambda *unit: f"{_unit(*unit)}.downsample.0"),
    (r"bn(\d)([a-z])(\d*)_branch1", lambda *unit: f"{_unit(*unit)}.downsample.1"),
    (r"res(\d)([a-z])(\d*)_branch2([abc])", lambda *unit: f"{_unit(*unit[:3])}.conv{'_abc'.index(unit[3])}"),
    (r"bn(\d)([a-z])(\d*)_branch2([abc])", lambda *unit: f"{_unit(*unit[:3])}.bn{'_abc'.index(unit[3])}"),
    (r"p_ims\d+d\d+_outl(\d)_dimred", lambda g: f"adapt.0-{5 - int(g)}"),
    (_ADAPT + r"_b(\d)_conv", lambda g, u: f"blocks.{int(g) - 1}.adapt.0.{int(u) - 1}.conv1"),
    (_ADAPT + r"_b(\d)_conv_relu_varout_dimred", lambda g, u: f"blocks.{int(g) - 1}.adapt.0.{int(u) - 1}.conv2"),
    (_ADAPT + r"_b\d_joint_varout_dimred", lambda g: f"blocks.{int(g) - 1}.fusion.convs.0"),
    (r"mflow_conv_g(\d)_b\d_joint_varout_dimred", lambda g: f"blocks.{int(g)}.fusion.convs.1"),
    (r"mflow_conv_g(\d)_pool(\d)_outvar_dimred", lambda g, p: f"blocks.{int(g) - 1}.pooling.convs.{int(p) - 1}"),
    (
        r"mflow_conv_g(\d)_(?:poolprev_relu_varout|pool\d_outvar)_pb(\d)",
        lambda g, p: f"blocks.{int(g) - 1}.pooling.convs.{int(p) - 1}",
    ),
    (r"mflow_conv_g(\d)_b(\d)_conv", lambda g, u: f"blocks.{int(g) - 1}.output.{int(u) - 1}.conv1"),
    (r"mflow_conv_g(\d)_b(\d)_conv_relu_varout_dimred", lambda g, u: f"blocks.{int(g) - 1}.output.{int(u) - 1}.conv2"),
)


@dataclass(frozen=True)
class Layer:
    """A layer of a DagNN. `kind`: its class without "dagnn."; `params`: names; `block`: its settings."""

    name: str
    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    params: tuple[str, ...]
    block: Mapping[str, Any]


@dataclass(frozen=True)
class Network:
    """A DagNN. `values`: parameters by name, filters height x width x in x out."""

    layers: tuple[Layer, ...]
    values: Mapping[str, Numbers]
    meta: Mapping[str, Any]


def translate(layer: str) -> str | None:
    """Return our name of a convolution or batch norm, None for an unknown one."""
    return next((ours(*found.groups()) for names, ours in _NAMES if (found := re.fullmatch(names, layer))), None)


@dataclass(frozen=True)
class Converted:
    """The networks of a file as one. `tensors`: arrays by our names; `geometry`: convolution -> (stride, padding).

    `order`: of the chained pooling, None without one. `mean`: RGB of the images it was trained with, None if unknown.
    """

    tensors: Mapping[str, Numbers]
    geometry: Mapping[str, tuple[Sequence[int], Sequence[int]]]
    order: PoolOrder | None
    mean: tuple[float, float, float] | None


def convert(path: Path) -> Converted:
    """Read a file of MatConvNet's networks. Raises UserError, which names the layer or parameter that does not fit."""
    found = structs(path, _NETWORK, _CONVOLUTION)
    networks = [_network(struct, path) for struct in found if struct.keys() >= _NETWORK]
    convolutions = [struct for struct in found if struct.keys() >= _CONVOLUTION]
    tensors: dict[str, Numbers] = {}
    geometry: dict[str, tuple[Sequence[int], Sequence[int]]] = {}
    orders: set[PoolOrder] = set()
    mean: tuple[float, float, float] | None = None
    for network in networks:
        for name, value in _parameters(network, path):
            if name in tensors:
                raise UserError(f"{path}: two tensors for {name}, expected the network of one image scale")
            tensors[name] = value
        geometry |= {
            f"{translate(layer.name)}": (_numbers(layer, "stride", [1, 1]), _numbers(layer, "pad", [0] * 4))
            for layer in network.layers
            if layer.kind == "Conv" and layer.name not in _HEAD
        }
        orders |= set(_orders(network, path))
        mean = _mean(network) or mean
    for convolution in convolutions:
        tensors["classifier.weight"] = _filters(np.asarray(convolution["filters"]))
        tensors["classifier.bias"] = np.asarray(convolution["biases"]).ravel()
    if not networks or len(convolutions) > 1 or len(orders) > 1:
        raise UserError(
            f"{path}: {len(networks)} DagNNs, {len(convolutions)} single convolutions, "
            f"pooling blocks {sorted(orders)}; expected a ResNet, or a RefineNet of one order with its classifier"
        )
    if (bias := tensors.pop("backbones.0.conv1.bias", None)) is not None and "backbones.0.bn1.running_mean" in tensors:
        tensors["backbones.0.bn1.running_mean"] = tensors["backbones.0.bn1.running_mean"] - bias
    return Converted(tensors, geometry, next(iter(orders), None), mean)


def _network(struct: Struct, path: Path) -> Network:
    try:
        pairs = [(str(param["name"]), np.asarray(param["value"])) for param in many(struct["params"])]
        layers = tuple(
            Layer(
                name=layer["name"],
                kind=layer["type"].removeprefix("dagnn."),
                inputs=tuple(many(layer["inputs"])),
                outputs=tuple(many(layer["outputs"])),
                params=tuple(many(layer["params"])),
                block=layer["block"] if isinstance(layer["block"], Mapping) else {},
            )
            for layer in many(struct["layers"])
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: layers and params are not those of a MatConvNet DagNN ({error!r})") from None
    for name, value in pairs:
        if value.dtype.kind not in "fiu" or value.ndim > 4:
            raise UserError(f"{path}: tensor {name} is {value.dtype} {list(value.shape)}, expected up to 4 dimensions")
    values = dict(pairs)
    if len(values) < len(pairs):
        raise UserError(f"{path}: {len(pairs)} tensors have {len(values)} names, expected one for each")
    meta = struct.get("meta")
    return Network(layers, values, meta if isinstance(meta, Mapping) else {})


def _parameters(network: Network, path: Path) -> Iterator[tuple[str, Numbers]]:
    """Yield the tensors of a network under our names."""
    left = dict(network.values)
    for layer in network.layers:
        missing = [name for name in layer.params if name not in left]
        if missing:
            raise UserError(f"{path}: tensor {missing[0]} of layer {layer.name} is missing")
        values = [left.pop(name) for name in layer.params]
        name = translate(layer.name)
        if layer.name in _HEAD or (layer.kind in _PASSIVE and not values):
            continue
        if name is None or (layer.kind, len(values)) not in (("Conv", 1), ("Conv", 2), ("BatchNorm", 3)):
            raise UserError(
                f"{path}: layer {layer.name} ({layer.kind}, {len(values)} tensors), expected those of a ResNet "
                "or of the authors' RefineNet"
            )
        if layer.kind == "Conv":
            yield f"{name}.weight", _filters(values[0])
            yield from ((f"{name}.bias", bias.ravel()) for bias in values[1:])
            continue
        multiplier, bias, moments = values
        if moments.ndim != 2 or moments.shape[1] != 2:
            raise UserError(f"{path}: tensor {layer.params[2]} is {list(moments.shape)}, expected channels x 2")
        yield f"{name}.weight", multiplier.ravel()
        yield f"{name}.bias", bias.ravel()
        yield f"{name}.running_mean", moments[:, 0]
        yield f"{name}.running_var", moments[:, 1].astype(np.float64) ** 2 - EPSILON
    for name in left:
        raise UserError(f"{path}: tensor {name} is left over, no layer has it")


def _filters(value: Numbers) -> Numbers:
    """Transpose height x width x in x out to out x in x height x width. MATLAB drops trailing dimensions of 1."""
    return value.reshape(value.shape + (1,) * (4 - value.ndim)).transpose(3, 2, 0, 1)


def _mean(network: Network) -> tuple[float, float, float] | None:
    """Return the mean RGB of the images that the network was trained with; None where the file has none."""
    normalization = network.meta.get("normalization")
    image = np.asarray(normalization.get("averageImage", ()) if isinstance(normalization, Mapping) else ())
    if image.dtype.kind not in "fiu" or not image.size or image.size % 3:
        return None
    red, green, blue = image.reshape(-1, 3).astype(np.float64).mean(axis=0)
    return float(red), float(green), float(blue)


def _numbers(layer: Layer, setting: str, default: list[int]) -> list[int]:
    """Return a setting of a layer, one number for each side; the file may have one for all sides."""
    given = [int(number) for number in np.asarray(layer.block.get(setting, default)).ravel()]
    return given * len(default) if len(given) == 1 else given


def _orders(network: Network, path: Path) -> Iterator[PoolOrder]:
    """Yield the order of convolution and pooling of each chain, from the input of its first pooling."""
    makers = {output: layer for layer in network.layers for output in layer.outputs}
    for layer in network.layers:
        if layer.kind == "Pooling" and (found := re.fullmatch(r"mflow_conv_g\d_pool(\d)", layer.name)):
            size, stride, pad = (
                _numbers(layer, s, [n] * k) for s, n, k in (("poolSize", 1, 2), ("stride", 1, 2), ("pad", 0, 4))
            )
            if layer.block.get("method") != "max" or [size, stride, pad] != [[5] * 2, [1] * 2, [2] * 4]:
                raise UserError(
                    f"{path}: layer {layer.name} is a {layer.block.get('method')} of {size}, stride {stride}, "
                    f"padding {pad}, expected the maximum of [5, 5], stride 1, padding 2"
                )
            if found[1] == "1":
                maker = makers.get(layer.inputs[0])
                yield "conv-pool" if maker is not None and maker.kind == "Conv" else "pool-conv"
