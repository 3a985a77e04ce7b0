"""Every image and label of the real parts, through `prepare`, as Pillow, scipy and h5py read them here."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import real_context
from PIL import Image
from scipy.io import loadmat, savemat

from pipeline import datasets, prepare
from refinenet.data.split import Split

Array = npt.NDArray[Any]
Expected = Iterator[tuple[str, str, Array, Array | None]]  # split, name, image, label

PARTS = [["head", "hair", "leye"], ["torso", "neck"], ["luarm", "ruarm"], ["rlarm", "lhand"], ["ruleg"], ["lfoot"]]


@pytest.fixture
def raw(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """A project folder with one data set's archives in it, as links."""
    wanted = {"prepare": {name: {"official_counts": False} for name in datasets.NAMES}}
    (tmp_path / "settings.json").write_text(json.dumps(wanted))
    monkeypatch.chdir(tmp_path)

    def folder(name: str, *files: Path) -> Path:
        place = tmp_path / "data" / "raw" / name
        place.mkdir(parents=True)
        for file in files:
            (place / file.name).symlink_to(file)
        return place

    return folder


def compare(name: str, expected: Expected) -> dict[str, int]:
    """Prepare `name`; images of each split, all of which must be as expected, in that order."""
    prepare.run(name)
    splits = {path.stem: Split(path) for path in Path("data", name).iterdir()}
    seen = dict.fromkeys(splits, 0)
    for split, image_name, image, label in expected:
        sample = splits[split][seen[split]]
        assert sample.name == image_name
        np.testing.assert_array_equal(sample.image, image, strict=True)
        if label is None:
            assert sample.label is None
        else:
            np.testing.assert_array_equal(sample.label, label)
        seen[split] += 1
    assert seen == {split: len(found) for split, found in splits.items()}
    return seen


def members(path: Path) -> dict[str, bytes]:
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    with tarfile.open(path) as tar:
        return {info.name: file.read() for info in tar if (file := tar.extractfile(info)) is not None}


def rgb(data: bytes) -> Array:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def indices(data: bytes) -> Array:
    return np.asarray(Image.open(io.BytesIO(data)))


def matlab(data: bytes) -> Any:
    file: Any = io.BytesIO(data)
    return loadmat(file)


@pytest.mark.slow
def test_voc_and_sbd(real: Path, raw: Callable[..., Path]) -> None:
    raw("voc", *(real / "voc").iterdir())
    voc, sbd = members(real / "voc/VOCtrainval_11-May-2012.tar"), members(real / "voc/benchmark.tgz")
    v, s = "VOCdevkit/VOC2012", "benchmark_RELEASE/dataset"

    def expected() -> Expected:
        train, val = (voc[f"{v}/ImageSets/Segmentation/{split}.txt"].decode().split() for split in ("train", "val"))
        extra = [name for split in ("train", "val") for name in sbd[f"{s}/{split}.txt"].decode().split()]
        added = [name for name in dict.fromkeys(extra) if name not in train and name not in val]
        for split, names in (("train", train), ("train_voc", train), ("val", val)):
            for name in names:
                label = indices(voc[f"{v}/SegmentationClass/{name}.png"])
                yield split, name, rgb(voc[f"{v}/JPEGImages/{name}.jpg"]), label
        for name in added:
            label = matlab(sbd[f"{s}/cls/{name}.mat"])["GTcls"][0]["Segmentation"][0]
            yield "train", name, rgb(sbd[f"{s}/img/{name}.jpg"]), label

    assert compare("voc", expected()) == {"train": 1440, "train_voc": 440, "val": 461}


def test_nyud(real: Path, raw: Callable[..., Path]) -> None:
    names = ("nyu_depth_v2_labeled.mat", "splits.mat", "classMapping40.mat")
    raw("nyud", *(real / "nyud" / name for name in names))

    def expected() -> Expected:
        splits, mapping = (loadmat(real / "nyud" / name) for name in names[1:])
        with h5py.File(real / "nyud" / names[0]) as file:
            for split, key in (("train", "trainNdxs"), ("val", "testNdxs")):
                for number in splits[key][:, 0].tolist():
                    image, label = file["images"][number - 1].transpose(2, 1, 0), file["labels"][number - 1].T
                    box = slice(6, 474), slice(7, 632)
                    classes = np.concatenate([[255], mapping["mapClass"][0].astype(int) - 1])
                    yield split, f"{number:04d}", image[box], classes[label[box]]

    assert compare("nyud", expected()) == {"train": 6, "val": 4}


def test_ade20k(real: Path, raw: Callable[..., Path]) -> None:
    raw("ade20k", *(real / "ade20k").iterdir())
    found, root = members(real / "ade20k/ADEChallengeData2016.zip"), "ADEChallengeData2016"

    def expected() -> Expected:
        for path in sorted(path for path in found if path.endswith(".jpg")):
            split = "train" if "/training/" in path else "val"
            label = indices(found[path.replace("/images/", "/annotations/").replace(".jpg", ".png")]).astype(int)
            yield split, Path(path).stem, rgb(found[path]), np.where(label == 0, 255, label - 1)

    assert root in next(iter(found))
    assert compare("ade20k", expected()) == {"train": 2, "val": 1}


