"""Every setting of the method, as plain data: importing this costs no torch.

Where the paper and the authors' code differ, both values are here and the default says whose it is.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Literal

from refinenet.errors import UserError

PoolOrder = Literal["pool-conv", "conv-pool"]
Upsample = Literal["bilinear", "bilinear-aligned", "bicubic"]
Stride = Literal["3x3", "1x1"]
Average = Literal["probability", "log"]
Initial = Literal["gaussian", "scaled", "variance_matched"]
Precision = Literal["float32", "bfloat16", "auto"]  # auto: bfloat16 where the device computes in it

AS_IT_IS = "as it is"  # as a model file's short edge: images are not resized, whatever their size
SMALLEST_TILE = 256  # pixels a side; smaller tiles would be mostly border

# The authors' epochs: fewest and most images (gen_net_opts_model_type1.m); at most the whole set.
EPOCH = (1000, 2000)

# Bottleneck units in the four stages of each ResNet.
RESNETS: Mapping[str, tuple[int, int, int, int]] = {
    "resnet50": (3, 4, 6, 3),
    "resnet101": (3, 4, 23, 3),
    "resnet152": (3, 8, 36, 3),
}


@dataclass(frozen=True)
class Cascade:
    """Which maps feed which block, coarsest block first.

    `blocks`: for each block its taps (scale, stage): stage 1 to 4 of the backbone (1/4 to 1/32) at `scales[scale]` of
    the image. Every block but the first also takes the output of the one before. `scales`: an independent backbone for
    each. The authors' code says the same with `path_group_ids`.
    """

    blocks: tuple[tuple[tuple[int, int], ...], ...]
    scales: tuple[float, ...] = (1.0,)

    def __post_init__(self) -> None:
        # Values from YAML and JSON are lists.
        object.__setattr__(self, "blocks", tuple(tuple((t[0], t[1]) for t in block) for block in self.blocks))
        object.__setattr__(self, "scales", tuple(self.scales))
        taps = [tap for block in self.blocks for tap in block]
        if not self.blocks or not all(self.blocks):
            raise UserError(f"cascade.blocks is {self.blocks}, expected one or more blocks with one or more taps each")
        if not self.scales or min(self.scales) <= 0:
            raise UserError(f"cascade.scales is {list(self.scales)}, expected one or more, above 0")
        for scale, stage in taps:
            if not 0 <= scale < len(self.scales) or not 1 <= stage <= 4:
                raise UserError(
                    f"cascade: tap [{scale}, {stage}] is not [scale, stage] with scale 0 to {len(self.scales) - 1} "
                    "and stage 1 to 4"
                )
            if taps.count((scale, stage)) > 1:
                raise UserError(f"cascade: tap [{scale}, {stage}] occurs twice, expected each map to feed one block")
        for scale in range(len(self.scales)):
            if not any(tap[0] == scale for tap in taps):
                raise UserError(f"cascade: no block takes a map of scale {scale}, its backbone would be idle")


# Table 9. The 2-scale network of the paper has seven paths (section 3.1); which, is read from the repository
# googleinterns/out-of-distribution: the half-size image's stage 1 is unused and maps of equal resolution meet. The
# authors' code has eight, half-size image first: path_group_ids [1 2 3 4 1 2 3 4]. The image scales 1.2 and 0.6 are an
# input scale of 1.2 and these.
CASCADES: Mapping[str, Cascade] = {
    "single": Cascade((((0, 4), (0, 3), (0, 2), (0, 1)),)),
    "two": Cascade((((0, 4), (0, 3)), ((0, 2), (0, 1)))),
    "four": Cascade((((0, 4),), ((0, 3),), ((0, 2),), ((0, 1),))),
    "four-two-scale": Cascade((((0, 4), (1, 3), (1, 4)), ((0, 3), (1, 2)), ((0, 2),), ((0, 1),)), scales=(1.0, 0.5)),
    "four-two-scale-8path": Cascade(
        (((1, 4), (0, 4)), ((1, 3), (0, 3)), ((1, 2), (0, 2)), ((1, 1), (0, 1))), scales=(1.0, 0.5)
    ),
}


@dataclass(frozen=True)
class Config:
    """The architecture of a RefineNet: with its weights it defines the function. The defaults are the paper's network.

    docs/reference/settings.md has what the paper and the authors' code say, and which table needs which value.
    """

    classes: int
    backbone: str = "resnet101"  # or "timm:<name>", any timm model with maps at 1/4, 1/8, 1/16 and 1/32
    cascade: str | Cascade = "four"  # one of CASCADES, or your own
    pools: int = 2  # chained pooling blocks: 0 and 2 in the ablation, 4 for Person-Part and VOC, else 2
    # With pools 0, whether the ReLU before the chain stays. The paper does not say what "Chained pool. no" leaves out,
    # the authors' gen_network_pool_block.m returns before the ReLU where use_chained_pool is false.
    relu_without_pools: bool = False
    order: PoolOrder = "pool-conv"  # the paper and the released VOC and Cityscapes models; the other five: conv-pool
    upsample: Upsample = "bilinear"  # the paper; "bicubic" in the authors' my_resize.m; "-aligned": align_corners
    dropout: float = 0.5  # on taps of > 512 channels and before the classifier (authors' code; not in the paper)
    width: int = 256  # channels of the decoder (paper, 3.2)
    coarse_width: int = 512  # of the paths from stage 4 (paper, 3.2)
    last_units: int = 3  # RCUs after the last block's pooling: its own and the two extra ones (paper, 3.2)
    void_output: bool = False  # one more output, the last, for void (authors' code: all but Person-Part and Context)
    stride: Stride = "3x3"  # where a ResNet's down-sampling unit has its stride: as torchvision; "1x1" as Caffe's
    mean: tuple[float, float, float] | None = None  # RGB, taken from values in 0..255; None: as the backbone learned
    std: tuple[float, float, float] | None = None  # the authors: 128 and 1 for every channel
    stem: int = 64  # channels of a ResNet's first convolution; less makes it thinner and leaves depth and wiring

    def __post_init__(self) -> None:
        if not self.backbone.startswith("timm:"):
            _one_of("backbone", self.backbone, RESNETS, "timm:<name>")
        if isinstance(self.cascade, str):
            _one_of("cascade", self.cascade, CASCADES, "{blocks: ..., scales: ...}")
        elif isinstance(self.cascade, Mapping):
            object.__setattr__(self, "cascade", Cascade(**self.cascade))
        _one_of("order", self.order, ("pool-conv", "conv-pool"))
        _one_of("upsample", self.upsample, ("bilinear", "bilinear-aligned", "bicubic"))
        _one_of("stride", self.stride, ("3x3", "1x1"))
        for name in ("classes", "stem", "width", "coarse_width"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, expected 1 or more")
        if min(self.pools, self.last_units) < 0 or not 0 <= self.dropout < 1:
            raise UserError(
                f"pools is {self.pools}, last_units {self.last_units}, dropout {self.dropout}; "
                "expected 0 or more, 0 or more, and 0 <= dropout < 1"
            )
        for name in ("mean", "std"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, tuple(value))
                if len(value) != 3:
                    raise UserError(f"{name} is {list(value)}, expected three numbers, R G B")
        if self.std is not None and min(self.std) <= 0:
            raise UserError(f"std is {list(self.std)}, expected numbers above 0")

    @property
    def paths(self) -> Cascade:
        """Return the cascade, whether it was given by name or written out."""
        return self.cascade if isinstance(self.cascade, Cascade) else CASCADES[self.cascade]

    @property
    def outputs(self) -> int:
        """Return the number of channels of the logits."""
        return self.classes + self.void_output


def _one_of(name: str, value: str, known: Collection[str], other: str = "") -> None:
    if value not in known:
        raise UserError(f"{name} is {value!r}, expected one of {', '.join(known)}{other and f' or {other}'}")


@dataclass(frozen=True)
class Recipe:
    """How a network is trained. The defaults are the authors' (file of their code in brackets)."""

    steps: int
    batch_size: int = 1  # images a step (gen_net_opts)
    crop: int = 400  # pixels a side, after scaling; 600 for Cityscapes (demo)
    input_scale: float = 1.2  # the crop is enlarged by this before the network (gen_featnet_config_resnet_custom)
    scales: tuple[float, ...] = (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)  # (batch_do_data_augmentation; paper: 0.7 to 1.3)
    short_edge: tuple[int, int] | None = None  # pixels, clamped to this before all else; authors: 450 to 1100
    flip: bool = True
    class_balanced: bool = True  # classes drawn evenly, crops centred on a pixel of it (my_epoch_run_config, type 1)
    epoch_sampling: bool = True  # with it: the authors' epochs of 1000 to 2000 images; else a class, then its image
    class_sampling_power: float = 0.0  # where a class is drawn first: as often as its number of images to this power
    square_crops: bool = True  # a square within the short edge (batch_do_data_crop); else longer along the long edge
    lr: float = 5e-4  # of the new layers (demo_refinenet_train)
    backbone_lr: float = 0.1  # times lr, for the layers that start from ImageNet weights
    momentum: float = 0.9
    weight_decay: float = 5e-4
    schedule: Literal["drop", "cosine"] = "drop"  # drop: lr x 0.1 at `drop_at`, by hand in the authors' code
    drop_at: float = 0.8  # fraction of the steps
    warmup: int = 0  # steps over which the rate rises linearly
    grad_clip: float | None = None  # largest norm of the gradient; the authors do not clip
    init: Initial = "gaussian"  # see RefineNet.initialise
    optimiser: Literal["sgd", "adamw"] = "sgd"  # adamw: ours, momentum is its beta 1
    precision: Precision = "float32"  # of the convolutions; weights, gradients and the loss are float32 in both
    channels_last: bool = False  # order of the maps in memory, which convolutions are faster in
    compile: bool = False  # torch.compile of the network
    num_processes: int = 1  # a GPU each, a share of each batch: same result to rounding, but for dropout's masks
    activation_checkpointing: bool = False  # maps are recomputed for the gradient instead of kept: less memory
    log_every: int = 20
    hold_out: float = 0.0  # share of the training images never trained on; the weights best on them are kept. Ours
    hold_out_every: int = 200  # steps between two looks at them

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "crop", "num_processes", "log_every", "hold_out_every"):
            if getattr(self, name) < 1:
                raise UserError(f"train.{name} is {getattr(self, name)}, expected 1 or more")
        if self.batch_size < self.num_processes:
            raise UserError(
                f"train.batch_size is {self.batch_size}, expected an image for each of {self.num_processes} processes"
            )
        if not 0 <= self.hold_out < 1:
            raise UserError(
                f"train.hold_out is {self.hold_out}, expected a share of the images: 0 (none) or more, below 1"
            )
        if not 0 <= self.class_sampling_power <= 1:
            raise UserError(
                f"train.class_sampling_power is {self.class_sampling_power}, expected 0 (all classes alike) to 1 "
                "(as in images)"
            )
        if not self.scales or min(self.scales) <= 0 or self.input_scale <= 0 or self.lr <= 0:
            raise UserError("train.scales, train.input_scale and train.lr must be above 0")


