"""Readers: every pixel is what the official archives hold, as decoders written here read it."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
import real_context
import tiny_archives
from PIL import Image
from pycocotools import mask
from pycocotools.coco import COCO
from scipy.io import loadmat

from pipeline import datasets
from pipeline.config.schema import Rendered
from pipeline.datasets import coco, nyud
from pipeline.synthetic import render
from refinenet.errors import UserError

Array = npt.NDArray[Any]
CLASS_COUNTS = {"voc": 21, "context": 60, "person": 7, "nyud": 40, "sunrgbd": 37, "cityscapes": 19, "ade20k": 150}
CLASS_COUNTS |= {"coco": 21, "camvid": 11}


@pytest.mark.parametrize("name", datasets.NAMES)
def test_tables(name: str) -> None:
    dataset = datasets.load(name)
    assert len(dataset.CLASSES) == len(dataset.PALETTE) == CLASS_COUNTS[name]
    assert len(set(dataset.CLASSES)) == len(dataset.CLASSES), "a score is filed under its class's name"
    assert all(name == name.strip() for name in dataset.CLASSES)
    assert all(len(colour) == 3 and set(colour) <= set(range(256)) for colour in dataset.PALETTE)
    splits = {"voc": ["train", "train_voc", "val", "test"], "coco": ["train"]}
    splits |= {three: ["train", "val", "test"] for three in ("cityscapes", "camvid")}
    assert list(dataset.COUNTS) == splits.get(name, ["train", "val"])
    assert datasets.evaluated(name) == ("test" if name == "camvid" else "val")


def test_unknown_data_set() -> None:
    with pytest.raises(UserError, match="no data set 'decode'; there are voc, context"):
        datasets.load("decode")


def test_cityscapes_as_torchvision_has_it() -> None:
    Cityscapes = pytest.importorskip("torchvision.datasets").Cityscapes  # noqa: N806

    from pipeline.datasets import cityscapes

    official = sorted((c for c in Cityscapes.classes if c.train_id not in (255, -1)), key=lambda c: c.train_id)
    assert tuple(c.name for c in official) == cityscapes.CLASSES
    assert tuple(c.color for c in official) == cityscapes.PALETTE
    assert tuple(c.id for c in official) == cityscapes.LABEL_IDS


@pytest.mark.parametrize("name", datasets.NAMES)
def test_tiny_official_layout(name: str, tmp_path: Path) -> None:
    files, truth = tiny_archives.BUILD[name]()
    tiny_archives.pack(files, tmp_path / "raw" / name)
    dataset = datasets.load(name)
    with dataset.Reader(tmp_path / "raw" / name) as reader:
        for split, expected in truth.items():
            assert reader.names(split) == list(expected)
            for image in expected:
                assert reader.where(split, image).startswith(str(tmp_path / "raw" / name))
                check(reader.read(split, image), *expected[image])
    assert sorted(path.name for path in (tmp_path / "raw").rglob("*") if path.is_file()) == sorted(files)


def test_nyud_keeps_the_box_of_the_authors_examples(tmp_path: Path) -> None:
    """468 x 625 pixels of each image, also of one that is white all over: nothing is looked for."""
    files, truth = tiny_archives.nyud_((480, 640))
    tiny_archives.pack(files, tmp_path)
    with datasets.load("nyud").Reader(tmp_path) as reader:
        for split, images in truth.items():
            for name, (image, label) in images.items():
                assert image.shape == (468, 625, 3)
                check(reader.read(split, name), image, label)
        assert (reader.read("train", "0001")[0] == 255).all()


def test_nyud_box_of_other_sizes() -> None:
    """The same share of the sides, to the nearest pixel."""
    assert nyud.inside_frame(480, 640) == (slice(6, 474), slice(7, 632))
    assert nyud.inside_frame(240, 320) == (slice(3, 237), slice(4, 316))
    assert nyud.inside_frame(96, 128) == (slice(1, 95), slice(1, 126))
    assert nyud.inside_frame(32, 32) == (slice(0, 32), slice(0, 32))


def check(found: tuple[Array, Array | None], image: Array, label: Array | None) -> None:
    assert found[0].dtype == np.uint8
    np.testing.assert_array_equal(found[0], image)
    if label is None:
        assert found[1] is None
        return
    assert found[1] is not None
    assert found[1].dtype == np.uint8
    np.testing.assert_array_equal(found[1], label)


def content(tar: tarfile.TarFile, member: str | tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    assert file is not None
    return file.read()


def matlab(data: bytes) -> Any:
    file: Any = io.BytesIO(data)
    return loadmat(file)


def rgb(data: bytes) -> Array:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def indices(data: bytes) -> Array:
    return np.asarray(Image.open(io.BytesIO(data)))


def test_real_voc_and_sbd(real: Path) -> None:
    """Every 15th image of both splits, and the lists in full."""
    root = "VOCdevkit/VOC2012"
    with (
        datasets.load("voc").Reader(real / "voc") as reader,
        tarfile.open(real / "voc/VOCtrainval_11-May-2012.tar") as tar,
    ):

        def member(name: str) -> bytes:
            return content(tar, f"{root}/{name}")

        lists = {split: member(f"ImageSets/Segmentation/{split}.txt").decode().split() for split in ("train", "val")}
        sbd, wanted = {}, set(reader.names("train")[::15])
        with tarfile.open(real / "voc/benchmark.tgz", "r|gz") as stream:
            for info in stream:
                if info.name.endswith(".txt") or Path(info.name).stem in wanted:
                    sbd[info.name.removeprefix("benchmark_RELEASE/dataset/")] = content(stream, info)
        own = set(lists["train"]) | set(lists["val"])
        augmented = (own | set((sbd["train.txt"] + b"\n" + sbd["val.txt"]).decode().split())) - set(lists["val"])
        assert sorted(reader.names("train")) == sorted(augmented)
        assert reader.names("val") == lists["val"]
        assert (len(reader.names("train")), len(reader.names("val"))) == (1440, 461)
        seen = [0, 0]
        for split in ("train", "val"):
            for name in reader.names(split)[::15]:
                seen[name in own] += 1
                if name in own:
                    image, label = (
                        rgb(member(f"JPEGImages/{name}.jpg")),
                        indices(member(f"SegmentationClass/{name}.png")),
                    )
                else:
                    mat = matlab(sbd[f"cls/{name}.mat"])
                    image, label = rgb(sbd[f"img/{name}.jpg"]), mat["GTcls"][0]["Segmentation"][0]
                check(reader.read(split, name), image, label)
        assert min(seen) > 20, "both archives must be among those compared"
        palette = Image.open(io.BytesIO(member(f"SegmentationClass/{name}.png"))).getpalette()
        assert palette is not None
        assert tuple(zip(*[iter(palette[:63])] * 3, strict=True)) == datasets.load("voc").PALETTE


def test_real_nyud(real: Path) -> None:
    mapping: Any = loadmat(real / "nyud/classMapping40.mat")
    splits: Any = loadmat(real / "nyud/splits.mat")
    frames: dict[tuple[int, ...], int] = {}
    with (
        datasets.load("nyud").Reader(real / "nyud") as reader,
        h5py.File(real / "nyud/nyu_depth_v2_labeled.mat") as file,
    ):
        expected = {"train": splits["trainNdxs"][:, 0].tolist(), "val": splits["testNdxs"][:, 0].tolist()}
        assert sum(len(numbers) for numbers in expected.values()) == 10
        for split, numbers in expected.items():
            assert reader.names(split) == [f"{number:04d}" for number in numbers]
            for number in numbers:
                image = np.moveaxis(file["images"][number - 1], 0, 2).swapaxes(0, 1)
                raw = file["labels"][number - 1].T.astype(int)
                label = np.where(raw == 0, 255, mapping["mapClass"][0][raw - 1].astype(int) - 1)
                ys, xs = np.nonzero((image != 255).any(axis=2))
                found = (int(ys.min()), int(ys.max()) + 1, int(xs.min()), int(xs.max()) + 1)
                frames[found] = frames.get(found, 0) + 1
                box = slice(6, 474), slice(7, 632)
                check(reader.read(split, f"{number:04d}"), image[box], label[box])
    # Where the white ends: at the box, but for the two that went through a lossy copy, which lose a line on each side.
    assert frames == {(6, 474, 7, 632): 8, (5, 475, 6, 633): 2}


def test_official_nyud_split(real: Path, tmp_path: Path) -> None:
    """The real splits.mat over a file of 1449 images (here: without pixels) gives 795 and 654."""
    for name in ("classMapping40.mat", "official_splits.mat"):
        (tmp_path / name.removeprefix("official_")).write_bytes((real / "nyud" / name).read_bytes())
    with h5py.File(tmp_path / "nyu_depth_v2_labeled.mat", "w") as file:
        file.create_dataset("images", (1449, 3, 8, 6), np.uint8, chunks=(1, 3, 8, 6))
        file.create_dataset("labels", (1449, 8, 6), np.uint16, chunks=(1, 8, 6))
    with datasets.load("nyud").Reader(tmp_path) as reader:
        train, val = reader.names("train"), reader.names("val")
        assert (len(train), len(val)) == (795, 654) == tuple(nyud.COUNTS.values())
        assert not set(train) & set(val)
        _, label = reader.read("val", val[-1])
        assert label is not None
        assert (label == 255).all()


def test_real_ade20k(real: Path) -> None:
    root = "ADEChallengeData2016"
    with (
        datasets.load("ade20k").Reader(real / "ade20k") as reader,
        zipfile.ZipFile(real / "ade20k/ADEChallengeData2016.zip") as archive,
    ):
        assert (len(reader.names("train")), len(reader.names("val"))) == (2, 1)
        for split, folder in (("train", "training"), ("val", "validation")):
            for name in reader.names(split):
                raw = indices(archive.read(f"{root}/annotations/{folder}/{name}.png")).astype(int)
                label = np.where(raw == 0, 255, raw - 1)
                check(reader.read(split, name), rgb(archive.read(f"{root}/images/{folder}/{name}.jpg")), label)


def test_real_context_and_person(real: Path, tmp_path: Path) -> None:
    """Four images each; Person-Part's lie in the same VOC 2010 archive, which its release does not bring."""
    with tarfile.open(real / "context/VOCtrainval_03-May-2010.tar") as tar:
        voc = {info.name: content(tar, info.name) for info in tar}
    with tarfile.open(real / "context/trainval.tar.gz") as tar:
        maps = {info.name: matlab(content(tar, info.name))["LabelMap"] for info in tar}
    names459 = [line.split(": ")[1] for line in (real / "context/labels.txt").read_text().splitlines()]
    names59 = [line.split(": ")[1] for line in (real / "context/59_labels.txt").read_text().splitlines()]
    seen = 0
    (tmp_path / "context").mkdir()
    real_context.place(real, tmp_path / "context")
    with datasets.load("context").Reader(tmp_path / "context") as reader:
        for split in ("train", "val"):
            assert reader.names(split) == voc[f"VOCdevkit/VOC2010/ImageSets/Main/{split}.txt"].decode().split()
            for name in reader.names(split):
                label = np.zeros(maps[f"trainval/{name}.mat"].shape, int)
                for number, text in enumerate(names459, 1):
                    if text in names59:
                        label[maps[f"trainval/{name}.mat"] == number] = names59.index(text) + 1
                check(reader.read(split, name), rgb(voc[f"VOCdevkit/VOC2010/JPEGImages/{name}.jpg"]), label)
                seen += 1
    for file in ("context/VOCtrainval_03-May-2010.tar", "person/pascal_person_part.zip"):
        (tmp_path / Path(file).name).symlink_to(real / file)
    with (
        datasets.load("person").Reader(tmp_path) as reader,
        zipfile.ZipFile(real / "person/pascal_person_part.zip") as archive,
    ):
        for split in ("train", "val"):
            for name in reader.names(split):
                label = indices(archive.read(f"pascal_person_part/pascal_person_part_gt/{name}.png"))
                check(reader.read(split, name), rgb(voc[f"VOCdevkit/VOC2010/JPEGImages/{name}.jpg"]), label)
                seen += 1
    assert seen == 8


