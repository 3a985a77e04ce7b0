"""What test_hostile_archives.py makes of tiny archives: names, headers and contents that mean harm."""

from __future__ import annotations

import gzip
import io
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import tiny_archives
from PIL import Image
from scipy.io import savemat
from tiny_archives import annotation, box, jpeg

VOC, SBD, ADE, PARTS = "VOCtrainval_11-May-2012.tar", "benchmark.tgz", "ADEChallengeData2016.zip", "trainval.tar.gz"
NYUD, COCO = "nyu_depth_v2_labeled.mat", "annotations_trainval2014.zip"
PNG, JPG = "VOCdevkit/VOC2012/SegmentationClass/b.png", "VOCdevkit/VOC2012/JPEGImages/b.jpg"
LIST = "VOCdevkit/VOC2012/ImageSets/Segmentation/train.txt"
MAT, LABEL = "trainval/b.mat", "ADEChallengeData2016/annotations/training/ADE_train_00000002.png"
JSON = "annotations/instances_train2014.json"
H, W = tiny_archives.H, tiny_archives.W

Change = Callable[[Path], Any]  # of the packed archives in a folder


def add(archive: str, name: str, data: bytes = b"x", **info: Any) -> Change:
    """One more member of a tar."""

    def change(raw: Path) -> None:
        path = raw / archive
        with tarfile.open(path) as tar:
            old = [(one, tar.extractfile(one)) for one in tar]
            kept = [(one, content.read() if content else b"") for one, content in old if one.name != name]
        with tarfile.open(path, "w:gz" if path.suffix != ".tar" else "w", format=tarfile.PAX_FORMAT) as tar:
            more = tarfile.TarInfo(name)
            more.size = len(data)
            for key, value in info.items():
                setattr(more, key, value)
            for one, content in [*kept, (more, data)]:
                tar.addfile(one, io.BytesIO(content))

    return change


def put(archive: str, member: str, data: bytes) -> Change:
    """Other bytes under a member's name."""

    def change(raw: Path) -> None:
        if not archive.endswith(".zip"):
            return add(archive, member, data)(raw)
        with zipfile.ZipFile(raw / archive) as old:
            kept = {name: old.read(name) for name in old.namelist()}
        assert member in kept
        with zipfile.ZipFile(raw / archive, "w", zipfile.ZIP_DEFLATED) as new:
            for name, content in {**kept, member: data}.items():
                new.writestr(name, content)
        return None

    return change


def link_in_zip(raw: Path) -> None:
    """LABEL as a symbolic link."""
    with zipfile.ZipFile(raw / ADE) as old:
        kept = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(raw / ADE, "w") as new:
        for name, content in kept.items():
            info = zipfile.ZipInfo(name)
            if name == LABEL:
                info.create_system, info.external_attr = 3, 0o120777 << 16
            new.writestr(info, b"/etc/passwd" if name == LABEL else content)


def zip_more(name: str, data: bytes = b"x", **info: Any) -> Change:
    def change(raw: Path) -> None:
        with zipfile.ZipFile(raw / ADE, "a", zipfile.ZIP_DEFLATED) as archive:
            more = zipfile.ZipInfo("-" * len(name))
            for key, value in info.items():
                setattr(more, key, value)
            archive.writestr(more, data)
        path = raw / ADE
        path.write_bytes(path.read_bytes().replace(b"-" * len(name), name.encode()))

    return change


def patch(archive: str, change: Callable[[bytes], bytes]) -> Change:
    """Other bytes for a whole archive."""
    return lambda raw: (raw / archive).write_bytes(change((raw / archive).read_bytes()))


def entry(field: str, value: int) -> Change:
    """Change a field of LABEL's entry in the .zip's index."""
    at, code = {"flags": (8, "<H"), "method": (10, "<H"), "crc": (16, "<I"), "size": (24, "<I"), "local": (42, "<I")}[
        field
    ]

    def change(data: bytes) -> bytes:
        start = data.rindex(LABEL.encode()) - 46
        assert data[start : start + 4] == b"PK\1\2"
        found = bytearray(data)
        struct.pack_into(code, found, start + at, value)
        return bytes(found)

    return patch(ADE, change)


def header_png(width: int, height: int) -> bytes:
    """A PNG that says it is large."""
    chunks = [
        (b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)),
        (b"IDAT", zlib.compress(b"0")),
        (b"IEND", b""),
    ]
    packed = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def header_jpeg(width: int, height: int) -> bytes:
    data = jpeg(np.zeros((8, 8, 3), np.uint8))
    at = data.index(b"\xff\xc0") + 5
    return data[:at] + struct.pack(">HH", height, width) + data[at + 4 :]


def picture(mode: str, bits: int | None = None) -> bytes:
    file = io.BytesIO()
    Image.new(mode, (W, H)).save(file, "PNG", **({"bits": bits} if bits else {}))
    return file.getvalue()


