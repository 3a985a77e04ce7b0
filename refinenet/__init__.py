"""RefineNet (Lin, Milan, Shen, Reid; CVPR 2017): the network, its data, training, inference and metrics.

`from refinenet import RefineNet` costs an import of torch; `refinenet.data.split` alone does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from refinenet.model.network import RefineNet as RefineNet
    from refinenet.model.network import load as load

__all__ = ["RefineNet", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'refinenet' has no attribute {name!r}")
    from refinenet.model import network

    return getattr(network, name)
