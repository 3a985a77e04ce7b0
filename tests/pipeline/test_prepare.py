"""The prepare stage: whole splits out of whole archives, or one clear line and nothing written."""

from __future__ import annotations

import gc
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tiny_archives
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from tiny_archives import Files, cell, gtcls, jpeg, mat, png

from pipeline import datasets, download, prepare
from pipeline.datasets import ade20k, nyud
from pipeline.formats import archive as members
from pipeline.runtime.dvc_md5 import md5_of_file
from refinenet.data.split import Schema, Split
from refinenet.data.writer import write_split
from refinenet.errors import UserError

VOC, SBD = "VOCtrainval_11-May-2012.tar", "benchmark.tgz"
V, S, ADE, BOX = "VOCdevkit/VOC2012", "benchmark_RELEASE/dataset", "ADEChallengeData2016", "SUNRGBDtoolbox"
H, W = tiny_archives.H, tiny_archives.W
ZEROS = np.zeros((H, W), np.uint8)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty project folder whose settings ask for every data set."""
    wanted = {"prepare": {name: {"official_counts": False} for name in datasets.NAMES}}
    (tmp_path / "settings.json").write_text(json.dumps(wanted))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def place(name: str, change: Callable[[Files], Any] = lambda files: None) -> tiny_archives.Truth:
    files, truth = tiny_archives.BUILD[name]()
    change(files)
    tiny_archives.pack(files, Path("data/raw") / name)
    return truth


@pytest.mark.parametrize("name", datasets.NAMES)
def test_split_files(name: str, project: Path) -> None:
    truth = place(name)
    prepare.run(name)
    dataset = datasets.load(name)
    assert sorted(path.name for path in (project / "data" / name).iterdir()) == sorted(
        f"{split}.arrow" for split in truth
    )
    for split, expected in truth.items():
        found = Split(project / "data" / name / f"{split}.arrow")
        assert found.schema == Schema(name, split, dataset.CLASSES, dataset.PALETTE)
        assert [sample.name for sample in found] == list(expected)
        for sample, (image, label) in zip(found, expected.values(), strict=True):
            np.testing.assert_array_equal(sample.image, image)
            np.testing.assert_array_equal(sample.label, label)
    first = {path.name: path.read_bytes() for path in (project / "data" / name).iterdir()}
    prepare.run(name)
    assert {path.name: path.read_bytes() for path in (project / "data" / name).iterdir()} == first


def put(archive: str, member: str, data: bytes) -> Callable[[Files], Any]:
    """Put other bytes under a member's name."""

    def change(files: Files) -> None:
        assert member in files[archive]
        files[archive][member] = data

    return change


def remove(archive: str, member: str | None = None) -> Callable[[Files], Any]:
    return lambda files: files.pop(archive) if member is None else files[archive].pop(member)


def one(value: int, dtype: Any = np.uint8) -> Any:
    """A label whose last pixel is `value`."""
    label = np.zeros((H, W), dtype)
    label[-1, -1] = value
    return label


def nyud_with(**variables: Any) -> Callable[[Files], Any]:
    """The HDF5 file with other variables."""

    def change(files: Files) -> None:
        file = io.BytesIO(files["nyu_depth_v2_labeled.mat"])
        with h5py.File(file, "a") as hdf5:
            for name, value in variables.items():
                del hdf5[name]
                if value is not None:
                    hdf5[name] = value
        files["nyu_depth_v2_labeled.mat"] = file.getvalue()

    return change


def sun_label(value: int) -> Callable[[Files], Any]:
    def change(files: Files) -> None:
        member = f"{BOX}/Metadata/SUNRGBD2Dseg.mat"
        file = io.BytesIO(files["SUNRGBDtoolbox.zip"][member])
        with h5py.File(file, "a") as hdf5:
            hdf5["#refs#/2"][0, 0] = value
        files["SUNRGBDtoolbox.zip"][member] = file.getvalue()

    return change


