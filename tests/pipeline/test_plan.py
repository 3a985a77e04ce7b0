"""The plan for one's own images: what is measured of them, the rules, and what a profile overrides."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import namedtuple
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import small_project
import yaml
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pipeline import plan, planning
from pipeline.config import resolve
from refinenet.config import Resizing
from refinenet.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
LEAVES: dict[str, Any] = {
    "base": "fit",
    "title": "leaves",
    "own": {"leaves": {"images": "photos", "masks": "masks", "classes": ["soil", "leaf"]}},
}
SEEN = planning.Look(
    400, 360, 480, (360, 480), ("soil", "leaf", "stem"), (400, 300, 200), (0.7, 0.2, 0.1), (200.0, 40.0, 20.0)
)


@pytest.mark.parametrize("width", [1, 3, 9, 30])
@pytest.mark.parametrize("turned", [False, True])
def test_the_width_of_a_bar_is_its_width(width: int, turned: bool) -> None:
    label = np.zeros((120, 200), np.uint8)
    label[20:110, 40 : 40 + width] = 1
    (_, found) = planning.object_widths([label.T if turned else label], 2)
    assert found is not None
    assert abs(found - width) <= 1


def test_the_typical_object_is_where_half_of_the_pixels_are() -> None:
    """Ten thin objects and a thick one of more pixels; strays of a brush and void are nothing."""
    label = np.full((300, 300), 255, np.uint8)
    for row in range(10):
        label[10 + 4 * row, 10:60] = 1
    label[100:150, 100:150] = 1
    label[200, 200:203] = 0
    soil, leaf, none = planning.object_widths([label], 3)
    assert (soil, none) == (None, None)
    assert leaf is not None
    assert abs(leaf - 50) <= 1


def test_photographs_are_seen_in_the_size_that_was_learnt() -> None:
    """Of any resolution; images of the size of the training's are left as they are."""
    seen = replace(SEEN, height=3000, width=4000, short_edges=(2900, 3000))
    made = planning.plan(seen, "cpu", 2)
    scale = made["train"]["input_scale"].value
    assert made["train"]["short_edge"] == made["evaluate"]["short_edge"]
    resizing = Resizing(scale, tuple(made["evaluate"]["short_edge"].value))
    assert resizing.factor(2950, 4000) == scale < 0.5
    assert resizing.factor(750, 1000) * 750 == pytest.approx(2900 * scale)
    assert resizing.factor(6000, 8000) * 6000 == pytest.approx(3000 * scale)


def test_of_large_labels_every_nth_pixel_is_looked_at() -> None:
    label = np.zeros((3000, 4000), np.uint8)
    label[1000:1400, 500:3500] = 1
    (_, found) = planning.object_widths([label], 2)
    assert found == pytest.approx(400, abs=8)


def test_an_object_goes_on_beyond_the_border() -> None:
    label = np.zeros((100, 100), np.uint8)
    label[:, :40] = 1
    (_, found) = planning.object_widths([label], 2)
    assert found == pytest.approx(79, abs=1)


@given(
    height=st.integers(20, 6000),
    width=st.integers(20, 6000),
    finest=st.floats(1, 500),
    images=st.lists(st.integers(0, 50), min_size=3, max_size=3).filter(any),
    device=st.sampled_from(["cpu", "cuda"]),
)
def test_a_plan_fits_any_images(height: int, width: int, finest: float, images: list[int], device: str) -> None:
    seen = replace(SEEN, images=50, height=height, width=width, found_in=tuple(images), widths=(500.0, None, finest))
    made = planning.plan(seen, device, 4)["train"]
    side = made["crop"].value * made["input_scale"].value
    assert planning.STEP - 1 < side <= planning.SIDE[device] * 1.02
    assert 0 < made["input_scale"].value <= 1
    assert made["input_scale"].value * max(height, width) <= 2 * planning.EDGE[device] * 1.05
    assert all(one.reason for one in made.values())


def test_finer_objects_are_seen_larger() -> None:
    """Of photographs of 4000 x 3000 pixels; nothing is enlarged, and no more than the budget allows."""
    large = replace(SEEN, height=3000, width=4000)
    scales = [
        planning.plan(replace(large, widths=(None, None, finest)), "cpu", 2)["train"]["input_scale"].value
        for finest in (400.0, 40.0, 30.0, 4.0)
    ]
    assert scales[:3] == [0.13, 0.15, 0.2]
    assert scales[3] == 0.26  # twice what the network would usually see
    made = planning.plan(replace(large, widths=(None, None, 4.0)), "cpu", 2)["train"]["input_scale"]
    assert "stem, are 4 pixels wide" in made.reason


