"""A user's own images and masks: packed, read, split, and from two folders to a table by the commands of its page."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import subprocess
import textwrap
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import own_files
import own_run
import pytest
import small_project
import yaml
from hypothesis import given
from hypothesis import strategies as st
from own_files import ABOUT, COLOURS, NAMES, draw, lists, packed, png_of_16_bits, refused, samples, save
from own_run import scores as leaves
from PIL import Image

from pipeline import tabulate
from pipeline.config import resolve, schema
from pipeline.config.schema import Folder
from pipeline.datasets import custom
from pipeline.fetch import own_folders
from refinenet.data.split import Array, Schema, Split
from refinenet.data.writer import write_split
from refinenet.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder, with photos/ and masks/."""
    monkeypatch.chdir(tmp_path)
    own_files.write(tmp_path)
    return tmp_path


# What comes out -------------------------------------------------------------------------------------------------------


def test_every_pixel_of_every_kind_of_mask(here: Path) -> None:
    for name, (image, label) in samples().items():
        assert np.array_equal(image, draw(name)[0])
        assert np.array_equal(label, draw(name)[1])
    table = np.zeros((256, 3), np.uint8)
    table[:3], table[255] = COLOURS, (224, 224, 192)
    kinds: dict[str, Callable[[Array, Path], None]] = {
        "index": save,
        "palette": save_with_a_palette,
        "colour": lambda mask, path: save(table[mask], path),
    }
    abouts = {
        "index": ABOUT,
        "palette": replace(ABOUT, void=3),
        "colour": replace(ABOUT, colours=COLOURS, void=(224, 224, 192)),
    }
    written = {}
    for kind, write in kinds.items():
        for name in NAMES:
            write(draw(name)[1], Path("masks", f"{name}.png"))
        about = abouts[kind]
        found = samples(about)
        assert sorted(found) == sorted(NAMES)
        with write_split(Path(f"{kind}.arrow"), Schema("leaves", "train", ABOUT.classes, COLOURS)) as writer:
            for name, (image, label) in found.items():
                writer.add(name, image, label)
        written[kind] = Path(f"{kind}.arrow").read_bytes()
        palette = COLOURS if kind == "colour" else ((0, 0, 0), (128, 0, 0), (0, 128, 0))  # VOC's
        assert palette == custom.dataset("leaves", about).PALETTE
    assert written["index"] == written["palette"] == written["colour"]


def save_with_a_palette(mask: Array, path: Path) -> None:
    """A palette PNG of 4 bits whose colours say nothing: two indices share one; void is index 3."""
    image = Image.fromarray(np.where(mask == 255, 3, mask).astype(np.uint8), "P")
    image.putpalette([7, 7, 7] * 4)
    image.save(path)


def test_void(here: Path) -> None:
    """No void, another value, and the 0 and 255 of a drawing program as two colours."""
    for void in (None, 9):
        refused(r"value 255, expected 0 to 2(, or 9 for void)?, at row", replace(ABOUT, void=void))
    for name in NAMES:
        save(np.where(draw(name)[1] == 255, 9, draw(name)[1]).astype(np.uint8), Path("masks", f"{name}.png"))
    refused(r"value 9, expected 0 to 2, or 255 for void, at row", ABOUT)
    assert np.array_equal(samples(replace(ABOUT, void=9))["a"][1], draw("a")[1])
    refused(r"value 9, expected 0 to 2, at row", replace(ABOUT, void=None))
    for name in NAMES:
        Image.fromarray(draw(name)[1] == 255).save(Path("masks", f"{name}.png"))  # 1 bit a pixel
    black_and_white = Folder("photos", "masks", ("soil", "leaf"), colours=((0, 0, 0), (255, 255, 255)))
    assert np.array_equal(samples(black_and_white)["a"][1], (draw("a")[1] == 255).astype(np.uint8))


def test_images_are_read_as_people_see_them(here: Path) -> None:
    image, mask = draw("a")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise
    save(np.rot90(image), Path("photos/a.png"), exif=exif)
    see_through = np.dstack([image, np.where(mask == 255, 0, 255).astype(np.uint8)])
    save(see_through, Path("photos/b.png"))
    save(mask, Path("masks/b.png"))
    found = samples()
    assert np.array_equal(found["a"][0], image)
    assert np.array_equal(found["b"][0], np.where(mask[..., None] == 255, 255, image))


