"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from refinenet.portable import portable_arithmetic

portable_arithmetic()  # before torch: a stage of profile mini that a test calls here wants it
import torch  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


THREADS = torch.get_num_threads()


@pytest.fixture(autouse=True)
def _torch_as_it_was() -> Iterator[None]:
    """Undo what a stage called in this process sets for the whole process; other operators run under it."""
    yield
    # As PyTorch starts: a fixture of a module may have set it before this one looked.
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(False)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)  # noqa: B010 - no attribute a checker knows


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder with small real parts of the official archives; tests that need it skip where it is missing."""
    folder = ROOT.parent / "shared" / "real"
    if not (folder / "MD5SUMS").is_file():
        pytest.skip(f"no real archives in {folder}")
    return folder