def test_rare_classes_are_drawn_more_often_but_not_alike() -> None:
    made = planning.plan(replace(SEEN, found_in=(400, 300, 3)), "cpu", 2)["train"]["class_sampling_power"]
    assert made.value == 0.5
    assert "stem is in 3 of 400 images" in made.reason
    assert planning.plan(SEEN, "cpu", 2)["train"]["class_sampling_power"].value == 0


def test_the_budget_or_enough_passes() -> None:
    made = planning.length(SEEN, hours=2, passes=200, rate=5.0, batch=8)
    assert made.value == 2 * 3600 * 5 // 8
    assert "2 hours at 5.00 images/s" in made.reason
    enough = planning.length(SEEN, hours=24, passes=200, rate=5.0, batch=8)
    assert enough.value == 200 * 400 // 8
    assert "267 minutes" in enough.reason
    assert planning.length(SEEN, 1e-9, 1, 1, 8).value == 1


@pytest.fixture
def project(tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    params |= {"profile": "leaves", "own": ["leaves"]}
    params["experiments"]["leaves-res50"] = {"data": "leaves", "start": "resnet50"}
    (tmp_path / "params.yaml").write_text(yaml.safe_dump(params))
    with chdir(tmp_path):
        yield tmp_path


def write_plan(values: dict[str, Any]) -> None:
    Path("profiles/plans/leaves.json").write_text(json.dumps({"values": values}))


def test_a_plan_is_asked_for_in_one_line(project: Path) -> None:
    Path("profiles/leaves.yaml").write_text(yaml.safe_dump(LEAVES))
    with pytest.raises(UserError, match=r"^profiles/plans/leaves\.json: no such file; `refinenet fit leaves` makes it"):
        resolve.resolve()
    Path("profiles/plans/leaves.json").write_text("{")
    with pytest.raises(UserError, match=r"^profiles/plans/leaves\.json: not as `refinenet plan leaves` writes"):
        resolve.resolve()


def test_one_data_set_waits_for_its_plan_while_the_other_trains(project: Path) -> None:
    """After `add` of two, `fit` of either works: the one without a plan is in no settings."""
    stones = {"images": "stones", "masks": "masks", "classes": ["sand", "stone"]}
    Path("profiles/leaves.yaml").write_text(yaml.safe_dump(LEAVES | {"own": {**LEAVES["own"], "stones": stones}}))
    params = yaml.safe_load(Path("params.yaml").read_text()) | {"own": ["stones", "leaves"]}
    params["experiments"]["stones-res50"] = {"data": "stones", "start": "resnet50"}
    params["seeds"] = {"stones-res50-seed7": {"of": "stones-res50", "seed": 7, "data": "stones", "start": "resnet50"}}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(UserError, match=r"^profiles/plans/stones\.json: no such file; `refinenet fit stones` makes it"):
        resolve.resolve()
    write_plan({"train": {"steps": {"value": 700, "reason": "-"}}})
    settings = resolve.resolve()
    assert "leaves" in settings["prepare"]
    assert "leaves-res50" in settings["train"]
    assert not {"stones", "stones-res50", "stones-res50-seed7"} & {
        name for stage in settings.values() for name in stage
    }
    Path("profiles/plans/stones.json").write_text(Path("profiles/plans/leaves.json").read_text())
    assert {"stones-res50", "stones-res50-seed7", "leaves-res50"} <= resolve.resolve()["train"].keys()


def test_what_a_user_says_wins_over_the_plan_and_the_plan_over_the_recipe(project: Path) -> None:
    steps = {"steps": {"value": 700, "reason": "-"}, "crop": {"value": 250, "reason": "-"}}
    write_plan({"threads": {"value": 3, "reason": "-"}, "train": {**steps, "warmup": {"value": 35, "reason": "-"}}})
    Path("profiles/leaves.yaml").write_text(yaml.safe_dump(LEAVES | {"train": {"crop": 99}}))
    made = resolve.resolve()["train"]["leaves-res50"]
    recipe = made["recipe"]
    assert (recipe["crop"], recipe["steps"], recipe["warmup"]) == (99, 700, 35)
    assert (recipe["optimiser"], made["threads"], made["portable"], made["network"]["width"]) == ("adamw", 3, False, 64)
    # What is said of this data set, and of the experiment, wins over both.
    more = {"datasets": {"leaves": {"train": {"crop": 77}, "threads": 1}}, "train": {"crop": 99, "lr": 0.5}}
    Path("profiles/leaves.yaml").write_text(yaml.safe_dump(LEAVES | more))
    made = resolve.resolve()["train"]["leaves-res50"]
    assert (made["recipe"]["crop"], made["recipe"]["lr"], made["threads"]) == (77, 0.5, 1)


def test_the_recipe_for_own_images_is_not_for_the_drawn_ones(project: Path) -> None:
    write_plan({"train": {"steps": {"value": 700, "reason": "-"}}})
    Path("profiles/leaves.yaml").write_text(yaml.safe_dump(LEAVES))
    settings = resolve.resolve()
    params = yaml.safe_load(Path("params.yaml").read_text()) | {"profile": "mini", "own": []}
    del params["experiments"]["leaves-res50"]
    Path("params.yaml").write_text(yaml.safe_dump(params))
    mini = resolve.resolve()
    assert settings["train"]["voc-res101"] == mini["train"]["voc-res101"]
    assert settings["train"]["leaves-res50"]["profile"] == "leaves"


@pytest.mark.slow
def test_from_folders_to_a_plan_that_the_engines_know(tmp_path: Path) -> None:
    """With a thin network: images packed and prepared, a measured rate, a run that does neither once more.

    Beside it a data set that has no plan yet.
    """
    folder = small_project.make(tmp_path, "base: mini\n")
    rng = np.random.default_rng(0)
    for name in ("photos", "masks"):
        (folder / name).mkdir()
    for n in range(12):
        label = np.zeros((60, 80), np.uint8)
        label[10 + n : 30 + n, 20:50] = 1
        Image.fromarray(rng.integers(0, 255, (60, 80, 3), np.uint8)).save(folder / f"photos/{n}.png")
        Image.fromarray(label).save(folder / f"masks/{n}.png")
    thin = {"network": {"stem": 2, "width": 4, "coarse_width": 4}, "train": {"init": "scaled"}}
    two = {"own": {**LEAVES["own"], "stones": LEAVES["own"]["leaves"]}}
    (folder / "profiles/leaves.yaml").write_text(yaml.safe_dump(LEAVES | two | thin))
    params = yaml.safe_load((folder / "params.yaml").read_text())
    params |= {"profile": "leaves", "own": ["stones", "leaves"]}
    for data in params["own"]:
        params["experiments"][f"{data}-res50"] = {"data": data, "start": "resnet50"}
    (folder / "params.yaml").write_text(yaml.safe_dump(params))
    # Half a second of training: the steps follow from the rate that is measured.
    done = small_project.call(folder, "python", "-m", "pipeline.plan", "leaves", "--hours", str(0.5 / 3600))
    made = json.loads((folder / "profiles/plans/leaves.json").read_text())
    steps, rate = made["values"]["train"]["steps"]["value"], made["measured"]["images_per_second"]
    assert steps == pytest.approx(max(1, 0.5 * rate / 8), abs=1)
    assert f"train.steps: {steps}" in done.stdout
    assert "refinenet fit stones` makes it and trains by it; until then stones is left out" in done.stderr
    assert made["seen"]["images"] + 2 <= 12
    assert made["seen"]["classes"]["leaf"]["width"] == pytest.approx(20, abs=2)
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["train"]["leaves-res50"]["recipe"]["steps"] == steps
    assert settings["train"]["leaves-res50"]["recipe"]["short_edge"] == [60, 60]
    assert settings["evaluate"]["leaves-res50"]["short_edge"] == [60, 60]
    table = "results/leaves_table.csv"
    ran = small_project.call(folder, "snakemake", "--cores", "1", "--", table)
    assert (folder / table).is_file()
    assert "download leaves" not in ran.stdout + ran.stderr
    assert "prepare leaves" not in ran.stdout + ran.stderr
    assert "train leaves-res50" in ran.stdout + ran.stderr
    (folder / "profiles/leaves.yaml").write_text(yaml.safe_dump(LEAVES | two | thin | {"title": "changed"}))
    everything = small_project.call(folder, "dvc", "repro", check=False)
    assert "refinenet fit stones` makes it and trains by it, or name what" in everything.stdout + everything.stderr


def test_work_of_others_is_told_from_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten seconds on four cores: this process took 15 s of them, others 5, 18 were idle and 2 waited for a disk."""
    names = ("user", "nice", "system", "idle", "iowait", "irq", "guest")
    times = iter([(100, 0, 20, 500, 1, 0, 7), (116, 1, 22.5, 518, 3, 0.5, 9)])
    machine = namedtuple("machine", names)
    own, clock = iter([(3.0, 1.0, 0.0, 0.0, 0.0), (15.0, 3.0, 1.0, 0.0, 0.0)]), iter([50.0, 60.0])
    monkeypatch.setattr(psutil, "cpu_times", lambda: machine(*next(times)))
    monkeypatch.setattr(os, "times", lambda: next(own))
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    others = plan.cores_of_others()
    assert others() == pytest.approx((16 + 1 + 2.5 + 0.5 - 15) / 10)
