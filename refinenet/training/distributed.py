"""One training over several processes, each with a slice of every batch (`torchrun`).

The result is that of one process with the same batches, to rounding: the loss is divided by the labelled pixels of the
whole batch and gradients are summed. Only dropout differs, each process draws masks of its own.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist


class ProcessGroup:
    """What this process, number `rank` of `world`, does with the others: each calls every method at the same point."""

    def __init__(self, rank: int = 0, world: int = 1) -> None:
        self.rank, self.world = rank, world
        self._asked: tuple[Tensor, dist.Work] | None = None

    @property
    def first(self) -> bool:
        """Whether this is the one that writes files."""
        return self.rank == 0

    def share(self, batch: int) -> slice:
        """Which images of a batch of so many this process has; sizes differ by one at most."""
        return slice(self.rank * batch // self.world, (self.rank + 1) * batch // self.world)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """The sum of `values` over the processes, in place."""
        if self.world > 1:
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """Whether any process said so in the last call: nobody waits for an answer that is still under way."""
        if self.world == 1:
            return flag
        said = False
        if self._asked:
            answer, work = self._asked
            work.wait()
            said = bool(answer.item())
        answer = torch.tensor(float(flag))  # on the host, over gloo: no device is waited for
        work = dist.all_reduce(answer, async_op=True)
        assert work is not None
        self._asked = answer, work
        return said

    def barrier(self) -> None:
        """Until all are here."""
        if self._asked:
            self._asked[1].wait()
            self._asked = None
        if self.world > 1:
            dist.barrier()

    def wrap_ddp(self, network: nn.Module, unused: bool) -> nn.Module:
        """`network`, whose gradients are the mean over the processes after each backward pass.

        `unused`: it has parameters without a gradient.
        """
        if self.world == 1:
            return network
        device = next(network.parameters()).device
        with warnings.catch_warnings():
            # Moments are constants: nothing to broadcast. PyTorch is about to give the argument another name.
            warnings.simplefilter("ignore", FutureWarning)
            return nn.parallel.DistributedDataParallel(
                network,
                device_ids=[device.index] if device.type == "cuda" else None,
                broadcast_buffers=False,
                find_unused_parameters=unused,
                gradient_as_bucket_view=True,
            )


@contextmanager
def processes(device: torch.device) -> Iterator[ProcessGroup]:
    """Join the others that torchrun started with this process; alone where it did not."""
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