def sixteen_bit() -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.zeros((H, W), np.uint16)).save(file, "PNG")
    return file.getvalue()


CITY = "gtFine/train/ulm/ulm_000001_000019_gtFine_labelIds.png"
GT = "pascal_person_part/pascal_person_part_gt/b.png"
PERSON_LIST = "pascal_person_part/pascal_person_part_trainval_list/train_id.txt"
ADE_LABEL = f"{ADE}/annotations/training/ADE_train_00000002.png"
LABELS = "trainval/labels.txt"
ADE_ZIP = "ADEChallengeData2016.zip"
CLS = f"{S}/cls/d.mat"
PNG = f"{V}/SegmentationClass/b.png"

ERRORS: dict[str, tuple[str, Callable[[Files], Any], str]] = {
    "label 21 of VOC": ("voc", put(VOC, PNG, png(one(21), True)), rf"{VOC}!{PNG}: b: label 21 is outside the 21 cl"),
    "label 21 of SBD": ("voc", put(SBD, CLS, gtcls(one(21))), rf"{SBD}!{CLS}: label 21, expected 0 to 20"),
    "label 460 of Context": (
        "context",
        put("trainval.tar.gz", "trainval/b.mat", mat(LabelMap=one(460, np.uint16))),
        r"trainval.tar.gz!trainval/b.mat: label 460, expected 0 to 459",
    ),
    "label 7 of Person-Part": ("person", put("pascal_person_part.zip", GT, png(one(7))), rf"{GT}: b: label 7 is outs"),
    "label 895 of NYUD": (
        "nyud",
        nyud_with(labels=np.full((4, W, H), 895, np.uint16)),
        r"nyu_depth_v2_labeled.mat!labels\[0004\]: label 895, expected 0 to 894",
    ),
    "label 38 of SUN": ("sunrgbd", sun_label(38), r"SUNRGBD2Dseg.mat\[00003\]: label 38, expected 0 to 37"),
    "label 34 of Cityscapes": (
        "cityscapes",
        put("gtFine_trainvaltest.zip", CITY, png(one(34))),
        rf"gtFine_trainvaltest.zip!{CITY}: label 34, expected 0 to 33",
    ),
    "label 151 of ADE": (
        "ade20k",
        put(ADE_ZIP, ADE_LABEL, png(one(151))),
        rf"{ADE_LABEL}: label 151, expected 0 to 150",
    ),
    "colour PNG": (
        "voc",
        put(VOC, PNG, png(np.zeros((H, W, 3), np.uint8))),
        rf"{VOC}!{PNG}: PNG of mode RGB, expected PNG of mode P",
    ),
    "JPEG as label": (
        "ade20k",
        put(ADE_ZIP, ADE_LABEL, jpeg(ZEROS)),
        rf"{ADE_LABEL}: JPEG of mode L, expected PNG of mode L",
    ),
    "16-bit PNG": ("ade20k", put(ADE_ZIP, ADE_LABEL, sixteen_bit()), r"PNG of mode I;16, expected PNG of mode L"),
    "float label": (
        "context",
        put("trainval.tar.gz", "trainval/b.mat", mat(LabelMap=np.zeros((H, W)) + 0.5)),
        r"trainval/b.mat: label 0.5, expected whole numbers, 0 to 459",
    ),
    "sizes differ": (
        "voc",
        put(VOC, PNG, png(np.zeros((H, W - 1), np.uint8), True)),
        rf"{PNG}: b: label is uint8 \(24, 39\), expected uint8 \(24, 40\) as its image",
    ),
    "missing image": ("voc", remove(SBD, f"{S}/img/d.jpg"), rf"{SBD}!{S}/img/d.jpg: no such file in the archive"),
    "missing label": ("voc", remove(VOC, PNG), rf"{VOC}!{PNG}: no such file in the archive"),
    "missing list": ("person", remove("pascal_person_part.zip", PERSON_LIST), rf"{PERSON_LIST}: no such file"),
    "missing archive": ("voc", remove(SBD), rf"data/raw/voc/{SBD}: no such file; `download` gets it"),
    "empty list": ("person", put("pascal_person_part.zip", PERSON_LIST, b"\n \n"), rf"{PERSON_LIST}: an empty list"),
    "name twice": ("person", put("pascal_person_part.zip", PERSON_LIST, b"a\nb\na\n"), r"a is listed twice"),
    "path in list": (
        "person",
        put("pascal_person_part.zip", PERSON_LIST, b"../a\n"),
        r"line '../a', expected an image",
    ),
    "binary list": ("person", put("pascal_person_part.zip", PERSON_LIST, b"\xff\xfe"), r"not a text file"),
    "no images": (
        "ade20k",
        lambda files: [files[ADE_ZIP].pop(m) for m in list(files[ADE_ZIP]) if "images/val" in m],
        rf"{ADE_ZIP}!{ADE}/images/validation: no image",
    ),
    "cut JPEG": (
        "voc",
        lambda files: files[VOC].update({f"{V}/JPEGImages/b.jpg": files[VOC][f"{V}/JPEGImages/b.jpg"][:-300]}),
        rf"{V}/JPEGImages/b.jpg: not a whole image \(image file is truncated.*\), expected JPEG or PNG",
    ),
    "text as JPEG": (
        "voc",
        put(VOC, f"{V}/JPEGImages/b.jpg", b"hello"),
        r"b.jpg: not a whole image \(neither JPEG nor",
    ),
    "text as .mat": ("voc", put(SBD, CLS, b"hello" * 100), rf"{SBD}!{CLS}: not a whole MATLAB file"),
    "cut .mat": (
        "voc",
        lambda files: files[SBD].update({CLS: files[SBD][CLS][:-40]}),
        rf"{SBD}!{CLS}: not a whole MATLAB file",
    ),
    "other variable": ("voc", put(SBD, CLS, mat(GTinst=ZEROS)), rf"{CLS}: no variable GTcls"),
    "no struct": ("voc", put(SBD, CLS, mat(GTcls=ZEROS)), r"GTcls is uint8 \(24, 40\), expected a struct"),
    "object array": ("voc", put(SBD, CLS, gtcls(cell(["a", "b"]))), rf"{CLS}: label is object"),
    "not a tar": ("voc", lambda files: files.update({VOC: b"<html>" * 1000}), rf"{VOC}: not a whole tar archive"),
    "not a zip": ("ade20k", lambda files: files.update({ADE_ZIP: b"<html>"}), rf"{ADE_ZIP}: not a whole zip archive"),
    "not gzip": ("voc", lambda files: files.update({SBD: b"<html>" * 1000}), rf"{SBD}: not a whole gzip stream"),
    "ADE's classes": (
        "ade20k",
        put(ADE_ZIP, f"{ADE}/objectInfo150.txt", b"Idx\tName\n1\twall\n"),
        r"objectInfo150.txt: 1 classes, expected 150",
    ),
    "SUN's classes": (
        "sunrgbd",
        put("SUNRGBDtoolbox.zip", f"{BOX}/Metadata/seg37list.mat", mat(seg37list=cell(["floor", "wall"] + ["x"] * 35))),
        r"seg37list.mat: class 1 is 'floor', expected 'wall'",
    ),
    "Context's classes": (
        "context",
        lambda files: files.update({"59_labels.txt": files["59_labels.txt"].replace(b"snow", b"slush")}),
        r"59_labels.txt: class 51 is 'slush', expected 'snow'",
    ),
    "Context's labels": (
        "context",
        lambda files: files["trainval.tar.gz"].update(
            {LABELS: files["trainval.tar.gz"][LABELS].rpartition(b"459: ")[0]}
        ),
        rf"trainval.tar.gz!{LABELS}: 458 labels, expected 459",
    ),
    "Context without labels": (
        "context",
        remove("trainval.tar.gz", "trainval/labels.txt"),
        rf"trainval.tar.gz!{LABELS}: no such file in the archive",
    ),
    "NYUD's split": (
        "nyud",
        lambda files: files.update({"splits.mat": mat(trainNdxs=[[5]], testNdxs=[[1]])}),
        r"splits.mat: trainNdxs names image 5, nyu_depth_v2_labeled.mat has 1 to 4",
    ),
    "NYUD without labels": ("nyud", nyud_with(labels=None), r"labeled.mat: no labels"),
    "NYUD of other shape": (
        "nyud",
        nyud_with(labels=np.zeros((4, H, W), np.uint16)),
        r"images \(4, 3, 40, 24\) and labels \(4, 24, 40\) do not match",
    ),
    "cut HDF5": (
        "nyud",
        lambda files: files.update({"nyu_depth_v2_labeled.mat": files["nyu_depth_v2_labeled.mat"][:9000]}),
        r"nyu_depth_v2_labeled.mat: not a whole HDF5 file",
    ),
    "mapping to 41": (
        "nyud",
        lambda files: files.update(
            {"classMapping40.mat": mat(mapClass=np.full((1, 894), 41), className=cell(list(nyud.CLASSES)))}
        ),
        r"classMapping40.mat: mapClass has 894 entries, expected 894 of 1 to 40",
    ),
    "SUN's split": (
        "sunrgbd",
        put(
            "SUNRGBDtoolbox.zip",
            f"{BOX}/traintestSUNRGBD/allsplit.mat",
            mat(alltrain=cell(["/n/fs/sun3d/data/SUNRGBD/kv1/z"]), alltest=cell(["x"])),
        ),
        r"alltrain names kv1/z, which SUNRGBDMeta has no image of",
    ),
    "SUN's labels are no HDF5": (
        "sunrgbd",
        put("SUNRGBDtoolbox.zip", f"{BOX}/Metadata/SUNRGBD2Dseg.mat", mat(SUNRGBD2Dseg=[1])),
        r"SUNRGBD2Dseg.mat: not a whole HDF5 file",
    ),
}


