"""The command `submit`: archives as the two test servers take them, scored by the official tool, killed, corrupted."""

from __future__ import annotations

import gzip
import importlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

import fake_run
import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from pipeline import datasets, evaluate, submit, tabulate
from pipeline.config.schema import Rendered
from pipeline.runtime.dvc_md5 import dvc_md5
from pipeline.synthetic import render
from pipeline.tables import server_records
from pipeline.tables.paper import published
from pipeline.test_servers.formats import SERVERS
from pipeline.tracking import Run
from refinenet import RefineNet
from refinenet.config import Protocol, Resizing
from refinenet.data.split import Array, Schema, Split
from refinenet.data.writer import write_split
from refinenet.errors import UserError
from refinenet.inference.multiscale import predict
from refinenet.inference.predictor import Predictor
from refinenet.metrics import confusion, scores
from refinenet.model.network import load, save

torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[2]
COUNT = 8  # as many drawn images have every class of Cityscapes in their labels
MULTI = Protocol((0.6, 1.0))
SETTINGS = {
    "protocols": {"single": {"scales": [1.0]}, "multi": {"scales": MULTI.scales}},
    **{"input_scale": 1.2, "short_edge": [48, 72], "profile": "test", "device": "cpu", "threads": 1, "seed": 0},
}
EXPERIMENTS = {"voc-res152": "voc", "cityscapes-res101": "cityscapes", "nyud-res50": "nyud", "voc-none": "voc"}


def thin(path: Path, data: str) -> None:
    """An untrained network that finds many classes, and no class here and there, saved as `train` does."""
    dataset = datasets.load(data)
    torch.manual_seed(0)
    model = RefineNet(len(dataset.CLASSES), backbone="resnet50", stem=2, width=4, coarse_width=8, void_output=True)
    model.initialise("scaled", torch.Generator().manual_seed(1))
    with torch.no_grad():
        model.classifier.weight.normal_(generator=torch.Generator().manual_seed(3))
    save(model, path, {"dataset": data, "classes": dataset.CLASSES, "palette": dataset.PALETTE})


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with VOC's test images and Cityscapes' val images (and labels), all drawn, and thin models."""
    folder = tmp_path_factory.mktemp("submit")
    (folder / "models").mkdir()
    evaluations = {name: {"data": data, **SETTINGS} for name, data in EXPERIMENTS.items()}
    (folder / "settings.json").write_text(json.dumps({"evaluate": evaluations}))
    for data, split, experiment in (("voc", "test", "voc-res152"), ("cityscapes", "val", "cityscapes-res101")):
        raw = folder / "data/raw" / data
        render(data, Rendered(train=1, val=COUNT, height=64, width=80), raw)
        dataset = datasets.load(data)
        schema = Schema(data, split, dataset.CLASSES, dataset.PALETTE)
        with dataset.Reader(raw) as reader, write_split(folder / "data" / data / f"{split}.arrow", schema) as writer:
            for name in reader.names("val"):
                image, label = reader.read("val", name)
                writer.add(name, image, None if split == "test" else label)
        thin(folder / "models" / f"{experiment}.safetensors", data)
    return folder


@pytest.fixture
def inside(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The project as the working folder, its few images the whole official split, nothing submitted yet."""
    monkeypatch.chdir(project)
    shutil.rmtree("submissions", ignore_errors=True)
    monkeypatch.setitem(datasets.load("voc").COUNTS, "test", COUNT)  # type: ignore[arg-type]
    return project


class Calls:
    """Counts the images that models predict; Ctrl-C comes at prediction number `interrupt`."""

    def __init__(self) -> None:
        self.count, self.interrupt = 0, 0


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Calls:
    made, original = Calls(), Predictor.stream

    def counted(self: Predictor, batches: Iterable[Sequence[Array]], *more: Any) -> Iterator[list[dict[str, Tensor]]]:
        def each() -> Iterator[Sequence[Array]]:
            for images in batches:
                made.count += 1
                if made.count == made.interrupt:
                    raise KeyboardInterrupt
                yield images

        return original(self, each(), *more)

    monkeypatch.setattr(Predictor, "stream", counted)
    return made


