"""`python -m pipeline.add`: two folders, or one in a usual layout, looked at and written down for the stages."""

from __future__ import annotations

import builtins
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from own_files import draw, save
from PIL import Image

from pipeline import add
from pipeline.config import profiles, resolve
from pipeline.config.schema import Folder
from pipeline.datasets import custom
from pipeline.fetch import own_folders
from pipeline.own_data import writing
from refinenet.data.split import Array

ROOT = Path(__file__).resolve().parents[2]
NAMES = [f"{letter}_{index:02}" for letter in "ab" for index in range(6)]
PALETTE = ((0, 0, 0), (200, 0, 0), (60, 0, 0))
VOC = ((0, 0, 0), (128, 0, 0), (0, 128, 0))
COLOURS = np.array([(0, 0, 0), (0, 128, 0), (255, 215, 0)], np.uint8)


def label(name: str) -> Array:
    """Values 0, 1 and 2 in every image, twice as many 1 as others."""
    drawn = draw(name)[1]
    return np.where(drawn == 255, 1, drawn).astype(np.uint8)


def index(array: Array) -> Image.Image:
    return Image.fromarray(array)


def palette(array: Array, colours: tuple[tuple[int, int, int], ...] = PALETTE) -> Image.Image:
    picture = Image.fromarray(array, "P")
    picture.putpalette([value for colour in colours for value in colour])
    return picture


def put(images: str, masks: str, change: Callable[[Array], Image.Image] = index, names: list[str] = NAMES) -> None:
    """Images and masks as files; in both paths {} is the image's name."""
    for name in names:
        save(draw(name)[0], Path(images.format(name)))
        path = Path(masks.format(name))
        path.parent.mkdir(parents=True, exist_ok=True)
        change(label(name)).save(path)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: params.yaml and the profiles as they are."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    monkeypatch.setenv("PIPELINE_CORES", "1")
    return tmp_path


def about(name: str = "leaves") -> Folder:
    return profiles.read_profile(name)[0].own[name]


def labels(name: str = "leaves") -> dict[str, Array]:
    """Every label, as the stages read it."""
    own_folders.pack(name, about(name), Path("raw"))
    with custom.dataset(name, about(name)).Reader(Path("raw")) as reader:
        found = {one: reader.read(split, one)[1] for split in ("train", "val") for one in reader.names(split)}
    return {one: value for one, value in found.items() if value is not None}


TWO = ["--images", "photos", "--masks", "masks", "--base", "mini", "--yes"]


