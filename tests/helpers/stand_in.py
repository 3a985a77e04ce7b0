"""The stand-in for pydensecrf2 (tests/helpers/made_up_crf) in this process and those that it starts."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "made_up_crf"
NAMES = ("pydensecrf", "pydensecrf.densecrf")


@contextmanager
def made_up_crf(notes: Path) -> Iterator[None]:
    """Put it in the package's place; it notes who did what in the folder `notes`, which this makes."""
    notes.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name in NAMES:
            patch.delitem(sys.modules, name, raising=False)
        patch.syspath_prepend(FOLDER)
        patch.setenv("MADE_UP_CRF_NOTES", str(notes))
        try:
            yield
        finally:
            for name in NAMES:
                sys.modules.pop(name, None)
