"""A bare Debian, a user without a prepared home, a fresh clone, and the commands of the README."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import bare_debian
import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs/how-to/fresh-machine.md"
TABLE = "results/nyud_table.csv"


def documented_packages() -> list[str]:
    """Return what docs/how-to/fresh-machine.md has installed on Debian."""
    line = re.search(r"^    apt install --no-install-recommends (.*)$", PAGE.read_text(encoding="utf-8"), re.M)
    assert line is not None
    return line[1].split()


@pytest.fixture(params=["stable", pytest.param("oldstable", marks=pytest.mark.services)])
def debian(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[bare_debian.BareDebian]:
    made = bare_debian.BareDebian(tmp_path / "root", request.param, bare_debian.mirror())
    yield made
    shutil.rmtree(made.root)  # 7 GB


@pytest.mark.slow
def test_from_nothing_to_a_table(debian: bare_debian.BareDebian) -> None:
    """The packages of the page are enough, none is left out without a line that says so, and git sees no change."""
    bundle = debian.root / "srv" / "project.bundle"
    subprocess.run(["git", "bundle", "create", "--quiet", str(bundle), "HEAD"], cwd=ROOT, check=True)
    packages = documented_packages()
    assert packages == ["git", "make", "python3-venv"]
    assert debian.run("command -v git make python3 || true").stdout == ""

    debian.apt("git", "make")
    done = debian.run(
        "git clone --quiet /srv/project.bundle project && cd project && git switch -qc main && make setup"
    )
    assert re.findall(r"^(?:error|Traceback).*", done.stdout, re.M) == [
        "error: no python3 here (Debian: apt install python3-venv)"
    ]
    debian.apt("python3")
    done = debian.run("cd project && make setup")
    assert re.findall(r"^(?:error|Traceback).*", done.stdout, re.M) == [
        "error: python3 cannot make virtual environments (Debian: apt install python3-venv)"
    ]
    debian.apt(*packages)

    done = debian.run("cd project && make setup && git status --short")
    assert done.returncode == 0, done.stdout
    done = debian.run(f"cd project && .venv/bin/snakemake --cores 2 {TABLE}")
    assert done.returncode == 0, done.stdout
    assert debian.run("cd project && git status --short").stdout == ""
