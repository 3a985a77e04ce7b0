"""Load of the device for the curves in MLflow: memory, and GPU utilisation."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_no_utilisation: set[torch.device] = set()


def device_load(device: torch.device) -> dict[str, float]:
    """Return the load of `device` by name; reads counters only and never waits for the device.

    On a GPU "memory_bytes", the peak of tensors so far, "memory_reserved_bytes", what PyTorch holds now, and, with the
    package nvidia-ml-py and a GPU that supports it, "gpu_utilisation", 0 to 1: the share of the last second (or less)
    in which a kernel of any process ran. On a CPU "memory_bytes" alone: the peak resident memory of this process.
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
        except Exception:  # no package, no permission, MIG, another vendor: each has its own type of error
            _no_utilisation.add(device)
    return load


def _of_the_process() -> dict[str, float]:
    try:
        import resource  # not on Windows
    except ImportError:
        return {}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"memory_bytes": float(peak if sys.platform == "darwin" else peak * 1024)}  # macOS counts bytes, Linux KiB
