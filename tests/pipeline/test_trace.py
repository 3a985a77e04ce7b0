"""`refinenet trace`: every number of it against the files that it comes from; what is missing is said."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import own_run
import pytest
import small_project
import yaml

from pipeline import trace
from pipeline.runtime.dvc_md5 import dvc_md5

ROOT = Path(__file__).resolve().parents[2]
NAME = "leaves-res101"
METRICS = Path(f"metrics/leaves/{NAME}.json")
MODEL = Path(f"models/{NAME}.safetensors")


def edit(file: Path, **changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(file.read_text()) | changes
    file.write_text(json.dumps(made))
    return made


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Results on leaves in a repository with one commit; dvc.lock has what they were made from."""
    own_run.write_run(tmp_path)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/resnet101.safetensors").write_bytes(b"initial")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with chdir(tmp_path):
        metrics = json.loads(METRICS.read_text())
        for number, protocol in enumerate(metrics["protocols"].values()):
            protocol |= {
                "interval": {"mean_iou": [0.31, 0.44], "pixel_accuracy": [0.7, 0.8]},
                "mean_iou": 0.36 + number / 64,
            }
        edit(METRICS, protocols=metrics["protocols"], weights={"md5": dvc_md5(MODEL)})
        deps = [
            {"path": "data/leaves", "md5": "a" * 32 + ".dir"},
            {"path": "weights/resnet101.safetensors", "md5": "b" * 32},
        ]
        stages = {f"train@{NAME}": {"deps": deps, "outs": [{"path": str(MODEL), "md5": dvc_md5(MODEL)}]}}
        Path("dvc.lock").write_text(yaml.safe_dump({"stages": stages}))
        small_project.git(tmp_path, "init", "--quiet")
        small_project.git(tmp_path, "add", "metrics")
        small_project.git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-qm", "scores")
        yield tmp_path


def as_json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert trace.main([*words, "--json"]) == 0
    made: dict[str, Any] = json.loads(capsys.readouterr().out)
    return made


def test_all_that_a_footnote_needs(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, NAME)
    metrics = json.loads(METRICS.read_text())
    for score in found["scores"]:
        of = metrics["protocols"][score["protocol"]]
        assert (score["mean_iou"], score["interval"]) == (of["mean_iou"], of["interval"]["mean_iou"])
        assert (score["pixel_accuracy"], score["scales"]) == (of["pixel_accuracy"], of["scales"])
        assert score["spread"] is None
    assert [score["protocol"] for score in found["scores"]] == ["single", "multi"]
    assert (found["images"], found["split"], found["seeds"], found["profile"]) == (12, "val", [0], "own")
    # What it was made from is what DVC noted, not what lies here now; the model is what lies here.
    assert found["md5"] == {
        str(METRICS): dvc_md5(METRICS),
        str(MODEL): dvc_md5(MODEL),
        "weights/resnet101.safetensors": "b" * 32,
        "data/leaves": "a" * 32 + ".dir",
    }
    (archive,) = found["archives"]["leaves"]
    assert (archive["file"], archive["md5"]) == ("leaves.zip", dvc_md5(Path("data/raw/leaves/leaves.zip")))
    assert len(found["commit"]) == 40
    assert found["notes"] == ["not in MLflow: " + f"{project / 'mlflow.db'}: no such file; the first training makes it"]

    assert trace.main([NAME]) == 0
    told = capsys.readouterr().out
    score = metrics["protocols"]["multi"]["mean_iou"]
    assert f"multi-scale (0.6, 0.8, 1): mean IoU {100 * score:.1f} (95 % over images 31.0 to 44.0)" in told
    last = told.splitlines()[-1]
    assert last.startswith("  report    multi-scale")
    assert last.endswith(
        f"12 images of leaves val, 1 training seed, commit {found['commit'][:12]}, weights md5 {dvc_md5(MODEL)}"
    )


