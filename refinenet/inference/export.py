"""A RefineNet as a file that runs without this project: an ONNX model, or a program of torch.export.

Both take a batch of any number of images of one size, 32 pixels a side or more, and give `model(images)` in eval mode:
no dropout, the backbone's norms multiplied into its convolutions. Each file is run before it gets its name.
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

# Most that a file's logits may be off, relative to the largest.
TOLERANCE = 1e-4
# The oldest opset that PyTorch's exporter writes by itself, so that older runtimes read the file too.
OPSET = 18
# N x 3 x H x W that the graph is traced with, and others that the file is then tried on: the smallest, and odd sizes.
_TRACED = (2, 3, 96, 160)
_TRIED = ((1, 3, 32, 32), (3, 3, 71, 130))
# A protobuf message, as which ONNX is written, cannot hold more bytes; the weights then go into a second file.
_PROTOBUF = 2**31 - 2**24


def to_exported_program(model: RefineNet, dtype: torch.dtype = torch.float32) -> torch.export.ExportedProgram:
    """The model as a program of torch.export: images N x 3 x H x W -> logits N x outputs x H/4 x W/4 (rounded up).

    N is 1 or more, H and W 32 or more, all of them open. `dtype` of the images: float32 or uint8, RGB in 0..255 both
    times. The program is for CPUs; `torch.export.passes.move_to_device_pass` brings it elsewhere. The model is left as
    it is. UserError for a timm backbone whose graph depends on the size of the image.
    """
    return _program(_copied(model), dtype)


def save_pt2(
    model: RefineNet, path: Path, about: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float32
) -> float:
    """Write `to_exported_program` for `torch.export.load(path)`.

    `about` (class names, palette, input scale ...) and the configuration go into its extra file "refinenet.json".
    Returns by how much its logits differ from the model's, relative to the largest; above 1e-4 is a UserError.
    """
    net = _copied(model)
    wanted = _wanted(net, dtype)
    program = _program(net, dtype)
    extra = {"refinenet.json": json.dumps(_metadata(model, about), sort_keys=True)}
    with atomic_file(path) as part, _quiet():
        with part.open("wb") as file:
            torch.export.save(program, file, extra_files=extra)
        with part.open("rb") as file:
            loaded = torch.export.load(file).module()
        return _difference(path, wanted, loaded)


def to_onnx(
    model: RefineNet, path: Path, about: Mapping[str, Any] | None = None, dtype: torch.dtype = torch.float32
) -> float:
    """Write an ONNX model: input "images" N x 3 x H x W, output "logits" N x outputs x H/4 x W/4 (rounded up).

    Batch, height and width are open; images are RGB in 0..255, of `dtype` float32 or uint8: nothing is left to
    normalise. The file's metadata_props are `about` (class names, palette, input scale ...) and the configuration, each
    value as JSON. Weights of more than 2 GB go into a second file, `path`.data. Needs the packages onnx, onnxscript and
    onnxruntime. Returns by how much the logits of onnxruntime differ from the model's, relative to the largest; above
    1e-4 is a UserError.
    """
    try:
        import onnx_ir
        import onnxruntime
        import onnxscript  # noqa: F401 - torch.onnx needs it
    except ImportError as error:
        raise UserError(f"{path}: ONNX needs the package {error.name}: pip install refinenet-repro[onnx]") from None
    net = _copied(model)
    wanted = _wanted(net, dtype)
    program = _program(net, dtype)
    large = sum(t.nbytes for t in program.state_dict.values()) > _PROTOBUF
    with _quiet():
        made = torch.onnx.export(
            program, dynamo=True, input_names=["images"], output_names=["logits"], opset_version=OPSET, verbose=False
        )
    assert made is not None
    _describe(made.model, model, about, onnx_ir)
    # Run under its own name, since a file of weights is found by name.
    with atomic_file(path) as part, TemporaryDirectory(f".{os.getpid()}.part", f".{path.name}.", path.parent) as folder:
        file = Path(folder, path.name)
        made.save(file, external_data=large)
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        difference = _difference(
            path, wanted, lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])
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
    """The program of `net`, which is changed."""
    from torch.export import Dim
    from torch.fx.experimental import _config

    if dtype not in (torch.float32, torch.uint8):
        raise UserError(f"images of {dtype}: expected torch.float32 or torch.uint8")
    for backbone in net.backbones:
        fold(backbone)
        if isinstance(backbone, TimmBackbone):
            backbone.net = _of_no_size(backbone, net.config.backbone)
    _order(net)
    for parameter in net.parameters():
        # Convolutions of channels-last weights ask whether a map has one cell only, and the answer would be kept.
        parameter.data = parameter.data.contiguous()
    sides = {2: Dim("height", min=32), 3: Dim("width", min=32)}
    # Oblivious: a side of 1 is no case of its own. The coarsest map of 32 pixels has such sides.
    with _config.patch(backed_size_oblivious=True), _quiet():  # type: ignore[attr-defined]
        program = torch.export.export(
            net,
            (torch.zeros(_TRACED, dtype=dtype),),
            dynamic_shapes=({0: Dim("batch", min=1), **sides},),
            prefer_deferred_runtime_asserts_over_guards=True,
        )
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        # What was assumed of sizes without a proof, "no side is 1" among it; that it need not hold is what is tried.
        if node.target is torch.ops.aten._assert_scalar.default:
            graph.erase_node(node)
        # Lines of code, with this machine's paths
        node.meta.pop("stack_trace", None)
    graph.eliminate_dead_code()
    program.graph_module.recompile()
    return program


def _order(net: RefineNet) -> None:
    """Tell every fusion which of its paths is the largest, where that is the same for images of all sizes.

    Sides are halved and rounded up, which keeps the order of one backbone's maps; halving the image first is one such
    step. Without this every size in a program is a maximum of maxima, and reading it takes minutes.
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


