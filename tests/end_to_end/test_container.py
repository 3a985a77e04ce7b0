"""Containerfile, built on a bare Debian and run as any uid on a mounted clone: the same bytes inside as outside."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import bare_debian
import pytest
import small_project

ROOT = small_project.ROOT
NETWORK = "models/nyud-res50.safetensors"
MADE = ("weights/resnet50.safetensors", "data/nyud/train.arrow", "data/nyud/val.arrow", NETWORK)


def md5s(folder: Path) -> dict[str, str]:
    return {name: hashlib.md5((folder / name).read_bytes()).hexdigest() for name in MADE}


@pytest.mark.slow
@pytest.mark.services
def test_same_bytes_inside_as_outside(tmp_path: Path) -> None:
    if shutil.which("buildah") is None:
        pytest.skip("no buildah here")
    source = bare_debian.mirror()
    release = re.search(r"^ARG BASE=.*/debian:(\w+)-slim$", (ROOT / "Containerfile").read_text(), re.M)
    assert release is not None
    debian = bare_debian.BareDebian(tmp_path / "root", release[1], source)
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for clone in (inside, outside):
        subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)

    def buildah(*words: str) -> str:
        command = ["buildah", "--root", str(tmp_path / "store"), "--runroot", str(tmp_path / "runs")]
        done = subprocess.run(
            [*command, "--storage-driver", "vfs", *words], cwd=ROOT, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        return done.stdout.strip()

    try:
        base = buildah("from", "scratch")
        for key, value in debian.copied_index_environment().items():
            buildah("config", "--env", f"{key}={value}", base)
        buildah("copy", "--quiet", base, str(debian.root), "/")
        buildah("commit", "--quiet", "--rm", base, "localhost/bare")
        shutil.rmtree(debian.root)
        buildah(
            *("build", "--isolation", "chroot", "--layers=false", "--build-arg", "BASE=localhost/bare"),
            *("--file", "Containerfile", "--tag", "refinenet-repro", "."),
        )
        container = buildah("from", "localhost/refinenet-repro")
        assert buildah("inspect", "--format", "{{.OCIv1.Config.User}}", container) == "10001:0"
        user = (54321, 0)  # as OpenShift does it
        for path in (inside, *inside.rglob("*")):
            os.chown(path, *user, follow_symlinks=False)
        in_it = ("run", "--isolation", "chroot", "--user", "54321:0", "--volume", f"{inside}:/project", container, "--")
        assert buildah(*in_it, "sh", "-c", "id -u; command -v gcc make uv || true") == "54321"
        buildah(*in_it, "snakemake", "--cores", "2", NETWORK)
        assert buildah(*in_it, "refinenet").endswith("here: /project, profile mini")
    finally:
        shutil.rmtree(tmp_path / "store", ignore_errors=True)
    small_project.call(outside, "snakemake", "--cores", "2", NETWORK)
    assert md5s(inside) == md5s(outside)
