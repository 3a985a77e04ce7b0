"""Blocks and networks equal tests/helpers/reference.py, forward and gradient, in float64."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import pytest
import reference
import torch
from numpy.typing import NDArray
from reference import Value, Weights
from torch import Tensor, nn

from refinenet import RefineNet
from refinenet.config import CASCADES, Cascade, PoolOrder, Upsample
from refinenet.model.blocks import ChainedResidualPooling, MultiResolutionFusion, RefineNetBlock, ResidualConvUnit

torch.set_num_threads(1)

M = TypeVar("M", bound=nn.Module)

ORDERS: tuple[PoolOrder, ...] = ("pool-conv", "conv-pool")
UPSAMPLES: tuple[Upsample, ...] = ("bilinear", "bilinear-aligned", "bicubic")
SHAPES = ((1, 3, 7, 9), (2, 2, 13, 6), (1, 4, 1, 5))


def randomised(module: M, seed: int) -> M:
    """In float64, with every weight and moment drawn so that no map dies and none explodes."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double().eval()
    for name, tensor in module.state_dict().items():
        if tensor.ndim == 0:  # how many batches a norm has seen
            continue
        if tensor.ndim == 4:
            tensor.normal_(0, tensor[0].numel() ** -0.5, generator=generator)
        elif name.endswith(("running_var", "weight")):  # a deviation and a scale are near 1
            tensor.uniform_(0.5, 1.5, generator=generator)
        else:
            tensor.normal_(0, 0.2, generator=generator)
    return module


def close(ours: Tensor, theirs: NDArray[np.float64], what: str) -> None:
    assert ours.shape == theirs.shape, what
    error, largest = np.abs(ours.detach().numpy() - theirs).max(), np.abs(theirs).max()
    assert error <= 1e-10 * largest, f"{what}: off by {error:.1e}, the largest is {largest:.1e}"


def compare(
    module: nn.Module, inputs: Sequence[Tensor], ours: Tensor, compute: Callable[[list[Value], Weights], Value]
) -> None:
    """Forward, and the gradient of a random projection with respect to every input and every parameter."""
    weights = {name: Value(tensor.numpy()) for name, tensor in module.state_dict().items()}
    values = [Value(x.detach().numpy()) for x in inputs]
    theirs = compute(values, weights)
    close(ours, theirs.array, "forward")
    direction = np.random.default_rng(0).normal(size=theirs.array.shape)
    torch.autograd.backward(ours, torch.from_numpy(direction))
    theirs.backward(direction)
    for i, (x, value) in enumerate(zip(inputs, values, strict=True)):
        assert x.grad is not None
        close(x.grad, value.gradient, f"gradient of input {i}")
    for name, parameter in module.named_parameters():
        assert parameter.grad is not None, f"{name} takes no part"
        close(parameter.grad, weights[name].gradient, f"gradient of {name}")


def maps(*shapes: tuple[int, ...]) -> list[Tensor]:
    """Distinct values, at least 0.01 apart and from 0: no maximum is tied, no ReLU at its kink."""
    generator = torch.Generator().manual_seed(1)
    out = []
    for shape in shapes:
        count = int(np.prod(shape))
        x = (torch.randperm(count, generator=generator, dtype=torch.float64) - count // 2 + 0.5) * (2 / count)
        out.append(x.reshape(shape).requires_grad_())
    return out


def gradcheck(module: nn.Module, call: Callable[[nn.Module, list[Tensor]], Tensor], inputs: list[Tensor]) -> None:
    def function(*values: Tensor) -> Tensor:  # the parameters are among them, and are perturbed in place
        return call(module, list(values[: len(inputs)]))

    assert torch.autograd.gradcheck(function, (*inputs, *module.parameters()))


@pytest.mark.parametrize("shape", SHAPES)
def test_residual_conv_unit(shape: tuple[int, ...]) -> None:
    unit, (x,) = randomised(ResidualConvUnit(shape[1]), 0), maps(shape)
    compare(unit, [x], unit(x), lambda v, w: reference.residual_conv_unit(v[0], w))


@pytest.mark.parametrize("upsample", UPSAMPLES)
@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 3, 5, 8),),
        ((1, 4, 4, 5), (1, 3, 8, 10)),
        ((2, 2, 13, 7), (2, 4, 25, 14)),  # odd: not twice the size
        ((1, 3, 9, 9), (1, 3, 9, 9)),
        ((1, 4, 2, 3), (1, 2, 4, 6), (1, 3, 1, 1), (1, 5, 15, 11)),
        ((1, 2, 6, 3), (1, 2, 3, 8)),  # neither is the largest in both directions
    ],
)
def test_fusion(shapes: tuple[tuple[int, int, int, int], ...], upsample: Upsample) -> None:
    fuse, inputs = randomised(MultiResolutionFusion([s[1] for s in shapes], upsample), 2), maps(*shapes)
    compare(fuse, inputs, fuse(inputs), lambda v, w: reference.fusion(v, w, upsample=upsample))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("pools", [0, 1, 2, 4])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_chained_residual_pooling(shape: tuple[int, ...], relu: bool, pools: int, order: PoolOrder) -> None:
    pooling, (x,) = randomised(ChainedResidualPooling(shape[1], pools, order, relu), 3), maps(shape)
    compare(pooling, [x], pooling(x), lambda v, w: reference.chained_pooling(v[0], w, "", pools, order, relu))


