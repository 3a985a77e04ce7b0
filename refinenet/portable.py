"""Arithmetic that gives the same bytes on every x86-64 processor with AVX2, whatever its maker.

By default PyTorch, oneDNN and MKL choose the code for this processor, and another one sums in another order. They read
what they are held to when they are loaded. With one thread and float32 nothing else is needed:
docs/explanation/same-bytes.md says what was compared on which processors, and where the promise ends.
"""

from __future__ import annotations

import os
import platform
import sys

from refinenet.errors import UserError

# Variable of the environment -> its value. MKL's own AVX2 code differs between makers, its compatible one does not.
SWITCHES = {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"}


def portable_arithmetic() -> None:
    """Hold PyTorch in this process, and in those that it starts, to arithmetic that x86-64 processors share.

    To be called before torch is imported. On another kind of processor (arm64) it changes nothing: the results are then
    repeatable on that machine.

    Raises UserError where torch was loaded without it, and where the processor has no AVX2.
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return
    missing = {name: value for name, value in SWITCHES.items() if os.environ.get(name) != value}
    if missing and "torch" in sys.modules:
        wanted = " ".join(f"{name}={value}" for name, value in missing.items())
        raise UserError(f"portable: torch was loaded before it was chosen; set {wanted} in the environment")
    os.environ.update(missing)
    import torch

    if not torch.cpu._is_avx2_supported():
        raise UserError("portable: this processor has no AVX2; `portable: false` in the profile works on it")
