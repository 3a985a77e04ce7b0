"""CamVid: the list that its zip is held to, the split that is scored, and this run's numbers among published ones."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fake_run
import numpy as np
import pytest
import tiny_archives
import yaml
from PIL import Image

from pipeline import datasets, prepare, settings, tabulate
from pipeline.config import resolve
from pipeline.datasets import camvid
from pipeline.tables import custom, others
from refinenet.data.split import Split
from refinenet.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
FRAME = f"{camvid.FOLDER}/train/0001TP_006690.png"
LABEL = f"{camvid.FOLDER}/testannot/Seq05VD_f00000.png"
Files = dict[str, bytes]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the project's own params.yaml and profiles, and settings that ask for the official CamVid."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    monkeypatch.chdir(tmp_path)
    Path("settings.json").write_text(json.dumps({"prepare": {"camvid": {"official_counts": True}}}))
    return tmp_path


def place(change: Callable[[Files], Any] = lambda files: None) -> None:
    """Pack the tiny archive, changed, in the place of the official one."""
    files, _ = tiny_archives.BUILD["camvid"]()
    change(files[camvid.ARCHIVE])
    tiny_archives.pack(files, Path("data/raw/camvid"))


@pytest.fixture
def release(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny archive is the official one, and nothing in it is changed yet."""
    place()
    lines = []
    with zipfile.ZipFile(Path("data/raw/camvid") / camvid.ARCHIVE) as archive:
        for member in archive.namelist():
            split, _, name = member.removeprefix(f"{camvid.FOLDER}/").partition("/")
            if split in camvid.COUNTS:
                pair = [archive.getinfo(one) for one in (member, f"{camvid.FOLDER}/{split}annot/{name}")]
                numbers = [f"{info.file_size} {info.CRC:08x}" for info in pair]
                lines.append(" ".join([f"{split}/{name.removesuffix('.png')}", *numbers]))
    Path("list.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.setattr(camvid, "RELEASE", Path("list.txt"))
    monkeypatch.setattr(camvid, "COUNTS", {"train": 2, "val": 1, "test": 1})


def error() -> str:
    """The one line that `prepare` ends with."""
    with pytest.raises(UserError) as caught:
        prepare.run("camvid")
    assert not Path("data/camvid").exists()
    return str(caught.value)


def flip(member: str) -> Callable[[Files], None]:
    """Change the last byte of a member, which stays as long."""

    def change(files: Files) -> None:
        files[member] = files[member][:-1] + bytes([files[member][-1] ^ 1])

    return change


@pytest.mark.usefixtures("release")
def test_the_official_archive_passes(capsys: pytest.CaptureFixture[str]) -> None:
    prepare.run("camvid")
    assert capsys.readouterr().out == "data/camvid: train 2, val 1, test 1 images\n"
    (sample,) = Split(Path("data/camvid/test.arrow"))
    assert sample.label is not None


@pytest.mark.usefixtures("release")
@pytest.mark.parametrize("member", [FRAME, LABEL])
def test_a_changed_byte_is_told_by_the_members_name(member: str) -> None:
    place(flip(member))
    line = error()
    assert line.startswith(f"data/raw/camvid/{camvid.ARCHIVE}!{member}: ")
    assert "of CRC-32" in line
    assert line.endswith("as in pipeline/datasets/releases/list.txt")
    assert "\n" not in line


@pytest.mark.usefixtures("release")
def test_a_missing_member_is_told_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    place(lambda files: files.pop(LABEL))
    assert f"{camvid.ARCHIVE}!{LABEL}: no such file, expected " in error()
    place(lambda files: (files.pop(LABEL), files.pop(FRAME)))
    assert error().endswith("list.txt, and 1 more of its 8 are wrong")


@pytest.mark.usefixtures("release")
def test_further_images_are_counted() -> None:
    place(lambda files: files.update({FRAME.replace("006690", "006691"): files[FRAME]}))
    assert error() == "CamVid: train has 3 images, expected 2 (official_counts is on)"


def test_drawn_archives_are_held_to_no_list(project: Path) -> None:
    place()
    Path("settings.json").write_text(json.dumps({"prepare": {"camvid": {}}}))
    prepare.run("camvid")


def test_a_label_that_is_no_class_names_the_file(project: Path) -> None:
    """12: one above void."""
    label = np.full((tiny_archives.H, tiny_archives.W), 12, np.uint8)
    place(lambda files: files.update({LABEL: tiny_archives.png(label)}))
    Path("settings.json").write_text(json.dumps({"prepare": {"camvid": {}}}))
    assert error() == f"data/raw/camvid/{camvid.ARCHIVE}!{LABEL}: label 12, expected 0 to 11"


def test_the_list_has_the_official_numbers() -> None:
    """367, 101 and 233 frames, each once, of four drives; no frame is in two splits."""
    frames = [line.split()[0].split("/") for line in camvid.RELEASE.read_text().splitlines()]
    assert {split: sum(one == split for one, _ in frames) for split in camvid.COUNTS} == camvid.COUNTS
    names = [name for _, name in frames]
    assert len(set(names)) == len(names) == 701
    assert {name.partition("_")[0] for name in names} == {"0001TP", "0006R0", "0016E5", "Seq05VD"}
    assert camvid.RELEASE.stat().st_size < 60_000


def test_test_is_scored_unless_the_profile_says_val(project: Path) -> None:
    evaluated = resolve.resolve()["evaluate"]
    assert {name: one["split"] for name, one in evaluated.items() if one["split"] != "val"} == {"camvid-res50": "test"}
    profile = yaml.safe_load(Path("profiles/mini.yaml").read_text())
    for data, split in (("camvid", "val"), ("camvid", "tset"), ("nyud", "test")):
        changed = profile | {"datasets": profile["datasets"] | {data: {"evaluate": {"split": split}}}}
        Path("profiles/mini.yaml").write_text(yaml.safe_dump(changed))
        if split == "val":
            assert resolve.resolve()["evaluate"]["camvid-res50"]["split"] == "val"
            continue
        with pytest.raises(UserError, match=rf"evaluate\.split of {data}-res50\S* is '{split}', expected a split with"):
            settings.run()


def test_test_images_without_labels_cannot_be_scored(project: Path) -> None:
    profile = yaml.safe_load(Path("profiles/mini.yaml").read_text())
    profile["datasets"]["cityscapes"] = {"evaluate": {"split": "test"}}
    Path("profiles/mini.yaml").write_text(yaml.safe_dump(profile))
    with pytest.raises(UserError, match=r"cityscapes-res101 is 'test', expected a split with labels: train, val$"):
        settings.run()


def evening(project: Path) -> dict[str, Any]:
    """Do with params.yaml what the first lines of profiles/evening.yaml say; the settings that come out."""
    text = (project / "profiles/evening.yaml").read_text()
    told = [line.removeprefix("#   ") for line in text.splitlines() if line.startswith("#   ")]
    assert told[0].startswith("profile: evening ")
    assert told[-1].startswith("snakemake ")
    rows = yaml.safe_load("\n".join(told[1:-1]))
    params = yaml.safe_load(Path("params.yaml").read_text()) | {"profile": "evening", "pretrainings": {}}
    Path("params.yaml").write_text(yaml.safe_dump(params | rows))
    return resolve.resolve()


def test_the_evening_is_as_its_first_lines_say(project: Path) -> None:
    """Three seeds of one experiment, and the paper's ablations around it: cascades of tables 2 and 9, pools."""
    resolved = evening(project)
    assert resolved["download"]["camvid"]["archives"].keys() == {camvid.ARCHIVE}
    assert camvid.COMMIT in resolved["download"]["camvid"]["archives"][camvid.ARCHIVE]["url"]
    assert resolved["prepare"]["camvid"]["official_counts"]
    networks = {(one["network"]["cascade"], one["network"]["pools"]) for one in resolved["train"].values()}
    assert networks == {("four", 2), ("single", 2), ("two", 2), ("four", 0), ("four", 4)}
    assert sorted(one["seed"] for one in resolved["train"].values()) == [0, 0, 0, 0, 0, 1, 2]
    assert len({json.dumps(one["recipe"], sort_keys=True) for one in resolved["train"].values()}) == 1
    for one in resolved["evaluate"].values():
        assert (one["split"], one["drawn"], sorted(one["protocols"])) == ("test", False, ["multi-flip", "single"])


def write_scores(experiment: str, **changes: Any) -> None:
    """Made-up metrics on the official test images."""
    made = fake_run.scores("voc-res101", "evening")
    iou = dict.fromkeys(camvid.CLASSES, 0.5)
    protocol = made["protocols"]["single"] | {"mean_iou": 0.6543, "iou": iou, "interval": {"mean_iou": [0.64, 0.67]}}
    made |= {"experiment": experiment, "dataset": "camvid", "split": "test", "images": 233, "drawn": False}
    file = Path(f"metrics/camvid/{experiment}.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(made | {"protocols": {"single": protocol}} | changes))


def published() -> tuple[list[dict[str, str]], str]:
    """The csv's rows, and the part of the Markdown that has the published ones."""
    with Path("results/camvid_table.csv").open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    return rows, Path("results/camvid_table.md").read_text().partition("\n## Published by others")[2]


def test_published_scores_stand_below_this_runs(project: Path) -> None:
    """Each of the facts, once, with its source; unverified ones in brackets; this run's row told apart."""
    evening(project)
    for name in resolve.resolve()["evaluate"]:
        if "seed" not in name:
            write_scores(name)
    tabulate.tabulate("camvid")
    rows, text = published()
    theirs = [row for row in rows if not row["experiment"]]
    known = others.read("camvid")
    assert known is not None
    assert len(theirs) == len(known.rows) == 13
    for row, one in zip(theirs, known.rows, strict=True):
        cells = (row["method"], row["mean_iou"], row["size"], row["starts_from"], row["trained_on"])
        assert cells == (one.method, str(one.mean_iou), one.size, one.starts_from, one.trained_on)
        assert row["published_by"]
        assert (row["verified"] == "no") == (row["published_by"] == "from memory")
        shown = f"({row['mean_iou']})" if row["verified"] == "no" else row["mean_iou"]
        assert [line for line in text.splitlines() if line.startswith(f"| {one.method} |") and f"| {shown} |" in line]
        assert (row["protocol"], row["profile"], row["evaluated_on"], row["images"]) == ("", "", "test", "233")
    assert "| FC-DenseNet103 | 360 x 480 | nothing | train | its paper, by way of Papers with Code | 66.9 |" in text
    ours = [row for row in rows if row["experiment"]]
    assert len(ours) == 5
    assert all(row["method"] == "this run" and not row["published_by"] for row in ours)
    line = (
        "**this run: camvid-lite0, single-scale** | 360 x 480 | ImageNet | train | 95 % interval 64.0–67.0 | **65.4**"
    )
    assert f"| {line} |" in text
    tex = Path("results/camvid_table.tex").read_text()
    assert r"FC-DenseNet103 & 360 x 480 & nothing & train & its paper, by way of Papers with Code & 66.9 \\" in tex


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"drawn": True, "images": 12}, "of synthetic images"),
        ({"split": "val", "images": 101}, "of 101 images of val, not of the 233 of test"),
        ({"images": 20}, "of 20 images of test, not of the 233 of test"),
    ],
)
def test_scores_on_other_images_are_not_among_them(changes: dict[str, Any], reason: str, project: Path) -> None:
    write_scores("camvid-res50", **changes)
    tabulate.tabulate("camvid")
    _, text = published()
    assert "FC-DenseNet103" in text
    assert "this run" not in text
    assert f"`camvid-res50` is not compared with these: its scores are {reason}." in text
    ours, theirs, remarks = custom.table("camvid").comparison()
    assert (ours, len(theirs)) == ([], 13)
    assert reason in remarks[-1]


