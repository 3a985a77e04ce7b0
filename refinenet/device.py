"""Where and how the arithmetic runs: the device, and what makes it repeatable to the bit."""

from __future__ import annotations

import torch

from refinenet.files import UserError


def choose_device(name: str) -> torch.device:
    """The device called `name`; UserError where this machine has none."""
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device is {name}, but PyTorch finds no GPU here; a profile with `device: cpu` needs none")
    return device


def reproducible(seed: int, threads: int) -> None:
    """Make this process repeatable to the bit: seeds, deterministic kernels, a fixed number of threads.

    The number of threads decides in which order sums are taken, so it is a setting and not the machine's.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    # On a GPU the backward pass of interpolation has no deterministic kernel: a warning there, not an error.
    torch.use_deterministic_algorithms(True, warn_only=True)
