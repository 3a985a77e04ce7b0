"""Memory that a training step frees is there for the next step."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

FAULTS = """
import resource, sys
import torch
from refinenet.allocator import keep_freed_memory
torch.set_num_threads(1)
if sys.argv[1] == "kept":
    keep_freed_memory()

def step():  # as a map and its gradient: blocks of 40, 60 and 20 MiB, freed in another order
    maps = [torch.ones(size << 18) for size in (40, 60, 20)]
    del maps[1], maps[0]

for _ in range(6):  # until holes of each size are there
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(how: str) -> int:
    done = subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True, timeout=300)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the allocator of glibc")
def test_blocks_that_were_freed_come_back_without_a_page_fault() -> None:
    # 120 MiB are 30,720 pages, five times; the few that remain are Python's own.
    assert page_faults("returned") > 20 * page_faults("kept")