def test_a_slip_in_the_published_scores_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above all a `verified` that is mistyped, which would make a remembered number a quoted one."""
    monkeypatch.setattr(others, "FOLDER", tmp_path)
    assert others.read("leaves") is None
    row = {
        "method": "m",
        "size": "1 x 1",
        "starts_from": "nothing",
        "trained_on": "train",
        "mean_iou": 50.0,
        "source": "s",
    }
    for change, told in (
        ({"verfied": False}, "unknown key rows.0.verfied"),
        ({"mean_iou": 101}, "rows.0.mean_iou is 101"),
    ):
        (tmp_path / "leaves.yaml").write_text(yaml.safe_dump({"split": "val", "images": 3, "rows": [row | change]}))
        with pytest.raises(UserError, match=rf"^pipeline/tables/published/leaves\.yaml: {told}"):
            others.read("leaves")


@pytest.fixture
def official(project: Path) -> Path:
    """The real archive in its place, also made of the folder CamVid where that is what there is."""
    found = Path(os.environ.get("CAMVID") or "-").expanduser()
    if not found.exists():
        pytest.skip("CAMVID names no archive and no folder of the real CamVid")
    target = Path("data/raw/camvid") / camvid.ARCHIVE
    target.parent.mkdir(parents=True)
    if found.is_file():
        target.symlink_to(found)
        return target
    with zipfile.ZipFile(target, "w") as archive:
        for file in sorted(found.glob("*/*.png")):
            archive.write(file, f"{camvid.FOLDER}/{file.parent.name}/{file.name}")
    return target


# Percent of the labelled pixels of each class, in order, as counted once with Pillow.
SHARES = {
    "train": (17.54, 24.21, 1.02, 32.96, 4.67, 10.12, 1.22, 1.17, 6.11, 0.67, 0.30),
    "val": (9.34, 26.41, 0.57, 29.46, 8.87, 16.62, 0.91, 3.13, 1.78, 0.66, 2.26),
    "test": (17.75, 25.59, 1.22, 26.84, 9.64, 11.70, 1.05, 1.23, 4.13, 0.66, 0.20),
}


def test_real_camvid(official: Path) -> None:
    """All 701 images: counts, size, and each class's share of the pixels, which Pillow counts here, too."""
    prepare.run("camvid")
    assert datasets.load("camvid").Reader(official.parent).check_release()
    with zipfile.ZipFile(official) as archive:
        for split, images in camvid.COUNTS.items():
            folder = f"{camvid.FOLDER}/{split}annot/"
            members = sorted(name for name in archive.namelist() if name.startswith(folder) and name != folder)
            raw = np.stack([np.asarray(Image.open(io.BytesIO(archive.read(name)))) for name in members])
            assert raw.shape == (images, 360, 480)
            pixels = np.bincount(raw.ravel(), minlength=12)
            assert len(pixels) == 12
            assert tuple(np.round(100 * pixels[:11] / pixels[:11].sum(), 2)) == SHARES[split]
            prepared = Split(Path(f"data/camvid/{split}.arrow"))
            assert [sample.name for sample in prepared] == [Path(name).stem for name in members]
            assert (prepared.sizes() == (360, 480)).all()
            assert (prepared.counts().sum(axis=0) == pixels).all()
