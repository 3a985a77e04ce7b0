"""Export a RefineNet as a file that runs without this project: an ONNX model, or a program of torch.export.

Both take a batch of any number of images of one size, 32 pixels a side or more, and return `model(images)` in eval
mode: no dropout, the backbone's norms folded into its convolutions. Each file is run and compared with the model before
it gets its name.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor, fx, nn

from refinenet.atomic import atomic_file
from refinenet.errors import UserError
from refinenet.inference.fast import fold
from refinenet.model.backbones import TimmBackbone
from refinenet.model.blocks import RefineNetBlock
from refinenet.model.network import RefineNet

# Largest difference of a file's logits from the model's, relative to the largest logit.
TOLERANCE = 1e-4
# The oldest opset that PyTorch's exporter writes by itself, so that older runtimes read the file too.
OPSET = 18
# Input shapes: the graph is traced with the first, the file is then run on the others: the smallest, and odd sizes.
_TRACED = (2, 3, 96, 160)
_TRIED = ((1, 3, 32, 32), (3, 3, 71, 130))
# An ONNX file is a protobuf message, which cannot hold more bytes; larger weights go into a second file.
_PROTOBUF = 2**31 - 2**24


def to_exported_program(model: RefineNet, dtype: torch.dtype = torch.float32) -> torch.export.ExportedProgram:
    """Return a torch.export program: images N x 3 x H x W -> logits N x outputs x H/4 x W/4 (rounded up).

    N from 1, H and W from 32 are dynamic. `dtype` of the images: float32 or uint8, both RGB in 0..255. The program runs
    on a CPU; `torch.export.passes.move_to_device_pass` moves it to another device. The model is not changed. Raises
    UserError for a timm backbone whose graph depends on the size of the image.
    """
    return _program(_copied(model), dtype)


def save_pt2(
    model: RefineNet, path: Path, about: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float32
) -> float:
    """Write `to_exported_program` as a file for `torch.export.load(path)`.

    Args:
        model: is not changed.
        path: the file, usually *.pt2.
        about: class names, palette, input scale ...; goes into the extra file "refinenet.json" with the configuration.
        dtype: of the images.

    Returns:
        The largest difference of its logits from the model's, relative to the largest logit.

    Raises:
        UserError: that is above 1e-4, or the backbone cannot be exported.
    """
    net = _copied(model)
    expected = _expected(net, dtype)
    program = _program(net, dtype)
    extra = {"refinenet.json": json.dumps(_metadata(model, about), sort_keys=True)}
    with atomic_file(path) as part, _quiet():
        with part.open("wb") as file:
            torch.export.save(program, file, extra_files=extra)
        with part.open("rb") as file:
            loaded = torch.export.load(file).module()
        return _difference(path, expected, loaded)


def to_onnx(
    model: RefineNet, path: Path, about: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float32
) -> float:
    """Write an ONNX model: input "images" N x 3 x H x W, output "logits" N x outputs x H/4 x W/4 (rounded up).

    Batch, height and width are dynamic; the graph normalises images itself. Needs the packages onnx, onnxscript and
    onnxruntime. Weights of more than 2 GB go into a second file, `path`.data.

    Args:
        model: is not changed.
        path: the file.
        about: class names, palette, input scale ...; with the configuration the metadata_props, each value as JSON.
        dtype: of the images, RGB in 0..255: float32 or uint8.

    Returns:
        The largest difference of onnxruntime's logits from the model's, relative to the largest logit.

    Raises:
        UserError: that is above 1e-4, a package is missing, or the backbone cannot be exported.
    """
    try:
        import onnx_ir
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise UserError(f"{path}: ONNX needs the package {error.name}: pip install refinenet-repro[onnx]") from None
    net = _copied(model)
    expected = _expected(net, dtype)
    program = _program(net, dtype)
    large = sum(t.nbytes for t in program.state_dict.values()) > _PROTOBUF
    with _quiet():
        made = torch.onnx.export(
            program, dynamo=True, input_names=["images"], output_names=["logits"], opset_version=OPSET, verbose=False
        )
    assert made is not None
    _describe(made.model, model, about, onnx_ir)
    # Run under its final name in a temporary folder: the model refers to its weights file by name.
    with atomic_file(path) as part, TemporaryDirectory(f".{os.getpid()}.part", f".{path.name}.", path.parent) as folder:
        file = Path(folder, path.name)
        made.save(file, external_data=large)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        difference = _difference(
            path, expected, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
        )
        weights = Path(f"{path}.data")
        weights.unlink(missing_ok=True)  # of the file that this one replaces
        if large:
            with atomic_file(weights) as data:
                Path(folder, weights.name).replace(data)
        file.replace(part)
    return difference


def _copied(model: RefineNet) -> RefineNet:
    return copy.deepcopy(model).to("cpu", torch.float32).eval().requires_grad_(False)


def _metadata(model: RefineNet, about: Mapping[str, Any] | None) -> dict[str, Any]:
    return {**(about or {}), "config": asdict(model.config)}


@torch.no_grad()
def _program(net: RefineNet, dtype: torch.dtype) -> torch.export.ExportedProgram:
    """Return the program of `net`, which is changed in place."""
    from torch.export import Dim
    from torch.fx.experimental import _config

    if dtype not in (torch.float32, torch.uint8):
        raise UserError(f"images of {dtype}: expected torch.float32 or torch.uint8")
    for backbone in net.backbones:
        fold(backbone)
        if isinstance(backbone, TimmBackbone):
            backbone.net = _size_independent(backbone, net.config.backbone)
    _mark_largest(net)
    for parameter in net.parameters():
        # With channels-last weights tracing would branch on whether a map has one cell only, and keep the answer.
        parameter.data = parameter.data.contiguous()
    sides = {2: Dim("height", min=32), 3: Dim("width", min=32)}
    # Oblivious: a side of 1 is not specialised. The coarsest map of an image of 32 pixels has such sides.
    with _config.patch(backed_size_oblivious=True), _quiet():  # type: ignore[attr-defined]
        program = torch.export.export(
            net,
            (torch.zeros(_TRACED, dtype=dtype),),
            dynamic_shapes=({0: Dim("batch", min=1), **sides},),
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        # Unproven assumptions on sizes, such as "no side is 1"; that the graph works without is tested afterwards.
        if node.target is torch.ops.aten._assert_scalar.default:
            graph.erase_node(node)
        # Lines of code, with this machine's paths
        node.meta.pop("stack_trace", None)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def _mark_largest(net: RefineNet) -> None:
    """Set for every fusion which of its paths has the largest map, where that is the same for all image sizes.

    A stage halves sides and rounds up, which keeps the order of one backbone's maps; halving the image first is one
    such step. Without this every size in a program is a maximum of maxima, and loading it takes minutes.
    """
    scales = net.cascade.scales
    if any(math.frexp(scale)[0] != 0.5 or scale > 1 for scale in scales):
        return
    before: list[float] = []
    for taps, block in zip(net.cascade.blocks, net.blocks, strict=True):
        assert isinstance(block, RefineNetBlock)
        sides = [scales[scale] / 2**stage for scale, stage in taps] + before
        block.fusion.largest = sides.index(max(sides))
        before = [max(sides)]


def _size_independent(backbone: TimmBackbone, name: str) -> nn.Module:
    """Return the backbone's network with everything that it computes from sizes as constants.

    It gets multiples of 32 only, so that its paddings are the same for all sizes; traced symbolically they would take
    hours. Raises UserError for networks with windows or position tables, which depend on the size.
    """
    net = backbone.net
    images = [torch.rand(size) for size in ((2, 3, 64, 96), (1, 3, 96, 32), (3, 3, 32, 128))]
    try:
        with _quiet():
            traced = torch.export.export(net, (images[0],)).module(check_guards=False)
        traced._forward_pre_hooks.clear()  # they check for the size it was traced with
        _without_channels_last(traced)
        for image in images:
            torch.testing.assert_close(tuple(traced(image)), tuple(net(image)), rtol=TOLERANCE, atol=TOLERANCE)
    except Exception:  # an unknown network can fail in any way
        raise UserError(
            f"backbone {name}: its graph depends on the size of the image, expected one that works for every size; "
            "only fully convolutional networks can be exported"
        ) from None
    return traced


def _without_channels_last(traced: fx.GraphModule) -> None:
    """Insert a copy after each permutation: channels-last maps would specialise, as such weights (see _program)."""
    for node in traced.graph.find_nodes(op="call_function", target=torch.ops.aten.permute.default):
        with traced.graph.inserting_after(node):
            plain = traced.graph.call_function(torch.ops.aten.clone.default, (node,))
        node.replace_all_uses_with(plain, lambda user, plain=plain: user is not plain)
        plain.kwargs = {"memory_format": torch.contiguous_format}
    traced.recompile()


@torch.no_grad()
def _expected(net: RefineNet, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Return images to run a file on, and the model's logits for them."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, size, generator=generator).to(dtype) for size in _TRIED]
    return [(image, net(image)) for image in images]


@torch.no_grad()
def _difference(path: Path, expected: Sequence[tuple[Tensor, Tensor]], run: Callable[[Tensor], Tensor]) -> float:
    off = []
    for images, logits in expected:
        found = run(images)
        if found.shape != logits.shape:
            raise UserError(f"{path}: not written, its logits are {list(found.shape)}, expected {list(logits.shape)}")
        off.append(float((found - logits).abs().max() / logits.abs().max()))
    if not all(value <= TOLERANCE for value in off):  # NaN is not
        raise UserError(f"{path}: not written, its logits are {max(off):.1e} off the model's, expected {TOLERANCE:.0e}")
    return max(off)


def _describe(graph_model: Any, model: RefineNet, about: Mapping[str, Any] | None, onnx_ir: Any) -> None:
    """Name dynamic sides, describe inputs and outputs, set the metadata; remove traces of this machine."""
    graph = graph_model.graph
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for output in node.outputs:
            output.shape = None  # formulas of many lines; a runtime infers them
    for values in (graph.inputs, graph.outputs, graph.initializers.values()):
        for value in values:
            value.metadata_props.clear()
    (images,), (logits,) = graph.inputs, graph.outputs
    images.shape = onnx_ir.Shape(["batch", 3, "height", "width"])
    logits.shape = onnx_ir.Shape(["batch", model.config.outputs, "ceil(height/4)", "ceil(width/4)"])
    images.doc_string = "RGB, 0 to 255, 32 pixels a side or more"
    logits.doc_string = "one channel a class" + (", the last one void" if model.config.void_output else "")
    graph.metadata_props.clear()
    graph_model.metadata_props.clear()
    graph_model.metadata_props.update({k: json.dumps(v) for k, v in sorted(_metadata(model, about).items())})


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence warnings and log lines of PyTorch's exporters within this block."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
