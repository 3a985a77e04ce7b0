"""The stage `evaluate` on a small project: its numbers against a count in numpy, batches, what is not to score."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stand_in import made_up_crf

from pipeline import datasets, evaluate
from pipeline.config.schema import build
from pipeline.tables.metrics_files import MetricsFile
from pipeline.tracking import Run
from refinenet import RefineNet
from refinenet.config import Protocol, Resizing
from refinenet.data.split import Schema, Split
from refinenet.data.writer import write_split
from refinenet.errors import UserError
from refinenet.inference.multiscale import predict
from refinenet.model.network import load, save

torch.set_num_threads(1)

PROTOCOLS = {"single": Protocol((1.0,)), "multi": Protocol((0.6, 1.0), flip=True)}
SETTINGS = {
    "protocols": {name: {"scales": p.scales, "flip": p.flip} for name, p in PROTOCOLS.items()},
    **{"input_scale": 1.2, "profile": "test", "device": "cpu", "threads": 1, "seed": 0, "pictures": 2},
}
MODELS = {"cityscapes-thin": "cityscapes", "ade20k-thin": "ade20k", "voc-thin": "voc"}
COUNT = 5

Metrics = dict[str, Any]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three data sets with images of two sizes, void in their labels, and untrained networks."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "models").mkdir()
    for name, data in MODELS.items():
        dataset = datasets.load(data)
        schema = Schema(data, "val", dataset.CLASSES, dataset.PALETTE)
        (folder / "data" / data).mkdir(parents=True)
        rng = np.random.default_rng(0)
        with write_split(folder / "data" / data / "val.arrow", schema) as writer:
            for index in range(COUNT):
                cells = rng.integers(0, len(dataset.CLASSES), (4, 10 if index == 1 else 12), dtype=np.uint8)
                label = cells.repeat(16, 0).repeat(8, 1)
                label[:3] = 255
                image = rng.integers(0, 256, (256, 3), dtype=np.uint8)[label]
                writer.add(f"image/{index}", image, label)
        torch.manual_seed(0)
        # What is no class: a void output that wins here and there.
        model = RefineNet(len(dataset.CLASSES), backbone="resnet50", stem=2, width=4, coarse_width=8, void_output=True)
        model.initialise("scaled", torch.Generator().manual_seed(1))
        with torch.no_grad():
            model.classifier.weight.normal_(generator=torch.Generator().manual_seed(3))
            model.classifier.weight[-1] *= 2
        about = {"dataset": data, "classes": dataset.CLASSES, "palette": dataset.PALETTE}
        save(model, folder / "models" / f"{name}.safetensors", about)
    return folder


class Told(Run):
    """Keeps what MLflow would be told."""

    def __init__(self) -> None:
        super().__init__(None)
        self.values: dict[str, Any] = {}

    def _send(self, call: str, **message: Any) -> None:
        self.values |= message.get("values", {})


@pytest.fixture
def inside(project: Path, monkeypatch: pytest.MonkeyPatch) -> Told:
    """The project as the working folder; returns what is told to MLflow."""
    monkeypatch.chdir(project)
    told = Told()

    @contextmanager
    def track(*_: object, **__: object) -> Iterator[Run]:
        yield told

    monkeypatch.setattr(evaluate, "track", track)
    return told


def run(name: str, **settings: Any) -> Metrics:
    """The metrics file that the stage writes."""
    every = {model: {"data": data, **SETTINGS, **settings} for model, data in MODELS.items()}
    Path("settings.json").write_text(json.dumps({"evaluate": every}))
    evaluate.run(name)
    read: Metrics = json.loads(Path(f"metrics/{MODELS[name]}/{name}.json").read_text())
    return read


def count(name: str, protocol: Protocol) -> tuple[dict[str, Any], Any]:
    """Ten lines of numpy: the scores, from labels predicted one image at a time with the plain network; the counts."""
    model, about = load(f"models/{name}.safetensors")
    classes = len(about["classes"])
    table = np.zeros((classes, classes + 1), np.int64)
    for sample in Split(Path(f"data/{MODELS[name]}/val.arrow")):
        assert sample.label is not None
        label = predict(model, sample.image, {"it": protocol}, Resizing(1.2))["it"]
        np.add.at(table, (sample.label[sample.label != 255], label[sample.label != 255]), 1)
    hits, truth = np.diag(table), table.sum(1)
    iou = hits / np.where(truth > 0, truth + table[:, :classes].sum(0) - hits, 1)
    values = {
        "iou": {c: i if t else None for c, i, t in zip(about["classes"], iou.tolist(), truth, strict=True)},
        "mean_iou": sum(iou[truth > 0].tolist()) / (truth > 0).sum(),
        "pixel_accuracy": hits.sum() / truth.sum(),
    }
    return values, table


def test_the_split_of_the_settings_is_scored(inside: Told) -> None:
    """The last image alone, under another name, with another score."""
    found = Split(Path("data/voc/val.arrow"))
    with write_split(Path("data/voc/test.arrow"), replace(found.schema, split="test")) as writer:
        writer.add("alone", found[COUNT - 1].image, found[COUNT - 1].label)
    every, alone = run("voc-thin"), run("voc-thin", split="test")
    assert [(one["split"], one["images"]) for one in (every, alone)] == [("val", COUNT), ("test", 1)]
    assert every["protocols"]["single"]["mean_iou"] != alone["protocols"]["single"]["mean_iou"]
    with pytest.raises(UserError, match=r"^data/voc/other\.arrow: no such file"):
        run("voc-thin", split="other")


@pytest.mark.parametrize("name", MODELS)
def test_the_numbers_are_those_of_a_plain_count(inside: Told, name: str) -> None:
    """To the last digit that the file has."""
    metrics = run(name)
    assert metrics["images"] == COUNT
    for protocol, how in PROTOCOLS.items():
        told = metrics["protocols"][protocol]
        values, table = count(name, how)
        assert np.array_equal(np.load(f"predictions/{name}/confusion-{protocol}.npy"), table)
        assert table[:, -1].any()  # void won somewhere
        assert {key: told[key] for key in values} == values
        assert told["mean_accuracy"] == pytest.approx(np.mean([r[i] / r.sum() for i, r in enumerate(table) if r.sum()]))
        assert (told["scales"], told["flip"], told["crf"]) == (list(how.scales), how.flip, False)
        low, high = told["interval"]["mean_iou"]
        assert 0 <= low < told["mean_iou"] < high <= 1
        low, high = told["interval"]["pixel_accuracy"]
        assert low < told["pixel_accuracy"] < high
        assert inside.values[f"{protocol}/mean_iou"] == told["mean_iou"]
    assert inside.values["images_per_second"] > 0
    assert len(list(Path(f"predictions/{name}").glob("*.png"))) == 2


def test_the_official_rules_stand_beside_the_papers(inside: Told) -> None:
    """Cityscapes: a predicted class that the truth lacks is 0; ADE20K: any lacking class is 0, of all 150."""
    told = run("cityscapes-thin")["protocols"]["single"]
    table = np.load("predictions/cityscapes-thin/confusion-single.npy")
    official = [v for v, c in zip(told["iou"].values(), table[:, :-1].sum(0), strict=True) if v is not None or c]
    assert told["alternatives"]["mean_iou"] == pytest.approx(sum(v or 0 for v in official) / len(official), abs=1e-12)
    names = list(told["iou"])
    labels = pytest.importorskip("cityscapesscripts.helpers.labels")
    group = [labels.name2label[name].category for name in names]
    assert {c: {n for n, g in zip(names, group, strict=True) if g == c} for c in dict.fromkeys(group)} == {
        category: set(members) for category, members in evaluate.CATEGORIES.items()
    }
    flat = np.array([g == "flat" for g in group])
    hits = table[flat][:, :-1][:, flat].sum()
    assert 0 < hits / (table[flat].sum() + table[:, :-1][:, flat].sum() - hits) < 1
    assert 0 < told["alternatives"]["category_iou"] < 1

    told = run("ade20k-thin")["protocols"]["single"]
    mean = sum(v or 0 for v in told["iou"].values()) / 150
    assert told["alternatives"]["mean_iou"] == pytest.approx(mean, abs=1e-12)
    assert told["alternatives"]["score"] == pytest.approx((mean + told["pixel_accuracy"]) / 2, abs=1e-12)
    assert "alternatives" not in run("voc-thin")["protocols"]["single"]


def test_metrics_say_whether_images_were_drawn(inside: Told) -> None:
    """By which a table says that its numbers mean nothing, whatever the profile is called."""
    for drawn in (False, True):
        metrics = run("voc-thin", drawn=drawn)
        assert metrics["drawn"] is drawn
        assert build(MetricsFile, metrics, "metrics").drawn is drawn


def test_batches_change_nothing_and_come_again_bit_for_bit(inside: Told) -> None:
    def files() -> dict[str, bytes]:
        paths = [Path("metrics/voc/voc-thin.json"), *Path("predictions/voc-thin").iterdir()]
        return {str(path): path.read_bytes() for path in sorted(paths)}

    one = run("voc-thin")
    first = files()
    run("voc-thin")
    assert files() == first
    several = run("voc-thin", batch_size=3)
    for protocol in PROTOCOLS:
        told, wanted = several["protocols"][protocol], one["protocols"][protocol]
        assert told["pixel_accuracy"] == pytest.approx(wanted["pixel_accuracy"], abs=1e-4)  # a tie may tip
        assert told["interval"]["mean_iou"] == pytest.approx(wanted["interval"]["mean_iou"], abs=1e-2)
    pictures = {name: data for name, data in files().items() if name.endswith(".png")}
    assert pictures == {name: data for name, data in first.items() if name.endswith(".png")}


def test_batches_are_of_one_size() -> None:
    sizes = np.array([[4, 5], [5, 4], [4, 5], [4, 5], [4, 4], [5, 4], [4, 5]])
    assert evaluate.batches(sizes, 1) == [[0], [2], [3], [6], [1], [5], [4]]
    assert evaluate.batches(sizes, 3) == [[0, 2, 3], [6], [1, 5], [4]]


def test_other_arithmetic_is_a_setting(inside: Told) -> None:
    """Each is passed on, and each gives nearly the plain numbers."""
    plain = run("voc-thin")["protocols"]["single"]["pixel_accuracy"]
    for settings in ({"precision": "bfloat16"}, {"channels_last": True}, {"tile": 256}):
        assert run("voc-thin", **settings)["protocols"]["single"]["pixel_accuracy"] == pytest.approx(plain, abs=0.02)
    with pytest.raises(UserError, match="tile is 7"):
        run("voc-thin", tile=7)


def test_a_dense_crf_on_prepared_images(inside: Told) -> None:
    """The protocol that profile paper has on VOC, on a split as `prepare` writes it: mapped, and read-only."""
    pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is not built here")
    protocols = {"multi": {"scales": (0.6, 1.0)}, "crf": {"scales": (0.6, 1.0), "crf": True}}
    told = run("voc-thin", protocols=protocols)["protocols"]
    assert told["crf"]["crf"]
    plain, refined = (np.load(f"predictions/voc-thin/confusion-{name}.npy") for name in protocols)
    assert plain.sum() == refined.sum()
    assert not np.array_equal(plain, refined)


def test_a_dense_crf_in_any_number_of_processes(inside: Told, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same bytes; one line and no new file where a process is killed."""
    files: list[dict[Path, bytes]] = []
    protocols = {"multi": {"scales": (0.6, 1.0)}, "crf": {"scales": (0.6, 1.0), "crf": True}}

    def written() -> dict[Path, bytes]:
        every = [path for folder in ("metrics", "predictions") for path in Path(folder).rglob("*") if path.is_file()]
        return {path: path.read_bytes() for path in every}

    with made_up_crf(tmp_path / "notes"):
        for cores in (1, 2, 3):
            for folder in ("metrics", "predictions"):
                shutil.rmtree(folder, ignore_errors=True)
            monkeypatch.setenv("PIPELINE_CORES", str(cores))
            run("voc-thin", protocols=protocols, batch_size=2)
            files.append(written())
            by = {note.suffix for note in (tmp_path / "notes").iterdir()}
            assert len(by) == 1 if cores == 1 else by
            assert f".{os.getpid()}" not in by
        assert files[0] == files[1] == files[2]
        assert len(files[0]) == 5
        assert not np.array_equal(*(np.load(f"predictions/voc-thin/confusion-{name}.npy") for name in protocols))

        monkeypatch.setenv("MADE_UP_CRF_SECONDS", "600")
        threading.Timer(0, kill_a_process).start()
        with pytest.raises(UserError, match=r"^a process of the dense CRF was killed or crashed; [^\n]*$"):
            run("voc-thin", protocols=protocols)
    assert written() == files[0]
    assert multiprocessing.active_children() == []


def kill_a_process() -> None:
    """The first that this one starts, as the system does where memory runs out."""
    while not multiprocessing.active_children():
        time.sleep(0.05)
    multiprocessing.active_children()[0].kill()


def test_an_image_without_a_label(inside: Told) -> None:
    path = Path("data/voc/val.arrow")
    split, kept = Split(path), path.read_bytes()
    with write_split(path, split.schema) as writer:
        writer.add("nameless", split[0].image, None)
    try:
        with pytest.raises(UserError, match=r"^data/voc/val\.arrow: nameless has no label to score against$"):
            run("voc-thin")
    finally:
        path.write_bytes(kept)
