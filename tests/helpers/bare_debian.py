"""A Debian in a folder: what debootstrap makes of this machine's own mirror, and nothing that was prepared."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

UID = 4321  # of the user inside; it has no entry in /etc/passwd
HOME = "/srv/home"
# How this machine reaches its package index goes inside by the environment; files that it names, too, read-only.
_INDEX = re.compile(r"(PIP|UV)_\w+|SSL_CERT_(FILE|DIR)|(https?|no)_proxy", re.IGNORECASE)
_ENTER = """\
set -e
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
cp -L /etc/resolv.conf "$1/etc/resolv.conf"
root=$1 user=$2
shift 2
while [ "$1" != -- ]; do
    if [ -d "$1" ]; then mkdir -p "$root$1"; else mkdir -p "$root${1%/*}"; touch "$root$1"; fi
    mount --rbind "$1" "$root$1"
    mount -o remount,bind,ro "$root$1"
    shift
done
shift
exec chroot --userspec="$user" --groups= "$root" "$@"
"""


def index_environment() -> dict[str, str]:
    """Return the variables that say where and how to fetch packages."""
    return {key: value for key, value in os.environ.items() if _INDEX.fullmatch(key)}


def _named_paths(environment: Mapping[str, str]) -> list[str]:
    """Return the files and folders that exist among the values, without those that lie in another of them."""
    words = {word.removeprefix("file://") for value in environment.values() for word in value.split()}
    found = {Path(word) for word in words if word.startswith("/") and Path(word).exists()}
    return sorted(str(path) for path in found if found.isdisjoint(path.parents))


@dataclass(frozen=True)
class Mirror:
    """Where apt has Debian from, and the keys that sign it (None: debootstrap's own)."""

    address: str
    keys: str | None


def mirror() -> Mirror:
    """Return the mirror of this machine's Debian; skip the test, with the reason, where a Debian cannot be made."""
    if os.geteuid() != 0:
        pytest.skip("a Debian in a folder needs root")
    for command in ("debootstrap", "unshare", "apt-get"):
        if shutil.which(command) is None:
            pytest.skip(f"no {command} here")
    if subprocess.run(["unshare", "--mount", "mount", "-t", "tmpfs", "x", "/mnt"], capture_output=True).returncode:
        pytest.skip("no mounts of one's own here")
    about = dict(re.findall(r'^(\w+)="?([^"\n]*)"?$', Path("/etc/os-release").read_text(), re.M))
    if about.get("ID") != "debian":
        pytest.skip(f"this is {about.get('ID')}, no Debian: its mirror has none")
    form = "$(RELEASE)\t$(COMPONENT)\t$(REPO_URI)\t$(SIGNED_BY)"
    listed = subprocess.run(
        ["apt-get", "indextargets", "--format", form, "Created-By: Packages"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for line in listed.splitlines():
        release, component, address, keys = line.split("\t")
        if release == about.get("VERSION_CODENAME") and component == "main":
            return Mirror(address, keys if Path(keys).is_file() else None)
    pytest.skip("apt names no mirror of this Debian")


class BareDebian:
    """A release in `root`: the packages that every Debian has, and what `apt` adds."""

    def __init__(self, root: Path, suite: str, source: Mirror) -> None:
        self.root = root
        keys = [f"--keyring={source.keys}"] if source.keys else []
        made = subprocess.run(
            ["debootstrap", "--variant=minbase", *keys, suite, str(root), source.address],
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode:
            pytest.skip(f"no {suite} from {source.address}: {made.stdout.strip().splitlines()[-1]}")
        (root / HOME.lstrip("/")).mkdir()
        os.chown(root / HOME.lstrip("/"), UID, UID)

    def run(
        self, script: str, *, user: int = UID, folder: str = HOME, timeout: int = 900
    ) -> subprocess.CompletedProcess[str]:
        """Run `script` inside, in its own mounts and processes: nothing of them stays."""
        index = index_environment() if user else {}  # apt has its own way
        variables = {
            **index,
            "HOME": HOME,
            "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
            "DEBIAN_FRONTEND": "noninteractive",
        }
        return subprocess.run(
            [
                *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private"),
                *("bash", "-c", _ENTER, "enter", str(self.root), f"{user}:{user}", *_named_paths(index), "--"),
                *("env", "--ignore-environment", f"--chdir={folder}", *(f"{k}={v}" for k, v in variables.items())),
                *("bash", "-ec", script),
            ],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            timeout=timeout,
        )

    def copied_index_environment(self) -> dict[str, str]:
        """Copy the files that the index's variables name into the Debian; return the variables with their places."""
        variables = {}
        for key, value in index_environment().items():
            if Path(value).is_file():
                shutil.copy(value, self.root / "srv" / key)
                variables[key] = f"/srv/{key}"
            elif not _named_paths({key: value}):
                variables[key] = value
        return variables

    def apt(self, *packages: str) -> None:
        """Install these packages and what they need, and none that they merely recommend."""
        done = self.run(
            f"apt-get update -q && apt-get install -qy --no-install-recommends {' '.join(packages)}", user=0, folder="/"
        )
        assert done.returncode == 0, done.stdout
