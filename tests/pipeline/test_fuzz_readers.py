"""Readers on broken input: whatever the bytes are, a result or a UserError, soon.

Longer: FUZZ=20000 pytest tests/pipeline/test_fuzz_readers.py
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_archives
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.io import savemat
from tiny_archives import cell, gtcls, jpeg, png

from pipeline import datasets
from pipeline.datasets import coco, person
from pipeline.formats import archive as members
from pipeline.formats import decode
from pipeline.formats.archive import Archive
from refinenet.errors import UserError

EXAMPLES = int(os.environ.get("FUZZ", "100"))
# Bounded time: an example that takes a minute has failed. Milliseconds are usual; the rest is for busy machines.
fuzz = settings(max_examples=EXAMPLES, deadline=60_000, suppress_health_check=list(HealthCheck), database=None)

kinds = st.sampled_from(["flip", "set", "cut", "splice", "repeat", "number"])
Edit = tuple[str, float, int, float]
edits = st.lists(st.tuples(kinds, st.floats(0, 1), st.integers(0, 2**32 - 1), st.floats(0, 1)), min_size=1, max_size=8)


def edited(data: bytes, changes: list[Edit]) -> bytes:
    """`data` with flipped bits, other bytes, less at the end, pieces from elsewhere, pieces twice, other numbers."""
    found = bytearray(data)
    for kind, place, number, other in changes:
        at, source = int(place * max(0, len(found) - 1)), int(other * max(0, len(found) - 1))
        if kind == "flip" and found:
            found[at] ^= 1 << number % 8
        elif kind == "set" and found:
            found[at] = (0, 1, 127, 128, 255, number % 256)[number % 6]
        elif kind == "cut":
            del found[at:]
        elif kind == "splice":
            found[at : at + number % 64] = found[source : source + number % 64]
        elif kind == "repeat":
            found[at:at] = found[source : source + number % 512]
        elif kind == "number":
            found[at : at + 4] = number.to_bytes(4, "little" if number % 2 else "big")
    return bytes(found)


def broken(*whole: bytes) -> st.SearchStrategy[bytes]:
    """Edited ones of these files, and bytes of any kind behind their first ones."""
    some = st.sampled_from(whole)
    start = st.builds(
        lambda data, length, rest: data[:length] + rest, some, st.integers(0, 200), st.binary(max_size=600)
    )
    return st.one_of(st.builds(edited, some, edits), st.builds(edited, some, edits), start)


def plain_mat(**variables: Any) -> bytes:
    """Not compressed: edits reach what is in it."""
    file: Any = io.BytesIO()
    savemat(file, variables)
    content: bytes = file.getvalue()
    return content


LABEL = np.arange(60, dtype=np.uint8).reshape(6, 10) % 21
ANNO = {
    "imname": "a",
    "objects": np.array(
        [[("person", 15, LABEL > 3, np.array([[("head", LABEL > 5)]], [("part_name", "O"), ("mask", "O")]))]],
        [("class", "O"), ("class_ind", "O"), ("mask", "O"), ("parts", "O")],
    ),
}
MATS = (
    plain_mat(GTcls={"Segmentation": LABEL}),
    plain_mat(LabelMap=LABEL.astype(np.uint16), other=1.0),
    plain_mat(seg37list=cell(["wall", "floor"])),
    plain_mat(anno=ANNO),
    plain_mat(GTcls={"Segmentation": LABEL, "Boundaries": cell(["", "b"]), "more": {"more": {"more": 1j}}}),
    gtcls(LABEL),
)


def read_mat(data: bytes) -> None:
    for name in ("GTcls", "LabelMap", "seg37list", "anno"):
        with suppress(UserError):
            found = decode.matlab(data, "a.mat", name)
            with suppress(UserError):
                decode.strings(found, "a.mat")
            with suppress(UserError):
                decode.relabel(found, np.zeros(22, np.uint8), "a.mat")
            with suppress(UserError):
                datasets.load("voc")._segmentation(found, "a.mat")  # type: ignore[attr-defined]


@fuzz
@given(broken(*MATS))
def test_mat(data: bytes) -> None:
    read_mat(data)


def small(mode: str, **options: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) * 5).convert(mode).save(file, **options)
    return file.getvalue()


PICTURES = (
    png(LABEL, palette=True),
    png(LABEL),
    jpeg(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)),
    small(
        "RGB", format="JPEG", progressive=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\1\x12\0\3\0\0\0\1\0\6\0\0\0\0\0\0"
    ),
    small("CMYK", format="JPEG"),
    small("RGBA", format="PNG", dpi=(3, 3)),
    small("LA", format="PNG"),
    small("P", format="PNG", transparency=1, bits=2),
    small("1", format="PNG"),
)


@fuzz
@given(broken(*PICTURES))
def test_png_and_jpeg(data: bytes) -> None:
    with suppress(UserError):
        assert decode.photo(data, "a.png").ndim == 3
    with suppress(UserError):
        assert decode.index_png(data, "a.png", modes="PL").ndim == 2


@fuzz
@given(broken(b"2007_000032\r\n2007_000039\n\xc3\xa9 \n", b"Idx\tRatio\tName\n1\t0.1\twall, a\n2\t0.1\tfloor\n"))
def test_lists(data: bytes) -> None:
    with suppress(UserError):
        names = decode.image_list(data, "a.txt")
        assert names
        assert all("/" not in name and "\n" not in name for name in names)


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a data set's tiny archives, whose files a test may replace."""

    def folder(name: str) -> Path:
        path = tmp_path_factory.mktemp(name)
        tiny_archives.pack(tiny_archives.BUILD[name]()[0], path)
        return path

    return folder