def test_coco_as_torchvision_and_voc_have_it() -> None:
    names = pytest.importorskip("torchvision.models._meta")._COCO_CATEGORIES
    assert [names[category] for category in coco.CATEGORIES[1:]] == list(coco.NAMES[1:])
    assert coco.CATEGORIES == (0, 5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72)
    assert coco.CLASSES == datasets.load("voc").CLASSES


@pytest.mark.parametrize("number", [0, 1, 3])
def test_coco_objects_of_too_few_points(number: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Left out and counted in one line: those that are all there is of an object, and those beside a real polygon."""
    person, cat = [tiny_archives.box(0, 0, 40, 40)], [tiny_archives.box(0, 0, 30, 40)]
    flat: list[list[list[float]]] = [[[1, 1]], [[50, 1, 55, 9], [1, 2, 3]], []]
    objects = [
        tiny_archives.annotation(1, [*person, *[[50, 1, 55, 9]] * number], 1600),
        tiny_archives.annotation(17, cat, 1200, 9),
        # By their own area these would be kept.
        *(tiny_archives.annotation(18, segmentation, 2000, 10) for segmentation in flat[:number]),
    ]
    files, _ = tiny_archives.coco_(objects)
    tiny_archives.pack(files, tmp_path)
    with coco.Reader(tmp_path) as reader:
        assert reader.names("train") == ["7", "9"]
        for name, klass, width in (("7", 15, 40), ("9", 8, 30)):
            _, label = reader.read("train", name)
            assert label is not None
            assert (label[:, :width] == klass).all()
            assert not label[:, width:].any()
    where = tmp_path / "annotations_trainval2014.zip!annotations/instances_train2014.json"
    told = {
        0: "",
        1: f"warning: {where}: left out 2 polygons of fewer than three points and 1 object without any other\n",
        3: f"warning: {where}: left out 6 polygons of fewer than three points and 3 objects without any other\n",
    }
    assert capsys.readouterr().err == told[number]


def test_coco_as_pycocotools_reads_it(tmp_path: Path) -> None:
    """Drawn archives, with one object's mask in each of pycocotools' three forms."""
    render("coco", Rendered(train=8, val=1), tmp_path)
    archive, member = tmp_path / "annotations_trainval2014.zip", "annotations/instances_train2014.json"
    with zipfile.ZipFile(archive) as file:
        record = json.loads(file.read(member))
    sizes = {image["id"]: (image["height"], image["width"]) for image in record["images"]}
    for thing in record["annotations"][1::5]:
        runs = mask.merge(mask.frPyObjects(thing["segmentation"], *sizes[thing["image_id"]]))
        thing["segmentation"] = {"size": runs["size"], "counts": runs["counts"].decode()}
    (tmp_path / "instances.json").write_text(json.dumps(record))
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(member, json.dumps(record))
    official = COCO(tmp_path / "instances.json")
    seen, kinds = np.zeros(256, int), set()
    with coco.Reader(tmp_path) as reader, zipfile.ZipFile(tmp_path / "train2014.zip") as photos:
        assert reader.released("train") == len(record["images"]) == 9
        kept = []
        for number in official.getImgIds():
            things = [t for t in official.imgToAnns[number] if t["category_id"] in coco.CATEGORIES]
            if sum(t["area"] for t in things if not t["iscrowd"]) > 1000:
                kept.append(number)
                claims = np.zeros((21, *sizes[number]), bool)
                crowd = np.zeros(sizes[number], bool)
                for thing in things:
                    form = thing["segmentation"]
                    kinds.add(type(form["counts"]) if isinstance(form, dict) else "polygons")
                    pixels = official.annToMask(thing).astype(bool)
                    klass = coco.CATEGORIES.index(thing["category_id"])
                    if thing["iscrowd"]:
                        crowd |= pixels
                    else:
                        claims[klass] |= pixels
                label = np.where((claims.sum(axis=0) > 1) | crowd, 255, claims.argmax(axis=0))
                name = f"COCO_train2014_{number:012d}"
                check(reader.read("train", name), rgb(photos.read(f"train2014/{name}.jpg")), label)
                seen += np.bincount(label.ravel(), minlength=256)
        assert reader.names("train") == [f"COCO_train2014_{number:012d}" for number in kept]
    assert len(kept) == 8
    assert len(kinds) == 3, "polygons, a crowd's run lengths, packed run lengths"
    assert seen[[0, 255]].all()
    assert (seen[1:21] > 0).sum() > 15


def test_nothing_is_left_of_a_killed_reader(tmp_path: Path) -> None:
    files, _ = tiny_archives.voc()
    tiny_archives.pack(files, tmp_path / "raw" / "voc")
    code = f"""
import os, signal
from pathlib import Path
from pipeline.datasets import voc
reader = voc.Reader(Path({str(tmp_path / "raw" / "voc")!r}))
assert any("(deleted)" in os.readlink(f"/proc/self/fd/{{n}}") for n in os.listdir("/proc/self/fd") if int(n) > 2)
os.kill(os.getpid(), signal.SIGKILL)
"""
    if not Path("/proc/self/fd").is_dir():
        pytest.skip("no /proc here")
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == sorted(files)


def test_voc_without_test_images(tmp_path: Path) -> None:
    files, _ = tiny_archives.voc()
    del files["VOC2012test.tar"]
    tiny_archives.pack(files, tmp_path)
    with datasets.load("voc").Reader(tmp_path) as reader:
        assert reader.names("test") == []
        assert len(reader.names("train")) == 4
