"""The rehearsal drives the whole road: no setting left out, every failure said, nothing of the project touched."""

from __future__ import annotations

import copy
import fnmatch
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_project
import yaml

from pipeline import rehearse
from pipeline.config import resolve
from pipeline.config.profiles import read_params
from refinenet.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


def differences(one: Any, other: Any, path: str = "") -> Iterator[str]:
    """Yield where two nested mappings differ."""
    if isinstance(one, dict) and isinstance(other, dict):
        for key in {**one, **other}:
            yield from differences(one.get(key), other.get(key), f"{path}.{key}" if path else key)
    elif one != other:
        yield path


def changed(profile: str, **options: Any) -> dict[str, list[str]]:
    """Return for each entry of CHANGED where the rehearsal of a profile differs; "" has what no entry covers."""
    params = yaml.safe_load(Path("params.yaml").read_text())
    Path("params.yaml").write_text(yaml.safe_dump({**params, "profile": profile}))
    real = resolve.resolve()
    made = rehearse.settings_of(real, rehearse.Options(profile, **options))
    assert made.keys() == real.keys()
    found: dict[str, list[str]] = {}
    for path in differences(real, made):
        why = [key for key in rehearse.CHANGED if fnmatch.fnmatch(path, key) or fnmatch.fnmatch(path, f"{key}.*")]
        found.setdefault(why[0] if why else "", []).append(path)
    return found


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ARCHIVES", raising=False)
    return tmp_path


@pytest.mark.parametrize("profile", ["paper", "modern", "mini"])
def test_no_setting_is_left_out_but_for_a_reason(profile: str, project: Path) -> None:
    found = changed(profile)
    assert "" not in found
    assert not {"train.*.device", "evaluate.*.device", "train.*.network", "weights.*.stem"} & found.keys()
    assert changed(profile, thin=True, device="cpu").keys() >= found.keys()


def test_every_reason_is_one(project: Path) -> None:
    """A list with reasons for what is not changed would hide what will be changed one day."""
    own = {"leaves": {"images": "photos", "masks": "masks", "classes": ["soil", "leaf"]}}
    paper = yaml.safe_load(Path("profiles/paper.yaml").read_text())
    lengths = {**paper["datasets"], "leaves": {"train": {"steps": 10, "hold_out": 0.1}}}
    models = {"nyud-res50": {"url": "file:///none.safetensors"}}
    Path("profiles/all.yaml").write_text(yaml.safe_dump({**paper, "own": own, "models": models, "datasets": lengths}))
    params = yaml.safe_load(Path("params.yaml").read_text())
    params["experiments"]["leaves-res50"] = {"data": "leaves", "start": "resnet50"}
    Path("params.yaml").write_text(yaml.safe_dump({**params, "own": ["leaves"]}))
    assert changed("all", thin=True, device="cpu").keys() == rehearse.CHANGED.keys()


