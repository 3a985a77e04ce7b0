"""Memory of a training step: activation checkpointing, and the peak of what a step holds."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.checkpoint import checkpoint

from refinenet.model.backbones import Bottleneck
from refinenet.model.blocks import ChainedResidualPooling, MultiResolutionFusion, ResidualConvUnit
from refinenet.model.network import RefineNet

# Modules that keep their inputs only. Small ones: all maps inside one are held when its gradient is computed.
_PARTS = (Bottleneck, ResidualConvUnit, MultiResolutionFusion, ChainedResidualPooling)


@contextmanager
def activation_checkpointing(model: RefineNet, enabled: bool = True) -> Iterator[None]:
    """Within this block the parts of `model` (bottlenecks, RCUs, fusions, pooling chains) keep their inputs only.

    The backward pass recomputes the maps inside a part with the same random numbers: the same gradients, for a third
    more arithmetic. Does nothing unless `enabled`.
    """
    parts = [module for module in model.modules() if isinstance(module, _PARTS)] if enabled else []
    for part in parts:
        setattr(part, "forward", _recomputing(part.forward))  # noqa: B010 - a checker sees a method
    _set_timm(model, enabled)
    try:
        yield
    finally:
        for part in parts:
            del part.forward  # back to the method of its class
        _set_timm(model, False)


def _set_timm(model: RefineNet, enabled: bool) -> None:
    """Switch gradient checkpointing of timm backbones that support it; others keep their maps."""
    for backbone in model.backbones:
        net: Any = getattr(backbone, "net", None)
        if hasattr(net, "set_grad_checkpointing"):
            net.set_grad_checkpointing(enabled)


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        return checkpoint(forward, *inputs, use_reentrant=False)

    return run


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that are created in this mode, as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.most: int = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # An unknown input was created before this mode: weights, images.
        self._add((args, kwargs), counted=False)
        result = function(*args, **kwargs)
        self._add(result, counted=True)
        self.most = max(self.most, self.now)
        return result

    def _add(self, values: Any, counted: bool) -> None:
        for tensor in tree_iter(values):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage())._cdata not in self._known:
                size = storage.nbytes() if counted else 0
                self._known.add(storage._cdata)
                self.now += size
                weakref.finalize(storage, self._drop, storage._cdata, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def held_bytes(run: Callable[[], object]) -> int:
    """Return the peak bytes of the tensors that `run` creates, as long as they live.

    For eager code on a CPU, or on the meta device, which computes nothing. On a GPU use
    `torch.cuda.max_memory_allocated`, which includes what kernels need.
    """
    with _Held() as held:
        run()
    most: int = held.most
    return most


def activation_bytes(run: Callable[[], Tensor]) -> int:
    """Return the `held_bytes` of `run`, which returns a loss, and its backward pass; gradients are counted."""
    return held_bytes(lambda: run().backward())  # type: ignore[no-untyped-call]