def test_the_command_of_the_readme(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Profile and rows as one would write them; the rest of params.yaml as it was; the next command."""
    put("photos/{}.jpg", "masks/{}.png")
    before = Path("params.yaml").read_text()
    assert add.main(["leaves", *TWO, "--classes", "soil,leaf,stem"]) == 0
    out = capsys.readouterr().out
    assert "images   12 in photos: .jpg\n           32 x 24 pixels\n" in out
    assert out.endswith("next: refinenet fit leaves\n")
    assert yaml.safe_load(Path("profiles/leaves.yaml").read_text()) == {
        "base": "mini",
        "title": "leaves",
        "own": {"leaves": {"images": "photos", "masks": "masks", "classes": ["soil", "leaf", "stem"]}},
    }
    old, new = before.splitlines(), Path("params.yaml").read_text().splitlines()
    assert [line for line in new if line not in old] == [
        "profile: leaves",
        "own: [leaves] # folders of your own, as profiles/own.yaml explains",
        "  leaves-res50: {data: leaves, start: resnet50}",
    ]
    assert [line for line in old if line not in new] == [
        "profile: mini",
        "own: [] # folders of your own, as profiles/own.yaml explains",
    ]
    assert resolve.resolve()["evaluate"]["leaves-res50"]["data"] == "leaves"
    for name, found in labels().items():
        assert np.array_equal(found, label(name))


def test_fit_is_the_base_where_it_is_there(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put("photos/{}.jpg", "masks/{}.png")
    assert add.main(["leaves", "--images", "photos", "--masks", "masks", "--yes"]) == 0
    assert capsys.readouterr().out.endswith("next: refinenet fit leaves --hours 1\n")
    params = yaml.safe_load(Path("params.yaml").read_text())
    assert params["backbones"][-1] == "timm:tf_efficientnet_lite0"
    assert params["experiments"]["leaves-lite0"] == {"data": "leaves", "start": "timm:tf_efficientnet_lite0"}
    text = Path("params.yaml").read_text()
    assert '  - resnet152\n  - "timm:tf_efficientnet_lite0"\n\ntables:' in text


# How the masks are written; what else is typed; class names, values, colours, void; how a label of 0, 1, 2 comes out.
Kind = tuple[Callable[[Array], Image.Image], list[str], list[str], Any, Any, Any, list[int]]
PLAIN = ["background", "class_1", "class_2"]
KINDS: dict[str, Kind] = {
    "index": (index, [], PLAIN, None, None, 255, [0, 1, 2]),
    "palette": (palette, [], ["background", "firebrick", "maroon"], None, None, 255, [0, 1, 2]),
    "VOC's palette": (lambda a: palette(a, VOC), [], PLAIN, None, None, 255, [0, 1, 2]),
    "0 and 255": (
        lambda a: index((a > 0) * np.uint8(255)),
        [],
        ["background", "object"],
        (0, 255),
        None,
        255,
        [0, 1, 1],
    ),
    "1 bit": (lambda a: Image.fromarray(a > 0), [], ["background", "object"], None, None, 255, [0, 1, 1]),
    "from 1": (
        *(lambda a: index(a + np.uint8(1)), [], ["class_1", "class_2", "class_3"]),
        *((1, 2, 3), None, 255, [0, 1, 2]),
    ),
    "255 is void": (
        *(lambda a: index(np.where(a == 2, 255, a).astype(np.uint8)), [], PLAIN[:2]),
        *(None, None, 255, [0, 1, 255]),
    ),
    "colours": (
        *(lambda a: Image.fromarray(COLOURS[a]), [], ["background", "green", "gold"]),
        *(None, ((0, 0, 0), (0, 128, 0), (255, 215, 0)), None, [0, 1, 2]),
    ),
    "one name less": (index, ["--classes", "soil,leaf"], ["soil", "leaf"], None, None, 2, [0, 1, 255]),
    "a void": (index, ["--void", "0"], ["class_1", "class_2"], (1, 2), None, 0, [255, 0, 1]),
    "names with values": (
        *(index, ["--classes", "stem=2,soil=0,leaf=1"], ["stem", "soil", "leaf"]),
        *((2, 0, 1), None, 255, [1, 2, 0]),
    ),
    "names with colours": (
        *(lambda a: Image.fromarray(COLOURS[a]), ["--classes", "leaf=#008000,stem=#ffd700", "--void", "0,0,0"]),
        *(["leaf", "stem"], None, ((0, 128, 0), (255, 215, 0)), (0, 0, 0), [255, 0, 1]),
    ),
    "more names": (index, ["--classes", "a,b,c,d"], ["a", "b", "c", "d"], None, None, 255, [0, 1, 2]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_masks(project: Path, kind: str) -> None:
    """What is proposed, and that the stages read it so."""
    change, more, names, values, colours, void, comes_out = KINDS[kind]
    put("photos/{}.png", "masks/{}.png", change)
    assert add.main(["leaves", *TWO, *more]) == 0
    found = about()
    assert (list(found.classes), found.values, found.colours, found.void) == (names, values, colours, void)
    for name, one in labels().items():
        assert np.array_equal(one, np.array(comes_out, np.uint8)[label(name)])


LAYOUTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "images and masks": ("d/images/{}.png", "d/masks/{}.png", {"images": "d/images", "masks": "d/masks"}),
    "a suffix": ("d/imgs/{}.jpg", "d/labels/{}_mask.png", {"mask_suffix": "_mask"}),
    "the image's ending": ("d/rgb/{}.jpg", "d/gt/{}.jpg.png", {"mask_suffix": ".jpg"}),
    "a suffix of images": ("d/images/{}_rgb.png", "d/masks/{}.png", {"image_suffix": "_rgb"}),
    "two suffixes": (
        "d/images/{}_left.png",
        "d/masks/{}_labelIds.png",
        {"image_suffix": "_left", "mask_suffix": "_labelIds"},
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_usual_layouts(project: Path, layout: str) -> None:
    images, masks, settings = LAYOUTS[layout]
    put(images, masks)
    assert add.main(["leaves", "d", "--base", "mini", "--yes"]) == 0
    for key, value in settings.items():
        assert getattr(about(), key) == value
    found = labels()
    assert sorted(found) == NAMES
    assert np.array_equal(found["a_01"], label("a_01"))


SPLITS = {
    "folders of splits": ("d/{split}/images/{}.png", "d/{split}/masks/{}.png", ("train", "val")),
    "splits of folders": ("d/img_dir/{split}/{}.png", "d/ann_dir/{split}/{}.png", ("train", "val")),
    "CamVid's": ("d/{split}/{}.png", "d/{split}annot/{}.png", ("train", "val")),
    "training and validation": ("d/images/{split}/{}.png", "d/annotations/{split}/{}.png", ("training", "validation")),
}


@pytest.mark.parametrize("layout", SPLITS)
def test_layouts_with_splits(project: Path, layout: str) -> None:
    images, masks, folders = SPLITS[layout]
    for folder, names in zip(folders, (NAMES[:8], NAMES[8:]), strict=True):
        put(images.replace("{split}", folder), masks.replace("{split}", folder), names=names)
    assert add.main(["leaves", "d", "--base", "mini", "--yes"]) == 0
    assert about().split_folders == folders
    found = labels()
    assert sorted(found) == [f"train/{name}" for name in NAMES[:8]] + [f"val/{name}" for name in NAMES[8:]]
    assert np.array_equal(found["val/b_04"], label("b_04"))


def test_names_as_in_cityscapes(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Both names have a suffix, and of each image there are masks of other kinds."""
    for split, names in (("train", NAMES[:8]), ("val", NAMES[8:])):
        put(f"left/{split}/ulm/{{}}_left.png", f"gt/{split}/ulm/{{}}_gt_labelIds.png", names=names)
        put(f"left/{split}/ulm/{{}}_left.png", f"gt/{split}/ulm/{{}}_gt_color.png", palette, names)
        put(f"left/{split}/ulm/{{}}_left.png", f"gt/{split}/ulm/{{}}_gt_instanceIds.png", names=names)
    assert add.main(["leaves", "--images", "left/{split}", "--masks", "gt/{split}", "--base", "mini", "--yes"]) == 0
    out = capsys.readouterr().out
    assert "12 in left/{split}: .png; names end in _left\n" in out
    assert "12 in gt/{split}: .png; names end in _gt_labelIds\n" in out
    assert np.array_equal(labels()["train/ulm/a_01"], label("a_01"))


def test_vocs_layout(project: Path) -> None:
    """Most images have no mask there; the lists name those that have one."""
    put("v/JPEGImages/{}.jpg", "v/SegmentationClass/{}.png", palette)
    for name in ("x", "y"):
        save(draw(name)[0], Path(f"v/JPEGImages/{name}.jpg"))
    for split, names in (("train", NAMES[:9]), ("val", NAMES[9:])):
        file = Path(f"v/ImageSets/Segmentation/{split}.txt")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("\n".join(names))
    assert add.main(["leaves", "v", "--base", "mini", "--yes"]) == 0
    assert about().val == "v/ImageSets/Segmentation/val.txt"
    assert sorted(labels()) == NAMES


def nothing_written(before: tuple[str, list[str]]) -> bool:
    return before == state()


def state() -> tuple[str, list[str]]:
    return Path("params.yaml").read_text(), sorted(path.name for path in Path("profiles").rglob("*"))


MISTAKES: dict[str, tuple[Callable[[], Any], list[str], str]] = {
    "a data set of the paper": (lambda: None, ["voc", *TWO], "'voc': expected a name of a-z, 0-9 and _ that is no"),
    "a folder of the project": (lambda: None, ["incoming", *TWO], "own: 'incoming' is a folder of the project"),
    "no profile": (
        lambda: None,
        ["leaves", *TWO, "--base", "big"],
        "--base big: no such profile, expected one of evening, evening-ablation, fit",
    ),
    "no weights": (lambda: None, ["leaves", *TWO, "--backbone", "vgg"], "--backbone vgg: profile mini has no weights"),
    "no folder": (lambda: None, ["leaves", "nowhere", "--yes"], "nowhere: no such folder"),
    "no layout": (lambda: None, ["leaves", "photos", "--yes"], "photos: no folder; expected images/ and masks/"),
    "too few names": (lambda: None, ["leaves", *TWO, "--classes", "soil"], "--classes has 1 names, the masks have 3"),
    "a name without its value": (
        lambda: None,
        ["leaves", *TWO, "--classes", "soil=0,leaf=1"],
        "",  # the one that has no name is void
    ),
    "two values without a name": (
        lambda: None,
        ["leaves", *TWO, "--classes", "soil=0"],
        "--classes: no name for 1, 2 in the masks, expected one, or --void",
    ),
    "one group": (lambda: None, ["leaves", *TWO, "--group", r"_"], "group is '_': 1 group ('_'), expected 2 or more"),
    "other names": (
        lambda: [path.rename(path.with_name(f"{number}.png")) for number, path in enumerate(Path("masks").iterdir())],
        ["leaves", *TWO],
        "photos and masks: no image has a mask of its name, as a_00 and 0",
    ),
    "smooth edges": (
        lambda: [save(draw("c", 40, 40)[0], Path(file)) for file in ("masks/a_00.png", "photos/a_00.jpg")],
        ["leaves", *TWO],
        "masks/a_00.png: 1599 colours, expected 254 at most: smoothed edges?",
    ),
    "nothing labelled": (
        lambda: [index(np.full((24, 32), 255, np.uint8)).save(path) for path in Path("masks").iterdir()],
        ["leaves", *TWO, "--void", "255"],
        "all pixels of the masks are void (255), expected a class",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line_and_write_nothing(
    project: Path, mistake: str, capsys: pytest.CaptureFixture[str]
) -> None:
    put("photos/{}.jpg", "masks/{}.png")
    change, arguments, told = MISTAKES[mistake]
    change()
    before = state()
    assert add.main(arguments) == (1 if told else 0)
    err = capsys.readouterr().err
    if told:
        assert told in err
        assert err.count("\n") == 1
        assert nothing_written(before)


def test_all_that_is_wrong_at_once(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put("photos/{}.jpg", "masks/{}.png")
    before = state()
    for name in ("a_01", "a_04", "b_02"):
        Path(f"photos/{name}.jpg").write_bytes(Path(f"photos/{name}.jpg").read_bytes()[:300])
    save(np.zeros((9, 9), np.uint8), Path("masks/b_00.png"))
    assert add.main(["leaves", *TWO]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "error: 4 of 12 images or their masks cannot be used"
    assert [line.split(":")[0].strip() for line in lines[1:]] == [
        *(f"photos/{name}.jpg" for name in ("a_01", "a_04")),
        "masks/b_00.png",
        "photos/b_02.jpg",
    ]
    assert nothing_written(before)


def test_recordings_are_suggested_and_kept_together(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put("photos/{}.jpg", "masks/{}.png")
    assert add.main(["leaves", *TWO]) == 0
    out = capsys.readouterr().out
    assert "2 of names with numbers, as frames of videos: a 6, b 6" in out
    group = out.partition("--group '")[2].partition("'")[0]
    assert add.main(["leaves", *TWO, "--force", "--group", group]) == 0
    assert about().group == group
    assert "  split    train 6, val 6; 20% is val, drawn by group\n" in capsys.readouterr().out
    put("deep/{}.jpg", "deeper/{}.png", names=[f"{folder}/{index}" for folder in "xyz" for index in range(5)])
    arguments = ["roots", "--images", "deep", "--masks", "deeper", "--base", "leaves", "--yes"]
    assert add.main(arguments) == 0
    assert "if each is one recording, --group 1 keeps it" in capsys.readouterr().out
    assert add.main([*arguments, "--force", "--group", "1"]) == 0
    assert about("roots").group == 1


def test_a_second_data_set_and_the_first_again(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The second lies on top of the first, which stays; nothing is replaced without a word."""
    put("photos/{}.jpg", "masks/{}.png")
    assert add.main(["leaves", *TWO]) == 0
    before = state()
    assert add.main(["leaves", *TWO]) == 1
    assert "profiles/leaves.yaml: is there already; --force replaces it" in capsys.readouterr().err
    assert add.main(["roots", *TWO]) == 1
    assert "--base mini: it does not have leaves, which params.yaml names" in capsys.readouterr().err
    assert nothing_written(before)
    assert add.main(["roots", "--images", "photos", "--masks", "masks", "--yes"]) == 0
    assert yaml.safe_load(Path("profiles/roots.yaml").read_text())["base"] == "leaves"
    assert profiles.read_params().own == ("leaves", "roots")
    assert {"leaves", "roots"} <= set(resolve.resolve()["prepare"])


def test_questions(project: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In a terminal: a name for each value, Enter for the one proposed; then whether to write."""
    put("photos/{}.jpg", "masks/{}.png")
    before = state()
    answers: list[str] = []
    asked: list[str] = []

    def answer(prompt: str) -> str:
        asked.append(prompt)
        return answers.pop(0)

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(builtins, "input", answer)
    answers[:] = ["soil", "soil", "leaf", "", "n"]  # one is there already
    assert add.main(["leaves", *TWO[:-1]]) == 1
    assert "error: nothing is written" in capsys.readouterr().err
    assert nothing_written(before)
    assert asked[0].startswith("  0, 12 images, ")
    assert asked[-1] == "write profiles/leaves.yaml and change params.yaml? [Y/n] "
    answers[:] = ["soil", "", "stem", ""]
    assert add.main(["leaves", *TWO[:-1]]) == 0
    assert about().classes == ("soil", "class_1", "stem")


def test_a_failed_write_leaves_no_half(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put("photos/{}.jpg", "masks/{}.png")
    before = state()
    real = writing.atomic_file

    def full(path: Path) -> Any:
        if path == profiles.PARAMS:
            raise OSError(28, "No space left on device", str(path))
        return real(path)

    monkeypatch.setattr(writing, "atomic_file", full)
    assert add.main(["leaves", *TWO]) == 1
    assert nothing_written(before)


def test_paths_below_home_and_profiles_with_epochs(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(project))
    put("photos/{}.jpg", "masks/{}.png")
    there = ["--images", str(project / "photos"), "--masks", str(project / "masks") + "/"]
    assert add.main(["leaves", *there, "--base", "paper", "--yes"]) == 0
    assert replace(about(), classes=()) == Folder("~/photos", "~/masks", ())
    made = profiles.read_profile("leaves")[0]
    assert made.datasets["leaves"]["train"]["steps"] > 0


def test_wrong_usage(capsys: pytest.CaptureFixture[str]) -> None:
    for more in ([], ["--images", "a"], ["d", "--masks", "b"], ["d", "--classes", "a,,b"]):
        with pytest.raises(SystemExit) as ended:
            add.main(["leaves", *more])
        assert ended.value.code == 2
    assert "expected DIR, or --images and --masks" in capsys.readouterr().err
