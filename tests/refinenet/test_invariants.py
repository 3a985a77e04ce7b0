"""What holds of every RefineNet: any size, any batch, any wiring; and the sizes that the paper's network must have."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from refinenet import RefineNet
from refinenet.config import CASCADES, Cascade, Upsample
from refinenet.model.blocks import ChainedResidualPooling, MultiResolutionFusion, ResidualConvUnit

torch.set_num_threads(1)

UPSAMPLES: st.SearchStrategy[Upsample] = st.sampled_from(("bilinear", "bilinear-aligned", "bicubic"))
SEEDS = st.integers(0, 2**32 - 1)
SIDES = st.integers(32, 80)


def thin(**others: Any) -> RefineNet:
    return RefineNet(**{"classes": 5, "backbone": "resnet50", "stem": 2, "width": 4, "coarse_width": 8, **others})


@settings(max_examples=15, deadline=None)
@given(height=SIDES, width=SIDES, cascade=st.sampled_from(list(CASCADES)), upsample=UPSAMPLES, seed=SEEDS)
def test_any_size_and_batch(height: int, width: int, cascade: str, upsample: Upsample, seed: int) -> None:
    """Logits at 1/4, rounded up; uint8 and float the same; each image as if it were alone."""
    torch.manual_seed(seed)
    model = thin(cascade=cascade, upsample=upsample).double().eval()
    images = torch.randint(0, 256, (3, 3, height, width), dtype=torch.uint8)
    with torch.no_grad():
        logits = model(images)
        assert logits.shape == (3, 5, -(-height // 4), -(-width // 4))
        assert logits.isfinite().all()
        assert torch.equal(logits, model(images.double()))
        alone = torch.cat([model(image[None]) for image in images])
        torch.testing.assert_close(logits, alone, rtol=1e-11, atol=1e-12)


@st.composite
def cascades(draw: st.DrawFn) -> Cascade:
    """Some of the maps of one to three scales, in any order, cut into one or more blocks."""
    scales = draw(st.lists(st.sampled_from((1.0, 0.5, 0.75, 1.3)), min_size=1, max_size=3, unique=True))
    every = draw(st.permutations([(scale, stage) for scale in range(len(scales)) for stage in (1, 2, 3, 4)]))
    taps = every[: draw(st.integers(1, len(every)))]
    used = sorted({scale for scale, _ in taps})
    taps = [(used.index(scale), stage) for scale, stage in taps]
    cuts = draw(st.sets(st.integers(1, len(taps) - 1))) if len(taps) > 1 else set()
    edges = [0, *sorted(cuts), len(taps)]
    blocks = tuple(tuple(taps[a:b]) for a, b in pairwise(edges))
    return Cascade(blocks, tuple(scales[scale] for scale in used))


def side_at(side: int, scale: float, stage: int) -> int:
    """Of a map: the image's, scaled and rounded (half up), then halved and rounded up for each stride."""
    side = math.floor(side * scale + 0.5)
    for _ in range(stage + 1):
        side = (side + 1) // 2
    return side


@settings(max_examples=15, deadline=None)
@given(cascade=cascades(), upsample=UPSAMPLES, height=SIDES, width=SIDES, seed=SEEDS)
def test_any_cascade_uses_every_tap(cascade: Cascade, upsample: Upsample, height: int, width: int, seed: int) -> None:
    torch.manual_seed(seed)
    model = thin(cascade=cascade, upsample=upsample, dropout=0.0)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):  # averages of positive numbers: no ReLU closes
            module.weight.data = module.weight.data.abs() / module.weight.data.abs().sum((1, 2, 3), keepdim=True)
    logits = model(torch.randint(128, 256, (1, 3, height, width)))
    used = [(cascade.scales[scale], stage) for block in cascade.blocks for scale, stage in block]
    assert list(logits.shape[2:]) == [max(side_at(side, *tap) for tap in used) for side in (height, width)]
    assert logits.isfinite().all()
    logits.sum().backward()
    taps = {f"{scale}-{stage}" for block in cascade.blocks for scale, stage in block}
    assert set(model.adapt) == taps
    for name, conv in model.adapt.items():
        assert isinstance(conv, nn.Conv2d)
        assert conv.weight.grad is not None, name
        assert (conv.weight.grad.abs().sum((1, 2, 3)) > 0).all(), name


@settings(max_examples=25, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 6), st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=5),
    upsample=UPSAMPLES,
    seed=SEEDS,
)
def test_fusion_of_anything(shapes: list[tuple[int, int, int]], upsample: Upsample, seed: int) -> None:
    """The largest size, the smallest depth, linear in its maps; a single map passes through untouched."""
    torch.manual_seed(seed)
    fusion = MultiResolutionFusion([channels for channels, _, _ in shapes], upsample).double()
    one, two = ([torch.randn(2, *shape, dtype=torch.float64) for shape in shapes] for _ in range(2))
    fused = fusion(one)
    depths, heights, widths = zip(*shapes, strict=True)
    assert fused.shape == (2, min(depths), max(heights), max(widths))
    both = fusion([3 * a - b for a, b in zip(one, two, strict=True)])
    torch.testing.assert_close(both, 3 * fused - fusion(two), rtol=1e-11, atol=1e-11)
    if len(shapes) == 1:
        assert fused is one[0]
        assert not list(fusion.parameters())


