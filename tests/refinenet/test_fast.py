"""The fast network is the model's function, now and after more training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from refinenet import RefineNet
from refinenet.inference import fast
from refinenet.inference.fast import FastRefineNet, Winograd

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def thin_convolutions_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast, "_CHANNELS", 4)


def thin(**more: Any) -> RefineNet:
    torch.manual_seed(0)
    model = RefineNet(**{"classes": 5, "backbone": "resnet50", "stem": 4, "width": 8, "coarse_width": 16, **more})
    model.initialise("scaled", torch.Generator().manual_seed(0))
    for module in model.backbones.modules():  # norms that do something
        for name, low in (("weight", 0.5), ("running_var", 0.5), ("bias", -0.5), ("running_mean", -0.5)):
            if hasattr(module, "running_var") and isinstance(tensor := getattr(module, name), Tensor):
                nn.init.uniform_(tensor, low, low + 1)
    return model.eval()


def train_a_step(model: RefineNet, images: Tensor) -> None:
    optimiser = torch.optim.SGD(model.parameters(), lr=1e-2)
    model.train()
    model(images).square().mean().backward()
    optimiser.step()
    model.eval()


def assert_same(model: RefineNet, quick: nn.Module, images: Tensor) -> Tensor:
    with torch.no_grad():
        wanted, found = model(images), quick(images)
    assert (found - wanted).abs().max() <= 1e-4 * wanted.abs().max()
    return wanted  # type: ignore[no-any-return]


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_winograd_is_the_convolution(data: st.DataObject) -> None:
    """In float64 to the last digits: any size, also where the tiles overhang and where strips end."""
    inputs, outputs = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 5))
    height, width = data.draw(st.integers(1, 23)), data.draw(st.integers(1, 23))
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=data.draw(st.booleans())).double()
    x = torch.randn(data.draw(st.integers(1, 2)), inputs, height, width, dtype=torch.float64)
    size = data.draw(st.sampled_from([4, 6]))
    plus = torch.randn(len(x), outputs, height, width, dtype=torch.float64)
    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast, "_AT_A_TIME", data.draw(st.sampled_from([1, 1000, 2**21])))
        torch.testing.assert_close(
            Winograd(conv, size)(x, relu=True, plus=plus), conv(x.relu()) + plus, rtol=1e-10, atol=1e-10
        )
        torch.testing.assert_close(Winograd(conv, size)(x), conv(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "choice",
    [
        {"cascade": "single", "pools": 0},
        {"cascade": "two", "order": "conv-pool", "pools": 4},
        {"cascade": "four-two-scale", "stride": "1x1"},
        {"cascade": "four-two-scale-8path", "upsample": "bicubic", "void_output": True},
        {"backbone": "timm:tf_efficientnet_lite0"},
        {"backbone": "timm:convnext_atto"},  # layer norms: nothing to fold
    ],
    ids=lambda choice: "-".join(map(str, choice.values())),
)
def test_same_logits_now_and_after_more_training(choice: dict[str, Any]) -> None:
    model = thin(**choice)
    quick = FastRefineNet(model)
    before = assert_same(model, quick, torch.randint(0, 256, (2, 3, 75, 101), dtype=torch.uint8))
    train_a_step(model, torch.rand(1, 3, 64, 64) * 255)
    after = assert_same(model, quick, torch.randint(0, 256, (2, 3, 75, 101), dtype=torch.uint8))
    assert not torch.equal(before, after)


def test_every_norm_is_folded_and_the_model_left_alone() -> None:
    for choice in ({}, {"backbone": "timm:tf_efficientnet_lite0"}):
        model = thin(width=3, **choice)
        state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        quick = FastRefineNet(model)
        assert not [name for name, _ in quick.named_buffers() if name.endswith("running_var")]
        assert any(isinstance(module, Winograd) for module in quick.modules())
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
        # What is not changed is not copied.
        assert quick._net.adapt["0-1"].weight is model.adapt["0-1"].weight
