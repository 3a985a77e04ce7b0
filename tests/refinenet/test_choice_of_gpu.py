"""Which GPU a stage takes: free memory, locks, CUDA_VISIBLE_DEVICES. What PyTorch and nvidia-smi find is made up."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from refinenet import device
from refinenet.device import pick
from refinenet.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
# UUID -> free MiB, in CUDA's order, which is not that of nvidia-smi.
GPUS = {
    "aaaa0000-0000-0000-0000-000000000000": 3000,
    "bbbb0000-0000-0000-0000-000000000000": 9000,
    "cccc0000-0000-0000-0000-000000000000": 5000,
}
A, B, C = GPUS


def visible() -> list[str]:
    """The UUIDs that CUDA_VISIBLE_DEVICES leaves, by PyTorch's own reading of it."""
    chosen = torch.cuda._parse_visible_devices()
    if chosen and str(chosen[0]).startswith("MIG-"):
        return [str(name).removeprefix("MIG-") for name in chosen[:1]]
    names, found = [f"GPU-{uuid}" for uuid in GPUS], list[str]()
    for one in chosen:
        place = one if isinstance(one, int) else torch.cuda._transform_uuid_to_ordinals([one], names)[0]
        if place >= len(GPUS):
            break
        found.append(list(GPUS)[place])
    return found


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str | None, str], None]:
    """Make a machine of GPUS: CUDA_VISIBLE_DEVICES, and who knows the free memory, nvidia-smi, PyTorch or nobody."""

    def make(named: str | None, source: str) -> None:
        if named is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
        programs, packages = tmp_path / "bin", tmp_path / "packages"
        programs.mkdir()
        packages.mkdir()
        if source == "nvidia-smi":
            rows = "".join(f"GPU-{uuid}, {free}\n" for uuid, free in reversed(GPUS.items()))
            (programs / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{rows}'\n")
            (programs / "nvidia-smi").chmod(0o755)
        free = [GPUS.get(uuid, 1000) << 20 for uuid in visible()] if source == "torch" else []
        (packages / "torch.py").write_text(FAKE.format(free=free))
        monkeypatch.setenv("PATH", str(programs))
        monkeypatch.setenv("PYTHONPATH", str(packages))
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(visible()))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(visible()))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=visible()[index]))
        monkeypatch.setattr(device.tempfile, "gettempdir", lambda: str(tmp_path))
        monkeypatch.setattr(device, "_held", {})

    return make


# What the process that is asked finds; the GPU with the least refuses a second one.
FAKE = """
free = {free}
class cuda:
    def device_count():
        return len(free)
    def mem_get_info(index):
        if free[index] == 3000 << 20:
            raise RuntimeError("CUDA-capable device(s) is/are busy or unavailable")
        return free[index], 1 << 40
"""


@pytest.mark.parametrize("source", ["nvidia-smi", "torch"])
@pytest.mark.parametrize(
    ("named", "first", "two"),
    [
        (None, 1, "1,2"),
        ("2, 0", 0, "2,0"),
        ("0,2,1", 2, "1,2"),
        (f"GPU-{C},GPU-{B}", 1, f"GPU-{B},GPU-{C}"),
        ("GPU-aa,GPU-c", 1, "GPU-c,GPU-aa"),
        ("1,0,7,2", 0, "1,0"),  # what comes after a number that there is not does not count
    ],
)
def test_the_most_free_memory_among_those_that_are_named(
    machine: Callable[[str | None, str], None], source: str, named: str | None, first: int, two: str
) -> None:
    machine(named, source)
    assert device.choose_device("cuda") == torch.device("cuda", first)
    assert device.reserve(2) == two


def test_no_gpu_is_named(machine: Callable[[str | None, str], None]) -> None:
    machine("", "nvidia-smi")
    with pytest.raises(UserError, match="PyTorch finds no GPU here"):
        device.choose_device("cuda")
    with pytest.raises(UserError, match="num_processes is 2, but 0 of 0 GPUs here are free"):
        device.reserve(2)


def test_of_one_gpu_nobody_is_asked(
    machine: Callable[[str | None, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A MIG instance: CUDA shows a process no second one, nvidia-smi knows none."""
    machine("MIG-dddd,MIG-eeee", "nvidia-smi")
    monkeypatch.setattr(subprocess, "run", None)
    assert device.choose_device("cuda") == torch.device("cuda", 0)
    assert [Path(path).name for path in device._held] == ["refinenet-gpu-dddd.lock"]
    with pytest.raises(UserError, match="num_processes is 2, but 1 of 1 GPUs here are free"):
        device.reserve(2)


def test_where_nobody_knows_the_memory_locks_decide(
    machine: Callable[[str | None, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(None, "nobody")
    assert device._free_memory(list(GPUS)) == [0, 0, 0]
    assert device.hold(device._lock(A))
    monkeypatch.setattr(device, "_held", {})  # as another process would find it
    assert device.reserve(2) == "1,2"


def test_gpus_are_taken_for_all_processes_or_not_at_all(
    machine: Callable[[str | None, str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    machine(None, "nvidia-smi")
    assert device.reserve(2) == "1,2"
    monkeypatch.setattr(device, "_held", {})  # as another process would find it
    with pytest.raises(UserError, match="processes is 2, but 1 of 3 GPUs here are free"):
        device.reserve(2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_pytorch_in_a_process_of_its_own_knows_the_memory() -> None:
    free = [int(word) for word in device._output([sys.executable, "-c", device._ASK]).split()]
    assert len(free) == torch.cuda.device_count()
    assert all(0 <= one <= torch.cuda.mem_get_info(index)[1] for index, one in enumerate(free))
    assert max(free) > 0


def test_the_gpu_with_the_most_free_memory_that_nobody_took() -> None:
    def choose(free: list[int], *taken: int) -> int:
        return pick(free, lambda index: index not in taken)

    assert choose([3, 9, 5]) == 1
    assert choose([3, 9, 5], 1) == 2
    assert choose([0, 0, 0], 0) == 1  # nothing is known of memory
    assert choose([3, 9, 5], 0, 1, 2) == 1


def test_processes_at_once_take_a_gpu_each(tmp_path: Path) -> None:
    """Four GPUs, six processes: four get one each, two share; what a process held is free once it has ended."""
    code = f"""
import sys
from pathlib import Path
from refinenet.device import hold, pick
taken = []
def take(index):
    taken.append((index, hold(Path({str(tmp_path)!r}) / f"gpu{{index}}")))
    return taken[-1][1]
index = pick([1, 4, 2, 3], take)
print(index, taken[-1][1], flush=True)
sys.stdin.read()
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}

    def start() -> subprocess.Popen[str]:
        pipe = subprocess.PIPE
        return subprocess.Popen([sys.executable, "-c", code], env=environment, stdin=pipe, stdout=pipe, text=True)

    def told(process: subprocess.Popen[str]) -> tuple[int, bool]:
        assert process.stdout is not None
        index, alone = process.stdout.readline().split()
        return int(index), alone == "True"

    running = [start() for _ in range(6)]
    found = [told(process) for process in running]
    assert sorted(found) == [(0, True), (1, False), (1, False), (1, True), (2, True), (3, True)]
    third = running[found.index((3, True))]
    third.kill()
    third.wait()
    another = start()
    assert told(another) == (3, True)
    for process in (*running, another):
        process.kill()
        process.communicate()
