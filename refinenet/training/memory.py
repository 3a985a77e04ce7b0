"""Memory of a training step: maps computed again instead of kept, and how much a step holds at once."""

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

# What keeps its inputs only. Small parts: a part's insides are all held at once when its gradient is computed.
_PARTS = (Bottleneck, ResidualConvUnit, MultiResolutionFusion, ChainedResidualPooling)


@contextmanager
def activation_checkpointing(model: RefineNet, wanted: bool = True) -> Iterator[None]:
    """In this block a part of `model` (a bottleneck, a residual conv unit, a chain of pools) keeps its inputs only.

    What the gradient needs besides is computed again when it is its turn, with the same random numbers: the same
    gradients, for a third more arithmetic. Nothing where it is not `wanted`.
    """
    parts = [module for module in model.modules() if isinstance(module, _PARTS)] if wanted else []
    for part in parts:
        setattr(part, "forward", _recomputing(part.forward))  # noqa: B010 - a checker sees a method
    _of_timm(model, wanted)
    try:
        yield
    finally:
        for part in parts:
            del part.forward  # that of its class again
        _of_timm(model, False)


def _of_timm(model: RefineNet, wanted: bool) -> None:
    """Those of timm's networks that can do the same have a switch for it; others keep their maps."""
    for backbone in model.backbones:
        net: Any = getattr(backbone, "net", None)
        if hasattr(net, "set_grad_checkpointing"):
            net.set_grad_checkpointing(wanted)


def _recomputing(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*inputs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*inputs)
        return checkpoint(forward, *inputs, use_reentrant=False)

    return run


class _Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that come into being, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.most: int = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # What goes in and is not known was there before: weights, images.
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


def activation_bytes(run: Callable[[], Tensor]) -> int:
    """The most bytes that `run`, which returns a loss, and its backward pass hold at once; gradients are counted.

    Of eager code on a CPU. On a GPU `torch.cuda.max_memory_allocated` says more: also what its kernels need.
    """
    with _Held() as held:
        run().backward()  # type: ignore[no-untyped-call]
    most: int = held.most
    return most
