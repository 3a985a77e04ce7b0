"""The one error that a user is meant to read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches

SHOWN = 20  # files that one error names
NAMED = 12  # names in one line


class UserError(Exception):
    """Something the user can put right. Its text is one line: the file, what was found, what was expected.

    Of several files it has a first line and one for each of them (`several`).
    """


def several(found: str, problems: Sequence[str]) -> UserError:
    """Return one error for all `problems`: the first SHOWN, each a line below `found`; a single one is all of it."""
    if len(problems) == 1:
        return UserError(problems[0])
    more = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return UserError("\n  ".join([found, *problems[:SHOWN], *more]))


def nearest(name: str, known: Iterable[str]) -> str | None:
    """Return the one of `known` that `name` was most likely meant to be, None where none is near."""
    lower = {one.lower(): one for one in known}
    near = get_close_matches(name.lower(), lower, 1)
    return lower[near[0]] if near else None


def expected_one_of(name: str, known: Collection[str], listing: str) -> str:
    """Return the end of a line about a name that is not known: what was meant, and which there are.

    `listing`: a command that lists them, named instead where they are too many for a line.
    """
    near = nearest(name, known)
    there = f"expected one of {', '.join(known)}" if len(known) <= NAMED else f"`{listing}` lists them"
    return f": did you mean {near}? {there}" if near else f", {there}"
