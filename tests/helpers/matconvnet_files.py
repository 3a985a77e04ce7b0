"""Files of MatConvNet networks as MATLAB writes them, made here; and the networks run layer by layer, in float64.

Built from the authors' generating code (My_net_util.m, gen_network_*.m) and MatConvNet's importer, not from ours.
"""

from __future__ import annotations

import io
import struct
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from scipy.io import savemat
from torch import Tensor
from torch.nn import functional as F

UNITS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3), "resnet152": (3, 8, 36, 3)}


class DagNN:
    """What addLayer makes: layers in order, parameters by name."""

    def __init__(self, seed: int) -> None:
        self.layers: list[dict[str, Any]] = []
        self.params: dict[str, Any] = {}
        self.meta: dict[str, Any] = {}
        self._draw = np.random.default_rng(seed)

    def add(self, name: str, kind: str, inputs: Sequence[str], output: str, block: dict[str, Any], *params: str) -> str:
        self.layers.append(
            {
                "name": name,
                "type": kind,
                "inputs": list(inputs),
                "outputs": [output],
                "params": list(params),
                "block": block,
            }
        )
        return output

    def random(self, *shape: int, gain: float = 2.0) -> Any:
        fan = np.prod(shape[:3]) if len(shape) == 4 else 4
        return (self._draw.standard_normal(shape) * np.sqrt(gain / fan)).astype(np.float32)

    def conv(self, name: str, x: str, output: str, size: Sequence[int], stride: int = 1, bias: bool = False) -> str:
        params = [f"{name}_filter"]
        self.params[params[0]] = self.random(*size, gain=1.0)
        if bias:
            params.append(f"{name}_bias")
            self.params[params[1]] = self.random(1, size[3])
        pad = (size[0] - 1) // 2
        # One number for all sides, or each of them: both occur.
        block = {"size": np.array([[*size]], float), "hasBias": np.array([[bias]]), "pad": np.array([[pad]], float)}
        block["stride"] = np.array([[stride, stride]], float)
        return self.add(name, "dagnn.Conv", [x], output, block, *params)

    def norm(self, name: str, x: str, output: str, channels: int, gain: float = 1.0) -> str:
        params = [f"{name}_mult", f"{name}_bias", f"{name}_moments"]
        sigma = self._draw.uniform(0.5, 1.5, (channels, 1))
        moments = np.concatenate([self._draw.standard_normal((channels, 1)) * 0.1, sigma], axis=1)
        values = (gain * self._draw.uniform(0.5, 1.5, (channels, 1)), self.random(channels, 1), moments)
        self.params |= {k: v.astype(np.float32) for k, v in zip(params, values, strict=True)}
        return self.add(name, "dagnn.BatchNorm", [x], output, {"epsilon": np.array([[1e-5]])}, *params)

    def relu(self, name: str, x: str, output: str) -> str:
        return self.add(name, "dagnn.ReLU", [x], output, {"leak": np.array([[0.0]])})

    def pool(self, name: str, x: str, output: str, size: int, stride: int, pad: Sequence[int]) -> str:
        block = {"method": "max", "poolSize": np.array([[size, size]], float)}
        block |= {"pad": np.array([[*pad]], float), "stride": np.array([[stride, stride]], float)}
        return self.add(name, "dagnn.Pooling", [x], output, block)

    def saved(self) -> dict[str, Any]:
        """What saveobj.m leaves of it."""
        params = [{"name": k, "value": v, "learningRate": np.ones((1, 1))} for k, v in self.params.items()]
        names = dict.fromkeys(name for layer in self.layers for name in (*layer["inputs"], *layer["outputs"]))
        variables = [{"name": name, "precious": np.array([[False]])} for name in names]
        return {"vars": variables, "params": params, "layers": self.layers, "meta": self.meta}

    def run(self, **values: Tensor) -> dict[str, Tensor]:
        """All variables, N x C x H x W in float64."""
        for layer in self.layers:
            x = [values[name] for name in layer["inputs"]]
            params = [torch.from_numpy(self.params[name].astype(np.float64)) for name in layer["params"]]
            values[layer["outputs"][0]] = _forward(layer, x, params)
        return values


