"""Fixtures shared by all tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def _torch_as_it_was() -> Iterator[None]:
    """Undo what a stage called in this process sets for the whole process; other operators run under it."""
    threads, fill = torch.get_num_threads(), torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
    setattr(torch.utils.deterministic, "fill_uninitialized_memory", fill)  # noqa: B010 - no attribute a checker knows


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder with small real parts of the official archives; tests that need it skip where it is missing."""
    folder = ROOT.parent / "shared" / "real"
    if not (folder / "MD5SUMS").is_file():
        pytest.skip(f"no real archives in {folder}")
    return folder
