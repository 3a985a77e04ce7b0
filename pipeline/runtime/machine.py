"""What a stage needs of the machine it runs on, asked for before hours of work: a GPU, packages."""

from __future__ import annotations

import ctypes
import importlib.util
import os
from collections.abc import Mapping
from typing import Any

from refinenet.errors import UserError

# Set at the head of a cluster, whose jobs run elsewhere (pipeline/graph.py).
ELSEWHERE = "PIPELINE_ELSEWHERE"


def cores() -> int:
    """Return how many processes a stage may compute in: PIPELINE_CORES, or as many cores as this process may use."""
    given = os.environ.get("PIPELINE_CORES")
    if given is None:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not given.isdecimal() or int(given) < 1:
        raise UserError(f"PIPELINE_CORES is {given!r}, expected a whole number from 1")
    return int(given)


def has_gpu() -> bool:
    """Return whether NVIDIA's driver finds a GPU; asked directly, because importing torch to ask takes seconds."""
    try:
        count = ctypes.c_int(0)
        driver = ctypes.CDLL("libcuda.so.1")
        return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and bool(count.value)
    except OSError:
        return False


def missing_gpu(device: str) -> str | None:
    """Return what is wrong where `device` of the profile is a GPU and this machine has none."""
    if not device.startswith("cuda") or ELSEWHERE in os.environ or has_gpu():
        return None
    return (
        f"device is {device}, but this machine has no GPU; `profile: mini` needs none, and {ELSEWHERE}=1 in the "
        "environment lets you prepare data here"
    )


def missing_crf(protocols: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return what is wrong where one of an evaluation's protocols needs the dense CRF and its package is missing."""
    if not any(protocol["crf"] for protocol in protocols.values()) or importlib.util.find_spec("pydensecrf"):
        return None
    return "a dense CRF is asked for, but pydensecrf2 is missing; `make crf`"


def check_training(name: str, settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError where this machine lacks what the training `name`, or its evaluation afterwards, needs."""
    evaluation = settings.get("evaluate", {}).get(name)
    problem = missing_gpu(settings["train"][name]["device"]) or (evaluation and missing_crf(evaluation["protocols"]))
    if problem:
        raise UserError(f"{name}: {problem}")