def _forward(layer: dict[str, Any], x: list[Tensor], params: list[Tensor]) -> Tensor:
    block = layer["block"]
    kind = layer["type"].removeprefix("dagnn.")
    if kind in ("Conv", "Pooling"):
        pads = [int(n) for n in np.broadcast_to(block["pad"].ravel(), 4)]  # top, bottom, left, right
        stride = int(block["stride"].ravel()[0])
        padded = F.pad(x[0], (*pads[2:], *pads[:2]), value=-torch.inf if kind == "Pooling" else 0.0)
        if kind == "Pooling":
            return F.max_pool2d(padded, int(block["poolSize"].ravel()[0]), stride)
        return F.conv2d(padded, params[0].permute(3, 2, 0, 1), params[1].ravel() if params[1:] else None, stride)
    if kind == "BatchNorm":
        multiplier, bias, (mean, sigma) = params[0].ravel(), params[1].ravel(), params[2].T
        return (x[0] - mean[:, None, None]) / sigma[:, None, None] * multiplier[:, None, None] + bias[:, None, None]
    if kind == "ReLU":
        return x[0].clamp_min(0)
    if kind in ("Sum", "My_sum_layer"):
        size = max(y.shape[2] for y in x)
        return sum((y if y.shape[2] == size else twice(y) for y in x), torch.zeros(()))
    assert kind in ("DropOut", "My_copy_layer"), kind
    return x[0]


def twice(x: Tensor) -> Tensor:
    """MATLAB's imresize(x, 2): cubic convolution (Keys, a = -0.5) on pixel centres, border mirrored with its edge."""

    def along(length: int) -> Tensor:
        matrix = torch.zeros(2 * length, length, dtype=torch.float64)
        for i in range(2 * length):
            centre = (i + 0.5) / 2 - 0.5
            for j in range(int(np.floor(centre)) - 1, int(np.floor(centre)) + 3):
                d = abs(centre - j)
                weight = 1.5 * d**3 - 2.5 * d**2 + 1 if d <= 1 else -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2
                matrix[i, -1 - j if j < 0 else 2 * length - 1 - j if j >= length else j] += weight
        return matrix

    return along(x.shape[2]) @ x @ along(x.shape[3]).T


def resnet(kind: str, stem: int, seed: int = 0, stride_in: str = "2a", bias: bool = False) -> DagNN:
    """imagenet-resnet-*-dag.mat by the names of the Caffe models; the padding of pool1 is Caffe's."""
    dag = DagNN(seed)
    x = dag.conv("conv1", "data", "conv1", (7, 7, 3, stem), 2, bias)
    dag.layers[-1]["block"]["pad"] = np.array([[3.0, 3, 3, 3]])
    dag.params["conv1_filter"] /= 64
    x = dag.relu("conv1_relu", dag.norm("bn_conv1", x, "conv1x", stem), "conv1xxx")
    x, depth = dag.pool("pool1", x, "pool1", 3, 2, (0, 1, 0, 1)), stem
    for stage, units in enumerate(UNITS[kind], start=2):
        width = stem * 2 ** (stage - 2)
        for unit in range(units):
            # a, b, c ...; the longer stages of ResNet-101 and -152 have a, b1, b2 ...
            letter = "b" + str(unit) if unit and kind != "resnet50" and stage in (3, 4) else chr(ord("a") + unit)
            at, stride, short = f"{stage}{letter}", 2 if stage > 2 and not unit else 1, x
            if not unit:
                short = dag.conv(f"res{at}_branch1", x, f"res{at}_branch1", (1, 1, depth, 4 * width), stride)
                short = dag.norm(f"bn{at}_branch1", short, f"res{at}_branch1x", 4 * width)
            inner = x
            for part, k, n, m in (("2a", 1, depth, width), ("2b", 3, width, width), ("2c", 1, width, 4 * width)):
                name, step = f"{at}_branch{part}", stride if part == stride_in else 1
                inner = dag.conv(f"res{name}", inner, f"res{name}", (k, k, n, m), step)
                inner = dag.norm(f"bn{name}", inner, f"res{name}x", m, 0.3 if part == "2c" else 1.0)
                if part != "2c":
                    inner = dag.relu(f"res{name}_relu", inner, f"res{name}xxx")
            x = dag.add(f"res{at}", "dagnn.Sum", [short, inner], f"res{at}", {"numInputs": np.array([[2.0]])})
            x, depth = dag.relu(f"res{at}_relu", x, f"res{at}x"), 4 * width
    return dag


def fix_padding(dag: DagNN) -> None:
    """fix_padding_resnet of My_net_util.m, as far as it changes something."""
    for layer in dag.layers:
        if layer["name"] == "pool1":
            layer["block"]["pad"] = np.array([[1.0, 1, 1, 1]])


def stages(dag: DagNN) -> list[str]:
    """The variables that leave the four stages, coarsest first."""
    last = {
        layer["name"][3]: layer["outputs"][0]
        for layer in dag.layers
        if layer["name"].endswith("_relu") and layer["name"].startswith("res") and "branch" not in layer["name"]
    }
    return [last[stage] for stage in "5432"]


