"""RefineNet in numpy and scipy, float64: what the torch modules are held against.

Written from the paper (sections 3.1 and 3.2, figure 3) and the authors' MATLAB files named below; it imports nothing of
refinenet and no torch. Each operation is its definition and carries a backward written by hand. Tensors are looked up
in `weights` under the names of a RefineNet's state dict; `at` is the prefix of a part. Maps are N x C x H x W.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import count

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import ArrayLike, NDArray
from scipy.ndimage import maximum_filter
from scipy.signal import correlate

Array = NDArray[np.float64]
Weights = Mapping[str, "Value"]

# Units in the four stages of each ResNet (He et al. 2016, table 1).
UNITS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3), "resnet152": (3, 8, 36, 3)}

# (scale of the image, stage) of the maps that feed each block, coarsest block first. Stage 4 is at 1/32.
# four: figure 2c, path_group_ids [1 2 3 4]. single: "one block takes all four", [1 1 1 1]. two: [1 1 2 2].
# two scales, eight paths: [1 2 3 4 1 2 3 4] in the authors' code; seven: section 3.1, the smaller image's finest map is
# left out and maps of equal resolution meet.
CASCADES: Mapping[str, tuple[set[tuple[float, int]], ...]] = {
    "single": ({(1.0, 4), (1.0, 3), (1.0, 2), (1.0, 1)},),
    "two": ({(1.0, 4), (1.0, 3)}, {(1.0, 2), (1.0, 1)}),
    "four": ({(1.0, 4)}, {(1.0, 3)}, {(1.0, 2)}, {(1.0, 1)}),
    "four-two-scale": ({(1.0, 4), (0.5, 4), (0.5, 3)}, {(1.0, 3), (0.5, 2)}, {(1.0, 2)}, {(1.0, 1)}),
    "four-two-scale-8path": tuple({(1.0, stage), (0.5, stage)} for stage in (4, 3, 2, 1)),
}


class Value:
    """An array, and how a gradient reaches the values it was computed from: (value, its share of our gradient)."""

    _numbers = count()

    def __init__(self, array: Array, *sources: tuple[Value, Callable[[Array], Array]]) -> None:
        self.array = np.asarray(array, np.float64)
        self.gradient = np.zeros_like(self.array)
        self.sources = sources
        self.number = next(self._numbers)

    def backward(self, gradient: Array) -> None:
        """Add to every earlier value's `gradient`; later values were made later, so they come first."""
        found, open_ = {self.number: self}, [self]
        while open_:
            for source, _ in open_.pop().sources:
                if source.number not in found:
                    found[source.number] = source
                    open_.append(source)
        self.gradient = self.gradient + gradient
        for number in sorted(found, reverse=True):
            for source, share in found[number].sources:
                source.gradient = source.gradient + share(found[number].gradient)


def relu(x: Value) -> Value:
    """max(x, 0); the gradient at 0 is 0."""
    return Value(np.maximum(x.array, 0), (x, lambda g: g * (x.array > 0)))


def add(*terms: Value) -> Value:
    """The sum of maps of one shape."""
    total = np.zeros_like(terms[0].array)
    for term in terms:
        assert term.array.shape == total.shape, "a sum broadcasts nothing"
        total = total + term.array
    return Value(total, *((term, lambda g: g) for term in terms))


