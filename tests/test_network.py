"""The network: size as published, wiring as in the paper, any image size, what a wrong setting says."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from refinenet import RefineNet, load
from refinenet.blocks import ChainedResidualPooling, MultiResolutionFusion, ResidualConvUnit
from refinenet.config import CASCADES
from refinenet.files import UserError
from refinenet.network import save

torch.set_num_threads(1)


def thin(cascade: str = "four", pools: int = 2, classes: int = 5, backbone: str = "resnet50") -> RefineNet:
    torch.manual_seed(0)
    return RefineNet(classes, backbone=backbone, cascade=cascade, pools=pools, stem=2, width=4).eval()


# Millions of parameters for 21 classes, counted by hand from the authors' layer lists.
PUBLISHED = {
    ("resnet50", 2): 90.8,
    ("resnet101", 2): 109.8,
    ("resnet152", 2): 125.4,
    ("resnet50", 4): 99.1,
    ("resnet101", 4): 118.0,
    ("resnet152", 4): 133.7,
}


@pytest.mark.parametrize(("backbone", "pools"), PUBLISHED)
def test_parameter_count(backbone: str, pools: int) -> None:
    with torch.device("meta"):
        model = RefineNet(21, backbone=backbone, pools=pools)
    count = sum(p.numel() for p in model.parameters())
    assert count / 1e6 == pytest.approx(PUBLISHED[backbone, pools], abs=0.06)


@pytest.mark.parametrize(("cascade", "pools"), list(itertools.product(CASCADES, (0, 2, 4))))
def test_every_cascade_trains(cascade: str, pools: int) -> None:
    """Every parameter gets a gradient, so nothing is built and then left out of the wiring."""
    model = thin(cascade, pools).train()
    model(torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)).square().mean().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None]
    # The 7-path network does not use the half-size image's finest stage, but that stage feeds the others.
    assert not without


@settings(max_examples=12, deadline=None)
@given(st.integers(32, 90), st.integers(32, 90), st.sampled_from(list(CASCADES)))
def test_any_size(height: int, width: int, cascade: str) -> None:
    images = torch.randint(0, 256, (2, 3, height, width), dtype=torch.uint8)
    model = thin(cascade)
    with torch.no_grad():
        logits = model(images)
        assert logits.shape == (2, 5, -(-height // 4), -(-width // 4))
        torch.testing.assert_close(logits, model(images.float()))
        torch.testing.assert_close(logits[1:], model(images[1:]), rtol=1e-4, atol=1e-5)


def test_pooling_is_a_chain() -> None:
    """One bright pixel reaches 2 x pools pixels far: in parallel wiring, a frequent mistake, it would reach 2."""
    pooling = ChainedResidualPooling(1, pools=4)
    for conv in pooling.convs:
        assert isinstance(conv, nn.Conv2d)
        nn.init.zeros_(conv.weight)
        conv.weight.data[0, 0, 1, 1] = 1.0
    spot = torch.zeros(1, 1, 31, 31)
    spot[0, 0, 15, 15] = 1.0
    with torch.no_grad():
        reached = pooling(spot)[0, 0, 15].nonzero().flatten()
    assert (reached.min().item(), reached.max().item()) == (15 - 8, 15 + 8)


@pytest.mark.parametrize("order", ["pool-conv", "conv-pool"])
def test_pooling_against_the_paper(order: str) -> None:
    pooling = ChainedResidualPooling(3, 2, order).double()  # type: ignore[arg-type]
    x = torch.randn(1, 3, 9, 11, dtype=torch.float64)
    first, second = pooling.convs
    relu = x.clamp_min(0)

    def pool(maps: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(maps, 5, 1, 2)

    if order == "pool-conv":
        one = first(pool(relu))
        two = second(pool(one))
    else:
        one = pool(first(relu))
        two = pool(second(one))
    torch.testing.assert_close(pooling(x), relu + one + two)


def test_fusion() -> None:
    alone = torch.randn(1, 6, 4, 4)
    assert MultiResolutionFusion([6])([alone]) is alone
    fusion = MultiResolutionFusion([8, 4])
    assert fusion([torch.randn(1, 8, 3, 4), torch.randn(1, 4, 6, 7)]).shape == (1, 4, 6, 7)


def test_residual_unit_is_the_identity_without_its_branch() -> None:
    unit = ResidualConvUnit(4)
    nn.init.zeros_(unit.conv2.weight)
    x = torch.randn(1, 4, 5, 5)
    assert torch.equal(unit(x), x)
    assert unit.conv1.bias is not None  # as in gen_network_refine_group.m: the first has a bias, the second none
    assert unit.conv2.bias is None


def test_three_output_units_in_every_block() -> None:
    """The last block's two extra units are the ones that ports forget."""
    assert [len(block.output) for block in thin().blocks] == [3, 3, 3, 3]  # type: ignore[arg-type]


def test_frozen_norm_is_batch_norm_in_eval_mode() -> None:
    from refinenet.backbones import FrozenBatchNorm, conv_norm

    conv = nn.Conv2d(3, 5, 3, bias=False).double()
    reference = nn.BatchNorm2d(5).double().eval()
    for tensor in (reference.weight, reference.bias, reference.running_mean):
        assert tensor is not None
        nn.init.normal_(tensor)
    assert reference.running_var is not None
    nn.init.uniform_(reference.running_var, 0.5, 2)
    frozen = FrozenBatchNorm(5).double()
    frozen.load_state_dict({k: v for k, v in reference.state_dict().items() if k != "num_batches_tracked"})
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(conv_norm(conv, frozen, x), reference(conv(x)))
    torch.testing.assert_close(frozen(x[:, :1].expand(2, 5, 8, 8)), reference(x[:, :1].expand(2, 5, 8, 8)))


def test_backbone_is_torchvisions() -> None:
    """Same names, shapes and maps as torchvision's ResNet, so that its weights load and mean the same."""
    from torchvision.models import resnet50
    from torchvision.models.feature_extraction import create_feature_extractor

    from refinenet.backbones import ResNet
    from refinenet.network import load_tensors

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
    model = thin("four-two-scale")
    save(model, tmp_path / "m.safetensors", {"classes": ["a", "b"]})
    again, about = load(tmp_path / "m.safetensors")
    images = torch.randint(0, 256, (1, 3, 40, 40), dtype=torch.uint8)
    assert about == {"classes": ["a", "b"]}
    with torch.no_grad():
        assert torch.equal(model(images), again(images))


def test_wrong_input_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cascade is 'five', expected one of single, two, four"):
        RefineNet(21, cascade="five")
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
