"""A profile of a test's, made that of the project in the present folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from pipeline import settings


def choose(profile: dict[str, Any]) -> None:
    """Write profiles/tiny.yaml, have params.yaml name it, and resolve the settings."""
    params = yaml.safe_load(Path("params.yaml").read_text())
    Path("params.yaml").write_text(yaml.safe_dump({**params, "profile": "tiny"}))
    Path("profiles/tiny.yaml").write_text(yaml.safe_dump(profile))
    settings.run()