def steps_of_epochs(epochs: float, images: int, batch_size: int) -> int:
    """Return how many steps `epochs` of the authors' epochs are on a set of `images` images."""
    return max(1, round(epochs * min(images, EPOCH[1]) / batch_size))


@dataclass(frozen=True)
class Protocol:
    """One way to test: the image at each of `scales`, with `flip` also mirrored, scores averaged with equal weights.

    `crf`: a dense CRF on the averaged probabilities (refinenet/inference/crf.py); the paper has it on VOC.
    """

    scales: tuple[float, ...]
    flip: bool = False
    crf: bool = False

    def __post_init__(self) -> None:
        if not self.scales or min(self.scales) <= 0:
            raise UserError(f"scales is {list(self.scales)}, expected one or more, above 0")


@dataclass(frozen=True)
class Resizing:
    """How an image is resized before the scales of a protocol.

    Its short edge is clamped to `short_edge` (pixels; None: as it is), then it is enlarged by `input_scale` (1.2 in the
    authors' code, in training and test).
    """

    input_scale: float = 1.0
    short_edge: tuple[int, int] | None = None

    def factor(self, height: int, width: int) -> float:
        """Return the factor by which an image of height x width pixels is resized at scale 1."""
        return self.input_scale * clamp_short_edge(height, width, self.short_edge)


def clamp_short_edge(height: int, width: int, limits: tuple[int, int] | None) -> float:
    """Return the factor that brings the short edge of a height x width image within `limits`; 1 without limits."""
    if limits is None:
        return 1.0
    short = min(height, width)
    return min(max(short, limits[0]), limits[1]) / short
