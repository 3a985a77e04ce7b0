"""Archives that mean harm: each ends in one clear line; nothing is written outside, nothing is run."""

from __future__ import annotations

import json
import os
import re
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import tiny_archives
from hostile_files import (
    ADE,
    FUNCTION,
    JPG,
    JSON,
    LABEL,
    LIST,
    MAT,
    NYUD,
    OBJECT,
    OPAQUE,
    PARTS,
    PNG,
    SBD,
    VOC,
    Change,
    H,
    W,
    add,
    array,
    bad_size,
    bomb_mat,
    chain_of_names,
    coco,
    coco_text,
    elsewhere,
    entry,
    grey_of_four_bits,
    gzip_of,
    hdf5,
    header_jpeg,
    header_png,
    huge,
    link_in_zip,
    long_name,
    nested,
    past_its_end,
    patch,
    picture,
    put,
    raw_mat,
    replaced,
    virtual,
    zip_more,
)
from tiny_archives import annotation, box, cell, gtcls, mat, png

from pipeline import datasets, prepare
from pipeline.formats import archive
from pipeline.runtime.cli import run_cli

CASES: dict[str, tuple[str, Change, str]] = {
    "tar: ..": ("voc", add(VOC, "../../outside/a"), r"/\.\./outside/a: a name that leads out"),
    "tar: .. in the middle": ("voc", add(SBD, "a/../../b"), "a name that leads out of the archive"),
    "tar: absolute": ("voc", add(VOC, "/tmp/a"), "tar!/tmp/a: a name that leads out of the archive"),
    "tar: drive": ("voc", add(VOC, "C:/a"), "C:/a: a name that leads out of the archive"),
    "tar: backslash": ("voc", add(VOC, "..\\a"), "a name that leads out of the archive"),
    "tar: symbolic link out": (
        "voc",
        add(VOC, PNG, b"", type=tarfile.SYMTYPE, linkname="/etc/passwd"),
        rf"{PNG}: a symbolic link, expected a file",
    ),
    "tar: hard link out": (
        "voc",
        add(VOC, PNG, b"", type=tarfile.LNKTYPE, linkname="../../../etc/passwd"),
        rf"{PNG}: a hard link, expected a file",
    ),
    "tar: device": (
        "voc",
        add(VOC, PNG, b"", type=tarfile.BLKTYPE, devmajor=8),
        rf"{PNG}: a block device, expected a file",
    ),
    "tar: pipe": ("voc", add(VOC, LIST, b"", type=tarfile.FIFOTYPE), rf"{LIST}: a pipe, expected a file"),
    "tar: sparse": (
        "voc",
        add(
            VOC,
            PNG,
            b"1\n0\n1\n".ljust(512, b"\0") + b"x",
            pax_headers={"GNU.sparse.major": "1", "GNU.sparse.minor": "0"},
        ),
        rf"{PNG}: a sparse file, expected a file",
    ),
    "tar: unknown kind": ("voc", add(VOC, PNG, b"", type=b"Z"), rf"{PNG}: a member of kind b'Z', expected a file"),
    "tar: name of many lines": (
        "voc",
        add(VOC, "../a\nerror: all is well\x1b[2J\x1b]0;x\x07"),
        r"a\\nerror: all is well\\x1b\[2J\\x1b\]0;x\\x07: a name that leads out",
    ),
    "tar: size below zero": ("voc", patch(VOC, bad_size), "-1024 bytes at byte 512: damaged"),
    "tar: a name of gigabytes": (
        "voc",
        patch(VOC, lambda data: long_name(1 << 32) + data),
        r"not a whole tar archive \(a header of 42949\d+ bytes, expected 16384 at most\)",
    ),
    "tar: names of names": ("voc", patch(VOC, chain_of_names), "not a whole tar archive"),
    "tar: too many members": ("voc", lambda raw: None, f"{VOC}: more than 3 members"),
    "tar: truncated": ("voc", patch(VOC, lambda data: data[: data.index(b"c.jpg") + 700]), "truncated|not a whole tar"),
    "tar: wrong magic": ("voc", patch(VOC, lambda data: b"MZ" + b"\x90" * 4000), f"{VOC}: not a whole tar archive"),
    "tgz: bomb": (
        "voc",
        patch(SBD, lambda data: gzip_of(64 << 20)),
        f"{SBD}: unpacks to more than 4194304 bytes",
    ),
    "tgz: truncated": ("voc", patch(SBD, lambda data: data[:-20]), f"{SBD}: not a whole gzip stream"),
    "zip: ..": ("ade20k", zip_more("../../outside/a"), "zip!../../outside/a: a name that leads out of the archive"),
    "zip: absolute": ("ade20k", zip_more("/tmp/a"), "a name that leads out of the archive"),
    "zip: NUL": ("ade20k", zip_more("a\0/../b"), r"zip!a\\x00/\.\./b: a name that leads out of the archive"),
    "zip: symbolic link": ("ade20k", link_in_zip, rf"{LABEL}: a symbolic link, expected a file"),
    "zip: twice": ("ade20k", zip_more(LABEL), rf"{LABEL}: twice in the archive"),
    "zip: encrypted": ("ade20k", entry("flags", 1), rf"{LABEL}: an encrypted file, expected a file"),
    "zip: unknown packing": ("ade20k", entry("method", 97), rf"{LABEL}: a file packed by method 97, expected a file"),
    "zip: says too little": ("ade20k", entry("size", 10), rf"{LABEL}: .*unpacks to more than the 10 bytes"),
    "zip: says too much": ("ade20k", entry("size", 100_000), rf"{LABEL}: not a whole zip archive .* of 100000 bytes"),
    "zip: says gigabytes": ("ade20k", entry("size", 0xFFFF_FFF0), rf"{LABEL}: 4294967280 bytes, expected"),
    "zip: other check sum": ("ade20k", entry("crc", 1), rf"{LABEL}: not a whole zip archive \(the check sum"),
    "zip: overlap": ("ade20k", entry("local", 0), "overlaps what follows it in the archive"),
    "zip: truncated": ("ade20k", patch(ADE, lambda data: data[:-30]), f"{ADE}: not a whole zip archive"),
    "zip: wrong magic": ("ade20k", patch(ADE, lambda data: b"\x7fELF" * 100), f"{ADE}: not a whole zip archive"),
    "zip: a large index": (
        "ade20k",
        lambda raw: None,
        r"not a whole zip archive \(a header of \d+ bytes, expected 200 at most\)",
    ),
    "PNG: 100,000 x 100,000": (
        "ade20k",
        put(ADE, LABEL, header_png(100_000, 100_000)),
        f"{LABEL}: not a whole image .Image size .10000000000 pixels. exceeds",
    ),
    "JPEG: 65,000 x 65,000": (
        "voc",
        put(VOC, JPG, header_jpeg(65_000, 65_000)),
        f"{JPG}: not a whole image .Image size .4225000000 pixels. exceeds",
    ),
    "PNG: 12,000 x 12,000": (
        "ade20k",
        put(ADE, LABEL, header_png(12_000, 12_000)),
        f"{LABEL}: not a whole image .12000 x 12000 pixels, 134217728 at most",
    ),
    "PNG: colour": ("ade20k", put(ADE, LABEL, picture("RGB")), "PNG of mode RGB, expected PNG of mode L"),
    "PNG: one bit": ("ade20k", put(ADE, LABEL, picture("1")), "PNG of mode 1, expected PNG of mode L"),
    "PNG: four bits": ("ade20k", put(ADE, LABEL, grey_of_four_bits()), f"{LABEL}: grey PNG of 4 bits, expected 8"),
    "PNG: 16 bits": ("ade20k", put(ADE, LABEL, picture("I;16")), "PNG of mode I;16, expected PNG of mode L"),
    "PNG: wrong magic": ("ade20k", put(ADE, LABEL, b"GIF89a" + bytes(99)), f"{LABEL}: not a whole image .neither JPEG"),
    "label 151 of 150": (
        "ade20k",
        put(ADE, LABEL, png(np.full((H, W), 151, np.uint8))),
        f"{LABEL}: label 151, expected 0 to 150",
    ),
    "image and label of different size": (
        "ade20k",
        put(ADE, LABEL, png(np.zeros((H + 1, W), np.uint8))),
        rf"{LABEL}: .*label is uint8 \(25, 40\), expected uint8 \(24, 40\)",
    ),
    "list: empty": ("voc", put(VOC, LIST, b"\n"), f"{LIST}: an empty list"),
    "list: names a missing file": ("voc", put(VOC, LIST, b"a\nzz\n"), "JPEGImages/zz.jpg: no such file in the archive"),
    "list: names a file outside": ("voc", put(VOC, LIST, b"../../a\n"), "line '../../a', expected an image name"),
    "list: terminal escapes": ("voc", put(VOC, LIST, b"a\n\x1b[2Jb\n"), r"JPEGImages/\\x1b\[2Jb.jpg: no such file"),
    "mat: bomb": ("context", put(PARTS, MAT, bomb_mat()), f"{MAT}: not a whole MATLAB file .*unpacks to more than"),
    "mat: arrays in arrays": ("context", put(PARTS, MAT, nested(200_000)), "arrays in arrays, more than 32 deep"),
    "mat: arrays in arrays, in numbers": (
        "context",
        put(PARTS, MAT, past_its_end(20_000)),
        r"an element of \d+ bytes at byte \d+ of \d+",
    ),
    "mat: a cell of gigabytes": (
        "context",
        put(PARTS, MAT, raw_mat(array(1, b"", b"LabelMap", (1 << 15, 1 << 15)))),
        "an array of 1073741824 arrays in 0 bytes",
    ),
    "mat: object array": (
        "context",
        put(PARTS, MAT, mat(LabelMap=cell(["a", "b"]))),
        r"label is object \(1, 2\), expected",
    ),
    "mat: function": ("context", put(PARTS, MAT, raw_mat(FUNCTION)), f"{MAT}: "),
    "mat: object": ("context", put(PARTS, MAT, raw_mat(OBJECT)), f"{MAT}: "),
    "mat: opaque object": ("context", put(PARTS, MAT, raw_mat(OPAQUE)), f"{MAT}: "),
    "mat: SBD's label is a cell": (
        "voc",
        put(SBD, "benchmark_RELEASE/dataset/cls/d.mat", gtcls(cell(["a"]))),
        "label is object",
    ),
    "mat: HDF5": (
        "context",
        put(PARTS, MAT, b"MATLAB 7.3".ljust(124) + b"\x00\x02IM" + bytes(400)),
        "a MATLAB 7.3 file",
    ),
    "mat: a pickle": (
        "context",
        put(PARTS, MAT, b"cos\nsystem\n(S'touch /tmp/hacked'\ntR." + bytes(400)),
        f"{MAT}: not a whole",
    ),
    "HDF5: link to another file": (
        "nyud",
        hdf5(elsewhere),
        f"{NYUD}: labels is a link, expected a data set of this file",
    ),
    "HDF5: bytes of another file": (
        "nyud",
        hdf5(
            lambda file: replaced(
                file, "labels", shape=(4, W, H), dtype=np.uint16, external=[("/etc/passwd", 0, 99999)]
            )
        ),
        f"{NYUD}: the bytes of labels lie in other files",
    ),
    "HDF5: put together": ("nyud", hdf5(virtual), f"{NYUD}: the bytes of labels lie in other files"),
    "HDF5: images of terabytes": (
        "nyud",
        hdf5(huge),
        r"images\[0004\]: 3 x 99999 x 99999, expected 402653184 numbers at most",
    ),
    "HDF5: texts": (
        "nyud",
        hdf5(lambda file: replaced(file, "labels", data=np.full((4, W, H), "a", h5py.string_dtype()))),
        f"{NYUD}: labels is object, expected numbers",
    ),
    "json: an object of no image": (
        "coco",
        coco(annotation(1, [box(1, 1, 2, 2)], 4, 99)),
        "image 99, which is not in the list",
    ),
    "json: no such photograph": (
        "coco",
        coco_text(lambda text: text.replace(b'"7.jpg"', b'"zz.jpg"')),
        "train2014/zz.jpg: no such file in the archive",
    ),
    "json: a photograph outside": (
        "coco",
        coco_text(lambda text: text.replace(b'"7.jpg"', b'"../7.jpg"')),
        "file_name is '../7.jpg', expected <name>.jpg",
    ),
    "json: a polygon of three corners and a half": (
        "coco",
        coco(annotation(1, [[1, 1, 2, 2, 3, 1, 5]], 4)),
        r"\[7\]: polygon \[1, 1, 2, 2, 3, 1, 5\], expected",
    ),
    "json: a polygon of texts": ("coco", coco(annotation(1, [["a"] * 6], 4)), "a corner at 'a' of 60 pixels"),
    "json: a polygon of miles": (
        "coco",
        coco(annotation(1, [[1, 1, 2, 2, 1e18, 3]], 4)),
        r"a corner at 1e\+18 of 60 pixels",
    ),
    "json: not a number": (
        "coco",
        coco(annotation(1, [[1, 1, 2, 2, float("nan"), 3]], 4)),
        r"not JSON of lists \(lexical error: .*NaN",
    ),
    "json: no polygon": ("coco", coco(annotation(1, "all of it", 4)), "segmentation is 'all of it', expected polygons"),
    "json: huge run lengths": (
        "coco",
        coco(annotation(1, {"counts": [0, 1 << 40], "size": [40, 60]}, 4)),
        "run lengths that are not 2400 pixels in all",
    ),
    "json: run lengths below zero": (
        "coco",
        coco(annotation(1, {"counts": [-1, 2401], "size": [40, 60]}, 4)),
        "run lengths that are not 2400 pixels in all",
    ),
    "json: run lengths of another size": (
        "coco",
        coco(annotation(1, {"counts": [0, 10**10], "size": [100_000, 100_000]}, 4)),
        r"run lengths of size \[100000, 100000\], expected \[40, 60\]",
    ),
    "json: packed run lengths": (
        "coco",
        coco(annotation(1, {"counts": "oooooooooooooooooooooooooo", "size": [40, 60]}, 4)),
        "run lengths that are not 2400 pixels in all",
    ),
    "json: image of terabytes": (
        "coco",
        coco_text(lambda text: text.replace(b'"height": 40', b'"height": 4000000000')),
        "4000000000 x 60, expected 134217728 pixels at most",
    ),
    "json: other categories": (
        "coco",
        coco_text(lambda text: text.replace(b'"airplane"', b'"aeroplane"')),
        "category 5 is 'aeroplane', expected 'airplane'",
    ),
    "json: deep": ("coco", coco_text(lambda text: b'{"images": [' + b"[" * 100_000), "not JSON of lists"),
    "json: cut": ("coco", coco_text(lambda text: text[:-100]), f"{JSON}: not JSON of lists"),
    "json: a text": ("coco", coco_text(lambda text: b'"images"'), f"{JSON}: not JSON of lists"),
}

