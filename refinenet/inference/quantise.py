"""A RefineNet in 8-bit integers for a CPU: an ONNX file whose convolutions were calibrated on training images.

After training, by onnxruntime's static quantisation: weights with a scale for each output channel, maps with one scale
each, taken from what the network computes on the images. Sums, pooling, the classifier and the first convolutions stay
in float32, and so does a whole backbone of depthwise convolutions, whose channels differ too much for one scale:
benchmarks/inference.md has what each would cost.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from refinenet.atomic import atomic_file
from refinenet.errors import UserError
from refinenet.inference import export
from refinenet.model.network import RefineNet

# Convolutions at the beginning, of few channels of very different sizes, that stay in float32.
FIRST = 3


def to_int8(model: RefineNet, path: Path, about: Mapping[str, Any] | None, images: Iterable[Tensor]) -> float:
    """Write an ONNX file as `export.to_onnx`, whose convolutions compute in 8-bit integers.

    Args:
        model: is not changed.
        path: the file, usually *.onnx.
        about: class names, palette, input scale ...; as of `export.to_onnx`.
        images: to calibrate on, N x 3 x H x W float32 in 0..255 each, as the network sees them, tens of them.

    Returns:
        The share of cells of these images' logits whose class is that of the float32 network.

    Raises:
        UserError: no image, a package is missing, or the backbone cannot be exported.
    """
    given = list(images)
    if not given:
        raise UserError(f"{path}: no image to calibrate on, expected one or more")
    with TemporaryDirectory(f".{os.getpid()}.part", f".{path.name}.", path.parent) as folder:
        plain, made = Path(folder, "float32.onnx"), Path(folder, path.name)
        export.to_onnx(model, plain, about)
        import onnx
        import onnxruntime
        from onnxruntime import quantization
        from onnxruntime.quantization.shape_inference import quant_pre_process

        ready = Path(folder, "ready.onnx")
        quant_pre_process(str(plain), str(ready), skip_symbolic_shape=True)
        convolutions = [node.name for node in onnx.load(ready).graph.node if node.op_type == "Conv"]

        class Images(quantization.CalibrationDataReader):  # type: ignore[misc]
            def __init__(self) -> None:
                self._left: Iterator[Tensor] = iter(given)

            def get_next(self) -> dict[str, Any] | None:
                return None if (image := next(self._left, None)) is None else {"images": image.numpy()}

        quantization.quantize_static(
            str(ready),
            str(made),
            Images(),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            op_types_to_quantize=["Conv"],
            nodes_to_exclude=[*convolutions[: _kept(model)], convolutions[-1]],
        )
        written = onnx.load(made)
        metadata = {p.key: p.value for p in onnx.load(plain, load_external_data=False).metadata_props}
        onnx.helper.set_model_props(written, {**metadata, "quantised": json.dumps("int8")})
        with atomic_file(path) as part:
            onnx.save(written, part)
            session = onnxruntime.InferenceSession(part, providers=["CPUExecutionProvider"])
            return _agreement(model, session, given)


def _kept(model: RefineNet) -> int:
    """Return how many convolutions at the beginning of the graph, where the backbones are, stay in float32."""
    convolutions = [module for module in model.backbones.modules() if isinstance(module, nn.Conv2d)]
    return len(convolutions) if any(module.groups > 1 for module in convolutions) else FIRST


@torch.no_grad()
def _agreement(model: RefineNet, session: Any, images: Iterable[Tensor]) -> float:
    net = model.eval()
    same, cells = 0, 0
    for image in images:
        (logits,) = session.run(None, {"images": image.numpy()})
        wanted = net(image).argmax(1).numpy()
        same += int(np.count_nonzero(logits.argmax(1) == wanted))
        cells += wanted.size
    return same / cells
