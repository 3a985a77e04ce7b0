"""Fixtures shared by all tests."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def real() -> Path:
    """The folder with small real parts of the official archives; tests that need it skip where it is missing."""
    folder = ROOT.parent / "shared" / "real"
    if not (folder / "MD5SUMS").is_file():
        pytest.skip(f"no real archives in {folder}")
    return folder