def test_images_have_the_papers_name_and_synthetic_ones_no_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The committed mini: NYUDv2's `val` is the paper's test, VOC's is not; nothing of it is to be printed."""
    monkeypatch.chdir(ROOT)
    for name, images in (("nyud-res152", "of nyud test"), ("voc-res101", "of voc val")):
        assert trace.main([name]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert f"  images    12 synthetic images {images}" in lines
        assert lines[-1] == "  report    nothing: these images are synthetic"
        found = as_json(capsys, name)
        assert (found["split"], found["drawn"]) == ("val", True)


def test_several_seeds_are_mean_and_spread(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = json.loads(METRICS.read_text())
    values = [one["protocols"]["single"]["mean_iou"]]
    Path("metrics/seeds/leaves").mkdir(parents=True)
    for seed, value in ((1, 0.5), (2, 0.3)):
        file = Path(f"metrics/seeds/leaves/{NAME}-seed{seed}.json")
        shutil.copy(METRICS, file)
        protocols = {name: of | {"mean_iou": value} for name, of in one["protocols"].items()}
        edit(file, seed=seed, protocols=protocols, weights={"md5": str(seed) * 32})
        values.append(value)
    found = as_json(capsys, NAME)
    score = found["scores"][0]
    assert (score["mean_iou"], score["spread"]) == (pytest.approx(fmean(values)), pytest.approx(stdev(values)))
    assert found["seeds"] == [0, 1, 2]
    assert found["md5"][f"models/{NAME}-seed2.safetensors"] == "2" * 32
    assert trace.main([NAME]) == 0
    told = capsys.readouterr().out
    assert f"mean IoU {100 * fmean(values):.1f} ± {100 * stdev(values):.1f} over 3 seeds" in told


def test_what_does_not_fit_and_what_is_missing(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edit(METRICS, images=13)
    assert as_json(capsys, NAME)["commit"].endswith(f", from which {METRICS} differs: commit it")
    known = dvc_md5(MODEL)
    MODEL.write_bytes(b"trained again")
    assert trace.main([NAME]) == 1
    assert f"error: {METRICS}: of weights with md5 {known}, {MODEL} has {dvc_md5(MODEL)}; " in capsys.readouterr().err
    MODEL.unlink()
    found = as_json(capsys, NAME)
    assert found["md5"][str(MODEL)] == known
    assert found["notes"][0] == f"{MODEL} is not on this machine; `dvc pull train@{NAME}` brings it"
    Path("dvc.lock").unlink()
    assert as_json(capsys, NAME)["md5"]["data/leaves"] == dvc_md5(Path("data/leaves"))
    shutil.rmtree(".git")
    assert any(note.startswith("commit: ") for note in as_json(capsys, NAME)["notes"])
    METRICS.unlink()
    assert trace.main([NAME]) == 1
    assert capsys.readouterr().err == f"error: {METRICS}: no such file; `evaluate {NAME}` makes it\n"


def test_the_list(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert trace.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    params = yaml.safe_load(Path("params.yaml").read_text())
    assert sorted(line.split()[0] for line in lines[:-1]) == sorted([*params["experiments"], *params["pretrainings"]])
    assert f"{'voc-res101-coco':20} has no scores, others start from it" in lines
    assert f"{NAME:20} single 37.6, multi 36.0 on 12 images, profile own" in lines
    assert f"{'voc-res101':20} not evaluated yet" in lines


def test_a_record_says_what_its_files_say(capsys: pytest.CaptureFixture[str]) -> None:
    (folder,) = (ROOT / "docs/records").glob("*-camvid-lite0")
    found = as_json(capsys, str(folder))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {one["protocol"]: one["mean_iou"] for one in found["scores"]} == {
        name: of["mean_iou"] for name, of in metrics["protocols"].items()
    }
    assert found["md5"]["models/camvid-lite0.safetensors"] == metrics["weights"]["md5"]
    assert found["md5"]["metrics/camvid/camvid-lite0.json"] == dvc_md5(folder / "metrics.json")
    assert {run["stage"] for run in found["runs"]} == {"train", "evaluate"}
    page = (folder / "README.md").read_text()
    assert all(run["id"] in page and run["commit"] in page for run in found["runs"])
    assert found["commit"].split()[0] in page
    assert found["machine"].startswith("AMD EPYC")


def test_a_paper_row_names_its_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    run = trace.metrics_files.load("nyud-res152")
    assert list(trace._tables(run, "multi"))[-1] == "Table 3, RefineNet-Res152, RGB"
    real = trace.replace(run, drawn=False)
    assert list(trace._tables(real, "multi"))[-1] == "Table 3, RefineNet-Res152, RGB: 46.5 on test, 654 images"