@pytest.mark.parametrize("case", ERRORS)
def test_one_clear_line_and_nothing_written(case: str, project: Path) -> None:
    name, change, expected = ERRORS[case]
    place(name, change)
    (project / "data" / name).mkdir()
    (project / "data" / name / "of an earlier run").touch()
    with pytest.raises(UserError, match=expected) as error:
        prepare.run(name)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in (project / "data").iterdir()) == sorted([name, "raw"])
    assert [path.name for path in (project / "data" / name).iterdir()] == ["of an earlier run"]


@pytest.mark.parametrize(("name", "archive"), [("voc", VOC), ("voc", SBD), ("ade20k", ADE_ZIP)])
@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.99])
def test_truncated_archives(name: str, archive: str, share: float, project: Path) -> None:
    place(name)
    path = project / "data/raw" / name / archive
    whole = path.read_bytes().rstrip(b"\0") if archive == VOC else path.read_bytes()  # a tar ends in padding
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=archive):
        prepare.run(name)
    assert not (project / "data" / name).exists()


def test_a_damaged_header(project: Path) -> None:
    """Tarfile takes it for the end; then a list of images that are all before it would look whole."""
    place("voc")
    path = project / "data/raw/voc" / VOC
    with tarfile.open(path) as tar:
        offset = tar.getmembers()[-1].offset
    data = bytearray(path.read_bytes())
    data[offset + 150] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match=rf"{VOC}: damaged at byte {offset} of {len(data)}, expected a tar header"):
        prepare.run("voc")


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (tarfile.SYMTYPE, "a symbolic link"),
        (tarfile.LNKTYPE, "a hard link"),
        (tarfile.FIFOTYPE, "a pipe"),
        (tarfile.CHRTYPE, "a character device"),
        (tarfile.DIRTYPE, "a folder"),
    ],
)
def test_links_and_devices_are_no_members(kind: bytes, said: str, project: Path) -> None:
    place("voc", remove(VOC, PNG))
    info = tarfile.TarInfo(PNG)
    info.type, info.linkname = kind, "/etc/passwd"
    with tarfile.open(project / "data/raw/voc" / VOC, "a") as tar:
        tar.addfile(info)
    with pytest.raises(UserError, match=rf"{PNG}: {said}, expected a file"):
        prepare.run("voc")


