"""What a split says of its labels without reading one: as numpy counts them in the pixels."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from made_up_reader import Reader

from pipeline import prepare
from refinenet.data.split import Schema, Split
from refinenet.data.writer import write_split
from refinenet.errors import UserError

SCHEMA = Schema("made", "train", ("a", "b", "c", "d"), tuple((i, i, i) for i in range(4)))


def made_up(path: Path, count: int = 20) -> Split:
    """Images with and without labels; one is all void, one all of one class."""
    reader = Reader(path.parent)
    with write_split(path, SCHEMA) as writer:
        for part in ("train", "test"):
            for i in range(count):
                writer.add(f"{part}{i}", *reader.read(part, f"{part}{i}"))
        writer.add("void", np.zeros((3, 2, 3), np.uint8), np.full((3, 2), 255, np.uint8))
        writer.add("last", np.zeros((1, 7, 3), np.uint8), np.full((1, 7), 3, np.uint8))
    return Split(path)


def check(split: Split) -> None:
    """Compare with a count of every pixel."""
    counts, sizes = split.counts(), split.sizes()
    classes = len(split.schema.classes)
    assert counts.shape == (len(split), classes + 1)
    for sample, row, size, present in zip(split, counts, sizes, split.present(), strict=True):
        assert tuple(size) == sample.image.shape[:2]
        if sample.label is None:
            assert not row.any()
            assert not present.size
        else:
            expected = [np.count_nonzero(sample.label == value) for value in (*range(classes), 255)]
            assert row.tolist() == expected
            assert sum(expected) == size.prod()
            assert present.tolist() == np.flatnonzero(row[:-1]).tolist()


def test_counts_and_sizes(tmp_path: Path) -> None:
    split = made_up(tmp_path / "train.arrow")
    check(split)
    assert split.counts()[-2].tolist() == [0, 0, 0, 0, 6]
    assert split.counts()[-1].tolist() == [0, 0, 0, 7, 0]


def test_of_real_images(real: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data/raw").mkdir(parents=True)
    (tmp_path / "data/raw/voc").symlink_to(real / "voc")
    (tmp_path / "settings.json").write_text(json.dumps({"prepare": {"voc": {}}}))
    monkeypatch.chdir(tmp_path)
    prepare.run("voc")
    for part in ("train", "val"):
        check(Split(tmp_path / f"data/voc/{part}.arrow"))


def test_reads_no_pixel(tmp_path: Path) -> None:
    """The same answers from a file whose pixels are others."""
    split = made_up(tmp_path / "train.arrow")
    data = bytearray((tmp_path / "train.arrow").read_bytes())
    for sample in split:
        for pixels in (sample.image, sample.label):
            if pixels is not None and pixels.size > 100:
                at = data.index(pixels.tobytes())
                data[at : at + pixels.size] = bytes([255 - pixels.flat[0]]) * pixels.size
    (tmp_path / "other.arrow").write_bytes(data)
    other = Split(tmp_path / "other.arrow")
    assert any((one.image != another.image).any() for one, another in zip(other, split, strict=True))
    np.testing.assert_array_equal(other.counts(), split.counts())
    np.testing.assert_array_equal(other.sizes(), split.sizes())


def test_a_file_of_an_older_version(tmp_path: Path) -> None:
    path = tmp_path / "val.arrow"
    made_up(path)
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all().drop_columns(["counts"])
    with pa.ipc.new_file(str(tmp_path / "old.arrow"), table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(UserError, match=r"^\S*old\.arrow: prepared by an older version; run prepare again$"):
        Split(tmp_path / "old.arrow")
