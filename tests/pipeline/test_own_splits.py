"""Splits that do not lie: recordings that stay together, near-duplicates, classes and labels that a split lacks."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import own_files
import pytest
from hypothesis import given
from hypothesis import strategies as st
from own_files import ABOUT, draw, lists, save
from PIL import Image

from pipeline import prepare
from pipeline.config.schema import Folder, Prepare
from pipeline.datasets import custom, near_duplicates
from pipeline.fetch import own_folders
from refinenet.data.split import Array
from refinenet.errors import UserError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pair(name: str, image: Array, label: Array) -> None:
    save(image, Path("photos", f"{name}.png"))
    save(label, Path("masks", f"{name}.png"))


def prepared(about: Folder = ABOUT, cores: int = 1) -> dict[str, object]:
    """Stages `download` and `prepare` of leaves; what they say of the split."""
    Path("settings.json").write_text(json.dumps({"prepare": {"leaves": {"own": asdict(about)}}}))
    own_folders.pack("leaves", about, Path("data/raw/leaves"))
    prepare.run("leaves")
    found: dict[str, object] = json.loads(Path("data/leaves/checks.json").read_text())
    return found


def view(seed: int, shift: int = 0, height: int = 96, width: int = 128) -> Array:
    """A smooth drawn scene, H x W x 3, moved by `shift` pixels: as the next frame of a video."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 256, (7, 9, 3), np.uint8))
    whole = np.asarray(coarse.resize((width + 40, height), Image.Resampling.BICUBIC))
    return np.ascontiguousarray(whole[:, shift : shift + width])


# Groups ---------------------------------------------------------------------------------------------------------------


groups_of_images = st.dictionaries(
    st.text("abcxyz", min_size=1, max_size=3), st.integers(1, 9), min_size=2, max_size=12
)


@given(sizes=groups_of_images, share=st.floats(0.05, 0.95), seed=st.integers(0, 9))
def test_groups_stay_together(sizes: dict[str, int], share: float, seed: int) -> None:
    """Disjoint, complete, never empty, of no order; and no single group would bring val nearer to its share."""
    names = [f"{group}/{i}" for group, size in sizes.items() for i in range(size)]
    about = replace(ABOUT, group=1)
    train, val = custom.split_groups(names, share, seed, about.group_of)
    assert sorted(train + val) == sorted(names)
    assert train
    assert val
    sides = [{about.group_of(name) for name in part} for part in (train, val)]
    assert not sides[0] & sides[1]
    assert custom.split_groups(names[::-1], share, seed, about.group_of) == (train, val)
    wanted = share * len(names)
    if len(sides[0]) > 1:
        for group in sides[0]:
            assert group is not None
            assert abs(len(val) + sizes[group] - wanted) >= abs(len(val) - wanted) - 1e-9


def test_groups_by_folder_and_by_name(here: Path) -> None:
    for name in ("a/b/1", "a/c/2", "d/3", "4", "5"):
        pair(name, *draw(name))
    folder, two = replace(ABOUT, group=1), replace(ABOUT, group=2)
    assert {name: folder.group_of(name) for name in ("a/b/1", "d/3", "4")} == {"a/b/1": "a", "d/3": "d", "4": ""}
    assert two.group_of("a/b/1") == "a/b"
    assert two.group_of("d/3") == "d"
    found = lists(folder)
    for part in (("a/b/1", "a/c/2"), ("4", "5")):
        assert len({name in found["val"] for name in part}) == 1
    by_name = replace(ABOUT, group=r"^(\w+?)_\d+$")
    assert by_name.group_of("Seq05VD_f01") is None
    assert by_name.group_of("seq_0012") == "seq"
    assert replace(ABOUT, group=r"^[a-z]+").group_of("seq_0012") == "seq"
    with pytest.raises(UserError) as error:
        lists(by_name)
    first, *others = str(error.value).splitlines()
    assert first == r"own.leaves: group is '^(\\w+?)_\\d+$': the regular expression of `group` is not in 5 names"
    assert others[0] == "  4: no group"
    with pytest.raises(UserError, match=r"^own\.leaves: group is '\^\(\)': 1 group \(''\), expected 2 or more"):
        lists(replace(ABOUT, group="^()"))


# Near-duplicates ------------------------------------------------------------------------------------------------------