@contextmanager
def untracked(*_: object, **__: object) -> Iterator[Run]:
    yield Run(None)


def official_tool() -> Any:
    """Cityscapes' own scorer."""
    return importlib.import_module("cityscapesscripts.evaluation.evalPixelLevelSemanticLabeling")


def official(predictions: list[Path], truths: list[Path]) -> dict[str, Any]:
    """The scores of Cityscapes' own scorer."""
    tool = official_tool()
    tool.args.quiet, tool.args.JSONOutput, tool.args.evalInstLevelScore = True, False, False
    result: dict[str, Any] = tool.evaluateImgLists(list(map(str, predictions)), list(map(str, truths)), tool.args)
    return result


def unpacked(folder: Path, archive: Path) -> tuple[list[Path], list[Path]]:
    """The predictions as the official tool finds them in the unpacked archive, and their truths."""
    tool = official_tool()
    for path in (archive, Path("data/raw/cityscapes/gtFine_trainvaltest.zip")):
        with zipfile.ZipFile(path) as file:
            file.extractall(folder / path.stem)
    tool.args.predictionPath, tool.args.predictionWalk = str(folder / archive.stem), None
    truths = sorted((folder / "gtFine_trainvaltest/gtFine/val").rglob("*_gtFine_labelIds.png"))
    return [Path(tool.getPrediction(tool.args, str(truth))) for truth in truths], truths


