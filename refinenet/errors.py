"""The one error that a user is meant to read."""

from __future__ import annotations


class UserError(Exception):
    """Something the user can put right. Its text is one line: the file, what was found, what was expected."""