def _of_no_size(backbone: TimmBackbone, name: str) -> nn.Module:
    """The backbone's network with all that it computes from sizes as constants.

    It gets multiples of 32 only, so that its paddings are the same for all; followed symbolically they would take
    export hours. Windows and position tables are not the same for all: UserError.
    """
    net = backbone.net
    images = [torch.rand(size) for size in ((2, 3, 64, 96), (1, 3, 96, 32), (3, 3, 32, 128))]
    try:
        with _quiet():
            traced = torch.export.export(net, (images[0],)).module(check_guards=False)
        traced._forward_pre_hooks.clear()  # they insist on the size it was traced with
        _without_channels_last(traced)
        for image in images:
            torch.testing.assert_close(tuple(traced(image)), tuple(net(image)), rtol=TOLERANCE, atol=TOLERANCE)
    except Exception:  # of the many things that may go wrong with a network nobody here has seen
        raise UserError(
            f"backbone {name}: its graph depends on the size of the image, so no file of it takes any size; "
            "networks of convolutions only can be exported"
        ) from None
    return traced


def _without_channels_last(traced: fx.GraphModule) -> None:
    """A copy behind each permutation: what it is for channels-last weights (see _program) it is for such maps."""
    for node in traced.graph.find_nodes(op="call_function", target=torch.ops.aten.permute.default):
        with traced.graph.inserting_after(node):
            plain = traced.graph.call_function(torch.ops.aten.clone.default, (node,))
        node.replace_all_uses_with(plain, lambda user, plain=plain: user is not plain)
        plain.kwargs = {"memory_format": torch.contiguous_format}
    traced.recompile()


@torch.no_grad()
def _wanted(net: RefineNet, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """Images to try a file on, and the model's logits."""
    generator = torch.Generator().manual_seed(0)
    images = [torch.randint(0, 256, size, generator=generator).to(dtype) for size in _TRIED]
    return [(image, net(image)) for image in images]


@torch.no_grad()
def _difference(path: Path, wanted: Sequence[tuple[Tensor, Tensor]], run: Callable[[Tensor], Tensor]) -> float:
    off = []
    for images, logits in wanted:
        found = run(images)
        if found.shape != logits.shape:
            raise UserError(f"{path}: not written, its logits are {list(found.shape)}, expected {list(logits.shape)}")
        off.append(float((found - logits).abs().max() / logits.abs().max()))
    if not all(value <= TOLERANCE for value in off):  # NaN is not
        raise UserError(f"{path}: not written, its logits are {max(off):.1e} off the model's, expected {TOLERANCE:.0e}")
    return max(off)


def _describe(graph_model: Any, model: RefineNet, about: Mapping[str, Any] | None, onnx_ir: Any) -> None:
    """Names for the open sides, what the tensors and the outputs are; nothing of the machine it was made on."""
    graph = graph_model.graph
    for node in graph.all_nodes():
        node.metadata_props.clear()
        for output in node.outputs:
            output.shape = None  # formulas of many lines; a runtime finds them by itself
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
    """Without what exporters tell their developers."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