def test_cityscapes_official_tool_gives_our_score(
    inside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert submit.main(["cityscapes", "--split", "val", "--partial"]) == 0
    archive = Path("submissions/cityscapes-res101-val.partial.zip")
    predictions, truths = unpacked(tmp_path, archive)
    assert len(truths) == len(zipfile.ZipFile(archive).namelist()) == COUNT
    values = {int(v) for path in predictions for v in np.unique(np.array(Image.open(path)))}
    assert 0 in values  # a void output won somewhere
    assert values <= {0, *datasets.cityscapes.LABEL_IDS}  # type: ignore[attr-defined]
    assert len(values) > 6
    theirs = official(predictions, truths)

    monkeypatch.setattr(evaluate, "track", untracked)
    evaluate.run("cityscapes-res101")
    (metrics,) = Path("metrics").rglob("cityscapes-res101.json")
    ours = json.loads(metrics.read_text())["protocols"]["multi"]
    assert None not in ours["iou"].values()
    assert {name: theirs["classScores"][name] for name in ours["iou"]} == ours["iou"]
    assert ours["mean_iou"] == theirs["averageScoreClasses"]


def test_a_class_that_the_truth_lacks(inside: Path, tmp_path: Path) -> None:
    """We leave it out of the mean; the official tool counts it as 0 if it was predicted. On the 500 all 19 occur."""
    assert submit.main(["cityscapes", "--split", "val", "--partial"]) == 0
    predictions, truths = unpacked(tmp_path, Path("submissions/cityscapes-res101-val.partial.zip"))
    theirs = official(predictions[:1], truths[:1])["classScores"]
    sample = next(iter(Split(Path("data/cityscapes/val.arrow"))))
    assert sample.label is not None
    ids = np.array(Image.open(predictions[0]))
    table = np.full(256, 19, np.uint8)
    table[list(datasets.cityscapes.LABEL_IDS)] = range(19)  # type: ignore[attr-defined]
    ours = scores(confusion(sample.label, table[ids], 19)).iou
    lacking = 0
    for name, value in zip(datasets.load("cityscapes").CLASSES, ours, strict=True):
        if value is None:
            lacking += 1
            assert theirs[name] == 0 or np.isnan(theirs[name])
        else:
            assert theirs[name] == value
    assert lacking


def colour(index: int) -> list[int]:
    """VOClabelcolormap.m, line by line."""
    rgb, bits = [0, 0, 0], index
    for place in range(7, -1, -1):
        for channel in range(3):
            rgb[channel] |= (bits >> channel & 1) << place
        bits >>= 3
    return rgb


def test_voc_archive_is_as_the_server_wants_it(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert submit.main(["voc"]) == 0
    line = capsys.readouterr().out
    archive = Path("submissions/voc-res152.tgz")
    assert line.count("\n") == 1
    assert line.startswith(f"{archive}: {COUNT} images")
    assert "upload it, as comp6" in line
    assert "http://host.robots.ox.ac.uk:8080/" in line
    assert sorted(path.name for path in archive.parent.iterdir()) == ["voc-res152.json", "voc-res152.tgz"]

    model, _ = load(Path("models/voc-res152.safetensors"))
    # The same network without its output for void.
    plain = RefineNet(**{**vars(model.config), "void_output": False})
    weights = model.state_dict()
    plain.load_state_dict({k: v[:21] if k.startswith("classifier.") else v for k, v in weights.items()})
    voids, seen = 0, set()
    images = Split(Path("data/voc/test.arrow"))
    with tarfile.open(archive) as tar:
        folder = "results/VOC2012/Segmentation/comp6_test_cls"
        assert tar.getnames() == [f"{folder}/{sample.name}.png" for sample in images]
        assert all(member.isfile() for member in tar)
        for sample in images:
            file = tar.extractfile(f"{folder}/{sample.name}.png")
            assert file is not None
            with Image.open(file) as picture:
                assert (picture.format, picture.mode) == ("PNG", "P")
                assert picture.getpalette() == [value for index in range(256) for value in colour(index)]
                values = np.array(picture)
            expected = predict(plain.eval(), sample.image, {"m": MULTI}, Resizing(1.2, (48, 72)))["m"]
            assert np.array_equal(values, expected)
            seen |= set(np.unique(values).tolist())
            voids += (predict(model, sample.image, {"m": MULTI}, Resizing(1.2, (48, 72)))["m"] == 21).sum()
    assert len(seen) > 6
    assert voids > 0

    notes = json.loads(archive.with_suffix(".json").read_text())
    assert notes["archive"] == {"file": archive.name, "md5": dvc_md5(archive), "images": COUNT, "partial": False}
    assert notes["model"] == {
        "file": "models/voc-res152.safetensors",
        "md5": dvc_md5(Path("models/voc-res152.safetensors")),
    }
    assert notes["data"]["md5"] == dvc_md5(images.path)
    assert (notes["experiment"], notes["profile"], notes["protocol"]["name"]) == ("voc-res152", "test", "multi")
    assert notes["server"] == {"data": "voc", "split": "test", "competition": "comp6"}

    assert submit.main(["check", str(archive), "--data", "voc"]) == 0
    first = archive.read_bytes()
    archive.unlink()
    assert submit.main(["voc"]) == 0
    assert archive.read_bytes() == first
    for name in ("a.zip", "a.tar", "b.tar.gz"):
        assert submit.main(["voc", "--output", name, "--competition", "comp5"]) == 0
        assert submit.main(["check", name, "--data", "voc"]) == 0
    assert "names .tgz, .tar.gz, .tar only" in capsys.readouterr().out


KILL = """
import os, pathlib, signal, sys
from pipeline import datasets, submit
datasets.load("voc").COUNTS["test"] = {count}
rename, left = pathlib.Path.replace, [{renames}]
def replace(self, target):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    return rename(self, target)
pathlib.Path.replace = replace
sys.exit(submit.main(["voc"]))
"""


def test_killed_and_started_again(inside: Path, calls: Calls) -> None:
    assert submit.main(["voc", "--output", "whole/voc-res152.tgz"]) == 0
    assert calls.count == COUNT
    archive, kept = Path("submissions/voc-res152.tgz"), Path("submissions/.voc-res152.parts")
    # Files get their names in this order: the key, the predictions, the archive twice, the notes.
    for renames, predicted in ((1 + 3 + 1, 3), (COUNT - 3 + 1 + 1, COUNT)):
        before = {path: path.stat().st_mtime_ns for path in kept.glob("*.png")} if kept.exists() else {}
        code = KILL.format(count=COUNT, renames=renames)
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], env=environment, check=False, capture_output=True)
        assert done.returncode == -signal.SIGKILL, done.stderr
        assert not archive.exists()
        assert len(list(kept.glob("[!.]*.png"))) == predicted
        assert {path: path.stat().st_mtime_ns for path in before} == before
    assert submit.main(["voc"]) == 0
    assert calls.count == COUNT  # none since
    assert archive.read_bytes() == Path("whole/voc-res152.tgz").read_bytes()
    assert [path.name for path in archive.parent.iterdir() if path.name[0] == "."] == []


