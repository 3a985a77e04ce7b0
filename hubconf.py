"""Entry points of torch.hub: `torch.hub.load("<owner>/<repository>", "refinenet", weights="voc.safetensors")`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refinenet import RefineNet

dependencies = ["torch", "numpy", "safetensors"]


def refinenet(classes: int = 21, weights: str | None = None, **settings: Any) -> RefineNet:
    """RefineNet (CVPR 2017) in eval mode: images N x 3 x H x W in 0..255 -> logits N x classes x H/4 x W/4.

    `weights`: a model file of this project, which says its own classes and settings. Without it the network is
    untrained and `settings` are those of `refinenet.config.Config`: backbone="resnet101", cascade="four", pools=2 ...
    """
    from refinenet import RefineNet, load

    if weights is not None:
        if settings:
            raise TypeError(f"{weights} has its own settings, expected no {', '.join(settings)}")
        model, _ = load(weights)
        return model
    return RefineNet(classes, **settings).eval()