def test_context(real: Path, raw: Callable[..., Path]) -> None:
    real_context.place(real, raw("context"))
    voc, maps = (members(real / "context" / name) for name in ("VOCtrainval_03-May-2010.tar", "trainval.tar.gz"))

    def expected() -> Expected:
        lists = [(real / "context" / name).read_text().splitlines() for name in ("labels.txt", "59_labels.txt")]
        all_names, names = ([line.split(": ")[1] for line in lines] for lines in lists)
        table = np.array([0] + [names.index(name) + 1 if name in names else 0 for name in all_names])
        for split in ("train", "val"):
            for name in voc[f"VOCdevkit/VOC2010/ImageSets/Main/{split}.txt"].decode().split():
                label = table[matlab(maps[f"trainval/{name}.mat"])["LabelMap"]]
                yield split, name, rgb(voc[f"VOCdevkit/VOC2010/JPEGImages/{name}.jpg"]), label

    assert sum(compare("context", expected()).values()) == 4


def person(real: Path) -> Expected:
    voc = members(real / "context/VOCtrainval_03-May-2010.tar")
    found = members(real / "person/pascal_person_part.zip")
    for split in ("train", "val"):
        for name in found[f"pascal_person_part/pascal_person_part_trainval_list/{split}_id.txt"].decode().split():
            label = indices(found[f"pascal_person_part/pascal_person_part_gt/{name}.png"])
            yield split, name, rgb(voc[f"VOCdevkit/VOC2010/JPEGImages/{name}.jpg"]), label


def test_person(real: Path, raw: Callable[..., Path]) -> None:
    raw("person", real / "context/VOCtrainval_03-May-2010.tar", real / "person/pascal_person_part.zip")
    assert sum(compare("person", person(real)).values()) == 4


def structs(rows: list[tuple[Any, ...]], *fields: str) -> Array:
    array = np.empty((1, len(rows)), [(field, "O") for field in fields])
    array[0] = rows
    return array


def anno(label: Array) -> bytes:
    """Annotations_Part's variable of a label: two persons, each part cut in pieces of several names; other objects.

    A head lies over the whole of the torso behind it, as parts do; a person without parts is background.
    """
    things = [("person", 15, np.ones(label.shape, np.uint8), np.zeros((0, 0)))]
    horse = structs([("head", np.ones(label.shape, np.uint8))], "part_name", "mask")
    things.append(("horse", 13, np.ones(label.shape, np.uint8), horse))
    half = np.zeros(label.shape, bool)
    half[:, : label.shape[1] // 2] = True
    for side in (half, ~half):
        torso = np.isin(label, [1, 2]) & side  # under the head, too
        rows = [("torso", torso.astype(np.uint8))]
        for value, names in enumerate(PARTS, 1):
            mask = (label == value) & side
            turns = np.arange(label.size).reshape(label.shape) % len(names)
            rows += [(name, (mask & (turns == turn)).astype(np.uint8)) for turn, name in enumerate(names)]
        rows = [row for row in rows if row[1].any()]
        if rows:
            things.append(("person", 15, side.astype(np.uint8), structs(rows, "part_name", "mask")))
    file: Any = io.BytesIO()
    objects = structs(things, "class", "class_ind", "mask", "parts")
    savemat(file, {"anno": structs([("x", objects)], "imname", "objects")}, do_compression=True)
    content: bytes = file.getvalue()
    return content


def test_person_from_raw_annotations(real: Path, raw: Callable[..., Path]) -> None:
    """The real labels taken apart into PASCAL-Part's annotations are put together again."""
    folder = raw("person")
    samples = list(person(real))
    assert all(label is not None and 255 not in label for *_, label in samples)
    voc = members(real / "context/VOCtrainval_03-May-2010.tar")
    for split in ("train", "val"):
        names = [name for of, name, *_ in samples if of == split]
        voc[f"VOCdevkit/VOC2010/ImageSets/Main/{split}.txt"] = "\n".join(
            [*names, "without", f"nobody_{split}"]
        ).encode()
    labels = {name: label for _, name, _, label in samples if label is not None}
    parts = {f"Annotations_Part/{name}.mat": anno(label) for name, label in labels.items()}
    parts |= {f"Annotations_Part/nobody_{split}.mat": anno(np.zeros((9, 9), int)) for split in ("train", "val")}
    for archive, content in (("VOCtrainval_03-May-2010.tar", voc), ("pascal_part_trainval.tar.gz", parts)):
        with tarfile.open(folder / archive, "w:gz" if archive.endswith("gz") else "w") as tar:
            for name, data in content.items():
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    assert sum(compare("person", iter(samples)).values()) == 4