LIMITS = {
    "tar: too many members": ("MEMBERS_LIMIT", 3),
    "tgz: bomb": ("SCRATCH_LIMIT", 4 << 20),
    "zip: a large index": ("INDEX_LIMIT", 200),
}

# What Python does that this must not lead to, and the files that it opens to write to.
RUN = ("os.system", "os.exec", "os.posix_spawn", "os.fork", "subprocess.Popen", "pickle.find_class")
seen: list[tuple[str, str]] | None = None


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    if seen is None:
        return
    if event in RUN:
        seen.append((event, str(arguments)))
    elif event == "open" and isinstance(arguments[0], str | bytes):
        path, flags = os.fsdecode(arguments[0]), arguments[2]
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT) and "__pycache__" not in path:
            seen.append((event, path))


sys.addaudithook(watch)


def tree(folder: Path) -> dict[str, bytes | None]:
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A project folder with another folder beside it, to which archives would like to write."""
    for name in ("project", "outside"):
        (tmp_path / name).mkdir()
    (tmp_path / "outside" / "a").write_text("mine")
    wanted = {"prepare": {name: {"official_counts": False} for name in datasets.NAMES}}
    (tmp_path / "project" / "settings.json").write_text(json.dumps(wanted))
    monkeypatch.chdir(tmp_path / "project")
    yield tmp_path / "project"
    global seen
    seen = None


@pytest.mark.parametrize("case", CASES)
def test_one_line_and_nothing_else(
    case: str, project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    global seen
    name, change, expected = CASES[case]
    raw = project / "data" / "raw" / name
    tiny_archives.pack(tiny_archives.BUILD[name]()[0], raw)
    change(raw)
    if case in LIMITS:
        monkeypatch.setattr(archive, *LIMITS[case])
    before = tree(project.parent)
    seen = []
    code = run_cli(lambda: prepare.run(name))
    events, seen = seen, None
    line = capsys.readouterr().err
    assert code == 1
    assert re.search(expected, line), line
    assert line.startswith("error: data/raw/")
    assert line.count("\n") == 1
    assert line[:-1].isprintable()
    assert len(line) < 1000
    assert tree(project.parent) == before
    places = (str(project), "data/", ".", os.devnull)
    assert [event for event in events if event[0] != "open" or not event[1].startswith(places)] == []


def test_the_watch_sees(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above rests on these."""
    global seen
    seen = []
    (project.parent / "outside" / "b").write_text("x")
    os.system("true")
    events, seen = seen, None
    assert [event for event, _ in events] == ["open", "os.system"]
