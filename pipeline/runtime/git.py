"""What git says of this folder."""

from __future__ import annotations

import subprocess

from refinenet.errors import UserError


def ask(*command: str) -> bytes:
    """Return what git answers; it takes no lock for that. Raises UserError, in one line, with git's reason."""
    try:
        asked = ["git", "--no-optional-locks", *command]
        return subprocess.run(asked, capture_output=True, check=True, timeout=60).stdout
    except FileNotFoundError:
        raise UserError("git is not installed") from None
    except subprocess.CalledProcessError as error:
        raise UserError(" ".join(error.stderr.decode(errors="replace").split())[:300]) from None
    except (OSError, subprocess.SubprocessError) as error:
        raise UserError(f"git: {error}") from None