# Packing --------------------------------------------------------------------------------------------------------------


def test_same_files_same_bytes(here: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: Any) -> None:
    first = packed().read_bytes()
    with zipfile.ZipFile(io.BytesIO(first)) as archive:
        assert archive.namelist() == sorted(archive.namelist())
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        assert archive.read("classes.txt") == b"soil\nleaf\nstem\n"
        assert archive.read("images/field/c d.png") == Path("photos/field/c d.png").read_bytes()
    monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
    for name in reversed(NAMES):  # listed in another order, under names whose accents are letters of their own
        image, mask = draw(name)
        save(mask, Path("masks", f"{name.replace('é', 'é')}.png"))
        save(image, Path("photos", f"{name}.PNG"))
    assert packed().read_bytes() == first


def test_packed_again_only_when_the_content_has_changed(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    archive, raw = packed(), Path("raw")
    first = archive.stat()

    def same() -> bool:
        assert not own_folders.outdated("leaves", ABOUT, raw)
        packed()
        return (archive.stat().st_ino, archive.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)

    assert same()
    os.utime("photos/a.png", (1, 1))
    assert same()
    Path("raw.times.json").unlink()
    assert same()
    old = Path("masks/a.png").read_bytes()
    wrong = bytearray(old)
    wrong[-1] ^= 1
    Path("masks/a.png").write_bytes(wrong)  # same name and size
    assert own_folders.outdated("leaves", ABOUT, raw)
    Path("masks/a.png").write_bytes(old)
    assert same()
    for change in (replace(ABOUT, classes=("soil", "leaf", "root")), replace(ABOUT, train="list.txt")):
        Path("list.txt").write_text("a\n")
        assert own_folders.outdated("leaves", change, raw)
    os.utime("photos/b.png", (1, 1))
    for folder_name in ("photos", "masks"):  # a pair that is older than all others
        save(draw("z")[0 if folder_name == "photos" else 1], Path(folder_name, "z.png"))
        os.utime(Path(folder_name, "z.png"), (1, 1))
    assert own_folders.outdated("leaves", ABOUT, raw)
    packed()
    assert not own_folders.outdated("leaves", ABOUT, raw)
    with zipfile.ZipFile(archive) as found:
        assert "masks/z.png" in found.namelist()
    # A colleague has the archive and not the folders.
    Path("photos").rename("gone")
    assert not own_folders.outdated("leaves", ABOUT, raw)
    capsys.readouterr()
    packed()
    assert capsys.readouterr().out == "leaves: photos is not on this machine, using raw/leaves.zip\n"


def test_places(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Home and environment; masks among the images; links; hidden and other files."""
    monkeypatch.setenv("HOME", str(here))
    monkeypatch.setenv("LABELS", "masks")
    first = packed().read_bytes()
    Path("photos/.DS_Store").touch()
    Path("photos/notes.txt").touch()
    Path("raw/leaves.zip").unlink()
    assert packed(replace(ABOUT, images="~/photos", masks="${LABELS}")).read_bytes() == first
    Path("masks").rename("photos/masks")
    Path("photos/field").rename("meadow")
    Path("photos/field").symlink_to(here / "meadow")
    Path("photos/field/again").symlink_to(here / "photos")  # a circle
    Path("raw/leaves.zip").unlink()
    assert packed(replace(ABOUT, masks="photos/masks")).read_bytes() == first


def test_nothing_is_left_of_a_packing_that_fails(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = packed().read_bytes()
    Path("photos/b.png").write_bytes(b"x")

    def full(*_: Any) -> Any:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(zipfile._ZipWriteFile, "write", full)
    with pytest.raises(OSError, match="No space"):
        packed()
    assert Path("raw/leaves.zip").read_bytes() == first
    assert not list(here.glob(".*"))


# Splits ---------------------------------------------------------------------------------------------------------------


names_of_images = st.sets(st.text(min_size=1, max_size=8), min_size=2, max_size=40)


@given(names=names_of_images, share=st.floats(0.01, 0.99), seed=st.integers(0, 9), more=names_of_images)
def test_drawn_splits(names: set[str], share: float, seed: int, more: set[str]) -> None:
    """Disjoint, complete, never empty, of no order; nobody changes sides when others come, but a stand-in."""
    train, val = custom.split(names, share, seed)
    assert set(train) | set(val) == names
    assert not set(train) & set(val)
    assert train == sorted(train)
    assert val == sorted(val)
    assert train
    assert val
    assert custom.split(sorted(names, reverse=True), share, seed) == (train, val)
    later_train, later_val = custom.split(names | more, share, seed)
    moved = (set(train) & set(later_val)) | (set(val) & set(later_train))
    assert len(moved) <= 1
    assert not moved or moved in (set(train), set(val))


def test_drawn_splits_have_their_share() -> None:
    names = [f"{i:05}" for i in range(10000)]
    val = custom.split(names, 0.2, 0)[1]
    assert 1900 < len(val) < 2100
    assert 300 < len(set(val) & set(custom.split(names, 0.2, 1)[1])) < 500
    # What this very machine must draw, as any other.
    assert custom.split(names[:20], 0.2, 0)[1] == ["00003", "00018", "00019"]


def test_lists(here: Path) -> None:
    Path("train.txt").write_text("b\nfield/c d.png\n\na.png\n")
    Path("val.txt").write_text("field/a\r\n")
    both = replace(ABOUT, train="train.txt", val="val.txt")
    Path("masks/é.png").unlink()  # in neither
    assert lists(both) == {"train": ["b", "field/c d", "a"], "val": ["field/a"]}
    save(draw("é")[1], Path("masks/é.png"))
    assert lists(replace(ABOUT, val="val.txt")) == {"train": ["a", "b", "field/c d", "é"], "val": ["field/a"]}
    assert lists(replace(ABOUT, train="train.txt"))["val"] == ["field/a", "é"]


# What a user can get wrong --------------------------------------------------------------------------------------------


def put(path: str, content: bytes | str = b"") -> Callable[[], None]:
    def change() -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_bytes(content.encode() if isinstance(content, str) else content)

    return change


def mask(array: Any) -> Callable[[], None]:
    return lambda: save(np.asarray(array), Path("masks/field/a.png"))


FLAT = np.zeros((24, 32), np.uint8)
ODD = FLAT.copy()
ODD[3, 5] = 7
BLUE = np.zeros((24, 32, 3), np.uint8)
BLUE[3, 5] = (1, 2, 255)
FOLDERS: dict[str, tuple[Callable[[], Any], str]] = {
    "no folder": (lambda: Path("photos").rename("pictures"), r"^photos: no such folder$"),
    "no mask folder": (lambda: Path("masks").rename("labels"), r"^masks: no such folder$"),
    "no images": (lambda: [p.unlink() for p in Path("photos").rglob("*.png")], r"^photos: no \.jpg or .* in it$"),
    "image without a mask": (lambda: Path("masks/b.png").unlink(), r"^photos/b\.png: no mask masks/b\.png$"),
    "mask of another kind": (
        lambda: Path("masks/b.png").rename("masks/b.jpg"),
        r"^photos/b\.png: no mask masks/b\.png \(there is masks/b\.jpg: JPEG changes values, expected a mask without",
    ),
    "all masks of another kind": (
        lambda: [path.rename(path.with_suffix(".jpg")) for path in list(Path("masks").rglob("*.png"))],
        r"^masks: no \.png or .* in it, but masks/a\.jpg: JPEG changes values, expected a mask without loss$",
    ),
    "mask without an image": (
        lambda: Path("photos/b.png").unlink(),
        r"^masks/b\.png: no image photos/b\.jpg, \.jpeg, .* or \.webp$",
    ),
    "image of another kind": (
        lambda: Path("photos/b.png").rename("photos/b.gif"),
        r"^masks/b\.png: no image photos/b\.jpg.* \(there is photos/b\.gif\)$",
    ),
    "two of a name": (put("photos/b.JPG"), r"^photos/b\.png: photos/b\.JPG has the same name"),
    "a name of two lines": (put("photos/b\nc.png"), r"^'b\\nc\.png': expected a name"),
    "a name that is no text": (lambda: Path(os.fsdecode(b"photos/\xff.png")).touch(), r"expected a name in UTF-8"),
    "a name of two lines in masks": (put("masks/b\nc.png"), r"^'b\\nc\.png': expected a name"),
    "no image": (
        put("masks/b.png", b"GIF90a" * 9),
        r"^masks/b\.png: not a whole image \(of no known format\), expected",
    ),
    "a link to nothing": (
        lambda: (Path("photos/b.png").unlink(), Path("photos/b.png").symlink_to(".git/annex/objects/xx")),
        r"^photos/b\.png: a link to nothing; of git-annex or DataLad: `git annex get` it$",
    ),
    "a pipe": (lambda: (Path("masks/b.png").unlink(), os.mkfifo("masks/b.png")), r"^masks/b\.png: no file$"),
    "half an image": (
        lambda: os.truncate("photos/b.png", 200),
        r"^photos/b\.png: not a whole image",
    ),
    "half a mask": (lambda: os.truncate("masks/b.png", 100), r"^masks/b\.png: not a whole image"),
    "another size": (
        mask(np.zeros((32, 24), np.uint8)),
        r"^masks/field/a\.png: 24 x 32 pixels, expected 32 x 24 as its image",
    ),
    "value": (
        mask(ODD),
        r"^masks/field/a\.png: value 7, expected 0 to 2, or 255 for void, at row 3, column 5 \(1 such pixels\)$",
    ),
    "16 bits": (
        mask(FLAT.astype(np.uint16) + 300),
        r"^masks/field/a\.png: values 300 to 300 in 16 bits, expected 0 to 255$",
    ),
    "alpha": (mask(np.zeros((24, 32, 4), np.uint8)), r"^masks/field/a\.png: 768 transparent pixels, expected none"),
    "colours": (mask(BLUE), r"^masks/field/a\.png: an RGB picture, .*`colours`"),
    "a photo of 16 bits": (
        lambda: save(FLAT.astype(np.uint16), Path("photos/b.png")),
        r"^photos/b\.png: 16 bits a channel, expected 8",
    ),
    "names that end otherwise": (
        lambda: [path.rename(path.with_name(f"{path.stem}_gt.png")) for path in list(Path("masks").rglob("*.png"))],
        r"^masks: names end in _gt, those of images do not; set `mask_suffix: _gt`$",
    ),
}


@pytest.mark.parametrize("mistake", FOLDERS)
def test_folders(here: Path, mistake: str) -> None:
    change, message = FOLDERS[mistake]
    change()
    refused(message)
    assert not list(here.glob(".*"))


def test_a_colour_of_no_class(here: Path) -> None:
    about = replace(ABOUT, colours=COLOURS, void=(9, 9, 9))
    for name in NAMES:
        save(np.zeros((24, 32, 3), np.uint8), Path("masks", f"{name}.png"))
    mask(BLUE)()
    refused(
        r"^masks/field/a\.png: no class has the colour \[1, 2, 255\] at row 3, column 5 \(1 such pixels\)$",
        about,
    )
    mask(np.zeros((24, 32, 4), np.uint8))()
    refused(r"^masks/field/a\.png: 768 transparent pixels", about)
    Path("masks/field/a.png").write_bytes(png_of_16_bits())
    refused(r"^masks/field/a\.png: 16 bits a channel", about)


LISTS: dict[str, tuple[str, str, str]] = {
    "missing image": ("a\nb\nq\n", "field/a\n", r"^train\.txt: 'q' is no image in photos$"),
    "overlap": ("a\nb\n", "b\n", r"^val\.txt: 'b' is in train\.txt, too"),
    "twice": ("a\nb\na.png\n", "field/a\n", r"^train\.txt: 'a\.png' is there twice$"),
    "empty": ("a\n", "\n", r"^val\.txt: an empty list"),
    "no text": ("\udcff", "a\n", r"^train\.txt: not a text file"),
}


@pytest.mark.parametrize("mistake", LISTS)
def test_wrong_lists(here: Path, mistake: str) -> None:
    train, val, message = LISTS[mistake]
    Path("train.txt").write_bytes(os.fsencode(train))
    Path("val.txt").write_text(val)
    refused(message, replace(ABOUT, train="train.txt", val="val.txt"))


def test_lists_that_leave_nothing(here: Path) -> None:
    Path("val.txt").write_text("\n".join(NAMES))
    refused(r"^val\.txt: lists all images, expected some left for train$", replace(ABOUT, val="val.txt"))
    refused(r"^lost\.txt: cannot be read \(No such file", replace(ABOUT, val="lost.txt"))
    for name in NAMES[1:]:
        Path("photos", f"{name}.png").unlink()
        Path("masks", f"{name}.png").unlink()
    refused(r"1 images, expected 2 or more to draw train and val from")


SETTINGS: dict[str, tuple[dict[str, Any], str]] = {
    "class twice": ({"classes": ["a", "b", "a"]}, r"own\.leaves: class 'a' is there twice"),
    "nameless class": ({"classes": ["a", " "]}, r"own\.leaves: class ' ', expected a name"),
    "no class": ({"classes": []}, r"own\.leaves: 0 classes, expected 1 to 254"),
    "255 classes": ({"classes": [str(i) for i in range(255)]}, r"own\.leaves: 255 classes, expected 1 to 254"),
    "colours": ({"colours": [[0, 0, 0]]}, r"own\.leaves: 1 colours, expected 3"),
    "colour twice": ({"colours": [[0, 0, 0], [1, 1, 1], [0, 0, 0]]}, r"own\.leaves: colour \[0, 0, 0\] is there twice"),
    "void's colour": (
        {"colours": [[0, 0, 0], [1, 1, 1], [2, 2, 2]], "void": [1, 1, 1]},
        r"own\.leaves: colour \[1, 1, 1\] is there twice",
    ),
    "colour of 256": ({"colours": [[0, 0, 256], [1, 1, 1], [2, 2, 2]]}, r"own\.leaves: colour \[0, 0, 256\], expected"),
    "void and colours": (
        {"colours": [[0, 0, 0], [1, 1, 1], [2, 2, 2]], "void": 3},
        r"own\.leaves: void is 3, expected a colour",
    ),
    "void of a class": ({"void": 2}, r"own\.leaves: void is 2, expected 3 to 255"),
    "void as a colour": ({"void": [1, 1, 1]}, r"own\.leaves: void is the colour \[1, 1, 1\], expected a value"),
    "values of two": ({"values": [0, 255]}, r"own\.leaves: values is \[0, 255\], expected 3 different numbers from 0"),
    "a value twice": ({"values": [0, 1, 1]}, r"own\.leaves: values is \[0, 1, 1\], expected 3 different numbers"),
    "value of 256": ({"values": [0, 1, 256]}, r"own\.leaves: values is \[0, 1, 256\], expected 3 different numbers"),
    "void of a value": ({"values": [1, 2, 3], "void": 2}, r"own\.leaves: void is 2, expected a number from 0 to 255"),
    "values and colours": (
        {"values": [1, 2, 3], "colours": [[0, 0, 0], [1, 1, 1], [2, 2, 2]]},
        r"own\.leaves: values and colours, expected one of them",
    ),
    "no folder as group": ({"group": 0}, r"own\.leaves: group is 0, expected 1 or more folders, or a regular"),
    "no expression": ({"group": "("}, r"own\.leaves: group is '\(', no regular expression: missing \)"),
    "share": ({"val_share": 1.0}, r"own\.leaves: val_share is 1\.0, expected a number between 0 and 1"),
}


LEAVES = "images: photos, masks: masks"
PROFILES = {
    "unknown key": ("classes: [a], colour: 3", r"unknown key own\.leaves\.colour"),
    "no classes": ("", r"key own\.leaves\.classes is missing"),
    "one word": ("classes: soil", r"own\.leaves\.classes is 'soil': "),
    "YAML's no": ("classes: [no, yes]", r"own\.leaves\.classes\.0 is False: Input should be a valid string"),
    "colour of two": ("classes: [a], colours: [[0, 0]]", r"key own\.leaves\.colours\.0\.2 is missing"),
    "void of two": ("classes: [a], void: [0, 0]", r"key own\.leaves\.void\.2 is missing"),
    "share": ("classes: [a], val_share: some", r"own\.leaves\.val_share is 'some': Input should be a valid number"),
    "lists in place": ("classes: [a], train: [x, y]", r"own\.leaves\.train is \['x', 'y'\]: Input should be a valid"),
}


@pytest.mark.parametrize("mistake", PROFILES)
def test_a_profile_of_the_wrong_form(scored: Path, mistake: str) -> None:
    values, message = PROFILES[mistake]
    Path("profiles/own.yaml").write_text(f"base: mini\nown: {{leaves: {{{LEAVES}, {values}}}}}\n")
    with pytest.raises(UserError, match=rf"^profiles/own\.yaml: {message}"):
        resolve.resolve()


@pytest.mark.parametrize("mistake", SETTINGS)
def test_settings_that_contradict_themselves(here: Path, mistake: str) -> None:
    values, message = SETTINGS[mistake]
    about = schema.build(Folder, {"images": "photos", "masks": "masks", "classes": ABOUT.classes, **values}, "x")
    refused(message, about)
    with pytest.raises(UserError, match=message):
        custom.dataset("leaves", about)


def test_the_environment(here: Path) -> None:
    refused(
        r"^\$\{NO_SUCH_NAME\}/x: an environment variable in it is not set$", replace(ABOUT, images="${NO_SUCH_NAME}/x")
    )
    refused(r"^photos: holds images and masks, expected a folder for each$", replace(ABOUT, masks="./photos"))


# The table ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a project with two experiments on leaves, and their metrics, made up."""
    monkeypatch.chdir(tmp_path)
    own_run.write_project(tmp_path)
    for name, network in own_run.EXPERIMENTS.items():
        write(leaves(name, *network))
    return tmp_path


def write(metrics: dict[str, Any]) -> Path:
    return own_run.write_metrics(Path(), metrics)


def rows() -> list[dict[str, str]]:
    with Path("results/leaves_table.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


def test_every_experiment_and_protocol_is_a_row(scored: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left_out = write(leaves("removed", "resnet50", "four", 2, 8))
    tabulate.tabulate("leaves")
    assert capsys.readouterr().out.splitlines() == [
        f"{left_out}: left out, no experiment of params.yaml",
        "results/leaves_table.md, .csv and .tex: 4 rows",
    ]
    found = rows()
    left = ["data_set", "experiment", "backbone", "cascade", "pools", "protocol"]
    measures = ["pixel_accuracy", "mean_accuracy", "mean_iou", "iou soil", "iou leaf", "iou stem"]
    parts = ["mean_iou_low", "mean_iou_high", "mean_iou_spread"]
    behind = ["evaluated_on", "images", "seed", "seeds", "profile", "notes"]
    assert list(found[0]) == [*left, *measures[:3], *parts, *measures[3:], *behind]
    assert [[row[key] for key in left] for row in found] == [
        ["leaves", "leaves-res101", "resnet101", "four", "4", "single"],
        ["leaves", "leaves-res101", "resnet101", "four", "4", "multi"],
        ["leaves", "best", "resnet50", "two", "2", "single"],
        ["leaves", "best", "resnet50", "two", "2", "multi"],
    ]
    expected = f"{100 * leaves('best', '', '', 0, 0)['protocols']['single']['pixel_accuracy']:.1f}"
    assert [found[2][key] for key in measures[:1]] == [expected]
    assert [found[2][key] for key in measures[2:]] == ["37.5", "50.0", "25.0", ""]
    assert [row["notes"] for row in found[::2]] == [
        "2 of 3 classes occur; width 8, the paper's is 256",
        "2 of 3 classes occur",
    ]
    assert {(row["evaluated_on"], row["images"], row["seed"], row["profile"]) for row in found} == {
        ("val", "12", "0", "own")
    }
    lines = Path("results/leaves_table.md").read_text().splitlines()
    assert lines[0] == "# leaves"
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert cells[0][5:] == ["Pixel acc.", "Mean acc.", "IoU", "95 % interval", "Seeds", "soil", "leaf", "stem"]
    for row, shown in zip(found, cells[2:], strict=True):
        assert shown[:4] == [row[key] for key in left[1:5]]
        numbers = [row[key] or "–" for key in measures]
        assert shown[5:] == [*numbers[:3], "–", "1", *numbers[3:]]
    assert "- `best`: 12 images of leaves val; seed 0; profile own; 2 of 3 classes occur" in lines


def test_a_table_of_drawn_images_says_so(scored: Path) -> None:
    """Of a further data set that is drawn, or of a network that was first trained on drawn images."""
    write({**leaves("best", "resnet50", "two", 2, 256), "drawn": True})
    tabulate.tabulate("leaves")
    notes = {row["experiment"]: row["notes"] for row in rows()}
    assert notes["best"].endswith("synthetic images: says nothing about accuracy")
    assert "synthetic" not in notes["leaves-res101"]


def test_what_stands_in_the_way_of_the_table(scored: Path) -> None:
    write(leaves("best", "resnet50", "two", 2, 8) | {"dataset": "voc"}).rename("metrics/leaves/best.json")
    with pytest.raises(UserError, match=r"metrics/leaves/best\.json: .*it is of experiment 'best' on voc"):
        tabulate.tabulate("leaves")
    other = leaves("best", "resnet50", "two", 2, 8)
    other["protocols"]["single"]["iou"] = {"soil": 0.1, "root": 0.2}
    write(other)
    with pytest.raises(
        UserError, match=r"metrics/leaves/best\.json: not the classes soil, leaf, stem; `evaluate best`"
    ):
        tabulate.tabulate("leaves")
    Path("metrics/leaves/best.json").unlink()
    with pytest.raises(UserError, match=r"metrics/leaves/best\.json: no such file; `evaluate best` makes it"):
        tabulate.tabulate("leaves")
    with pytest.raises(UserError, match=r"no table 'blossoms'; the tables are person, .*, variants, leaves"):
        tabulate.tabulate("blossoms")
    assert not Path("results").exists()
    params = yaml.safe_load(Path("params.yaml").read_text())
    del params["experiments"]["best"], params["experiments"]["leaves-res101"]
    Path("params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(UserError, match=r"params\.yaml: no experiment with data: leaves, expected one or more"):
        tabulate.tabulate("leaves")


# From two folders to the table, by both engines -----------------------------------------------------------------------


def commands() -> str:
    """What docs/how-to/own-data.md has a user type, as one shell script."""
    text = (ROOT / "docs/how-to/own-data.md").read_text(encoding="utf-8")
    block = text.partition("<!-- own:start -->")[2].partition("<!-- own:end -->")[0]
    return textwrap.dedent("".join(line for line in block.splitlines(keepends=True) if line.startswith("    ")))


@pytest.mark.slow
def test_the_commands_of_the_page(tmp_path: Path) -> None:
    """They end in a table and a page; neither engine finds more to do; each change makes them again."""
    project, home = tmp_path / "project", tmp_path / "home"
    project.mkdir()
    small_project.make(project, "base: mini\n")
    names = [f"{i:02}" for i in range(10)]
    for name in names:
        image, mask = draw(name, 48, 64)
        save(image, home / "leaves/photos" / f"{name}.jpg")
        save(mask, home / "leaves/masks" / f"{name}.png")
    shutil.copy(ROOT / "params.yaml", project)  # as it is: what the page says about it has to be so

    def call(*command: str) -> str:
        done = small_project.call(project, *command, HOME=str(home))
        return done.stdout + done.stderr

    def table() -> list[dict[str, str]]:
        with (project / "results/leaves_table.csv").open(newline="") as stream:
            return list(csv.DictReader(stream))

    def settled() -> None:
        """Each engine finds nothing to do."""
        assert json.loads(call("dvc", "status", "--json", "--with-deps", "report-own@leaves")) == {
            "download-own@leaves": ["always changed"]
        }
        lock = (project / "dvc.lock").read_bytes()
        ran = re.findall(r"Running stage '(.*)'", call("dvc", "repro", "report-own@leaves"))
        assert ran == ["download-own@leaves"]
        assert (project / "dvc.lock").read_bytes() == lock
        assert "Nothing to be done" in call(*SNAKEMAKE)

    # Thin networks instead of the default's, which want a plan and an hour.
    lines = [line for line in commands().splitlines() if " plan " not in line]
    assert lines[0].startswith("refinenet add leaves ")
    script = "\n".join([f"{lines[0]} --base mini", *lines[1:]])
    assert script.rstrip().endswith(" ".join(SNAKEMAKE))
    (project / "commands.sh").write_text(f"set -e\n{script}")
    environment = {**os.environ, "PATH": f"{small_project.BIN}:{os.environ['PATH']}", "HOME": str(home)}
    subprocess.run(["bash", "commands.sh"], cwd=project, env={**environment, "PYTHONPATH": str(project)}, check=True)
    assert [row["experiment"] for row in table()] == ["leaves-res50"] * 2
    settled()
    first = table()
    assert int(first[0]["images"]) + len(Split(project / "data/leaves/train.arrow")) == len(names)

    # From here on with trainings that take no time; this, too, reruns what it has to.
    profile = project / "profiles/leaves.yaml"
    profile.write_text(profile.read_text() + "train: {steps: 6, batch_size: 2, crop: 48}\n")
    assert "] download " not in call(*SNAKEMAKE)
    settled()

    # What the page shows and no score tells. Two pictures are what Snakemake made at first: it has to make them again.
    page, scores = project / "results/leaves_report.html", (project / "metrics/leaves/leaves-res50.json").read_bytes()
    assert page.read_text().count('alt="Prediction of') == 2
    for engine, wanted in ((("dvc", "repro", "report-own@leaves"), 1), (SNAKEMAKE, 2)):
        before = page.read_text()
        profile.write_text(re.sub(r"evaluate: .*\n", "", profile.read_text()) + f"evaluate: {{pictures: {wanted}}}\n")
        call(*engine)
        assert page.read_text().count('alt="Prediction of') == wanted != before.count('alt="Prediction of')
        assert (project / "metrics/leaves/leaves-res50.json").read_bytes() == scores
        settled()

    # More images, older than anything there; DVC notices, and Snakemake finds its work done.
    for name in ("x1", "x2", "x3"):
        image, mask = draw(name, 48, 64)
        save(image, home / "leaves/photos" / f"{name}.jpg")
        save(mask, home / "leaves/masks" / f"{name}.png")
        for path in (home / "leaves").rglob(f"{name}.*"):
            os.utime(path, (1, 1))
    assert "pipeline.train leaves-res50" in call(*SNAKEMAKE, "--dry-run")
    assert "Running stage 'train@leaves-res50'" in call("dvc", "repro", "report-own@leaves")
    settled()
    grown = len(Split(project / "data/leaves/train.arrow")) + len(Split(project / "data/leaves/val.arrow"))
    assert grown == len(names) + 3

    # An image is gone; Snakemake notices.
    (home / "leaves/photos/x1.jpg").unlink()
    (home / "leaves/masks/x1.png").unlink()
    assert "] train leaves-res50, " in call(*SNAKEMAKE)
    settled()

    # Another experiment is another row, and nothing else is made again; without it, the row is gone.
    before = (project / "params.yaml").read_text()
    (project / "params.yaml").write_text(before + "  second: {data: leaves, start: resnet50, pools: 0}\n")
    log = call(*SNAKEMAKE)
    assert "] train second, " in log
    assert "] train leaves-res50, " not in log
    assert [row["experiment"] for row in table()] == ["leaves-res50"] * 2 + ["second"] * 2
    settled()
    (project / "params.yaml").write_text(before)
    call(*SNAKEMAKE)
    assert [row["experiment"] for row in table()] == ["leaves-res50"] * 2


SNAKEMAKE = ("snakemake", "--cores", "2", "results/leaves_report.html")
