"""Log in where archives need an account: Cityscapes, as the official csDownload does it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pipeline.fetch.checksums import CopyError

if TYPE_CHECKING:
    from requests import Session

# A password is sent to its own site only, never to a mirror.
HOSTS = {"cityscapes": "www.cityscapes-dataset.com"}
TIMEOUT = (15, 60)  # seconds: to connect; to answer


def log_in(session: Session, account: str, url: str) -> None:
    """Log the session in to the account's site; does nothing where `url` is on another site.

    Name and password are CITYSCAPES_USERNAME and CITYSCAPES_PASSWORD, or what csDownload has stored. Raises CopyError
    where there are none or the site rejects them, requests' errors where it does not answer.
    """
    import requests

    parts = urlsplit(url)
    if parts.netloc != HOSTS[account]:
        return
    if parts.scheme != "https" and parts.hostname != "127.0.0.1":
        raise CopyError("a password is sent over https:// only")
    name, password = _credentials(account)
    login = f"{parts.scheme}://{parts.netloc}/login"
    session.get(login, allow_redirects=False, timeout=TIMEOUT).raise_for_status()
    form = {"username": name, "password": password, "submit": "Login"}
    answer = session.post(login, data=form, allow_redirects=False, timeout=TIMEOUT)
    if answer.status_code == 429 or answer.status_code >= 500:
        raise requests.ConnectionError(f"{answer.status_code} {answer.reason}")
    if answer.status_code != 302:  # a login that succeeds is redirected, one that fails gets a page
        raise CopyError(f"{HOSTS[account]} does not accept this name and password")


def variables(account: str) -> tuple[str, str]:
    """Return the environment variables of an account's name and password."""
    return f"{account.upper()}_USERNAME", f"{account.upper()}_PASSWORD"


def missing(account: str) -> str | None:
    """Return what is wrong where this machine has no name and password of an account, else None."""
    try:
        _credentials(account)
        return None
    except CopyError as error:
        return f"{error}; set {' and '.join(variables(account))}"


def _credentials(account: str) -> tuple[str, str]:
    from platformdirs import user_data_dir

    name, password = (os.environ.get(variable, "") for variable in variables(account))
    if name and password:
        return name, password
    stored = Path(user_data_dir("cityscapesscripts", "cityscapes")) / "credentials.json"
    try:
        values = json.loads(stored.read_text(encoding="utf-8"))
        return str(values["username"]), str(values["password"])
    except FileNotFoundError:
        raise CopyError("needs an account, and no name and password are given") from None
    except (OSError, ValueError, KeyError, TypeError):
        raise CopyError(f"{stored}: not as csDownload writes it") from None