def test_kept_predictions_are_used_for_the_same_question_only(inside: Path, calls: Calls) -> None:
    def interrupted() -> None:
        calls.count, calls.interrupt = 0, 4
        assert submit.main(["voc"]) == 130
        calls.count, calls.interrupt = 0, 0

    interrupted()
    next(Path("submissions/.voc-res152.parts").glob("*.png")).write_bytes(b"damaged")
    assert submit.main(["voc"]) == 0
    assert calls.count == COUNT - 2
    first = Path("submissions/voc-res152.tgz").read_bytes()
    interrupted()
    assert submit.main(["voc", "--protocol", "single"]) == 0
    assert calls.count == COUNT
    assert Path("submissions/voc-res152.tgz").read_bytes() != first


Members = dict[str, bytes]


def repacked(members: Members, path: Path) -> Path:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in members.items():
                archive.writestr(name.partition("!")[0], data)
    else:
        with gzip.open(path, "wb") as packed, tarfile.open(fileobj=packed, mode="w") as tar:
            for name, data in members.items():
                info = tarfile.TarInfo(name.partition("!")[0])
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def repainted(data: bytes, change: Callable[[Image.Image], Image.Image]) -> bytes:
    file = io.BytesIO()
    change(Image.open(io.BytesIO(data))).save(file, "PNG")
    return file.getvalue()


def dotted(picture: Image.Image, value: int) -> Image.Image:
    picture.putpixel((3, 2), value)
    return picture


def train_ids(picture: Image.Image) -> Image.Image:
    return Image.fromarray(np.array(picture) % 19)


def recoloured(picture: Image.Image) -> Image.Image:
    picture.putpalette([*range(256)] * 3)
    return picture


def one(change: Callable[[bytes], bytes]) -> Callable[[Members], Members]:
    """Change the third file."""
    return lambda members: {k: change(v) if i == 2 else v for i, (k, v) in enumerate(members.items())}


BOTH: dict[str, tuple[Callable[[Members], Members], str]] = {
    "one missing": (lambda m: dict(list(m.items())[1:]), "7 of 8 images, .* is the first not there"),
    "one more": (lambda m: m | {"readme.txt": b"hello"}, "readme.txt: expected no file but"),
    "a stranger": (
        lambda m: m | {next(iter(m)).replace("000", "777"): next(iter(m.values()))},
        "has no image",
    ),
    "twice": (lambda m: m | {f"{next(iter(m))}!": next(iter(m.values()))}, "twice in the archive"),
    "no PNG": (one(lambda _: b"GIF89a"), "not a PNG"),
    "cut short": (one(lambda data: data[:-40]), "png: "),
    "another size": (one(lambda d: repainted(d, lambda p: p.resize((31, 17)))), "31 x 17 pixels, expected"),
    "colour": (one(lambda d: repainted(d, lambda p: p.convert("RGB"))), "of colour type 2, expected 8-bit"),
    "deep": (one(lambda d: repainted(d, lambda p: Image.fromarray(np.array(p).astype(np.uint16)))), "16-bit PNG"),
    "void": (one(lambda d: repainted(d, lambda p: dotted(p, 255))), "value 255, expected"),
}
OF_VOC = {
    "grey": (one(lambda d: repainted(d, lambda p: Image.fromarray(np.array(p)))), "type 0, expected 8-bit with a pal"),
    "another palette": (one(lambda d: repainted(d, recoloured)), "expected the colour map of VOC"),
    "too high": (one(lambda d: repainted(d, lambda p: dotted(p, 21))), "value 21, expected 0 to 20"),
    "no folders": (lambda m: {name.rpartition("/")[2]: data for name, data in m.items()}, "expected no file but"),
    "another split": (lambda m: {k.replace("_test_", "_val_"): v for k, v in m.items()}, "expected no file but"),
    "two competitions": (
        lambda m: {k.replace("comp6", "comp5") if i == 4 else k: v for i, (k, v) in enumerate(m.items())},
        "comp5 and comp6, expected one competition",
    ),
}
OF_CITYSCAPES = {
    "train ids": (one(lambda d: repainted(d, train_ids)), r"value \d+, expected the label ids \(not train ids\) 7, 8"),
    "two for one": (
        lambda m: m | {"again/" + next(iter(m)): next(iter(m.values()))},
        "a second file for",
    ),
    "a sequence's part": (lambda m: {name.replace("_000019", ""): v for name, v in m.items()}, "expected no file but"),
}
CASES = [
    *(("voc", name, *case) for name, case in (BOTH | OF_VOC).items()),
    *(("cityscapes", name, *case) for name, case in (BOTH | OF_CITYSCAPES).items()),
]


