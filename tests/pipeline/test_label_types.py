"""Labels in every type of number that a MATLAB file can have them in, through each reader of MATLAB files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import tiny_archives
from tiny_archives import Files, H, Truth, W, gtcls, mat

from pipeline import datasets
from pipeline.datasets import sunrgbd
from pipeline.formats import decode
from refinenet.errors import UserError

Array = npt.NDArray[Any]

MATLABS = [f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)] + ["float32", "float64"]
TABLE = np.array([255, 0, 1, 2], np.uint8)


@pytest.mark.parametrize("dtype", [*MATLABS, "float16", ">f8", ">i4"])
@pytest.mark.parametrize("entries", [4, 600])
def test_whole_numbers_of_every_type(dtype: str, entries: int) -> None:
    table = np.arange(entries).astype(np.uint8)
    highest = min(entries - 1, np.iinfo(dtype).max if np.dtype(dtype).kind in "iu" else entries)
    raw = np.array([[0, 1, 2], [highest, 1, 0]]).astype(dtype)
    for label in (raw, np.asfortranarray(raw), raw[:, ::-1]):
        found = decode.relabel(label, table, "a.mat")
        assert found.dtype == np.uint8
        np.testing.assert_array_equal(found, table[label.astype(int)])


def test_logical() -> None:
    raw = np.array([[True, False]])
    assert decode.relabel(raw, TABLE, "a.mat").tolist() == [[0, 255]]


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.5, "label 0.5, expected whole numbers, 0 to 3"),
        (2.0000001, "label 2, expected whole numbers, 0 to 3"),
        (np.nan, "label nan, expected whole numbers, 0 to 3"),
        (np.inf, "label inf, expected 0 to 3"),
        (-np.inf, "label -inf, expected 0 to 3"),
        (-1.0, "label -1, expected 0 to 3"),
        (4.0, "label 4, expected 0 to 3"),
        (1e300, r"label 1e\+300, expected 0 to 3"),
    ],
)
def test_other_numbers_are_refused(value: float, said: str) -> None:
    raw = np.ones((2, 3))
    raw[1, 1] = value
    with pytest.raises(UserError, match=rf"^a\.mat: {said}$"):
        decode.relabel(raw, TABLE, "a.mat")


@pytest.mark.parametrize("raw", [np.ones((2, 3), complex), np.full((2, 3), "1"), np.ones((2, 3, 1)), np.ones(6)])
def test_what_is_no_map_of_numbers(raw: Array) -> None:
    with pytest.raises(UserError, match=r"^a\.mat: label is .*, expected height x width numbers$"):
        decode.relabel(raw, TABLE, "a.mat")


def context_(dtype: str) -> tuple[Files, Truth]:
    files, truth = tiny_archives.context_()
    for member in [member for member in files["trainval.tar.gz"] if member.endswith(".mat")]:
        raw = np.full((H, W), 100).astype(dtype)
        files["trainval.tar.gz"][member] = mat(LabelMap=raw)
    return files, {
        split: {name: (image, np.zeros((H, W), np.uint8)) for name, (image, _) in images.items()}
        for split, images in truth.items()
    }


def sbd_(dtype: str) -> tuple[Files, Truth]:
    files, truth = tiny_archives.voc()
    for name, (_, label) in truth["train"].items():
        if name in "de":
            assert label is not None
            files["benchmark.tgz"][f"benchmark_RELEASE/dataset/cls/{name}.mat"] = gtcls(label.astype(dtype))
    return files, {"train": truth["train"]}


def parts_(dtype: str) -> tuple[Files, Truth]:
    files, truth = tiny_archives.person()
    del files["pascal_person_part.zip"]
    annotations, wanted = {}, {}
    for name in "abc":
        mask = np.zeros((H, W))
        mask[2:9, 3:12] = 1
        part = np.empty((1, 1), [("part_name", "O"), ("mask", "O")])
        part[0, 0] = ("torso", mask.astype(dtype))
        thing = np.empty((1, 1), [("class", "O"), ("parts", "O")])
        thing[0, 0] = ("person", part)
        annotations[f"Annotations_Part/{name}.mat"] = mat(anno={"objects": thing})
        wanted[name] = (2 * mask).astype(np.uint8)
    files["pascal_part_trainval.tar.gz"] = annotations
    return files, {s: {n: (image, wanted[n]) for n, (image, _) in images.items()} for s, images in truth.items()}


BUILD: dict[str, tuple[str, Callable[[str], tuple[Files, Truth]]]] = {
    "SUN RGB-D": ("sunrgbd", tiny_archives.sunrgbd_),
    "NYUDv2": ("nyud", lambda dtype: tiny_archives.nyud_(dtype=dtype)),
    "PASCAL-Context": ("context", context_),
    "SBD": ("voc", sbd_),
    "PASCAL-Part": ("person", parts_),
}


def samples(reader: datasets.Reader, truth: Truth) -> Iterator[tuple[Array, Array | None, Array, Array | None]]:
    for split, images in truth.items():
        assert reader.names(split) == list(images)
        for name, (image, label) in images.items():
            yield *reader.read(split, name), image, label


@pytest.mark.parametrize("slashes", ["/", "//"])
def test_slashes_in_suns_zip(slashes: str, tmp_path: Path) -> None:
    """The lists have doubled ones, the zip presumably not; whichever it has, an image is found."""
    files, truth = tiny_archives.sunrgbd_()
    files["SUNRGBD.zip"] = {
        path.replace("/image/", f"{slashes}image/"): data for path, data in files["SUNRGBD.zip"].items()
    }
    tiny_archives.pack(files, tmp_path)
    with datasets.load("sunrgbd").Reader(tmp_path) as reader:
        assert len(list(samples(reader, truth))) == 3


@pytest.mark.parametrize("spelt", [str.title, lambda name: name.replace("_", " "), lambda name: name.replace("_", "-")])
def test_spellings_of_suns_classes(spelt: Callable[[str], str], tmp_path: Path) -> None:
    """Public code writes "floor_mat", "floor mat" and "Floor-mat" for what seg37list has."""
    files, truth = tiny_archives.sunrgbd_()
    names = [spelt(name) for name in sunrgbd.CLASSES]
    files["SUNRGBDtoolbox.zip"]["SUNRGBDtoolbox/Metadata/seg37list.mat"] = mat(seg37list=tiny_archives.cell(names))
    tiny_archives.pack(files, tmp_path)
    with datasets.load("sunrgbd").Reader(tmp_path) as reader:
        assert reader.names("train") == list(truth["train"])


@pytest.mark.parametrize("kind", BUILD)
@pytest.mark.parametrize("dtype", MATLABS)
def test_readers(kind: str, dtype: str, tmp_path: Path) -> None:
    """SUN's are most likely doubles, by the size that public code tells of; others may be of any type as well."""
    name, build = BUILD[kind]
    files, truth = build(dtype)
    tiny_archives.pack(files, tmp_path)
    with datasets.load(name).Reader(tmp_path) as reader:
        for image, label, wanted_image, wanted in samples(reader, truth):
            np.testing.assert_array_equal(image, wanted_image)
            assert label is not None
            assert label.dtype == np.uint8
            np.testing.assert_array_equal(label, wanted)
