"""Where a training starts: a backbone's weights, or all of a network that was trained on more data."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import toy_training
from safetensors import safe_open
from safetensors.torch import save_file

from refinenet import RefineNet
from refinenet.config import Initial
from refinenet.data.augment import make_batch
from refinenet.data.split import Split
from refinenet.errors import UserError
from refinenet.model.network import save
from refinenet.training.initial import crops_of, load_initial_weights

RECIPE = toy_training.RECIPE
THIN: dict[str, Any] = {"backbone": "resnet50", "stem": 2, "width": 4, "coarse_width": 8, "pools": 1}


def network(seed: int, **changes: Any) -> RefineNet:
    torch.manual_seed(seed)
    return RefineNet(**{"classes": 3, **THIN, **changes})


def same(a: RefineNet, b: RefineNet, part: str = "") -> list[bool]:
    pairs = zip(a.named_parameters(), b.named_parameters(), strict=True)
    return [torch.equal(x, y) for (name, x), (_, y) in pairs if name.startswith(part)]


@pytest.fixture
def images(tmp_path: Path) -> Split:
    return toy_training.write(tmp_path / "train.arrow")


def test_a_backbone_is_loaded_and_the_rest_is_drawn(tmp_path: Path, images: Split) -> None:
    trained, path = network(1), tmp_path / "resnet50.safetensors"
    save_file(trained.backbones[0].state_dict(), path)
    first, again, other = network(2), network(3), network(2)
    load_initial_weights(path, first, images, RECIPE, 5)
    load_initial_weights(path, again, images, RECIPE, 5)
    load_initial_weights(path, other, images, RECIPE, 6)
    assert all(same(trained, first, "backbones"))
    assert all(same(first, again))
    assert not all(same(first, other))


@pytest.mark.parametrize("initial", ["scaled", "variance_matched"])
def test_a_pretraining_goes_on_with_the_whole_network(tmp_path: Path, images: Split, initial: Initial) -> None:
    trained, path = network(1), tmp_path / "voc-coco.safetensors"
    save(trained, path, {"classes": ("a", "b", "c")})
    after = network(2, dropout=0.1)
    load_initial_weights(path, after, images, replace(RECIPE, init=initial), 5)
    assert all(same(trained, after))


@pytest.mark.parametrize("cascade", ["four", "four-two-scale"])
def test_levelled_maps_are_equally_far_apart_whatever_the_backbone_gives(
    tmp_path: Path, images: Split, cascade: str
) -> None:
    trained, path = network(1, cascade=cascade), tmp_path / "resnet50.safetensors"
    for stage, times in (("layer1", 300.0), ("layer4", 0.01)):
        for block in getattr(trained.backbones[0], stage):
            block.bn3.weight.data.mul_(times)
    save_file(trained.backbones[0].state_dict(), path)
    variance_matched, scaled = network(2, cascade=cascade), network(2, cascade=cascade)
    load_initial_weights(path, variance_matched, images, replace(RECIPE, init="variance_matched"), 5)
    load_initial_weights(path, scaled, images, RECIPE, 5)
    windows = crops_of(images, RECIPE, 5).draw(0, 8)
    batch = make_batch(windows, RECIPE.crop, RECIPE.input_scale, torch.device("cpu")).images
    found = {}
    for name, convolution in variance_matched.adapt.items():
        convolution.register_forward_hook(lambda m, i, output, name=name: found.__setitem__(name, output.std().item()))
    assert variance_matched.training
    with torch.no_grad():
        variance_matched.eval()(batch)
    assert found == pytest.approx({name: (0.25, 0.5, 1.0, 2.0)[int(name[-1]) - 1] for name in found}, rel=1e-4)
    assert len(found) == len(variance_matched.adapt)
    fused = {name for name, _ in variance_matched.named_parameters() if ".fusion" in name and name.endswith("weight")}
    assert fused
    for name in fused:  # the centre hands the map on, and what lies around adds next to nothing
        weight, before = (net.get_parameter(name).detach() for net in (variance_matched, scaled))
        centre = weight[:, :, 1, 1]
        assert torch.allclose(centre @ centre.T, torch.eye(len(centre)), atol=0.2), name
        assert weight.square().sum() < 1.1 * centre.square().sum(), name
        assert before.square().sum() > 4 * before[:, :, 1, 1].square().sum(), name
    assert all(same(variance_matched, scaled, "backbones"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": 4}, r"voc-coco\.safetensors: a network with classes 3, expected 4"),
        ({"cascade": "two"}, r"a network with cascade four, expected two"),
        ({"mean": (128.0, 128.0, 128.0)}, r"a network with mean None, expected \[128\.0, 128\.0, 128\.0\]"),
    ],
)
def test_another_network_is_named(tmp_path: Path, images: Split, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "voc-coco.safetensors"
    save(network(1), path, {})
    with pytest.raises(UserError, match=message):
        load_initial_weights(path, network(2, **changes), images, RECIPE, 0)


@pytest.mark.parametrize(("pools", "relu", "fits"), [(1, False, True), (0, True, True), (0, False, False)])
def test_a_file_from_before_the_relus_setting(
    tmp_path: Path, images: Split, pools: int, relu: bool, fits: bool
) -> None:
    """It does not say; without pooling blocks its network had the ReLU, with some there is nothing to say."""
    path = tmp_path / "voc-coco.safetensors"
    trained = network(1, pools=pools, relu_without_pools=not pools)
    save(trained, path, {})
    with safe_open(path, framework="pt") as file:
        metadata = json.loads(file.metadata()["refinenet"])
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
    del metadata["config"]["relu_without_pools"]
    save_file(tensors, path, {"refinenet": json.dumps(metadata)})
    after = network(2, pools=pools, relu_without_pools=relu)
    if fits:
        load_initial_weights(path, after, images, RECIPE, 0)
        assert all(same(trained, after))
    else:
        with pytest.raises(UserError, match="a network with relu_without_pools True, expected False"):
            load_initial_weights(path, after, images, RECIPE, 0)


def test_no_file_and_half_a_file(tmp_path: Path, images: Split) -> None:
    path = tmp_path / "voc-coco.safetensors"
    with pytest.raises(UserError, match=r"voc-coco\.safetensors: no such file"):
        load_initial_weights(path, network(0), images, RECIPE, 0)
    save(network(1), path, {})
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="cut short"):
        load_initial_weights(path, network(0), images, RECIPE, 0)
