"""DVC as people use it: scores, curves and differences shown, one-off changes tried and taken back."""

from __future__ import annotations

import csv
import json
import sqlite3
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_project
import yaml
from small_project import TINY, call, git

SCORES = "metrics/voc/voc-res101.json"
CURVE = "curves/voc-res101.csv"
POOLS = "experiments.voc-res101.pools"

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project in which voc-res101 is trained and evaluated, and all of that committed."""
    folder = small_project.make(tmp_path_factory.mktemp("project"), TINY)
    params = yaml.safe_load((folder / "params.yaml").read_text())
    for other in ("voc-res152", "voc-res50-demo"):
        del params["experiments"][other]
    params["backbones"] = ["resnet101"]
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    call(folder, "dvc", "repro", "evaluate@voc-res101")
    git(folder, "config", "user.name", "somebody")
    git(folder, "config", "user.email", "somebody@example.org")
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "base")
    return folder


def changed(project: Path) -> str:
    """What `git status` has to say."""
    status = ["git", "status", "--short"]
    return subprocess.run(status, cwd=project, check=True, capture_output=True, text=True).stdout


@pytest.fixture(autouse=True)
def as_it_was(project: Path) -> Iterator[None]:
    """Whatever a test leaves, the next one finds what is committed."""
    yield
    take_back(project)


def take_back(project: Path) -> None:
    """The way back from a change: git's files, then those that DVC keeps."""
    git(project, "checkout", "--quiet", ".")
    call(project, "dvc", "checkout", "evaluate@voc-res101", "train@voc-res101")


def without_lists(scores: Any) -> Any:
    """All that DVC shows of a file of metrics; the intervals, lists, stay in the file."""
    if not isinstance(scores, dict):
        return scores
    kept = {key: without_lists(value) for key, value in scores.items() if not isinstance(value, list)}
    return {key: value for key, value in kept.items() if value != {}}


def test_scores_and_curves_are_shown(project: Path) -> None:
    scores = json.loads((project / SCORES).read_text())
    shown = json.loads(call(project, "dvc", "metrics", "show", "--json").stdout)
    assert shown[""]["data"][SCORES]["data"] == without_lists(scores)
    table = call(project, "dvc", "metrics", "show", SCORES, "--md").stdout.splitlines()
    row = dict(zip(*([cell.strip() for cell in line.split("|")[1:-1]] for line in (table[0], table[2])), strict=True))
    assert float(row["protocols.single.mean_iou"]) == pytest.approx(scores["protocols"]["single"]["mean_iou"], abs=1e-5)
    assert call(project, "dvc", "metrics", "diff").stdout == ""

    told = call(project, "dvc", "plots", "show", CURVE).stdout.strip()
    page = Path(told.removeprefix("file://"))
    assert page.is_file()
    losses = [row["loss"] for row in csv.DictReader((project / CURVE).read_text().splitlines())]
    assert len(losses) == 6
    text = page.read_text()
    assert all(f'"loss": "{loss}"' in text for loss in losses)
    assert changed(project) == "", "git takes what DVC drew for a change of the project"


def test_one_off_change_of_an_experiment(project: Path) -> None:
    ran = call(project, "dvc", "exp", "run", "--name", "pools-2", "-S", f"{POOLS}=2", "evaluate@voc-res101").stdout
    assert {line for line in ran.splitlines() if line.startswith("> python")} == {
        "> python -m pipeline.settings",
        "> python -m pipeline.train voc-res101",
        "> python -m pipeline.evaluate voc-res101",
    }
    assert yaml.safe_load((project / "params.yaml").read_text())["experiments"]["voc-res101"]["pools"] == 2
    (file,) = json.loads(call(project, "dvc", "metrics", "diff", "--json").stdout).values()
    assert file["network.pools"] == {"old": 4, "new": 2, "diff": -2}
    params = json.loads(call(project, "dvc", "params", "diff", "--json").stdout)
    assert params["params.yaml"] == {POOLS: {"old": 4, "new": 2, "diff": -2}}
    both = call(project, "dvc", "plots", "diff", "HEAD", "--targets", CURVE).stdout.strip()
    text = Path(both.removeprefix("file://")).read_text()
    assert '"rev": "HEAD"' in text
    assert '"rev": "workspace"' in text

    # The experiments have hundreds of columns: the two that matter.
    columns = ("--drop", ".*", "--keep", r"Experiment|rev|.*(single\.mean_iou|voc-res101\.pools)")
    shown = call(project, "dvc", "exp", "show", "--csv", *columns).stdout.splitlines()
    rows = {row["Experiment"] or row["rev"]: row for row in csv.DictReader(shown)}
    score = json.loads((project / SCORES).read_text())["protocols"]["single"]["mean_iou"]
    assert rows["pools-2"][POOLS] == "2"
    (shown_score,) = (value for name, value in rows["pools-2"].items() if name.endswith("protocols.single.mean_iou"))
    assert float(shown_score) == score
    assert len(rows["pools-2"]) == 4

    take_back(project)
    assert changed(project) == ""
    assert "Running stage" not in call(project, "dvc", "repro", "evaluate@voc-res101").stdout
    # And there again, without training.
    call(project, "dvc", "exp", "apply", "pools-2")
    assert "Running stage" not in call(project, "dvc", "repro", "evaluate@voc-res101").stdout
    assert json.loads((project / SCORES).read_text())["network"]["pools"] == 2


def test_one_off_change_of_the_profile_elsewhere(project: Path) -> None:
    """--temp works in a copy that is removed; MLflow's database is named, or its run would go with it."""
    before = {path: (project / path).read_bytes() for path in (CURVE, SCORES, "params.yaml", "dvc.lock")}
    database = project / "mlflow.db"
    change = "profiles/test.yaml:datasets.voc.train.steps=7"
    run = ("dvc", "exp", "run", "--temp", "--name", "steps-7", "-S", change, "train@voc-res101")
    # `call` puts the project itself on the path of modules: here they are to come from the copy.
    call(project, *run, MLFLOW_TRACKING_URI=f"sqlite:///{database}", PYTHONPATH="")
    assert changed(project) == ""
    assert {path: (project / path).read_bytes() for path in before} == before
    diff = json.loads(call(project, "dvc", "exp", "diff", "HEAD", "steps-7", "--json").stdout)
    assert diff["params"]["settings.json"]["train.voc-res101.recipe.steps"] == {"old": 6, "new": 7, "diff": 1}
    with sqlite3.connect(database) as connection:
        steps = connection.execute(
            "select p.value from params p join runs r using (run_uuid) where r.name = 'voc-res101' and p.key = 'steps'",
        ).fetchall()
    assert set(steps) == {("6",), ("7",)}
    call(project, "dvc", "exp", "apply", "steps-7")
    assert len((project / CURVE).read_text().splitlines()) == 8


def test_a_wrong_change_is_one_line(project: Path) -> None:
    for change, line in (
        ("experiments.voc-res101.pool=2", "ERROR: Invalid `--set-param` value: Could not override 'experiments.voc-"),
        ("+experiments.voc-res101.pool=2", "error: params.yaml: unknown key experiments.voc-res101.pool"),
    ):
        run = call(project, "dvc", "exp", "run", "-S", change, "evaluate@voc-res101", check=False)
        assert run.returncode != 0
        assert any(told.startswith(line) for told in run.stderr.splitlines()), run.stderr
        assert "Traceback" not in run.stderr
    take_back(project)
    assert changed(project) == ""
    assert "Running stage" not in call(project, "dvc", "repro", "evaluate@voc-res101").stdout