def grey_of_four_bits() -> bytes:
    """Pillow would give 17 for 1."""
    rows = b"".join(b"\0" + b"\x11" * (W // 2) for _ in range(H))
    data = header_png(W, H).replace(zlib.compress(b"0"), b"")
    ihdr = struct.pack(">IIBBBBB", W, H, 4, 0, 0, 0, 0)
    chunks = [(b"IHDR", ihdr), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return data[:8] + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )


def element(kind: int, data: bytes) -> bytes:
    return struct.pack("<II", kind, len(data)) + data + bytes(-len(data) % 8)


def array(matlab_class: int, body: bytes, name: bytes = b"", dims: tuple[int, ...] = (1, 1)) -> bytes:
    head = element(6, struct.pack("<II", matlab_class, 0)) + element(5, struct.pack(f"<{len(dims)}i", *dims))
    return struct.pack("<II", 14, len(head + element(1, name) + body)) + head + element(1, name) + body


def raw_mat(variable: bytes, packed: bool = False) -> bytes:
    file: Any = io.BytesIO()
    savemat(file, {"a": 1.0})
    return file.getvalue()[:128] + (element(15, zlib.compress(variable)) if packed else variable)


def nested(depth: int) -> bytes:
    """Arrays in arrays whose sizes lie, so that nobody who believes them sees the depth; scipy would die of it."""
    one = struct.pack("<II", 14, 16) + array(1, b"")[8:]
    body = struct.pack("<II", 14, 0)
    variable = array(1, one * depth + body, b"LabelMap")
    return raw_mat(variable)


def past_its_end(depth: int) -> bytes:
    """Numbers that go on past their variable's end, over one that scipy, which goes by that end, would die of."""
    deep = nested(depth)[128:]
    return raw_mat(array(9, struct.pack("<II", 9, len(deep)), b"other", (1, len(deep) // 8)) + deep)


def numbers(data: Any) -> bytes:
    return element(9, np.asarray(data, "<f8").tobytes())


def coco(*objects: dict[str, Any]) -> Change:
    """COCO with other objects; the first is always a good one."""
    good = annotation(1, [box(5, 2, 40, 30)], 1200)
    return lambda raw: tiny_archives.pack(tiny_archives.coco_([good, *objects])[0], raw)


def coco_text(change: Callable[[bytes], bytes]) -> Change:
    def changed(raw: Path) -> None:
        with zipfile.ZipFile(raw / COCO) as archive:
            text = archive.read(JSON)
        put(COCO, JSON, change(text))(raw)

    return changed


def hdf5(change: Callable[[h5py.File], Any]) -> Change:
    def changed(raw: Path) -> None:
        with h5py.File(raw / NYUD, "a") as file:
            change(file)

    return changed


def replaced(file: h5py.File, name: str, **arguments: Any) -> None:
    del file[name]
    file.create_dataset(name, **arguments)


def elsewhere(file: h5py.File) -> None:
    del file["labels"]
    file["labels"] = h5py.ExternalLink("/etc/passwd", "/labels")


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout((4, W, H), np.uint16)
    layout[:] = h5py.VirtualSource("/tmp/other.h5", "labels", (4, W, H))
    del file["labels"]
    file.create_virtual_dataset("labels", layout)


def bad_size(archive: bytes) -> bytes:
    """The first header of a tar with a size below zero: tarfile would go round in circles."""
    found = bytearray(archive)
    found[124:136] = b"\xff" * 10 + b"\xfc\x00"
    found[148:156] = b" " * 8
    found[148:156] = b"%06o\0 " % sum(found[:512])
    return bytes(found)


def long_name(size: int) -> bytes:
    info = tarfile.TarInfo("././@LongLink")
    info.type, info.size = tarfile.GNUTYPE_LONGNAME, size
    return info.tobuf(tarfile.GNU_FORMAT)


def chain_of_names(archive: bytes) -> bytes:
    one = long_name(1) + b"x" + bytes(511)
    return one * 5000 + archive


def huge(file: h5py.File) -> None:
    """Variables that take no room in the file and terabytes in memory."""
    side = 99_999
    replaced(file, "images", shape=(4, 3, side, side), dtype=np.uint8, chunks=(1, 1, 99, 99))
    replaced(file, "labels", shape=(4, side, side), dtype=np.uint16, chunks=(1, 99, 99))


def gzip_of(size: int) -> bytes:
    return gzip.compress(bytes(size))


def bomb_mat() -> bytes:
    """A label of 256 MB in one of them."""
    start = array(9, b"", b"LabelMap", (1 << 14, 1 << 14))
    start = struct.pack("<II", 14, len(start) + (1 << 28)) + start[8:] + struct.pack("<II", 2, 1 << 28)
    packer = zlib.compressobj(1)
    parts = [packer.compress(start), *(packer.compress(bytes(1 << 24)) for _ in range(16)), packer.flush()]
    return raw_mat(element(15, b"".join(parts)))


FUNCTION = array(16, array(2, element(5, struct.pack("<i", 8)) + element(1, b""), b""), b"LabelMap")
OBJECT = array(
    3,
    element(1, b"evil")
    + element(5, struct.pack("<i", 8))
    + element(1, b"run".ljust(8, b"\0"))
    + array(6, numbers([1])),
    b"LabelMap",
)
_OPAQUE = element(6, struct.pack("<II", 17, 0)) + b"".join(element(1, text) for text in (b"LabelMap", b"MCOS", b"evil"))
_OPAQUE += array(6, numbers([1]))
OPAQUE = struct.pack("<II", 14, len(_OPAQUE)) + _OPAQUE
