"""`python -m pipeline.verify`: the scores of a run against those of a commit. Its files: end_to_end/test_faults.py."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_project import git

from pipeline import verify

PROTOCOLS = {
    "single": {"mean_iou": 0.50, "iou": {"sky": 0.5}, "interval": {"mean_iou": [0.45, 0.55]}},
    "multi": {"mean_iou": 0.60, "iou": {"sky": 0.6}, "interval": {"mean_iou": [0.55, 0.65]}},
}
NAMES = ("voc-res50", "voc-res101")


def metrics(name: str, **more: Any) -> dict[str, Any]:
    return {"experiment": name, "weights": {"md5": "1" * 32}, "protocols": copy.deepcopy(PROTOCOLS), **more}


def entry(name: str, path: str, steps: int, seed: int) -> dict[str, Any]:
    """A stage of dvc.lock: its settings, what it reads, what it makes."""
    train = {
        "params": {"settings.json": {f"train.{name}": {"steps": steps, "seed": seed}}},
        "outs": [{"path": f"models/{name}"}],
    }
    evaluate = {
        "deps": [{"path": f"models/{name}"}, {"path": "pipeline/evaluate.py", "md5": "0"}],
        "params": {"settings.json": {f"evaluate.{name}": {"data": "voc"}}},
        "outs": [{"path": path}],
    }
    return {f"train@{name}": train, f"evaluate@{name}": evaluate}


def write(scores: dict[str, dict[str, Any]], steps: dict[str, int] | None = None, seed: int = 0) -> None:
    """metrics/ and dvc.lock as a run leaves them; `scores`: path under metrics/ -> content."""
    stages: dict[str, Any] = {}
    for path, content in scores.items():
        file = Path("metrics", path)
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))
        stages |= entry(file.stem, str(file), (steps or {}).get(file.stem, 100), seed)
    Path("dvc.lock").write_text(yaml.safe_dump({"stages": stages}))


def commit(message: str) -> None:
    git(Path(), "add", "-A")
    git(Path(), "-c", "user.name=a", "-c", "user.email=a@b", "commit", "--quiet", "-m", message)


@pytest.fixture
def committed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """A repository with the scores of two experiments; those of its last commit, to be changed and written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verify, "check_files", lambda md5: None)
    git(tmp_path, "init", "--quiet")
    scores = {f"voc/{name}.json": metrics(name) for name in NAMES}
    write(scores)
    commit("scores")
    return scores


def said(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, list[str]]:
    code = verify.main(arguments)
    return code, capsys.readouterr().out.splitlines()


def test_the_same(committed: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    code, lines = said(capsys)
    assert (code, len(lines)) == (0, 1)
    assert lines[0].startswith("4 of 4 scores identical to those of commit ")
    assert lines[0].endswith(": same")


def test_other_weights_with_the_same_scores(
    committed: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    committed["voc/voc-res50.json"]["weights"]["md5"] = "2" * 32
    write(committed)
    code, lines = said(capsys)
    assert code == verify.EXIT_WITHIN_NOISE
    assert "4 of 4" in lines[-1]
    assert lines[-1].endswith("the weights of 1 experiment are others: within noise")


@pytest.mark.parametrize(
    ("score", "seeds", "verdict"),
    [
        (0.54, [], "within noise"),  # in the interval
        (0.56, [], "different"),
        (0.44, [], "different"),
        (0.51, [0.49, 0.51], "within noise"),  # the seeds say more than the interval: they spread by 0.01
        (0.53, [0.49, 0.51], "different"),
        (0.53, [0.49], "within noise"),  # two runs do not say how far they spread
    ],
)
def test_how_far_is_noise(
    score: float,
    seeds: list[float],
    verdict: str,
    committed: dict[str, dict[str, Any]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    for seed, value in enumerate(seeds, 1):
        name = f"seeds/voc/voc-res50-seed{seed}.json"
        committed[name] = metrics("voc-res50")
        committed[name]["protocols"]["single"]["mean_iou"] = value
    write(committed)
    if seeds:
        commit("seeds")
    committed["voc/voc-res50.json"]["protocols"]["single"]["mean_iou"] = score
    write(committed)
    code, lines = said(capsys)
    assert code == {"within noise": verify.EXIT_WITHIN_NOISE, "different": verify.EXIT_DIFFERENT}[verdict]
    count = 4 + 2 * len(seeds)
    assert lines[-1].startswith(f"{count - 1} of {count} scores identical")
    assert lines[-1].endswith(verdict)
    spread = "± 1.00" if len(seeds) == 2 else "-"
    change = f"{100 * score - 50:+.2f}"
    assert lines[1].split() == [
        "voc-res50",
        "single",
        f"{100 * score:.2f}",
        "50.00",
        change,
        *["45.0", "to", "55.0"],
        *spread.split(),
    ]


def test_other_settings_are_no_difference(
    committed: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """A longer training scores otherwise: that is what it is for. An experiment of one side only has no partner."""
    committed["voc/voc-res50.json"]["protocols"]["single"]["mean_iou"] = 0.9
    committed["voc/mine-res50.json"] = metrics("mine-res50")
    write(committed, steps={"voc-res50": 200})
    code, lines = said(capsys)
    assert code == 0
    assert lines[0] == "not compared, with other settings or not in both: mine-res50, voc-res50"
    assert lines[1].startswith("2 of 2 scores identical")


def test_another_seed_is_compared(committed: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    committed["voc/voc-res50.json"]["protocols"]["single"]["mean_iou"] = 0.51
    write(committed, seed=1)
    code, lines = said(capsys)
    assert code == verify.EXIT_WITHIN_NOISE
    assert lines[-1].startswith("3 of 4 scores identical")


def test_another_commit(committed: dict[str, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    git(Path(), "tag", "v1")
    committed["voc/voc-res50.json"]["protocols"]["multi"]["mean_iou"] = 0.9
    write(committed)
    commit("better")
    assert said(capsys)[0] == 0
    assert said(capsys, "--against", "v1")[0] == verify.EXIT_DIFFERENT
    assert verify.main(["--against", "v2"]) == 1
    assert capsys.readouterr().err.startswith("error: v2: ")


def test_without_a_repository_files_are_verified_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(verify, "check_files", lambda md5: None)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    code, lines = said(capsys)
    assert code == 0
    assert len(lines) == 1
    assert lines[0].startswith("scores were not compared with those of the commit: fatal: not a git repository")