@pytest.mark.parametrize(("order", "upsample"), list(itertools.product(ORDERS, UPSAMPLES)))
@pytest.mark.parametrize(
    ("taps", "previous", "pools", "units", "relu"),
    [
        (((1, 3, 6, 7),), None, 2, 3, False),
        (((2, 3, 12, 9),), (2, 4, 6, 5), 2, 3, True),
        (((1, 4, 2, 2), (1, 2, 4, 3), (1, 2, 8, 6)), None, 4, 1, False),
        (((1, 2, 5, 5), (1, 3, 9, 10)), (1, 4, 3, 3), 0, 0, False),
        (((1, 2, 5, 5), (1, 3, 9, 10)), (1, 4, 3, 3), 0, 1, True),
    ],
)
def test_block(
    taps: tuple[tuple[int, int, int, int], ...],
    previous: tuple[int, int, int, int] | None,
    pools: int,
    units: int,
    relu: bool,
    order: PoolOrder,
    upsample: Upsample,
) -> None:
    settings: dict[str, Any] = {"pools": pools, "order": order, "upsample": upsample, "output_units": units}
    settings["relu_without_pools"] = relu
    block = randomised(RefineNetBlock([s[1] for s in taps], previous and previous[1], **settings), 4)
    inputs = maps(*taps, *([previous] if previous else []))
    n = len(taps)

    def compute(values: list[Value], weights: Weights) -> Value:
        return reference.block(values[:n], values[n] if previous else None, weights, **settings)

    compare(block, inputs, block(inputs[:n], inputs[n] if previous else None), compute)


def test_gradcheck() -> None:
    """Numerical against automatic differentiation, for every input and parameter of each block."""
    x, y = maps((1, 2, 5, 6), (1, 3, 3, 3))
    gradcheck(randomised(ResidualConvUnit(2), 5), lambda module, v: module(v[0]), [x])
    for order in ORDERS:
        gradcheck(randomised(ChainedResidualPooling(2, 2, order), 6), lambda module, v: module(v[0]), [x])
    for upsample in UPSAMPLES:
        gradcheck(randomised(MultiResolutionFusion([2, 3], upsample), 7), lambda module, v: module(v), [x, y])
    block = randomised(RefineNetBlock([2], 3, pools=2, output_units=1), 8)
    gradcheck(block, lambda module, v: module(v[:1], v[1]), [x, y])


OWN = Cascade((((2, 4), (0, 2)), ((1, 1),), ((0, 4), (1, 4), (2, 1))), scales=(1.0, 0.7, 1.5))


def network_cases() -> Iterator[Any]:
    """Every cascade with every way of up-sampling. Any two values of any two settings (but the backbone's) meet.

    The fractions of i are there for that and for nothing else.
    """
    for i, (cascade, upsample) in enumerate(itertools.product((*reference.CASCADES, OWN), UPSAMPLES)):
        settings = {
            "cascade": cascade,
            "upsample": upsample,
            "backbone": {4: "resnet101", 9: "resnet152"}.get(i, "resnet50"),
            "order": ORDERS[i % 2],
            "stride": ("3x3", "1x1")[i // 2 % 2],
            "pools": (2, 4, 0)[(i + i // 3) % 3],
            "relu_without_pools": i * 3 // 2 % 2 == 1,
            "last_units": (3, 1)[i * 7 // 5 % 2],
            "void_output": i * 3 // 4 % 2 == 1,
            "coarse_width": (8, 5)[i * 3 // 5 % 2],
            # The backbone's own (None) and the authors': 128 subtracted, not divided.
            **({} if i * i // 3 % 2 else {"mean": (128, 128, 128), "std": (1, 1, 1)}),
        }
        name = cascade if isinstance(cascade, str) else "own"
        yield pytest.param(settings, ((32, 32), (33, 47), (45, 36))[i % 3], id=f"{name}-{upsample}")


@pytest.mark.parametrize(("settings", "size"), list(network_cases()))
def test_network(settings: dict[str, Any], size: tuple[int, int]) -> None:
    """From pixels to logits, and the gradient of every parameter, backbone included."""
    model = randomised(RefineNet(3, stem=2, width=4, **settings), 9)
    images = torch.randint(0, 256, (1, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    cascade = settings["cascade"]
    if isinstance(cascade, str):
        name, cascade = cascade, CASCADES[cascade]
        wired = tuple({(cascade.scales[scale], stage) for scale, stage in taps} for taps in cascade.blocks)
        assert wired == reference.CASCADES[name]

    def compute(_: list[Value], weights: Weights) -> Value:
        return reference.network(
            images.numpy(),
            weights,
            cascade.scales,
            cascade.blocks,
            settings["backbone"],
            # torchvision's ImageNet values, on 0..255; the model keeps them in single precision.
            mean=np.float32(settings.get("mean", (123.675, 116.28, 103.53))),
            std=np.float32(settings.get("std", (58.395, 57.12, 57.375))),
            stride_in=settings["stride"],
            **{name: settings[name] for name in ("pools", "relu_without_pools", "order", "upsample", "last_units")},
        )

    logits = model(images)
    assert logits.shape[1] == 3 + settings["void_output"]
    widths = {name: weight.shape[0] for name, weight in model.adapt.state_dict().items()}
    assert widths == {name: settings["coarse_width"] if "-4." in name else 4 for name in widths}
    compare(model, [], logits, compute)