@pytest.fixture(scope="module")
def sent(project: Path) -> dict[str, Members]:
    """What a good archive of each data set has, without a prediction: class indices that go round."""
    made: dict[str, Members] = {}
    for data, split in (("voc", "test"), ("cityscapes", "val")):
        server = SERVERS[data]
        made[data] = {}
        for sample in Split(project / "data" / data / f"{split}.arrow"):
            label = np.indices(sample.image.shape[:2]).sum(0) % len(server.values)
            name = server.member.format(image=sample.name, split=split, competition="comp6")
            made[data][name] = server.png(label.astype(np.uint8))
    return made


def check(path: Path, data: str) -> int:
    split = "test" if data == "voc" else "val"
    return submit.main(["check", str(path), "--data", data, "--split", split, "--partial"])


@pytest.mark.parametrize(("data", "name", "change", "message"), CASES, ids=[f"{c[0]}-{c[1]}" for c in CASES])
def test_check_finds_what_the_server_would_refuse(
    inside: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    sent: dict[str, Members],
    data: str,
    name: str,
    change: Callable[[Members], Members],
    message: str,
) -> None:
    suffix = "tgz" if data == "voc" else "zip"
    with pytest.warns(UserWarning, match="Duplicate") if (name, suffix) == ("twice", "zip") else untracked():
        path = repacked(change(sent[data]), tmp_path / f"sent.{suffix}")
    assert check(path, data) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error), error