class RefineNet:
    """The groups of gen_network_main.m: a ResNet, the cascade, the loss group with the classifier."""

    def __init__(
        self,
        kind: str = "resnet101",
        outputs: int = 22,
        order: str = "conv-pool",
        pools: int = 4,
        adapt: str = "adapt_input_path",
        stride_in: str = "2a",
        stem: int = 2,
        width: int = 3,
    ) -> None:
        self.featnet = resnet(kind, stem, 1, stride_in)
        fix_padding(self.featnet)
        self.taps = []
        for tap, depth in zip(stages(self.featnet), (32, 16, 8, 4), strict=True):
            suffix, layer = ("dropout", "dagnn.DropOut") if depth > 8 else ("copy", "My_copy_layer")
            name = f"{tap}_{suffix}"
            self.taps.append(self.featnet.add(name, layer, [tap], f"{name}_varout", {}))
        dag = self.refinenets = DagNN(2)
        previous = None
        for g, depth in enumerate((32, 16, 8, 4), start=1):
            own = width + 1 if g == 1 else width
            x = self._dimred(f"p_ims1d2_outl{g}", depth * stem, own)
            x = self._units(f"{adapt}{g}", x, own, 2)
            if previous is not None:
                parts = [self._dimred(previous, width + 1 if g == 2 else width, width), self._dimred(x, own, width)]
                x = dag.add(f"mflow_joint_g{g}", "My_sum_layer", parts, f"mflow_joint_g{g}_varout", {})
            x = self._chain(f"mflow_conv_g{g}", x, own, pools, order)
            previous = self._units(f"mflow_conv_g{g}", x, own, 3)
        assert previous is not None
        self.last = previous
        self.filters = dag.random(3, 3, width, outputs)
        self.biases = dag.random(1, outputs)

    def _dimred(self, x: str, depth: int, outputs: int) -> str:
        return self.refinenets.conv(f"{x}_dimred", x, f"{x}_dimred_varout", (3, 3, depth, outputs))

    def _units(self, prefix: str, x: str, width: int, count: int) -> str:
        dag = self.refinenets
        for b in range(1, count + 1):
            at, start = f"{prefix}_b{b}", x
            x = dag.relu(f"{at}_prev_relu", x, f"{at}_prev_relu_varout")
            x = dag.conv(f"{at}_conv", x, f"{at}_conv_outvar", (3, 3, width, width), bias=True)
            x = self._dimred(dag.relu(f"{at}_conv_relu", x, f"{at}_conv_relu_varout"), width, width)
            x = dag.add(f"{at}_joint", "dagnn.Sum", [start, x], f"{at}_joint_varout", {"numInputs": np.array([[2.0]])})
        return x

    def _chain(self, at: str, x: str, width: int, pools: int, order: str) -> str:
        dag = self.refinenets
        x = dag.relu(f"{at}_poolprev_relu", x, f"{at}_poolprev_relu_varout")
        parts = [x]
        for p in range(1, pools + 1):
            if order == "conv-pool":
                x = dag.conv(f"{x}_pb{p}", x, f"{x}_pb{p}_varout", (3, 3, width, width))
            x = dag.pool(f"{at}_pool{p}", x, f"{at}_pool{p}_outvar", 5, 1, (2,))
            if order == "pool-conv":
                x = self._dimred(x, width, width)
            parts.append(x)
        return dag.add(f"{at}_pool_joint", "My_sum_layer", parts, f"{at}_pool_joint_varout", {})

    def run(self, images: Tensor) -> Tensor:
        """Scores as the file has them, of RGB images in 0..255."""
        features = self.featnet.run(data=images.double() - 128)
        inputs = {f"p_ims1d2_outl{g}": features[tap] for g, tap in enumerate(self.taps, start=1)}
        filters, biases = (torch.from_numpy(v.astype(np.float64)) for v in (self.filters, self.biases))
        return F.conv2d(
            self.refinenets.run(**inputs)[self.last], filters.permute(3, 2, 0, 1), biases.ravel(), padding=1
        )

    def saved(self) -> dict[str, Any]:
        """The properties of the ref_obj `net_config`; those of `net_info`, again ref_obj, stand in their places."""
        loss = [
            {"type": "dropout", "rate": np.array([[0.5]])},
            {"type": "conv", "filters": self.filters, "biases": self.biases, "stride": np.ones((1, 1))},
            {"type": "my_custom", "custom_type": "dense_softmaxloss"},
        ]
        groups = [
            {"name": "root", "child_group_idxes": np.array([[2.0], [4.0], [5.0]])},
            {"name": "multi_featnet", "net_info": []},
            {"name": "featnet_1", "dag_net": self.featnet.saved()},
            {"name": "refinenets", "dag_net": self.refinenets.saved()},
            {"name": "loss_group", "net_info": {"layers": Cell(loss), "name": "final_loss"}},
        ]
        return {"group_infos": Cell(groups), "net_input_img_scales": np.array([[1.2]])}


