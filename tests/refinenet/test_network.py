"""The network's weights: torchvision's names and norms, saved and loaded, what a wrong file or setting says.

That it computes what the paper says is in test_parity.py, of any size and wiring in test_invariants.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from refinenet import RefineNet, load
from refinenet.errors import UserError
from refinenet.model.network import save

torch.set_num_threads(1)


def thin(**more: Any) -> RefineNet:
    torch.manual_seed(0)
    return RefineNet(5, backbone="resnet50", stem=2, width=4, coarse_width=8, **more).eval()


def test_frozen_norm_is_batch_norm_in_eval_mode() -> None:
    from refinenet.model.backbones import FrozenBatchNorm, fold_norms

    pairs, norms = [], []
    for inputs, outputs, kernel in ((3, 5, 3), (7, 4, 1), (3, 2, 3)):  # the first and the last are folded as one
        conv = nn.Conv2d(inputs, outputs, kernel, bias=False).double()
        norm = nn.BatchNorm2d(outputs).double().eval()
        for tensor in (norm.weight, norm.bias, norm.running_mean):
            assert tensor is not None
            nn.init.normal_(tensor)
        assert norm.running_var is not None
        nn.init.uniform_(norm.running_var, 0.5, 2)
        frozen = FrozenBatchNorm(outputs).double()
        frozen.load_state_dict({k: v for k, v in norm.state_dict().items() if k != "num_batches_tracked"})
        pairs.append((conv, frozen))
        norms.append(norm)
    for order in (torch.contiguous_format, torch.channels_last):
        for (conv, frozen), norm, kernel in zip(pairs, norms, fold_norms(pairs), strict=True):
            x = torch.randn(2, conv.in_channels, 8, 8, dtype=torch.float64)
            wanted, found = norm(conv(x)), nn.functional.conv2d(x, *kernel)
            torch.testing.assert_close(found, wanted)
            direction = torch.randn_like(wanted)
            learnt = (conv.weight, frozen.weight, frozen.bias)
            theirs = torch.autograd.grad(wanted, (conv.weight, norm.weight, norm.bias), direction)
            torch.testing.assert_close(torch.autograd.grad(found, learnt, direction, retain_graph=True), theirs)
            conv.to(memory_format=order)


def test_backbone_is_torchvisions() -> None:
    """Same names, shapes and maps as torchvision's ResNet, so that its weights load and mean the same."""
    from torchvision.models import resnet50
    from torchvision.models.feature_extraction import create_feature_extractor

    from refinenet.model.backbones import ResNet
    from refinenet.model.network import load_tensors

    theirs = resnet50(weights=None).double().eval()
    ours = ResNet("resnet50").double().eval()
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    load_tensors(ours, state, "torchvision")
    x = torch.randn(1, 3, 64, 96, dtype=torch.float64)
    names = {f"layer{i}": str(i) for i in (1, 2, 3, 4)}
    with torch.no_grad():
        wanted = create_feature_extractor(theirs, names)(x)
        for i, found in enumerate(ours(x), 1):
            torch.testing.assert_close(found, wanted[str(i)])


def test_saved_and_loaded(tmp_path: Path) -> None:
    model = thin(cascade="four-two-scale", void_output=True, mean=(128, 128, 128), std=(1, 1, 1))
    save(model, tmp_path / "m.safetensors", {"classes": ["a", "b"]})
    again, about = load(tmp_path / "m.safetensors")
    images = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8)
    assert about == {"classes": ["a", "b"]}
    assert again.config == model.config
    with torch.no_grad():
        assert torch.equal(model(images), again(images))


def test_a_file_from_before_the_setting_keeps_its_relu(tmp_path: Path) -> None:
    """Without pooling blocks, a network trained with the ReLU is another one without it."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    images = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8)
    with torch.no_grad():
        wanted = {relu: thin(pools=0, relu_without_pools=relu)(images) for relu in (False, True)}
    assert not torch.equal(wanted[False], wanted[True])
    for relu in (False, True):
        save(thin(pools=0, relu_without_pools=relu), tmp_path / "m.safetensors", {})
        with torch.no_grad():
            assert torch.equal(load(tmp_path / "m.safetensors")[0](images), wanted[relu])
    with safe_open(tmp_path / "m.safetensors", framework="pt") as file:
        metadata = json.loads(file.metadata()["refinenet"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    del metadata["config"]["relu_without_pools"]
    save_file(tensors, tmp_path / "old.safetensors", {"refinenet": json.dumps(metadata)})
    with torch.no_grad():
        assert torch.equal(load(tmp_path / "old.safetensors")[0](images), wanted[True])


def test_wrong_input_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cascade is 'five', expected one of single, two, four"):
        RefineNet(21, cascade="five")
    for cascade, message in (
        ({"blocks": [[[0, 5]]]}, r"tap \[0, 5\] is not \[scale, stage\]"),
        ({"blocks": [[[0, 4]], [[0, 4]]]}, r"tap \[0, 4\] occurs twice"),
        ({"blocks": [[[0, 4]]], "scales": [1.0, 0.5]}, "no block takes a map of scale 1"),
        ({"blocks": []}, "expected one or more blocks"),
    ):
        with pytest.raises(UserError, match=message):
            RefineNet(21, cascade=cascade)
    with pytest.raises(UserError, match="std is \\[1, 0, 1\\], expected numbers above 0"):
        RefineNet(21, std=(1, 0, 1))
    with pytest.raises(UserError, match=r"no such model; near it: .*tf_efficientnet_lite0"):
        RefineNet(21, backbone="timm:tf_eficientnet_lite0")
    with pytest.raises(UserError, match="maps at 1/16, 1/16, 1/16; expected 1/4, 1/8, 1/16 and 1/32"):
        RefineNet(21, backbone="timm:vit_tiny_patch16_224")
    with pytest.raises(UserError, match="no such file"):
        load(tmp_path / "missing.safetensors")
    file = tmp_path / "m.safetensors"
    save(thin(), file, {})
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match="cut short"):
        load(file)
    model = thin()
    weights = dict(model.backbones[0].state_dict())
    missing = {k: v for k, v in weights.items() if k != "conv1.weight"}
    with pytest.raises(UserError, match=r"w\.pth: tensor conv1\.weight is missing"):
        model.load_backbone(missing, "w.pth")
    with pytest.raises(UserError, match=r"tensor fc\.bias is left over"):
        model.load_backbone({**weights, "fc.bias": torch.zeros(3)}, "w.pth")
    with pytest.raises(UserError, match=r"conv1\.weight is \[1\], expected \[2, 3, 7, 7\]"):
        model.load_backbone({**weights, "conv1.weight": torch.zeros(1)}, "w.pth")