@pytest.mark.parametrize("data", ["voc", "cityscapes"])
def test_check_of_good_and_of_broken_archives(
    inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], sent: dict[str, Members], data: str
) -> None:
    path = repacked(sent[data], tmp_path / ("sent.tgz" if data == "voc" else "sent.zip"))
    assert check(path, data) == 0
    assert capsys.readouterr().out.count("\n") == 1
    if data == "cityscapes":  # any folder, any ending
        names = {f"some/folder/{k.replace('_labelIds', '_leftImg8bit')}": v for k, v in sent[data].items()}
        assert check(repacked(names, tmp_path / "other.zip"), data) == 0
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"", b"no archive"):
        path.write_bytes(broken)
        assert check(path, data) == 1
        assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("voc --experiment nyud-res50", "--experiment nyud-res50: trained on nyud, expected an experiment on voc"),
        ("voc --experiment voc-res50", "unknown name 'voc-res50': did you mean"),
        ("voc --experiment voc-none", "models/voc-none.safetensors: no such file; `train voc-none` makes it"),
        ("voc --protocol flip", "--protocol flip: voc-res152 has single, multi"),
        ("voc --output voc.rar", "voc.rar: expected a name that ends in .tgz, .tar.gz, .tar, .zip"),
        ("voc --split val", "data/voc/val.arrow: no such file; `prepare` makes it"),
        ("cityscapes", "data/cityscapes/test.arrow: no test images are prepared: leftImg8bit_trainvaltest.zip"),
        ("cityscapes --split val", "data/cityscapes/val.arrow: 8 images, val of Cityscapes has 500; --partial"),
        ("check none.zip --data voc", "none.zip: no such file"),
        ("check settings.json --data voc", "settings.json: expected a name that ends in .tgz"),
    ],
)
def test_what_a_user_can_get_wrong(inside: Path, capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert submit.main(words.split()) == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert message in said.err
    assert said.out == ""
    assert not list(Path().glob("submissions/*"))


def test_two_at_once(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = Path("submissions/.voc-res152.parts")
    kept.mkdir(parents=True)
    with FileLock(kept / "lock"):
        assert submit.main(["voc"]) == 1
    assert capsys.readouterr().err == "error: submissions/voc-res152.tgz: another process is writing it\n"


def test_images_that_are_not_the_officials(
    inside: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(datasets.load("cityscapes").COUNTS, "val", COUNT)  # type: ignore[arg-type]
    assert submit.main(["cityscapes", "--split", "val"]) == 1
    assert "is 128 x 64, expected 2048 x 1024" in capsys.readouterr().err
    shutil.copy("data/voc/test.arrow", "kept.arrow")
    image = np.zeros((20, 20, 3), np.uint8)
    for names, message in (("../../x", "image '../../x', expected a name"), ("aa", "image a is there twice")):
        schema = Schema("voc", "test", datasets.load("voc").CLASSES, datasets.load("voc").PALETTE)
        with write_split(Path("data/voc/test.arrow"), schema) as writer:
            for name in [names] if "/" in names else names:
                writer.add(name, image, None)
        assert submit.main(["voc", "--partial"]) == 1
        assert message in capsys.readouterr().err
    Path("kept.arrow").replace("data/voc/test.arrow")


# What the servers answer ----------------------------------------------------------------------------------------------

LINK = "http://host.robots.ox.ac.uk:8080/anonymous/XYZ.html"
PRINTED = dict(zip(datasets.load("voc").CLASSES[1:], published()["voc"].rows[-1].values, strict=False))  # Res152
EXACT = {name: f"{value}1357" for name, value in (PRINTED | {"background": "96.1"}).items()}  # five decimals, as there


def answers(mean: str | None, iou: dict[str, str]) -> str:
    """A file of answers, the numbers with all their digits."""
    numbers = ", ".join(f'"{name}": {value}' for name, value in iou.items())
    return "{" + (f'"mean_iou": {mean}, ' if mean else "") + f'"iou": {{{numbers}}}}}'


@pytest.fixture
def noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the notes beside two archives, as `submit` writes them."""
    monkeypatch.chdir(tmp_path)
    Path("submissions").mkdir()
    for data, experiment, competition in (("voc", "voc-res152", "comp6"), ("cityscapes", "cityscapes-res101", None)):
        notes = {
            "archive": {"file": f"{experiment}.tgz", "md5": "a" * 32, "images": 1456, "partial": False},
            "server": {"data": data, "split": "test", "competition": competition},
            **{"experiment": experiment, "profile": "paper", "commit": None, "protocol": {"name": "multi"}},
            "model": {"file": f"models/{experiment}.safetensors", "md5": "b" * 32},
            "data": {"file": f"data/{data}/test.arrow", "md5": "c" * 32},
        }
        Path("submissions", f"{experiment}.json").write_text(json.dumps(notes))
    return tmp_path


def record(*words: str) -> int:
    return submit.main(["record", *words, "--link", LINK])


@pytest.mark.parametrize(("mean", "iou"), [("83.4", PRINTED), (None, EXACT), ("83.4", {})])
def test_record_of_voc(
    mean: str | None,
    iou: dict[str, str],
    noted: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """From a file, from stdin, typed in: the same record, with the digits that were given."""
    Path("scores.json").write_text(answers(mean, iou))
    assert record("voc", "--file", "scores.json") == 0
    assert capsys.readouterr().out.startswith("metrics/servers/voc-res152.json: mean IoU 83.4")
    found = server_records.load("voc-res152")
    assert found is not None
    assert (found.protocol, found.profile, found.images, found.weights, found.link) == (
        ("multi", "paper", 1456, "b" * 32, LINK)
    )
    assert {name: str(value) for name, value in found.answer.iou.items()} == iou
    assert found.value("iou tvmonitor") == (Decimal(iou["tvmonitor"]) if iou else None)
    exact = Decimal(mean) if mean else sum(map(Decimal, iou.values())) / 21
    assert abs(Decimal(found.value("mean_iou") or 0) - exact) < Decimal("0.00001")
    monkeypatch.setattr(sys, "stdin", io.StringIO(answers(mean, iou)))
    words = ["--mean-iou", mean] if mean else []
    for again in (["--file", "-"], [*words, *(["--iou", *(f"{k}={v}" for k, v in iou.items())] if iou else [])]):
        Path("metrics/servers/voc-res152.json").unlink()
        assert record("voc", *again) == 0
        assert server_records.load("voc-res152") == found


def test_record_of_cityscapes(noted: Path) -> None:
    """The official tool's result and the same numbers typed in."""
    classes = datasets.load("cityscapes").CLASSES
    values = {name: (index + 0.5) / 20 for index, name in enumerate(classes)}
    result = {"classScores": {**values, "caravan": float("nan")}, "averageScoreClasses": 0.475}
    Path("result.json").write_text(json.dumps(result | {"categoryScores": {"sky": 0.1}}))
    percent = {name: f"{100 * value:g}" for name, value in values.items()}
    typed = [f"{name}={value}" for name, value in percent.items()]
    for words in (["--file", "result.json"], ["--mean-iou", "47.5", "--iou", *typed]):
        assert record("cityscapes", *words) == 0
        found = json.loads(Path("metrics/servers/cityscapes-res101.json").read_text())["percent"]
        assert found == {"mean_iou": 47.5, "iou": {name: float(value) for name, value in percent.items()}}


@pytest.mark.parametrize(
    ("words", "text", "message"),
    [
        ("voc --mean-iou 83,4", "", "command line: mean_iou is '83,4': Input should be a valid decimal"),
        ("voc --mean-iou 183.4", "", "command line: mean_iou is '183.4': Input should be less than or equal to 100"),
        ("voc --mean-iou nan", "", "command line: mean_iou is 'nan': Input should be a finite number"),
        ("voc", "", "command line: no mean IoU, and not all 21 classes"),
        ("voc --mean-iou 83.4 --iou boat=74.9", "", "no IoU of background, aeroplane, bicycle, bird, bottle"),
        ("voc --mean-iou 83.4 --iou ship=74.9", "", "no class 'ship', expected background, aeroplane"),
        ("voc --mean-iou 83.4 --iou boat=74.9 boat=74.9", "", "--iou: a class is there twice"),
        ("voc --mean-iou 83.4 --iou boat", "", "command line: iou.boat is '': Input should be a valid decimal"),
        ("voc --file a", answers("88.4", PRINTED), "a: mean IoU 88.4 leaves 201.1 for background"),
        ("voc --file a", answers("78.0", PRINTED), "a: mean IoU 78.0 leaves -17.3 for background"),
        ("voc --file a", answers("84.0", EXACT), "a: mean IoU 84.0, expected 83.41"),
        ("voc --file a --mean-iou 83.5", answers("83.5", {}), "--file a: expected numbers in a file or on the command"),
        ("voc --file a", answers("83.4", {"boat": "true"}), "a: iou.boat is True: "),
        ("voc --file a", answers("NaN", {}), "a: mean_iou is nan: Input should be a finite number"),
        ("voc --file a", '{"mean": 83.4}', "a: unknown key mean"),
        ("voc --file a", "[83.4]", "a: Input should be "),
        ("voc --file a", "aeroplane 94.9", "a: no JSON (Expecting value: line 1 column 1 (char 0)), expected {"),
        ("cityscapes --file a", '{"classScores": {}}', "a: key averageScoreClasses is missing"),
        ("voc --file b", "", "b: no JSON ([Errno 2] No such file or directory"),
        (
            "voc --experiment voc-res50 --mean-iou 80",
            "",
            "--experiment voc-res50: not in Table 4, voc-res101, voc-res152",
        ),
        (
            "voc --experiment voc-res101 --mean-iou 80",
            "",
            "submissions/voc-res101.json: no such file; `submit voc --exp",
        ),
        ("voc --submission a --mean-iou 80", "{}", "a: not the notes beside an archive (KeyError: 'server')"),
        ("voc --submission submissions/cityscapes-res101.json --mean-iou 80", "", "data cityscapes, expected voc"),
        (
            "cityscapes --mean-iou 70 --iou " + " ".join(f"c{i}=1" for i in range(2)),
            "",
            "command line: no class 'c0', expected road",
        ),
    ],
)
def test_what_cannot_be_recorded(
    words: str, text: str, message: str, noted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if text:
        Path("a").write_text(text)
    assert record(*words.split()) == 1
    said = capsys.readouterr()
    assert said.err.count("\n") == 1
    assert message in said.err
    assert not Path("metrics").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"archive": {"partial": True}}, "of a trial (--partial), expected an archive of all test images"),
        ({"server": {"split": "val"}}, "split val, expected test"),
        ({"protocol": {"name": "single"}}, "protocol single, expected multi"),
        ({"experiment": "voc-res101"}, "experiment voc-res101, expected voc-res152"),
    ],
)
def test_archives_whose_scores_no_table_shows(
    change: dict[str, Any], message: str, noted: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = Path("submissions/voc-res152.json")
    notes = json.loads(file.read_text())
    for key, value in change.items():
        notes[key] = notes[key] | value if isinstance(value, dict) else value
    file.write_text(json.dumps(notes))
    assert record("voc", "--mean-iou", "83.4") == 1
    assert capsys.readouterr().err == f"error: {file}: {message}\n"


def test_from_answer_to_table(noted: Path) -> None:
    """The mark falls away, the difference is like for like; other weights since are told."""
    fake_run.write_metrics(Path(), tabulate.experiments("voc"), "paper")
    assert record("voc", "--mean-iou", "82.95") == 0
    tabulate.tabulate("voc")
    text = Path("results/voc_table.md").read_text()
    (ours,) = [line for line in text.splitlines() if "voc-res152, multi-scale, test server |" in line]
    assert ours.endswith(" – | 83.0 |")
    assert text.count("val instead of test server †") == 1
    assert LINK in text
    assert "recorded for other weights" not in text
    metrics = Path("metrics/voc/voc-res152.json")
    for md5 in ("b" * 32, "d" * 32):
        metrics.write_text(json.dumps(json.loads(metrics.read_text()) | {"weights": {"md5": md5}}))
        tabulate.tabulate("voc")
        warned = f"> **`voc-res152`: recorded for other weights than models/voc-res152.safetensors: md5 {'b' * 32}, "
        assert (warned in Path("results/voc_table.md").read_text()) == (md5 == "d" * 32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-9], "not what `submit record` writes: "),
        (
            lambda text: text.replace('"mean_iou": 83.4', '"mean_iou": 183.4'),
            "percent.mean_iou is '183.4': Input should",
        ),
        (lambda text: text.replace('"mean_iou": 83.4', '"mean_iou": 88.4'), "leaves 201.1 for background"),
        (lambda text: text.replace('"multi"', '"single"'), "protocol 'single', the table shows 'multi'"),
        (lambda text: text.replace('"weights"', '"weight"'), "key weights.md5 is missing"),
        (lambda text: text.replace('"voc-res152"', '"voc-res101"'), "of experiment 'voc-res101' on voc, expected"),
    ],
)
def test_a_damaged_record_is_named(change: Callable[[str], str], message: str, noted: Path) -> None:
    Path("scores.json").write_text(answers("83.4", PRINTED))
    assert record("voc", "--file", "scores.json") == 0
    file = Path("metrics/servers/voc-res152.json")
    file.write_text(change(file.read_text()))
    with pytest.raises(UserError, match=f"^{file}: .*{re.escape(message)}"):
        server_records.load("voc-res152")
