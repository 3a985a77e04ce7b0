"""A measured result as a folder: all that it depends on, and nothing that does not fit together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path

import own_run
import pytest
import yaml

from pipeline import record
from pipeline.runtime.dvc_md5 import dvc_md5

NAME = "leaves-res101"


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    own_run.write_run(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/resnet101.safetensors").write_bytes(b"initial")
    file = tmp_path / f"metrics/leaves/{NAME}.json"
    metrics = json.loads(file.read_text()) | {"weights": {"md5": dvc_md5(tmp_path / f"models/{NAME}.safetensors")}}
    for protocol in metrics["protocols"].values():
        protocol |= {"interval": {"mean_iou": [0.3, 0.45], "pixel_accuracy": [0.7, 0.8]}, "flip": False}
    file.write_text(json.dumps(metrics))
    with chdir(tmp_path):
        yield tmp_path


def test_a_record_has_what_the_result_depends_on(project: Path) -> None:
    assert record.main([NAME, "--to", "records/one", "--note", "Of a test."]) == 0
    folder = Path("records/one")
    assert (folder / "metrics.json").read_bytes() == Path(f"metrics/leaves/{NAME}.json").read_bytes()
    assert (folder / "curve.csv").read_bytes() == Path(f"curves/{NAME}.csv").read_bytes()
    page = (folder / "README.md").read_text()
    for path in (f"models/{NAME}.safetensors", "data/leaves", "weights/resnet101.safetensors"):
        assert f"- `{path}`: {dvc_md5(Path(path))}" in page
    metrics = json.loads((folder / "metrics.json").read_text())
    for name, found in metrics["protocols"].items():
        assert f"| {name} |" in page
        assert f"{100 * found['mean_iou']:.2f}" in page
    assert "Of a test." in page
    assert "| stem | not in the truth" in page
    # Only this experiment's settings, and all of them: they resolve to the same values from the files beside them.
    kept = json.loads((folder / "settings.json").read_text())
    assert {stage: sorted(names) for stage, names in kept.items()} == {
        "download": ["leaves"],
        "prepare": ["leaves"],
        "weights": ["resnet101"],
        "train": [NAME],
        "evaluate": [NAME],
    }
    assert yaml.safe_load((folder / "params.yaml").read_text())["profile"] == "own"
    assert sorted(path.name for path in (folder / "profiles").iterdir()) == ["mini.yaml", "own.yaml"]
    assert f"snakemake --cores all metrics/leaves/{NAME}.json" in page


def test_what_does_not_fit_is_one_line_and_nothing_is_written(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def told(*arguments: str) -> str:
        assert record.main(list(arguments)) == 1
        assert not Path("docs/records").exists()
        (line,) = capsys.readouterr().err.splitlines()
        return line

    assert told("nobody").startswith("error: no experiment 'nobody', ")
    Path("taken").mkdir()
    assert told(NAME, "--to", "taken").startswith("error: taken: is there already")
    Path(f"models/{NAME}.safetensors").write_bytes(b"trained again")
    assert f"metrics/leaves/{NAME}.json: of weights with md5" in told(NAME)
    Path(f"curves/{NAME}.csv").unlink()
    assert told(NAME).startswith(f"error: curves/{NAME}.csv: no such file; `snakemake")