def test_a_member_twice(project: Path) -> None:
    place("voc")
    with tarfile.open(project / "data/raw/voc" / VOC, "a") as tar:
        tar.addfile(tarfile.TarInfo(PNG))
    with pytest.raises(UserError, match=rf"{PNG}: twice in the archive"):
        prepare.run("voc")


def test_archives_that_unpack_to_too_much(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place("voc")
    monkeypatch.setattr(members, "SCRATCH_LIMIT", 4096)
    path = project / "data/raw/voc" / SBD
    with tarfile.open(path, "w:gz") as tar:
        info = tarfile.TarInfo("bomb")
        info.size = 4 << 20
        tar.addfile(info, io.BytesIO(bytes(info.size)))
    with pytest.raises(UserError, match=rf"{SBD}: unpacks to more than"):
        prepare.run("voc")


def test_official_counts(project: Path) -> None:
    place("ade20k")
    (project / "settings.json").write_text('{"prepare": {"ade20k": {"official_counts": true}}}')
    expected = r"ADE20K: train has 1 images, expected 20210; val has 1 images, expected 2000"
    with pytest.raises(UserError, match=expected):
        prepare.run("ade20k")
    assert not (project / "data/ade20k").exists()


def official(name: str, counts: dict[str, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have `prepare` expect these counts."""
    Path("settings.json").write_text(json.dumps({"prepare": {name: {"official_counts": True}}}))
    monkeypatch.setattr(datasets.load(name), "COUNTS", counts)


def test_a_count_that_nobody_confirms_warns(
    project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Person-Part's 1,817; its 1,716 are told by others, and stop."""
    place("person")
    official("person", {"train": 2, "val": 1817}, monkeypatch)
    prepare.run("person")
    assert len(Split(project / "data/person/val.arrow")) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning")]
    assert line == (
        "warning: PASCAL Person-Part: val has 1 images, expected 1817; no source confirms that number, "
        "so it is no error"
    )
    official("person", {"train": 2, "val": 1}, monkeypatch)
    prepare.run("person")
    assert "warning" not in capsys.readouterr().err
    official("person", {"train": 1716, "val": 1817}, monkeypatch)
    with pytest.raises(UserError, match=r"^PASCAL Person-Part: train has 2 images, expected 1716; val has 1 "):
        prepare.run("person")


def test_no_other_count_is_unsure(project: Path) -> None:
    for name in datasets.NAMES:
        place(name)
        with datasets.load(name).Reader(project / "data/raw" / name) as reader:
            unsure = [split for split in datasets.load(name).COUNTS if not reader.is_verified(split)]
        assert unsure == (["val"] if name == "person" else [])


def test_as_a_command(project: Path) -> None:
    """Exit codes, one line on stderr without a terminal, and no import of torch, which would cost seconds."""
    place("ade20k")
    code = "import sys, pipeline.prepare as p; sys.argv[1:] = ['ade20k']; p.main(p.run, p.__doc__, 'X')"
    check = f"import atexit, sys; atexit.register(lambda: print('torch' in sys.modules)); {code}"
    done = subprocess.run([sys.executable, "-c", check], cwd=project, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "data/ade20k: train 1, val 1 images\nFalse\n")
    assert re.fullmatch(r"warning: ade20k: 1 of 150 classes without a pixel in val: river; .*\n", done.stderr)
    assert len(Split(project / "data/ade20k/val.arrow")) == 1
    (project / "data/raw/ade20k" / ADE_ZIP).write_bytes(b"")
    done = subprocess.run(
        [sys.executable, "-m", "pipeline.prepare", "ade20k"], cwd=project, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: data/raw/ade20k/ADEChallengeData2016.zip: not a whole zip archive")
    assert done.stderr.count("\n") == 1


shapes = st.tuples(st.integers(1, 20), st.integers(1, 20))
labels = st.one_of(st.integers(0, len(ade20k.CLASSES) - 1), st.just(255))
samples = st.lists(
    shapes.flatmap(
        lambda shape: st.tuples(
            st.text(st.characters(exclude_categories=["Cs"])),
            arrays(np.uint8, (*shape, 3)),
            st.none() | arrays(np.uint8, shape, elements=labels),
        )
    ),
    max_size=5,
)


@settings(max_examples=50, deadline=None)
@given(samples, st.booleans())
def test_split_files_give_back_what_was_written(written: list[tuple[str, Any, Any]], strided: bool) -> None:
    schema = Schema("ade20k", "val", ade20k.CLASSES, ade20k.PALETTE)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "val.arrow"
        with write_split(path, schema) as writer:
            for name, image, label in written:
                writer.add(name, np.asfortranarray(image) if strided else image, label)
        split = Split(path)
        assert os.listdir(folder) == ["val.arrow"]  # noqa: PTH208
        assert split.schema == schema
        assert len(split) == len(written)
        for found, (name, image, label) in zip(split, written, strict=True):
            assert found.name == name
            np.testing.assert_array_equal(found.image, image)
            assert (found.label is None) == (label is None)
            if label is not None:
                np.testing.assert_array_equal(found.label, label)


def test_nothing_of_an_image_is_kept_once_it_is_written(tmp_path: Path) -> None:
    """What bounds the memory of `prepare`: pyarrow keeps each memoryview that pa.array() was given, for ever."""
    with write_split(tmp_path / "val.arrow", Schema("x", "val", ("a",), ((0, 0, 0),))) as writer:
        image, label = np.zeros((4, 5, 3), np.uint8), np.zeros((4, 5), np.uint8)
        alive: list[weakref.ref[Any]] = [weakref.ref(image), weakref.ref(label)]
        writer.add("a", image, label)
        del image, label
        gc.collect()
        assert all(reference() is None for reference in alive)


def test_archives_are_those_that_were_recorded(project: Path) -> None:
    """Without archives but with their record, as after `dvc pull`, they are brought; another one is refused."""
    drawn = {"person": {"rendered": {"train": 2, "val": 1, "height": 40, "width": 48}}}
    Path("settings.json").write_text(json.dumps({"download": drawn, "prepare": {"person": {}}}))
    download.run("person")
    prepare.run("person")
    splits = {path.name: path.read_bytes() for path in Path("data/person").iterdir()}
    record = Path("data/raw/person.json")
    recorded = json.loads(record.read_bytes())
    assert all(md5_of_file(Path("data/raw/person", name)) == one["md5"] for name, one in recorded.items())
    before = record.stat().st_mtime_ns
    for folder in ("data/raw/person", "data/person"):
        shutil.rmtree(folder)
    prepare.run("person")
    assert {path.name: path.read_bytes() for path in Path("data/person").iterdir()} == splits
    assert record.stat().st_mtime_ns == before, "an input of the stage has become newer than its output"

    archive = Path("data/raw/person") / sorted(recorded)[0]
    archive.write_bytes(archive.read_bytes() + b"\0")
    with pytest.raises(UserError, match=rf"^{archive}: md5 \w+, {record} has \w+; `python -m "):
        prepare.run("person")
    archive.unlink()
    with pytest.raises(UserError, match=rf"^{archive}: no such file, {record} has it; "):
        prepare.run("person")
    assert {path.name: path.read_bytes() for path in Path("data/person").iterdir()} == splits
