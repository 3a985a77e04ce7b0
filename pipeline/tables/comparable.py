"""Whose scores may stand against the paper's: by the setting `comparable` of their profile, as settings.json has it."""

from __future__ import annotations

import json
from pathlib import Path

from refinenet.errors import UserError

SETTINGS = Path("settings.json")


def profiles(root: Path = Path()) -> frozenset[str]:
    """Return the profiles whose scores are comparable: the current one and its bases, of which some trainings are.

    Scores of any other profile are not. Raises UserError where `root`/settings.json is missing or does not tell.
    """
    try:
        told = json.loads((root / SETTINGS).read_bytes())["tables"]
        return frozenset(name for name, values in told.items() if values["comparable"] is True)
    except FileNotFoundError:
        raise UserError(f"{SETTINGS}: no such file; stage settings makes it") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{SETTINGS}: has no tables.<profile>.comparable ({error!r}); stage settings renews it"
        ) from None
