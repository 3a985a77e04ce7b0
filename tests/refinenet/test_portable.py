"""`portable: true`: training and evaluation give the same bytes on any x86-64 processor with AVX2."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.config import schema
from refinenet.config import Protocol, Recipe
from refinenet.errors import UserError
from refinenet.portable import SWITCHES

ROOT = Path(__file__).resolve().parents[2]
PROBE = ROOT / "tests/helpers/portable_probe.py"
# One of AMD, two of Intel: with and without what came after AVX2, as Debian's emulator has them.
PROCESSORS = ("EPYC-Milan", "Skylake-Client-v3", "Haswell-v4")
X86 = platform.machine() == "x86_64"


def start(folder: Path, *before: str) -> subprocess.Popen[str]:
    """Start the probe, behind the words `before`, in an environment that chooses nothing."""
    folder.mkdir()
    environment = {k: v for k, v in os.environ.items() if k not in SWITCHES}
    environment["PYTHONPATH"] = f"{ROOT}:{ROOT / 'tests/helpers'}"
    command = [*before, sys.executable, str(PROBE), str(folder)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    out, err = process.communicate(timeout=1500)
    assert process.returncode == 0, err
    found: dict[str, Any] = json.loads(out)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not X86, reason="the promise is of x86-64")
def test_the_same_bytes_on_other_processors(tmp_path: Path) -> None:
    """Weights in float32, curve, file, scores and metrics of every backbone and cascade: two steps, six images."""
    emulator = shutil.which("qemu-x86_64")
    if emulator is None:
        pytest.skip("no qemu-x86_64 (Debian: qemu-user)")
    emulated = {cpu: start(tmp_path / cpu, emulator, "-cpu", cpu) for cpu in PROCESSORS}
    here = answer(start(tmp_path / "here"))
    assert len(here) == 6
    assert len({tuple(digests.values()) for digests in here.values()}) == 6
    for cpu, process in emulated.items():
        assert answer(process) == here, cpu


@pytest.mark.slow
@pytest.mark.skipif(not (X86 and shutil.which("taskset")), reason="wants x86-64 and taskset")
def test_the_same_bytes_on_any_number_of_cores(tmp_path: Path) -> None:
    one = start(tmp_path / "one", "taskset", "-c", str(min(os.sched_getaffinity(0))))
    assert answer(one) == answer(start(tmp_path / "all"))


def test_a_profile_that_cannot_be_portable_is_refused() -> None:
    recipe = Recipe(steps=1, precision="bfloat16")
    common: dict[str, Any] = {"data": "voc", "profile": "x", "device": "cpu", "threads": 1, "seed": 0, "portable": True}
    train = {"start": "resnet50", "phases": (), "target": "models", "network": {}, "dtype": "float32"}
    with pytest.raises(UserError, match="precision is bfloat16, expected float32: the profile is portable"):
        schema.Train(**common, **train, recipe=recipe)
    with pytest.raises(UserError, match="compile is true, expected false: the profile is portable"):
        schema.Evaluate(**common, protocols={"a": Protocol((1.0,))}, input_scale=1.0, compile=True)


@pytest.mark.skipif(not X86, reason="elsewhere it changes nothing")
def test_chosen_too_late_it_is_refused() -> None:
    """PyTorch reads its environment when it is loaded; results that only look portable are worse than an error."""
    code = "import torch; from refinenet.portable import portable_arithmetic as f; f()"
    environment = {k: v for k, v in os.environ.items() if k not in SWITCHES}
    failed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert "UserError: portable: torch was loaded before it was chosen; set ATEN_CPU_CAPABILITY=avx2" in failed.stderr


@pytest.mark.skipif(not X86, reason="elsewhere it changes nothing")
@pytest.mark.parametrize("stage", ["train", "evaluate"])
def test_the_stages_choose_it_before_torch_is_loaded(stage: str, tmp_path: Path) -> None:
    """Without their call a stage of profile mini would compute as this processor likes."""
    code = f"""
import sys
from unittest import mock
from pipeline import {stage}
assert "torch" not in sys.modules
class Chosen(Exception): pass
with mock.patch("pipeline.{stage}.portable_arithmetic", side_effect=Chosen) as chosen, \\
     mock.patch("pipeline.{stage}.Plan", create=True), mock.patch("pipeline.{stage}.Split"), \\
     mock.patch("pathlib.Path.is_file", return_value=True):
    from pipeline.config import resolve, schema
    resolve.load = lambda *a: mock.Mock(portable=True, source=None, target="models", start="resnet50", data="voc")
    {stage}.check_training = lambda *a: None
    resolve.everything = lambda: {{}}
    {stage}.len = lambda split: 1
    try:
        {stage}.run("voc-res50-demo")
    except Chosen:
        assert "torch" not in sys.modules
        print("chosen first")
"""
    environment = {k: v for k, v in os.environ.items() if k not in SWITCHES} | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False, cwd=tmp_path
    )
    assert done.stdout == "chosen first\n", done.stderr
