"""One training over several processes, each with a slice of every batch (`torchrun`).

The result is that of one process with the same batches, to rounding: the loss is divided by the labelled pixels of the
whole batch and gradients are summed. Only dropout differs: each process draws its own masks.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist


class ProcessGroup:
    """The processes of one training, seen from number `rank` of `world`; all must call a method at the same point."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world
        self._asked: tuple[Tensor, dist.Work] | None = None

    @property
    def first(self) -> bool:
        """Return whether this is the process that writes files."""
        return self.rank == 0

    def share(self, batch: int) -> slice:
        """Return which of a batch of `batch` images this process computes; shares differ by one at most."""
        return slice(self.rank * batch // self.world, (self.rank + 1) * batch // self.world)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Sum `values` over the processes in place, and return it."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Return of each flag whether it was set in any process in the call before.

        One call late, so that no process waits; but all hear the same at the same step.
        """
        if self.world == 1:
            return flags
        anywhere = (False,) * len(flags)
        if self._asked:
            answer, work = self._asked
            work.wait()
            anywhere = tuple(count > 0 for count in answer.tolist())
        answer = torch.tensor([float(flag) for flag in flags])  # on the host, over gloo: no device is waited for
        work = dist.all_reduce(answer, async_op=True)
        assert work is not None
        self._asked = answer, work
        return anywhere

    def barrier(self) -> None:
        """Wait until all processes are here."""
        if self._asked:
            self._asked[1].wait()
            self._asked = None
        if self.world > 1:
            dist.barrier()

    @contextmanager
    def wrap_ddp(self, network: nn.Module, without_gradient: Sequence[nn.Parameter] = ()) -> Iterator[nn.Module]:
        """Yield `network` such that gradients are averaged over the processes in each backward pass.

        The first backward pass makes buckets (25 MB, the first 1 MB) in the order of the gradients. From then on those
        of a bucket are summed as soon as it is full, while those of the layers before are computed; they stay in it, so
        that there is no second copy of them.

        without_gradient: parameters that the loss does not depend on (`parameters_without_gradient`), constants within
            this block. DDP would wait for their gradients; asked to find out itself (find_unused_parameters), it walks
            through the graph and sums a map of what was used in each step, for which on a GPU the host waits.
        """
        if self.world == 1:
            yield network
            return
        device = next(network.parameters()).device
        for parameter in without_gradient:
            parameter.requires_grad_(False)
        try:
            with warnings.catch_warnings():
                # Moments are constants: nothing to broadcast. PyTorch warns that the argument will be renamed.
                warnings.simplefilter("ignore", FutureWarning)
                wrapped = nn.parallel.DistributedDataParallel(
                    network,
                    device_ids=[device.index] if device.type == "cuda" else None,
                    broadcast_buffers=False,
                    gradient_as_bucket_view=True,
                )
            yield wrapped
        finally:
            for parameter in without_gradient:
                parameter.requires_grad_(True)


def parameters_without_gradient(model: nn.Module, side: int) -> list[nn.Parameter]:
    """Return the parameters that the output of `model` does not depend on, by its graph for one image of `side` pixels.

    Of a RefineNet those of the stages of a backbone below the last one that a block of the cascade takes.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    image = torch.zeros(1, 3, side, side, device=parameters[0].device)
    gradients = torch.autograd.grad(model(image).sum(), parameters, allow_unused=True)
    return [parameter for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is None]


@contextmanager
def processes(device: torch.device) -> Iterator[ProcessGroup]:
    """Join the process group that torchrun started; a group of one without torchrun."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield ProcessGroup()
        return
    more: dict[str, Any] = {}
    if device.type == "cuda":
        torch.cuda.set_device(device)
        more = {"device_id": device}
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", **more)
    try:
        yield ProcessGroup(dist.get_rank(), world)
    finally:
        dist.destroy_process_group()
