"""Multi-scale prediction of whole images (paper, section 4; the authors' fuse_multiscale_results.m)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from refinenet.blocks import imresize, resize
from refinenet.config import Average, Protocol, Resizing
from refinenet.data import Array

if TYPE_CHECKING:
    from refinenet.fast import FastRefineNet
    from refinenet.network import RefineNet

_LOG_FLOOR = -20.0  # of the authors' log-space resizing
_AT_ONCE = 2**25  # scores held at the image's size


@torch.inference_mode()
def predict(
    model: RefineNet | FastRefineNet,
    image: Array,
    protocols: Mapping[str, Protocol],
    resizing: Resizing,
    average: Average = "probability",
) -> dict[str, Array]:
    """Label map of one image under each protocol; a scale that several protocols share is computed once.

    image: H x W x 3 uint8. Returns H x W uint8 class indices by protocol; of a network with a void output, the number
    of classes where that wins. "probability" averages the softmax; "log" resizes it in log space with the floor of the
    authors' code, then averages.
    """
    height, width = image.shape[:2]
    device = next(model.parameters()).device
    pixels = torch.from_numpy(np.array(image)).to(device).permute(2, 0, 1)[None].float()
    views = sorted({(scale, flip) for p in protocols.values() for scale in p.scales for flip in _flips(p)})
    maps = {view: _probabilities(model, pixels, view, resizing.factor(height, width), average) for view in views}
    labels = {}
    for name, protocol in protocols.items():
        chosen = [maps[scale, flip] for scale in protocol.scales for flip in _flips(protocol)]
        scores = _fuse(chosen, average)
        labels[name] = _best(scores, (height, width)).cpu().numpy()
    return labels


def _flips(protocol: Protocol) -> Sequence[bool]:
    return (False, True) if protocol.flip else (False,)


def _probabilities(
    model: RefineNet | FastRefineNet, pixels: Tensor, view: tuple[float, bool], factor: float, average: Average
) -> Tensor:
    """1 x classes x h x w, at a quarter of the scaled image; log-probabilities if they are averaged so."""
    scale, flip = view
    # The network halves five times: below 32 pixels its coarsest map would see less than one cell.
    size = [max(32, round(s * factor * scale)) for s in pixels.shape[2:]]
    scaled = imresize(pixels, size).clamp(0, 255)
    logits = model(scaled.flip(3) if flip else scaled).float()
    if flip:
        logits = logits.flip(3)
    if average == "log":
        return F.log_softmax(logits, dim=1).clamp_min(_LOG_FLOOR)
    return F.softmax(logits, dim=1)


def _fuse(maps: Sequence[Tensor], average: Average) -> Tensor:
    """Resize to the largest map and average: 1 x classes x h x w, log-probabilities if they are averaged so."""
    largest = max((m.shape[2:] for m in maps), key=lambda s: s[0] * s[1])
    resized = [resize(m, largest) for m in maps]
    total = torch.stack([m.exp() for m in resized] if average == "log" else resized).mean(0)
    return total.clamp_min(np.exp(_LOG_FLOOR)).log() if average == "log" else total


def _best(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize 1 x classes x h x w to `size` and take the best class: H x W uint8."""
    if scores.shape[1] * size[0] * size[1] <= _AT_ONCE:
        return resize(scores, size).argmax(1)[0].to(torch.uint8)
    # A large photo: class by class, or 150 classes of 24 megapixels would take 14 GB.
    best = resize(scores[:, :1], size)[0, 0]
    label = torch.zeros(size, dtype=torch.uint8, device=scores.device)
    for index in range(1, scores.shape[1]):
        score = resize(scores[:, index : index + 1], size)[0, 0]
        label.masked_fill_(score > best, index)
        torch.maximum(best, score, out=best)
    return label