def test_nearest_is_the_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a plain count of bits, in blocks of any size."""
    random = np.random.default_rng(0)
    bits = random.integers(0, 2, (70, near_duplicates.SIDE**2), np.uint8)
    bits[60] = bits[3]
    prints = [np.packbits(row).tobytes() for row in bits]
    expected = (bits[None, :50] != bits[50:, None]).sum(axis=2)
    for block in (1, 130, 1 << 20):
        monkeypatch.setattr(near_duplicates, "_BLOCK", block)
        places, distances = near_duplicates.nearest(prints[:50], prints[50:])
        assert np.array_equal(places, expected.argmin(axis=1))
        assert np.array_equal(distances, expected.min(axis=1))
    assert (places[10], distances[10]) == (3, 0)


def test_frames_of_a_video_are_found_and_other_scenes_are_not(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The share, three examples and the advice; with `group` there are none."""
    label = draw("a", 96, 128)[1]
    for video in range(6):
        for frame in range(5):
            pair(f"v{video}_{frame}", view(video, 2 * frame), label)
    found = prepared()["near_duplicates"]
    assert isinstance(found, dict)
    train, val = (set(part) for part in lists().values())
    assert found["val"] == len(val)
    assert found["found"] == len([name for name in val if any(name[:2] == other[:2] for other in train)])
    assert len(found["examples"]) == 3
    for one, other, distance in found["examples"]:
        assert one in val
        assert other in train
        assert one[:2] == other[:2]
        assert 0 < distance <= near_duplicates.DISTANCE
    one, other, _ = found["examples"][0]
    err = capsys.readouterr().err
    assert f"warning: leaves: {found['found']} of {len(val)} val images" in err
    assert f"({one} and {other}, " in err
    assert "keep recordings together with `group`" in err
    grouped = prepared(replace(ABOUT, group=r"v\d"))
    assert grouped["near_duplicates"] == {"val": 5, "found": 0, "examples": []}
    assert grouped["groups"] == {"train": 5, "val": 1, "both": []}
    assert "warning" not in capsys.readouterr().err
    Path("val.txt").write_text("v0_1\nv1_1\nv2_0\nv2_1\nv2_2\nv2_3\nv2_4\n")
    by_list = prepared(replace(ABOUT, group=r"v\d", val="val.txt"))
    assert by_list["groups"] == {"train": 5, "val": 3, "both": ["v0", "v1"]}
    assert "the lists have images of 2 groups in train and val: v0, v1\n" in capsys.readouterr().err


def test_a_copy_in_other_dress_is_found() -> None:
    image = view(1)
    smaller = np.asarray(Image.fromarray(image).resize((70, 50)))
    darker = (image * 0.8).astype(np.uint8)
    first, *others = (near_duplicates.fingerprint(one) for one in (image, smaller, darker, view(2)))
    distances = near_duplicates.nearest([first], others)[1]
    assert (distances[:2] <= near_duplicates.DISTANCE).all()
    assert distances[2] > near_duplicates.DISTANCE


# What a split lacks ---------------------------------------------------------------------------------------------------


def test_classes_without_a_pixel(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Masks of 0 and 255 read as two classes from 0: the second never occurs, 255 is void."""
    for index in range(8):
        image, label = draw(str(index))
        pair(str(index), image, np.where(label == 1, 255, 0).astype(np.uint8))
    prepared(replace(ABOUT, classes=("background", "polyp")))
    told = capsys.readouterr().err
    for split in ("train", "val"):
        assert f"warning: leaves: 1 of 2 classes without a pixel in {split}: polyp; 2" in told
    assert "warning: leaves: 255 counts as void; where it is a class, as in masks of 0 and 255, set `values:" in told
    prepared(replace(ABOUT, classes=("background", "polyp"), values=(0, 255)))
    assert "warning" not in capsys.readouterr().err
    prepared(replace(ABOUT, classes=("background", *(f"c{i}" for i in range(9)))))
    assert "9 of 10 classes without a pixel in val: c0, c1, c2, c3, c4 and 4 more; 2" in capsys.readouterr().err


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_split_without_a_labelled_pixel(here: Path, split: str) -> None:
    own_files.write(here)
    Path(f"{split}.txt").write_text("a\nb\n")
    for name in ("a", "b"):
        save(np.full((24, 32), 255, np.uint8), Path(f"masks/{name}.png"))
    with pytest.raises(UserError, match=rf"^leaves: no labelled pixel in {split}: its 2 images are void all over, exp"):
        prepared(replace(ABOUT, **{split: f"{split}.txt"}))
    assert not Path("data/leaves").exists()


def test_a_rehearsal_takes_the_first_images_as_they_are(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own_files.write(here)
    save(np.full((24, 32), 255, np.uint8), Path("masks/a.png"))
    Path("val.txt").write_text("a\nb\n")
    about = replace(ABOUT, val="val.txt")
    prepared(about)
    assert "warning" not in capsys.readouterr().err
    prepare.run("leaves", Prepare(limit=1, own=about))
    assert "warning" not in capsys.readouterr().err
