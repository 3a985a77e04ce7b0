"""Stage `settings`: params.yaml + profiles/<profile>.yaml -> settings.json, every value that this run uses, checked.

This is the first stage of the graph. Each later stage depends on the one key of settings.json that it reads
(`train.voc-res101`), so that a change in a profile reruns only what it affects, and a profile can be ten lines that
state only how it differs from another one (`base: mini`). JSON, because DVC reads the file once for each stage and its
YAML reader takes 0.2 s for it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pipeline.config.profiles import PARAMS, PROFILES, read_params
from pipeline.config.resolve import SETTINGS, resolve
from pipeline.config.schema import TorchvisionWeights
from pipeline.fetch import checksums, local
from refinenet.atomic import atomic_file
from refinenet.errors import UserError


def _hosts(settings: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the host of every archive that is not on this machine yet and has to be downloaded."""
    for name, download in settings["download"].items():
        for file, source in download["archives"].items():
            url = urlsplit(source["url"])
            here = [folder / name / file for folder in (Path("data/raw"), checksums.STORE)]
            here += local.candidate_paths(name, file, download["mirror"])
            if url.scheme in ("http", "https") and not source["optional"] and not any(map(Path.is_file, here)):
                yield url.hostname or ""


def check_machine(settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError, before anything is written, where this machine lacks a needed GPU, package or network."""
    profile = PROFILES / f"{read_params().profile}.yaml"
    here = "PIPELINE_ELSEWHERE" not in os.environ  # the head of a cluster needs no GPU (pipeline/graph.py)
    if here and any(str(s["device"]).startswith("cuda") for s in settings["train"].values()):
        try:
            count = ctypes.c_int(0)
            driver = ctypes.CDLL("libcuda.so.1")  # asked directly: importing torch to ask takes seconds
            missing = driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or not count.value
        except OSError:
            missing = True
        if missing:
            raise UserError(
                f"{profile}: device is cuda, but this machine has no GPU; `profile: mini` needs none, and "
                "PIPELINE_ELSEWHERE=1 in the environment lets you prepare data here"
            )
    crf = [name for name, s in settings["evaluate"].items() if any(p["crf"] for p in s["protocols"].values())]
    if crf and importlib.util.find_spec("pydensecrf") is None:
        raise UserError(f"{profile}: a dense CRF for {', '.join(crf)}, but pydensecrf2 is missing; `make crf`")
    for host in dict.fromkeys(_hosts(settings)):
        try:
            socket.getaddrinfo(host, 443)
        except OSError as error:
            problem = f"{profile}: downloads from {host}, which cannot be reached ({error})"
            if not any(download["own"] for download in settings["download"].values()):
                raise UserError(problem) from None
            print(f"warning: {problem}; your own data does not need its archives", file=sys.stderr)
            return


def check_weights(settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError for a name of ImageNet weights that torchvision does not know, before anything is downloaded."""
    for backbone, weights in settings["weights"].items():
        if "torchvision" in (source := weights["source"] or {}):
            try:
                TorchvisionWeights(**source).entry(backbone)
            except UserError as error:
                raise UserError(f"{PROFILES / read_params().profile}.yaml: {error}") from None


def run() -> None:
    """Resolve params.yaml and the profile, check this machine, write settings.json."""
    settings = resolve()
    check_machine(settings)
    check_weights(settings)
    for file in sorted(Path("metrics/seeds").glob("*/*.json")):
        if file.stem not in settings["train"]:
            raise UserError(f"{file}: {PARAMS} has no seeds.{file.stem} any more; remove the file, or tables count it")
    with atomic_file(SETTINGS) as part:
        part.write_text(json.dumps(settings, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from pipeline.runtime.cli import run_cli

    sys.exit(run_cli(run))