@pytest.mark.parametrize("cascade", CASCADES)
def test_zeroed_branches_make_every_unit_the_identity(cascade: str) -> None:
    torch.manual_seed(0)
    model = thin(cascade=cascade).eval()
    seen: list[bool] = []
    for module in model.modules():
        if isinstance(module, ResidualConvUnit):
            nn.init.zeros_(module.conv2.weight)
            module.register_forward_hook(lambda _, inputs, output: seen.append(torch.equal(inputs[0], output)))
    with torch.no_grad():
        model(torch.randint(0, 256, (1, 3, 64, 48), dtype=torch.uint8))
    taps = sum(len(block) for block in CASCADES[cascade].blocks)
    assert seen == [True] * (2 * taps + 3 * len(CASCADES[cascade].blocks))


def test_no_pooling_is_nothing_or_a_relu() -> None:
    """The authors' code returns before the ReLU; with it is the other reading of the paper."""
    x = torch.randn(2, 3, 7, 5)
    for pooling, wanted in (
        (ChainedResidualPooling(3, pools=0), x),
        (ChainedResidualPooling(3, pools=0, relu_without_pools=True), x.clamp_min(0)),
    ):
        assert torch.equal(pooling(x), wanted)
        assert not list(pooling.parameters())


def test_moments_stay_and_scales_learn() -> None:
    torch.manual_seed(0)
    model = thin(stem=4, dropout=0.0).double().train()
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(model(images), model.eval()(images)), "training normalises by the batch"
    optimiser = torch.optim.SGD(model.train().parameters(), lr=1e-3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(2):
        optimiser.zero_grad()
        (model(images) - 1).square().mean().backward()
        optimiser.step()
    after = model.state_dict()
    moments = {name for name in before if "running" in name or "num_batches" in name}
    assert len(moments) >= 2 * 53  # a ResNet-50 has 53 norms
    assert {name for name in before if torch.equal(before[name], after[name])} == moments


def test_dropout_is_where_the_authors_have_it() -> None:
    """On maps of more than 512 channels (add_init_net_dropout) and before the classifier, in training only."""
    torch.manual_seed(0)
    # Stages of 128, 256, 512 and 1024 channels: 512 is not more than 512.
    model = RefineNet(5, backbone="resnet50", stem=32, width=4, coarse_width=8)
    inputs: dict[str, Tensor] = {}
    for name, module in [*model.adapt.items(), ("classifier", model.classifier)]:
        module.register_forward_hook(lambda _, x, __, name=name: inputs.__setitem__(name, x[0]))
    images = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8)
    with torch.no_grad():
        model.eval()(images)
        plain = dict(inputs)
        model.train()(images)
    for name in ("0-1", "0-2", "0-3"):
        assert torch.equal(inputs[name], plain[name]), name
    kept = inputs["0-4"] != 0
    torch.testing.assert_close(inputs["0-4"][kept], 2 * plain["0-4"][kept])
    assert kept.sum() / (plain["0-4"] != 0).sum() == pytest.approx(0.5, abs=0.05)
    assert 0.4 < (inputs["classifier"] == 0).float().mean() < 0.6
    assert (plain["classifier"] != 0).all()


@pytest.mark.parametrize(
    ("backbone", "resnet", "millions"),  # of a ResNet without its classifier; with two and four pooling blocks
    [
        ("resnet50", 23_508_032, (90.8, 99.1)),
        ("resnet101", 42_500_160, (109.8, 118.0)),
        ("resnet152", 58_143_808, (125.4, 133.7)),
    ],
)
def test_parameter_count(backbone: str, resnet: int, millions: tuple[float, float]) -> None:
    """For 21 classes, to the last one: the decoder is counted by hand from the authors' layer lists."""
    square = 9 * 256 * 256
    adapt = (8 * 2 + 4 + 2 + 1) * square  # 2048 to 512, the others to 256
    units = 5 * (2 * 4 * square + 512) + 3 * 5 * (2 * square + 256)
    fusion = (2 + 1 + 4) * square  # 512 to 256 once
    classifier = 9 * 256 * 21 + 21
    for pools, published in zip((2, 4), millions, strict=True):
        with torch.device("meta"):
            model = RefineNet(21, backbone=backbone, pools=pools)
        count = sum(p.numel() for p in model.parameters())
        assert count == resnet + adapt + units + fusion + classifier + pools * (4 + 3) * square
        assert count / 1e6 == pytest.approx(published, abs=0.06)


@pytest.mark.parametrize(("side", "giga"), [(480, 231), (512, 263)])
def test_multiply_accumulates(side: int, giga: int) -> None:
    """Of RefineNet-101 with four pooling blocks, for one image."""
    with torch.device("meta"):
        model, image = RefineNet(21, backbone="resnet101", pools=4).eval(), torch.zeros(1, 3, side, side)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image)
    assert round(counter.get_total_flops() / 2e9) == giga