class Cell(list[Any]):
    """A cell array of structs; a plain list of them is a struct array."""


def write_mat5(path: Path, variables: dict[str, Any], hidden: dict[str, Any] | None = None) -> None:
    """MATLAB 5 to 7.2. `hidden`: what objects have, in the subsystem: a uint8 variable without a name at the end."""
    savemat(path, {name: _scipy(value) for name, value in variables.items()}, do_compression=True)
    if hidden is not None:
        inner = io.BytesIO()
        savemat(inner, {name: _scipy(value) for name, value in hidden.items()})
        data = b"\x00\x01IM\0\0\0\0" + inner.getvalue()[128:]
        tags = struct.pack("<IIII", 6, 8, 9, 0) + struct.pack("<IIii", 5, 8, 1, len(data)) + struct.pack("<II", 1, 0)
        body = tags + struct.pack("<II", 2, len(data)) + data + bytes(-len(data) % 8)
        path.write_bytes(path.read_bytes() + struct.pack("<II", 14, len(body)) + body)


def _scipy(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _scipy(inner) for name, inner in value.items()}
    if isinstance(value, list) and value and isinstance(value[0], dict) and not isinstance(value, Cell):
        array = np.empty((1, len(value)), [(name, object) for name in value[0]])
        for i, one in enumerate(value):
            array[0, i] = tuple(_scipy(one[name]) for name in value[0])
        return array
    if isinstance(value, list):
        cell = np.empty((1, len(value)), object)
        for i, one in enumerate(value):
            cell[0, i] = _scipy(one)
        return cell
    return value


def write_mat73(path: Path, variables: dict[str, Any], hidden: dict[str, Any] | None = None) -> None:
    """MATLAB 7.3: HDF5 behind 512 bytes. What cells, struct arrays and objects have lies among #refs#."""
    with h5py.File(path, "w", userblock_size=512) as file:
        refs = file.create_group("#refs#")
        for name, value in variables.items():
            _hdf5(refs, file, name, value)
        if hidden is not None:
            values = [_hdf5(refs, refs, f"hidden{i}", value).ref for i, value in enumerate(hidden.values())]
            file.create_group("#subsystem#").create_dataset("MCOS", data=values, dtype=h5py.ref_dtype)
            obj = file.create_dataset("net_config", data=np.array([[0xDD000000, 2, 1, 1, 1, 1]], np.uint32))
            obj.attrs["MATLAB_class"] = np.bytes_("ref_obj")
    with path.open("r+b") as raw:
        raw.write(b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124) + b"\x00\x02IM")


_NUMBERS = count()


def _hdf5(refs: Any, parent: Any, name: str, value: Any) -> Any:
    def refer(values: Sequence[Any]) -> Any:
        made = [_hdf5(refs, refs, f"r{next(_NUMBERS)}", inner).ref for inner in values]
        return np.array(made, dtype=h5py.ref_dtype).reshape(-1, 1)

    if isinstance(value, list) and value and isinstance(value[0], dict) and not isinstance(value, Cell):
        item = parent.create_group(name)
        for key in value[0]:
            item.create_dataset(key, data=refer([one[key] for one in value]), dtype=h5py.ref_dtype)
        kind = "struct"
    elif isinstance(value, dict):
        item, kind = parent.create_group(name), "struct"
        for key, inner in value.items():
            _hdf5(refs, item, key, inner)
    elif isinstance(value, list) and value:
        item, kind = parent.create_dataset(name, data=refer(value), dtype=h5py.ref_dtype), "cell"
    elif isinstance(value, list):
        item, kind = parent.create_dataset(name, data=np.zeros(2, np.uint64)), "cell"
        item.attrs["MATLAB_empty"] = np.uint8(1)
    elif isinstance(value, str):
        item, kind = parent.create_dataset(name, data=np.array([[ord(c)] for c in value], np.uint16)), "char"
    else:
        data = np.asarray(value)
        item = parent.create_dataset(name, data=(data.astype(np.uint8) if data.dtype == bool else data).T)
        kind = {"f4": "single", "f8": "double", "b1": "logical"}[data.dtype.str[1:]]
    item.attrs["MATLAB_class"] = np.bytes_(kind)
    return item
