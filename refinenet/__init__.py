"""RefineNet (Lin, Milan, Shen, Reid; CVPR 2017): the network, its data, training, inference and metrics.

`RefineNet` is the network, `load` reads a model file, `Predictor` labels images with one:

    predictor = refinenet.Predictor("models/voc-res101.safetensors")
    labels = predictor("street.jpg")

`from refinenet import RefineNet` costs an import of torch; `refinenet.data.split` alone does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refinenet.inference.predictor import Predictor as Predictor
    from refinenet.model.network import RefineNet as RefineNet
    from refinenet.model.network import load as load

__all__ = ["Predictor", "RefineNet", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'refinenet' has no attribute {name!r}")
    from importlib import import_module

    module = "refinenet.inference.predictor" if name == "Predictor" else "refinenet.model.network"
    return getattr(import_module(module), name)