def test_archives_of_this_machine_are_used(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for file in yaml.safe_load(Path("profiles/paper.yaml").read_text())["sources"]["nyud"]:
        path = Path("data/incoming/nyud", file)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    params = yaml.safe_load(Path("params.yaml").read_text())
    Path("params.yaml").write_text(yaml.safe_dump({**params, "profile": "paper"}))
    made = rehearse.settings_of(resolve.resolve(), rehearse.Options("paper"))
    assert made["download"]["nyud"]["archives"]
    assert made["download"]["nyud"]["mirror"] == [str(project / "data/incoming")]
    assert made["prepare"]["nyud"] == {"official_counts": True, "limit": 2, "own": None}
    # So are files that the profile names.
    Path("mine").mkdir()
    for file in ("VOCtrainval_11-May-2012.tar", "benchmark.tgz"):
        Path("mine", file).touch()
    Path("params.yaml").write_text(yaml.safe_dump({**params, "profile": "voc-files"}))
    monkeypatch.setenv("VOC", "mine")
    voc = rehearse.settings_of(resolve.resolve(), rehearse.Options("voc-files"))["download"]["voc"]
    assert voc["archives"]["benchmark.tgz"]["url"] == f"file://{project}/mine/benchmark.tgz"
    # The others are drawn in their true size.
    assert made["download"]["cityscapes"]["rendered"] == {
        **{"train": 2, "val": 2, "seed": 0},
        **{"height": 1024, "width": 2048},
    }


def test_what_depends_on_a_failure_is_skipped_and_all_else_goes_on(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsal = rehearse.Rehearsal(project / "scratch", rehearse.Options("mini"))

    def one(job: rehearse.Job) -> rehearse.Result:
        return rehearse.Result(job.name, 1.0, "no such luck" if job.name == "prepare nyud" else None)

    monkeypatch.setattr(rehearsal, "one", one)
    lines: list[str] = []
    results = {result.name: result for result in rehearsal.run(lines.append)}
    wanted = [job.name for job in rehearse.jobs(read_params(), rehearsal.settings)]
    assert sorted(results) == sorted(wanted)
    failed = {name for name, result in results.items() if result.error and not result.skipped}
    skipped = {name for name, result in results.items() if result.skipped}
    assert failed == {"prepare nyud"}
    assert {"train nyud-res50", "evaluate nyud-res50", "tabulate nyud", "report"} <= skipped
    assert not [name for name in skipped if "voc" in name and not name.startswith("tabulate")]
    assert results["train nyud-res50"].error == "needs prepare nyud"
    assert len(lines) == len(wanted)


def test_the_forecast_by_hand(project: Path) -> None:
    one = {"start": "resnet50", "crops": 7200, "train": 2.0, "images": 1800, "evaluate": 1.0}
    one |= {"device": 5e9, "host": 1e9, "weights": 2e8}
    other = {**one, "start": "a", "evaluate": None, "images": 0}
    rates = {"options": {"profile": "paper", "steps": 2, "images": 2, "thin": False}, "machine": "an H100"}
    text = rehearse.forecast({**rates, "kind": "GPUs", "trainings": {"a": one, "b": other}}, 2)
    assert "| `a` | 7,200 | 1.0 | 0.50 | 5.0 |" in text
    assert "| all |  | 2.5 together |  |  |" in text
    assert "| 2 | 2.5 | 0.1 |" in text  # b waits for a
    assert "| trained weights | 0.4 |" in text


def test_a_folder_with_something_else_is_not_emptied(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine").mkdir()
    Path("mine/thesis.tex").touch()
    assert rehearse.main(["--folder", "mine"]) == 1
    assert Path("mine/thesis.tex").exists()
    expected = "error: mine: holds something else than a rehearsal, expected a folder to empty\n"
    assert capsys.readouterr().err == expected
    with pytest.raises(UserError, match="unknown"):
        rehearse.Rehearsal(Path("scratch"), rehearse.Options("unknown"))


def rehearsed(folder: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], dict[str, str]]:
    """Rehearse the project in `folder`; return the process, and each job's line."""
    command = [sys.executable, "-m", "pipeline.rehearse", *options]
    done = subprocess.run(
        command, cwd=folder, env=small_project.environment(ROOT), capture_output=True, text=True, check=False
    )
    lines = [line.partition("] ")[2] for line in done.stdout.splitlines() if line.startswith("[")]
    return done, {line[:34].strip(): line[34:].strip() for line in lines}


@pytest.mark.slow
def test_profile_paper_with_thin_networks(project: Path) -> None:
    """All of the paper's road but the width of its networks: protocols, phases, CRF, tiles, official rules."""
    before = sorted(path for path in project.rglob("*") if path.is_file())
    done, lines = rehearsed(project, "--profile", "paper", "--device", "cpu", "--thin", "--jobs", "2", "--gpus", "4")
    assert done.returncode == 0, done.stdout + done.stderr
    assert [name for name, line in lines.items() if not line.startswith("ok")] == []
    params = read_params()
    for name in (*params.pretrainings, *params.experiments):
        assert "s a step" in lines[f"train {name}"]
    for name in params.experiments:
        assert "images/s" in lines[f"evaluate {name}"]
    assert len([line for line in lines.values() if "stopped, killed and resumed" in line]) == 1
    assert {"submit voc", "submit cityscapes", "report"} <= lines.keys()
    assert {"export", "predict", "serve"} <= {name.partition(" ")[0] for name in lines}
    assert "Forecast of profile paper" in done.stdout
    assert "thin networks: no forecast of the profile's" in done.stdout
    left = sorted(path for path in project.rglob("*") if path.is_file() and "rehearsal" not in path.parts)
    assert left == before
    rates = json.loads((project / "rehearsal/rates.json").read_text())
    assert rates["trainings"]["voc-res101-coco"]["crops"] == 400_000


@pytest.mark.slow
def test_a_rehearsal_says_what_failed_and_goes_on(project: Path) -> None:
    params = yaml.safe_load(Path("params.yaml").read_text())
    few = {"nyud-res50": params["experiments"]["nyud-res50"], "person-res50": params["experiments"]["person-res50"]}
    few["leaves-res50"] = {"data": "leaves", "start": "resnet50"}
    changes = {"datasets": ["nyud", "person"], "backbones": ["resnet50"], "tables": [], "own": ["leaves"]}
    changes |= {"further": [], "experiments": copy.deepcopy(few), "pretrainings": {}, "profile": "trial"}
    Path("params.yaml").write_text(yaml.safe_dump({**params, **changes}))
    own = {"leaves": {"images": "photos", "masks": "masks", "classes": ["soil", "leaf"]}}
    broken = {"person": {"network": {"width": 3}, "train": {"crop": 8, "scales": [0.01]}}}
    profile = {"base": "mini", "title": "trial", "own": own, "datasets": broken}
    Path("profiles/trial.yaml").write_text(yaml.safe_dump(profile))
    done, lines = rehearsed(project)
    assert done.returncode == 1
    assert lines["download leaves"].startswith("FAILED")
    assert str(project / "photos") in lines["download leaves"]
    assert lines["evaluate leaves-res50"] == "skipped  needs train leaves-res50"
    assert lines["evaluate nyud-res50"].startswith("ok")
    assert "FAILED download leaves: " in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")