def convolve(x: Value, weight: Value, bias: Value | None = None, stride: int = 1) -> Value:
    """Zero-padded by half the kernel: N x I x H x W, O x I x k x k -> N x O x H / stride x W / stride, rounded up."""
    kernels, (outputs, inputs, size, _) = weight.array, weight.array.shape
    border = ((0, 0), (0, 0), (size // 2, size // 2), (size // 2, size // 2))
    padded = np.pad(x.array, border)
    dense = np.concatenate([_correlate(padded, kernels[o][None]) for o in range(outputs)], axis=1)

    def spread(g: Array) -> Array:  # where the stride skips, the gradient is 0
        spreaded = np.zeros_like(dense)
        spreaded[:, :, ::stride, ::stride] = g
        return spreaded

    def to_x(g: Array) -> Array:
        g = np.pad(spread(g), border)
        flipped = kernels[:, :, ::-1, ::-1]
        return np.concatenate([_correlate(g, flipped[None, :, i]) for i in range(inputs)], axis=1)

    def to_weight(g: Array) -> Array:
        g = spread(g)
        return np.concatenate([_correlate(padded, g[:, o : o + 1]) for o in range(outputs)], axis=0)

    out = dense[:, :, ::stride, ::stride]
    if bias is None:
        return Value(out, (x, to_x), (weight, to_weight))
    out = out + bias.array[:, None, None]
    return Value(out, (x, to_x), (weight, to_weight), (bias, lambda g: g.sum((0, 2, 3))))


def _correlate(x: Array, kernel: Array) -> Array:
    return np.asarray(correlate(x, kernel, mode="valid", method="direct"))


def max_pool(x: Value, size: int, stride: int = 1) -> Value:
    """Largest value of each size x size window; beyond the border lies nothing (-inf)."""
    pad = size // 2
    out = maximum_filter(x.array, (1, 1, size, size), mode="constant", cval=-np.inf)[:, :, ::stride, ::stride]

    def to_x(g: Array) -> Array:
        padded = np.pad(x.array, ((0, 0), (0, 0), (pad, pad), (pad, pad)), constant_values=-np.inf)
        windows = sliding_window_view(padded, (size, size), (2, 3))[:, :, ::stride, ::stride]
        winner = windows.reshape(*g.shape, -1).argmax(-1)
        n, c, row, column = np.indices(g.shape)
        back = np.zeros_like(padded)
        np.add.at(back, (n, c, row * stride + winner // size, column * stride + winner % size), g)
        return back[:, :, pad : pad + x.array.shape[2], pad : pad + x.array.shape[3]]

    return Value(out, (x, to_x))


def normalise(x: Value, weights: Weights, at: str) -> Value:
    """Batch norm with frozen moments: (x - mean) / sqrt(variance + 1e-5) * scale + shift; the moments do not learn."""
    scale, shift = weights[f"{at}.weight"], weights[f"{at}.bias"]
    mean, variance = weights[f"{at}.running_mean"].array, weights[f"{at}.running_var"].array
    deviation = np.sqrt(variance + 1e-5)[:, None, None]
    standard = (x.array - mean[:, None, None]) / deviation
    return Value(
        standard * scale.array[:, None, None] + shift.array[:, None, None],
        (x, lambda g: g * scale.array[:, None, None] / deviation),
        (scale, lambda g: (g * standard).sum((0, 2, 3))),
        (shift, lambda g: g.sum((0, 2, 3))),
    )


def resize(x: Value, size: tuple[int, int], how: str) -> Value:
    """Separable interpolation: rows x map x columns^T, for each map.

    "bilinear": pixel centres at half integers, the border repeats. "bilinear-aligned": the corner pixels coincide.
    "bicubic": the authors' my_resize.m, that is imresize(x, larger of the two ratios), cropped at the bottom and right.
    """
    given = x.array.shape[2:]
    if given == size:
        return x
    ratio = max(size[0] / given[0], size[1] / given[1])
    rows, columns = (
        bicubic(n, m, ratio) if how == "bicubic" else linear(n, m, how == "bilinear-aligned")
        for n, m in zip(given, size, strict=True)
    )
    return Value(rows @ x.array @ columns.T, (x, lambda g: rows.T @ g @ columns))


def imresize(x: Value, scale: float) -> Value:
    """An image for one of several scales, as my_get_batch_ds_info.m: imresize to round(size * scale), half rounded up.

    Bicubic; given a size, each axis has the ratio of its own sizes.
    """
    rows, columns = (bicubic(n, m, m / n) for n in x.array.shape[2:] for m in [int(np.floor(n * scale + 0.5))])
    return Value(rows @ x.array @ columns.T, (x, lambda g: rows.T @ g @ columns))


def linear(n: int, m: int, aligned: bool) -> Array:
    """M x N matrix that interpolates n samples at m positions."""
    positions = np.linspace(0, n - 1, m) if aligned else (np.arange(m) + 0.5) * n / m - 0.5
    return np.stack([np.interp(positions, np.arange(n), one) for one in np.eye(n)], axis=1)


def bicubic(n: int, m: int, ratio: float) -> Array:
    """The first m rows of MATLAB's imresize by `ratio` along an axis of n samples, as a matrix m x n.

    Keys' kernel with a = -0.5, stretched when shrinking (the default 'Antialiasing'); output sample x (from 1) looks at
    x / ratio + (1 - 1 / ratio) / 2; weights sum to 1; beyond the border the samples are mirrored, the edge repeated.
    """
    squeeze = min(ratio, 1.0)
    mirrored = np.concatenate([np.arange(n), np.arange(n)[::-1]])
    matrix = np.zeros((m, n))
    for x in range(1, m + 1):
        centre = x / ratio + 0.5 * (1 - 1 / ratio)
        around = int(np.floor(centre - 2 / squeeze)) + np.arange(int(np.ceil(4 / squeeze)) + 2)
        shares = np.array([keys(squeeze * (centre - i)) for i in around])
        np.add.at(matrix[x - 1], mirrored[(around - 1) % (2 * n)], shares / shares.sum())
    return matrix


def keys(x: float) -> float:
    """Cubic convolution (Keys 1981, equation 15)."""
    x = abs(x)
    if x <= 1:
        return 1.5 * x**3 - 2.5 * x**2 + 1
    return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x <= 2 else 0.0


def residual_conv_unit(x: Value, weights: Weights, at: str = "") -> Value:
    """Figure 3b; My_net_util.add_res_conv_block: a bias in the first convolution only, no ReLU after the sum."""
    inner = convolve(relu(x), weights[f"{at}conv1.weight"], weights[f"{at}conv1.bias"])
    return add(convolve(relu(inner), weights[f"{at}conv2.weight"]), x)


def fusion(maps: Sequence[Value], weights: Weights, at: str = "", upsample: str = "bilinear") -> Value:
    """Figure 3c: each map through a convolution to the smallest depth, to the largest size, summed. One map: as is."""
    if len(maps) == 1:
        return maps[0]
    height, width = (max(x.array.shape[axis] for x in maps) for axis in (2, 3))
    adapted = [convolve(x, weights[f"{at}convs.{i}.weight"]) for i, x in enumerate(maps)]
    assert {x.array.shape[1] for x in adapted} == {min(x.array.shape[1] for x in maps)}
    return add(*(resize(x, (height, width), upsample) for x in adapted))


def chained_pooling(
    x: Value,
    weights: Weights,
    at: str = "",
    pools: int = 2,
    order: str = "pool-conv",
    relu_without_pools: bool = False,
) -> Value:
    """Figure 3d; gen_network_pool_block.m: each pooling block takes the one before, all are summed onto the ReLU.

    That file returns its input before the ReLU where use_chained_pool is false.
    """
    if pools == 0 and not relu_without_pools:
        return x
    step = relu(x)
    terms = [step]
    for i in range(pools):
        kernels = weights[f"{at}convs.{i}.weight"]
        step = convolve(max_pool(step, 5), kernels) if order == "pool-conv" else max_pool(convolve(step, kernels), 5)
        terms.append(step)
    return add(*terms)


def block(
    taps: Sequence[Value],
    previous: Value | None,
    weights: Weights,
    at: str = "",
    pools: int = 2,
    order: str = "pool-conv",
    upsample: str = "bilinear",
    output_units: int = 3,
    relu_without_pools: bool = False,
) -> Value:
    """Figure 3a; do_gen_refinenet_joint. The previous block's units are already behind it: it enters at the fusion."""
    paths = []
    for i, x in enumerate(taps):
        for unit in range(2):
            x = residual_conv_unit(x, weights, f"{at}adapt.{i}.{unit}.")
        paths.append(x)
    if previous is not None:
        paths.append(previous)
    x = fusion(paths, weights, f"{at}fusion.", upsample)
    x = chained_pooling(x, weights, f"{at}pooling.", pools, order, relu_without_pools)
    for unit in range(output_units):
        x = residual_conv_unit(x, weights, f"{at}output.{unit}.")
    return x


def resnet(x: Value, weights: Weights, at: str, units: Sequence[int], stride_in: str) -> list[Value]:
    """Stages 1 to 4 (1/4 to 1/32), after their ReLU. `stride_in`: "3x3" (torchvision) or "1x1" (the Caffe models)."""
    x = relu(normalise(convolve(x, weights[f"{at}conv1.weight"], stride=2), weights, f"{at}bn1"))
    x = max_pool(x, 3, stride=2)
    stages = []
    for stage, number in enumerate(units, start=1):
        for unit in range(number):
            stride = 2 if stage > 1 and unit == 0 else 1
            x = bottleneck(x, weights, f"{at}layer{stage}.{unit}.", stride, stride_in, project=unit == 0)
        stages.append(x)
    return stages


def bottleneck(x: Value, weights: Weights, at: str, stride: int, stride_in: str, project: bool) -> Value:
    """He et al. 2016, figure 5: 1x1, 3x3, 1x1, each with its norm, onto the identity or its 1x1 projection; ReLU."""
    strides = {1: stride if stride_in == "1x1" else 1, 2: stride if stride_in == "3x3" else 1, 3: 1}
    inner = x
    for i in (1, 2, 3):
        inner = normalise(convolve(inner, weights[f"{at}conv{i}.weight"], stride=strides[i]), weights, f"{at}bn{i}")
        inner = relu(inner) if i < 3 else inner
    if project:
        x = normalise(convolve(x, weights[f"{at}downsample.0.weight"], stride=stride), weights, f"{at}downsample.1")
    return relu(add(inner, x))


def network(
    images: Array,
    weights: Weights,
    scales: Sequence[float],
    cascade: Sequence[Sequence[tuple[int, int]]],
    backbone: str,
    *,
    mean: ArrayLike,
    std: ArrayLike,
    stride_in: str = "3x3",
    pools: int = 2,
    order: str = "pool-conv",
    upsample: str = "bilinear",
    last_units: int = 3,
    relu_without_pools: bool = False,
) -> Value:
    """N x 3 x H x W in 0..255 -> logits at 1/4, no dropout. `cascade`: taps (scale, stage) as in the state dict."""
    centre, spread = (np.asarray(v, np.float64)[:, None, None] for v in (mean, std))
    pixels = Value((images - centre) / spread)
    stages = []
    for i, scale in enumerate(scales):
        scaled = pixels if scale == 1 else imresize(pixels, scale)
        stages.append(resnet(scaled, weights, f"backbones.{i}.", UNITS[backbone], stride_in))
    previous = None
    for b, taps in enumerate(cascade):
        adapted = [convolve(stages[s][t - 1], weights[f"adapt.{s}-{t}.weight"]) for s, t in taps]
        units = last_units if b == len(cascade) - 1 else 3
        previous = block(adapted, previous, weights, f"blocks.{b}.", pools, order, upsample, units, relu_without_pools)
    assert previous is not None
    return convolve(previous, weights["classifier.weight"], weights["classifier.bias"])
