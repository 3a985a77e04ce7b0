"""What a stage takes of its machine, for the curves: memory, and how busy the GPU is."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_no_utilisation: set[torch.device] = set()


def device_load(device: torch.device) -> dict[str, float]:
    """The load of `device` by name; asks counters only, never waits for the device's work.

    On a GPU "memory_bytes", the most that tensors have taken so far, "memory_reserved_bytes", what PyTorch holds now,
    and, where the package nvidia-ml-py is there and the GPU tells, "gpu_utilisation", 0 to 1: the share of the last
    second (or less) in which any kernel ran, of whichever process. Elsewhere "memory_bytes" alone: the most that this
    process has had in memory so far.
    """
    if device.type != "cuda":
        return _of_the_process()

    import torch

    load = {
        "memory_bytes": float(torch.cuda.max_memory_allocated(device)),
        "memory_reserved_bytes": float(torch.cuda.memory_reserved(device)),
    }
    if device not in _no_utilisation:
        try:
            load["gpu_utilisation"] = torch.cuda.utilization(device) / 100
        except Exception:  # no package, no right, part of a GPU (MIG), another maker: each has its own class of error
            _no_utilisation.add(device)
    return load


def _of_the_process() -> dict[str, float]:
    try:
        import resource  # not on Windows
    except ImportError:
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory_bytes": float(peak if sys.platform == "darwin" else peak * 1024)}  # macOS counts bytes, Linux KiB
