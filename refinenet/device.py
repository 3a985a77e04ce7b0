"""Choose the device, reserve GPUs, and make results repeatable to the bit."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Literal

import torch

from refinenet.config import Precision
from refinenet.errors import UserError

# Lock files stay open as long as the process lives: the lock is released when it ends, however it ends.
_held: dict[str, int] = {}


def processor() -> str:
    """Return the processor's name, as far as the system tells it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def choose_device(name: str) -> torch.device:
    """Return the device called `name`. Raises UserError where this machine has no such device.

    "cuda" is any GPU: under torchrun the one of LOCAL_RANK; else the one with the most free memory among those that no
    other stage on this machine uses. Where all are in use, the one with the most free memory is shared.
    """
    device = torch.device(name)
    if device.type != "cuda":
        return device
    count = torch.cuda.device_count()
    if not torch.cuda.is_available() or count <= (device.index or 0):
        found = f"{count} GPU{'s' * (count != 1)}" if torch.cuda.is_available() else "no GPU"
        raise UserError(f"device is {name}, but PyTorch finds {found} here; a profile with `device: cpu` needs none")
    if device.index is not None:
        return device
    if "LOCAL_RANK" in os.environ:
        rank = int(os.environ["LOCAL_RANK"])
        if rank >= count:
            raise UserError(f"LOCAL_RANK is {rank}, but PyTorch finds {count} GPUs here; start as many processes")
        return torch.device("cuda", rank)
    uuids = _uuids(count)
    return torch.device("cuda", pick(_free_memory(uuids), lambda index: hold(_lock(uuids[index]))))


def pick(free: Sequence[int], take: Callable[[int], bool]) -> int:
    """Return the index of the GPU to use. `free`: free bytes of each; `take(index)` locks one, False where it cannot.

    The first that can be locked, most free bytes first; if none can, the one with the most.
    """
    order = sorted(range(len(free)), key=lambda index: -free[index])
    return next((index for index in order if take(index)), order[0])


def reserve(count: int) -> str:
    """Lock `count` GPUs that no other stage on this machine uses; return a CUDA_VISIBLE_DEVICES with these alone.

    They are among those that CUDA_VISIBLE_DEVICES names now, in the form in which it names them: numbers, UUIDs, the
    beginnings of UUIDs. They stay locked until this process ends. Raises UserError where fewer are free: they are not
    shared.
    """
    uuids, taken = _uuids(torch.cuda.device_count() if torch.cuda.is_available() else 0), list[int]()
    free = _free_memory(uuids)
    for index in sorted(range(len(uuids)), key=lambda index: -free[index]):
        if len(taken) < count and hold(_lock(uuids[index])):
            taken.append(index)
    if len(taken) < count:
        raise UserError(f"train.num_processes is {count}, but {len(taken)} of {len(uuids)} GPUs here are free")
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    # CUDA counts the names as they stand there, and without any all GPUs in an order that is the same in each process.
    names = [str(index) for index in range(len(uuids))] if named is None else named.split(",")
    return ",".join(names[index].strip() for index in taken)


def _uuids(count: int) -> list[str]:
    """Return the UUID of each of the `count` GPUs that CUDA_VISIBLE_DEVICES leaves, in CUDA's order."""
    return [str(torch.cuda.get_device_properties(index).uuid) for index in range(count)]


def _lock(uuid: str) -> Path:
    """Return the lock file of a GPU, the same for all users of this machine."""
    return Path(tempfile.gettempdir()) / f"refinenet-gpu-{uuid}.lock"


def hold(path: Path) -> bool:
    """Lock the file `path` until this process ends; return False where another process holds it."""
    import fcntl  # not on Windows, where no stage gets here without a GPU

    if str(path) in _held:
        return True
    try:
        try:
            # In a shared /tmp another user's file can be opened, but not with O_CREAT.
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CREAT, 0o644)
    except OSError:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(file)
        return False
    _held[str(path)] = file
    return True


# For a process of its own, because a context of some hundred megabytes stays on every GPU that is asked. A GPU that its
# owner shares with nobody refuses one.
_ASK = """
import torch
for index in range(torch.cuda.device_count()):
    try:
        print(torch.cuda.mem_get_info(index)[0])
    except RuntimeError:
        print(0)
"""


def _free_memory(uuids: Sequence[str]) -> list[int]:
    """Return the free bytes of each GPU that CUDA_VISIBLE_DEVICES leaves, `uuids`; 0 for each where nobody knows.

    By nvidia-smi; a container may be without it, and it does not list MIG instances: then by PyTorch, which takes
    seconds. Of a single GPU nobody is asked.
    """
    if len(uuids) < 2:
        return [0] * len(uuids)
    query = ["nvidia-smi", "--query-gpu=uuid,memory.free", "--format=csv,noheader,nounits"]
    with suppress(OSError, subprocess.SubprocessError, ValueError, IndexError, KeyError):
        rows = [line.split(",") for line in _output(query).splitlines()]
        known = {row[0].strip().removeprefix("GPU-"): int(row[1]) << 20 for row in rows}
        return [known[uuid] for uuid in uuids]
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        free = [int(word) for word in _output([sys.executable, "-c", _ASK]).split()]
        if len(free) == len(uuids):
            return free
    return [0] * len(uuids)


def _output(command: Sequence[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def has_bfloat16(device: torch.device) -> bool:
    """Return whether the device computes in bfloat16, instead of emulating it.

    GPUs of NVIDIA do since compute capability 8.0, x86-64 processors with AVX512-BF16 or AMX. Of others (arm64, mps)
    nothing was measured here: they do not.
    """
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def choose_precision(precision: Precision, device: torch.device) -> Literal["float32", "bfloat16"]:
    """Return what is computed in: of "auto" bfloat16 where `has_bfloat16`, else float32.

    A bfloat16 that was asked for and is emulated on a CPU is warned of, once.
    """
    if precision == "auto":
        return "bfloat16" if has_bfloat16(device) else "float32"
    if precision == "bfloat16" and device.type == "cpu" and not has_bfloat16(device):
        _warn_of_emulation()
    return precision


@cache
def _warn_of_emulation() -> None:
    print(
        "warning: precision is bfloat16, which this processor has not and emulates: 2.7 s an image were measured where "
        "float32 takes 0.3; `precision: auto` chooses",
        file=sys.stderr,
    )


def repeatable_device(name: str, seed: int, threads: int) -> torch.device:
    """Return the device called `name` (`choose_device`), once this process is `reproducible`."""
    device = choose_device(name)
    reproducible(seed, threads)
    return device


def reproducible(seed: int, threads: int) -> None:
    """Make this process repeatable to the bit: seed, deterministic kernels, a fixed number of CPU threads.

    The number of threads decides the order of sums, so it is a setting and not the machine's number of cores.
    """
    torch.manual_seed(seed)
    torch.set_num_threads(threads)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
    torch.use_deterministic_algorithms(True, warn_only=True)
    # With deterministic algorithms PyTorch also writes NaN over memory that it hands out. Nothing here reads that.
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010 - no attribute a checker knows