def read_all(name: str, folder: Path) -> None:
    with suppress(UserError), datasets.load(name).Reader(folder) as reader:
        for split in datasets.load(name).COUNTS:
            for image in reader.names(split):
                with suppress(UserError):
                    reader.read(split, image)


def test_lists_of_labels(raw: Callable[[str], Path]) -> None:
    """The one inside trainval.tar.gz, and the one beside it."""
    folder = raw("context")
    files, _ = tiny_archives.context_()
    members, inside = files["trainval.tar.gz"], "trainval/labels.txt"
    whole = {inside: members[inside], "59_labels.txt": files["59_labels.txt"]}

    @settings(fuzz, max_examples=EXAMPLES // 2)
    @given(st.sampled_from(sorted(whole)), edits)
    def run(name: str, changes: list[Edit]) -> None:
        now = whole | {name: edited(whole[name], changes)}
        tiny_archives.pack(
            {"trainval.tar.gz": members | {inside: now[inside]}, "59_labels.txt": now["59_labels.txt"]}, folder
        )
        read_all("context", folder)

    run()


@pytest.mark.parametrize("file", ["splits.mat", "classMapping40.mat"])
def test_mats_of_nyud(file: str, raw: Callable[[str], Path]) -> None:
    folder = raw("nyud")
    from scipy.io import loadmat

    content = {key: value for key, value in loadmat(folder / file).items() if key[0] != "_"}

    @settings(fuzz, max_examples=EXAMPLES // 2)
    @given(broken(plain_mat(**content), (folder / file).read_bytes()))
    def run(data: bytes) -> None:
        (folder / file).write_bytes(data)
        read_all("nyud", folder)

    run()


def test_annotations_of_parts() -> None:
    """The structs of Annotations_Part, from a tar.gz whose one label is broken."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "raw" / "person"
        files, _ = tiny_archives.person()
        voc = {"VOCtrainval_03-May-2010.tar": files["VOCtrainval_03-May-2010.tar"]}
        tiny_archives.pack(voc, folder)

        @fuzz
        @given(broken(plain_mat(anno=ANNO)))
        def run(data: bytes) -> None:
            tiny_archives.pack({"pascal_part_trainval.tar.gz": {"Annotations_Part/a.mat": data}}, folder)
            with suppress(UserError), person.Reader(folder) as reader:
                reader.names("train")

        run()


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=9) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)


def test_json_of_coco(raw: Callable[[str], Path]) -> None:
    """Edited text, and JSON in which any value is another."""
    folder = raw("coco")
    archive, member = "annotations_trainval2014.zip", "annotations/instances_train2014.json"
    with zipfile.ZipFile(folder / archive) as file:
        text = file.read(member)

    def other(place: int, value: Any) -> bytes:
        record = json.loads(text)
        places: list[tuple[Any, Any]] = []

        def walk(node: Any) -> None:
            for key in node if isinstance(node, dict) else range(len(node)) if isinstance(node, list) else ():
                places.append((node, key))
                walk(node[key])

        walk(record)
        node, key = places[place % len(places)]
        node[key] = value
        return json.dumps(record).encode()

    @settings(fuzz, max_examples=EXAMPLES * 2)
    @given(st.one_of(broken(text), st.builds(other, st.integers(0, 10_000), json_values)))
    def run(data: bytes) -> None:
        tiny_archives.pack({archive: {member: data}}, folder)
        read_all("coco", folder)

    run()


@fuzz
@given(st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=40), st.integers(1, 9), st.integers(1, 9))
def test_packed_run_lengths(text: str, height: int, width: int) -> None:
    with suppress(UserError):
        mask = coco._mask({"counts": text, "size": [height, width]}, (height, width), "a.json")
        assert mask.shape == (height, width)


def tar(gz: bool, kind: int) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w:gz" if gz else "w", format=kind) as archive:
        for name in ("a/b.txt", f"{'long/' * 30}name", "\xe9.txt", "link"):
            info = tarfile.TarInfo(name)
            info.size, info.pax_headers = 5, {"comment": "x", "mtime": "1.5"}
            if name == "link":
                info.size, info.type, info.linkname = 0, tarfile.SYMTYPE, "a/b.txt"
            archive.addfile(info, io.BytesIO(b"hello"))
    return file.getvalue()


def zipped() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/b.txt", b"hello" * 50)
        archive.writestr("a/\xe9.txt", b"stored", zipfile.ZIP_STORED)
        archive.mkdir("a/folder")
        with archive.open(zipfile.ZipInfo("large"), "w", force_zip64=True) as member:
            member.write(b"x" * 1000)
        archive.comment = b"comment"
    return file.getvalue()


@pytest.mark.parametrize(
    ("suffix", "whole"),
    [
        (".tar", (tar(False, tarfile.PAX_FORMAT), tar(False, tarfile.GNU_FORMAT), tar(False, tarfile.USTAR_FORMAT))),
        (".tgz", (tar(True, tarfile.GNU_FORMAT),)),
        (".zip", (zipped(),)),
    ],
    ids=[".tar", ".tgz", ".zip"],
)
def test_archives(suffix: str, whole: tuple[bytes, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "raw" / "a" / f"archive{suffix}"
    path.parent.mkdir(parents=True)
    monkeypatch.setattr(members, "SCRATCH_LIMIT", 1 << 22)

    @settings(fuzz, max_examples=EXAMPLES * 2)
    @given(broken(*whole))
    def run(data: bytes) -> None:
        path.write_bytes(data)
        with suppress(UserError), Archive(path) as archive:
            for member in archive:
                with suppress(UserError):
                    assert len(archive.read(member)) <= 1 << 22

    run()
    assert [each.name for each in path.parent.iterdir()] == [path.name]


HDF5 = """
import random, sys
from pathlib import Path
from test_fuzz_readers import edited, read_all

name, folder, target = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
whole, kinds = target.read_bytes(), ["flip", "set", "cut", "splice", "repeat", "number"]
for seed in range(int(sys.argv[4])):
    chance = random.Random(seed)
    # Half of the edits where the structure is, which is at the start of so small a file.
    place = lambda: chance.random() * (0.1 if chance.random() < 0.5 else 1)
    count = chance.randint(1, 6)
    edits = [(chance.choice(kinds), place(), chance.getrandbits(32), chance.random()) for _ in range(count)]
    print(seed, flush=True)
    target.write_bytes(edited(whole, edits))
    read_all(name, folder)
"""


def test_hdf5(raw: Callable[[str], Path]) -> None:
    """A crash of the HDF5 library would end this process: it is done in another one."""
    folder, root = raw("nyud"), Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", HDF5, "nyud", str(folder), str(folder / "nyu_depth_v2_labeled.mat"), str(EXAMPLES)]
    path = os.pathsep.join([str(root / "tests" / "helpers"), str(root / "tests" / "pipeline"), str(root)])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path}, timeout=3600)
    assert done.returncode == 0, (done.stdout[-9:], done.stderr[-2000:])
    assert len(done.stdout.split()) == EXAMPLES
