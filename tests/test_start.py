"""Where a training starts: a backbone's weights, or all of a network that was trained on more data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pipeline.start import begin
from refinenet import RefineNet
from refinenet.files import UserError
from refinenet.network import save

THIN: dict[str, Any] = {"backbone": "resnet50", "stem": 2, "width": 4, "coarse_width": 8, "pools": 1}


def network(seed: int, **changes: Any) -> RefineNet:
    torch.manual_seed(seed)
    return RefineNet(**{"classes": 3, **THIN, **changes})


def same(a: RefineNet, b: RefineNet, part: str = "") -> list[bool]:
    pairs = zip(a.named_parameters(), b.named_parameters(), strict=True)
    return [torch.equal(x, y) for (name, x), (_, y) in pairs if name.startswith(part)]


def test_a_backbone_is_loaded_and_the_rest_is_drawn(tmp_path: Path) -> None:
    trained, path = network(1), tmp_path / "resnet50.safetensors"
    save_file(trained.backbones[0].state_dict(), path)
    first, again, other = network(2), network(3), network(2)
    begin(path, first, "scaled", 5)
    begin(path, again, "scaled", 5)
    begin(path, other, "scaled", 6)
    assert all(same(trained, first, "backbones"))
    assert all(same(first, again))
    assert not all(same(first, other))


def test_a_pretraining_goes_on_with_the_whole_network(tmp_path: Path) -> None:
    trained, path = network(1), tmp_path / "voc-coco.safetensors"
    save(trained, path, {"classes": ("a", "b", "c")})
    after = network(2, dropout=0.1)
    begin(path, after, "scaled", 5)
    assert all(same(trained, after))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": 4}, r"voc-coco\.safetensors: a network with classes 3, expected 4"),
        ({"cascade": "two"}, r"a network with cascade four, expected two"),
        ({"mean": (128.0, 128.0, 128.0)}, r"a network with mean None, expected \[128\.0, 128\.0, 128\.0\]"),
    ],
)
def test_another_network_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = tmp_path / "voc-coco.safetensors"
    save(network(1), path, {})
    with pytest.raises(UserError, match=message):
        begin(path, network(2, **changes), "scaled", 0)


def test_no_file_and_half_a_file(tmp_path: Path) -> None:
    path = tmp_path / "voc-coco.safetensors"
    with pytest.raises(UserError, match=r"voc-coco\.safetensors: no such file"):
        begin(path, network(0), "scaled", 0)
    save(network(1), path, {})
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="cut short"):
        begin(path, network(0), "scaled", 0)
