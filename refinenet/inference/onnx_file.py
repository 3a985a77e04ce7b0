"""A network in an ONNX file that this project has written, called like a RefineNet (refinenet/inference/export.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refinenet.config import Config
from refinenet.errors import UserError


class OnnxNetwork(nn.Module):
    """Runs an ONNX file by onnxruntime on the CPU: N x 3 x H x W in 0..255 -> logits N x outputs x H/4 x W/4, float32.

    `config` and `about` are the network's and the metadata of its file; `without_void`: a void output never wins. It
    uses as many threads as PyTorch does when it is loaded.

    Args:
        path: what `to_onnx` or `to_int8` wrote.

    Raises:
        UserError: no such file, not written by this project, or onnxruntime is missing.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        try:
            import onnxruntime
        except ImportError:
            raise UserError(f"{path}: needs the package onnxruntime: pip install refinenet-repro[onnx]") from None
        if not path.is_file():
            raise UserError(f"{path}: no such file; `refinenet export MODEL --to {path}` makes it")
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.log_severity_level = 3
        # Threads that spin while they wait take the cores from whatever runs between two calls.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        try:
            self._session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
            found = self._session.get_modelmeta().custom_metadata_map
            about: dict[str, Any] = {key: json.loads(value) for key, value in found.items()}
            self.config = Config(**about.pop("config"))
        except Exception as error:  # onnxruntime's errors share no other base
            raise UserError(f"{path}: not an ONNX file written by this project, or cut short ({error})") from None
        self.about, self.without_void = about, False
        (images,) = self._session.get_inputs()
        self._dtype = torch.uint8 if images.type == "tensor(uint8)" else torch.float32
        # By which callers find the device of a network.
        self.register_parameter("device", nn.Parameter(torch.empty(0), requires_grad=False))

    def forward(self, images: Tensor) -> Tensor:
        given = images.round() if self._dtype == torch.uint8 else images
        (logits,) = self._session.run(None, {"images": given.to(self._dtype).contiguous().numpy()})
        found = torch.from_numpy(logits)
        if self.without_void and self.config.void_output:
            found[:, -1] = -torch.inf
        return found
