"""Files that run without this project give the model's logits, at any size; compiled code follows more training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from pipeline.export import main
from refinenet import RefineNet, load
from refinenet.errors import UserError
from refinenet.inference import export
from refinenet.model.network import save

torch.set_num_threads(1)
ROOT = Path(__file__).resolve().parents[2]
SIZES = ((1, 32, 32), (2, 97, 130), (1, 64, 33))


def thin(**more: Any) -> RefineNet:
    torch.manual_seed(0)
    model = RefineNet(5, **{"backbone": "resnet50", "stem": 2, "width": 4, "coarse_width": 8, **more})
    model.initialise("scaled", torch.Generator().manual_seed(0))
    return model.eval()


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.shape == wanted.shape and bool((found - wanted).abs().max() <= 1e-4 * wanted.abs().max())


# An export takes ten seconds or more.
SLOW = [
    {"pools": 4},
    {"cascade": "single", "order": "conv-pool", "upsample": "bilinear-aligned"},
    {"cascade": "four-two-scale", "stride": "1x1"},
    {"cascade": "four-two-scale-8path", "upsample": "bicubic"},
    {"backbone": "timm:tf_efficientnet_lite0"},
]
CHOICES = [
    {"cascade": "two", "upsample": "bicubic", "void_output": True},
    *(pytest.param(choice, marks=pytest.mark.slow) for choice in SLOW),
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "-".join(map(str, choice.values())))
def test_exported_files_give_the_models_logits(choice: dict[str, Any], tmp_path: Path) -> None:
    model = thin(**choice).train()  # an export is of eval mode, whatever the model is in
    export.to_onnx(model, tmp_path / "m.onnx")
    export.save_pt2(model, tmp_path / "m.pt2")
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx")
    program = torch.export.load(tmp_path / "m.pt2").module()
    model.eval()
    for count, height, width in SIZES:
        images = torch.randint(0, 256, (count, 3, height, width)).float()
        with torch.no_grad():
            wanted = model(images)
            assert close(program(images), wanted)
        assert close(torch.from_numpy(session.run(None, {"images": images.numpy()})[0]), wanted)
    # Each weight once, and the norms gone.
    weights = sum(np.prod(tensor.dims) for tensor in onnx.load(tmp_path / "m.onnx").graph.initializer)
    assert weights < 1.02 * sum(p.numel() for p in model.parameters()) + 2000


def test_the_command_says_what_it_wrote_and_the_file_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(thin(), tmp_path / "m.safetensors", {"classes": ["a", "b", "c", "d", "é"], "input_scale": 1.2})
    assert main([str(tmp_path / "m.safetensors"), "--to", str(tmp_path / "m.onnx"), "--uint8"]) == 0
    told = capsys.readouterr()
    assert told.out.count("\n") == 1
    assert "images N x 3 x H x W uint8 -> logits N x 5 x H/4 x W/4" in told.out
    metadata = {entry.key: entry.value for entry in onnx.load(tmp_path / "m.onnx").metadata_props}
    assert json.loads(metadata["classes"]) == ["a", "b", "c", "d", "é"]
    assert json.loads(metadata["config"])["backbone"] == "resnet50"
    assert main([str(tmp_path / "m.safetensors"), "--to", str(tmp_path / "m.txt")]) == 1
    assert capsys.readouterr().err == f"error: {tmp_path / 'm.txt'}: expected a name that ends in .onnx or .pt2\n"


def test_a_file_that_is_off_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(export, "TOLERANCE", -1.0)
    with pytest.raises(UserError, match=r"m\.onnx: not written, its logits are .* off the model's"):
        export.to_onnx(thin(), tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


def test_hub(tmp_path: Path) -> None:
    untrained = torch.hub.load(str(ROOT), "refinenet", source="local", backbone="resnet50", stem=2, width=4)
    assert untrained(torch.zeros(1, 3, 32, 32)).shape == (1, 21, 8, 8)
    save(thin(), tmp_path / "m.safetensors", {})
    model = torch.hub.load(str(ROOT), "refinenet", source="local", weights=str(tmp_path / "m.safetensors"))
    images = torch.rand(1, 3, 40, 40) * 255
    with torch.no_grad():
        assert torch.equal(model(images), load(tmp_path / "m.safetensors")[0](images))


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_follows_more_training() -> None:
    """Evaluation compiled before a training step must not answer with the norms folded then (pytorch issue 108863)."""
    model = thin()
    compiled = torch.compile(model, dynamic=True)
    images = torch.rand(1, 3, 64, 96) * 255
    with torch.no_grad():
        before = compiled(images)
        assert close(before, model(images))
        assert close(compiled(images[:, :, :45]), model(images[:, :, :45]))
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
    model.train()
    model(images).square().mean().backward()
    optimiser.step()
    model.eval()
    with torch.no_grad():
        after = compiled(images)
        assert close(after, model(images))
    assert not close(after, before)
