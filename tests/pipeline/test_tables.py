"""The nine tables: the paper's numbers against each other and against typed samples, every cell against the metrics."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_run import all_experiments, scores, write_comparable, write_metrics

from pipeline import report, tabulate
from pipeline.config import resolve
from pipeline.tables import latex, paper
from pipeline.tables.paper import PUBLISHED, published
from refinenet.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PRINTED = yaml.safe_load(PUBLISHED.read_text(encoding="utf-8"))
TABLES = ["person", "ablation", "nyud", "voc", "cityscapes", "context", "sunrgbd", "ade20k", "variants"]


def path(experiment: str) -> Path:
    """Where the metrics of a table's experiment lie."""
    return Path("metrics", experiment.partition("-")[0], f"{experiment}.json")


def find(table: str, *labels: str) -> tuple[str, ...]:
    rows = [row.values for row in published()[table].rows if row.labels[: len(labels)] == labels]
    assert len(rows) == 1
    return rows[0]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    write_metrics(root, all_experiments())
    for name in TABLES:
        tabulate.tabulate(name, root)
    return root


def read(root: Path, name: str) -> list[dict[str, str]]:
    with (root / "results" / f"{name}_table.csv").open(encoding="utf-8", newline="") as stream:
        return list(csv.DictReader(stream))


# What the paper prints ------------------------------------------------------------------------------------------------


def test_nine_tables_in_the_papers_order_with_all_rows() -> None:
    assert list(published()) == TABLES
    assert [table.number for table in published().values()] == list(range(1, 10))
    assert [len(table.rows) for table in published().values()] == [7, 6, 5, 11, 8, 9, 6, 7, 4]


def test_the_experiments() -> None:
    """Twenty of the paper's rows, and one of the authors' training demo."""
    nyud = ["50", "50-nopool", "50-single", "50-two", "50-twoscale", "101", "152"]
    person = ["50", "50-nopool", "101", "152"]
    both = [f"{name}-res{depth}" for name in ("voc", "context", "sunrgbd", "ade20k") for depth in (101, 152)]
    expected = [f"nyud-res{kind}" for kind in nyud] + [f"person-res{kind}" for kind in person] + both
    assert all_experiments() == sorted([*expected, "cityscapes-res101", "voc-res50-demo"])


@pytest.mark.parametrize(
    ("table", "labels", "values"),
    [
        ("person", ("Graph-LSTM",), "60.2"),
        ("person", ("RefineNet-Res101",), "68.6"),
        ("ablation", ("ResNet-50", "no", "no"), "40.4 64.1"),
        ("ablation", ("ResNet-101", "yes", "no"), "43.6 67.6"),
        ("nyud", ("Gupta et al.", "RGB-D"), "60.3 – 28.6"),
        ("nyud", ("RefineNet-Res152", "RGB"), "73.6 58.9 46.5"),
        ("cityscapes", ("LRR-4x",), "71.8"),
        ("cityscapes", ("RefineNet-Res101",), "73.6"),
        ("context", ("DeepLab-v2 (Res101)", "COCO (~100K)"), "45.7"),
        ("context", ("RefineNet-Res152",), "47.3"),
        ("sunrgbd", ("Ren et al.", "RGB-D"), "– 36.3 –"),
        ("sunrgbd", ("RefineNet-Res101", "RGB"), "80.4 57.8 45.7"),
        ("ade20k", ("Cascaded-DilatedNet",), "34.9"),
        ("ade20k", ("RefineNet-Res101",), "40.2"),
        ("variants", ("2-cascaded RefineNet", "ResNet-50", "no"), "40.9"),
        ("variants", ("4-cascaded 2-scale RefineNet",), "43.1"),
    ],
)
def test_typed_sample(table: str, labels: tuple[str, ...], values: str) -> None:
    assert find(table, *labels) == tuple(values.split())


def test_sums_of_the_printed_numbers() -> None:
    """No single digit can change unseen: the sum of each table, and of each row of Table 4."""
    sums = {
        name: sum(Decimal(value) for row in table.rows for value in row.values if value != "–")
        for name, table in published().items()
    }
    assert [str(value) for value in sums.values()] == (
        ["428.4", "663.4", "709.0", "17406.7", "549.7", "352.8", "737.1", "226.6", "166.8"]
    )
    assert [str(sum(map(Decimal, row.values))) for row in published()["voc"].rows] == (
        ["1277.2", "1501.0", "1550.3", "1559.6", "1610.5", "1621.9", "1505.8", "1657.8", "1668.1", "1715.8", "1738.7"]
    )


def test_tables_agree_with_each_other() -> None:
    assert find("person", "RefineNet-Res101")[0] == find("ablation", "ResNet-101", "yes", "yes")[1] == "68.6"
    assert find("nyud", "RefineNet-Res152")[-1] == find("ablation", "ResNet-152", "yes", "yes")[0] == "46.5"
    assert find("variants", "4-cascaded RefineNet")[0] == find("ablation", "ResNet-50", "yes", "no")[0] == "42.5"


def test_voc_means_imply_a_background_between_90_and_100() -> None:
    """The mean is over 21 classes, the paper prints 20 of them: what is left over is the background's IoU."""
    for row in published()["voc"].rows:
        *classes, mean = map(float, row.values)
        assert len(classes) == 20
        assert 90 < 21 * mean - sum(classes) < 100, row.labels


def test_same_number_same_experiment() -> None:
    """Two rows that name the same experiment and protocol print the same number."""
    seen: dict[tuple[str, str], str] = {}
    for table in published().values():
        for row in table.rows:
            for source, score, value in zip(row.sources, table.scores, row.values, strict=False):
                if score.metric == "mean_iou":
                    assert seen.setdefault((source.experiment, source.protocol), value) == value


def test_our_rows_name_their_network() -> None:
    for table in published().values():
        for row in table.rows:
            depth = re.search(r"Res(?:Net-)?(\d+)", " ".join(row.labels))
            ours = "RefineNet" in row.labels[0] or table.name == "ablation"
            assert bool(row.sources) == ours, row
            if ours:
                assert depth is not None
                assert all(re.search(rf"-res{depth[1]}(-|$)", source.experiment) for source in row.sources)
                averaged = dict(zip(table.labels, row.labels, strict=True)).get("Msc Eva", "yes")
                assert {source.protocol for source in row.sources} == {"multi" if averaged == "yes" else "single"}


def test_what_others_have_published() -> None:
    """Each number typed once more, and where it was taken."""
    found = {
        (name, row.labels[0].rpartition("RefineNet-")[2], row.on.partition(",")[0]): row.values[-1]
        for name, table in published().items()
        for row in table.others
    }
    light = {
        ("person", "test"): "64.9 66.7 67.6",
        ("nyud", "test"): "41.7 43.6 44.4",
        ("context", "val"): "45.1 45.8",
    }
    expected = {
        (name, kind, split): value
        for (name, split), values in light.items()
        for value, kind in zip(values.split()[::-1], ("Res152", "Res101", "Res50"), strict=False)
    }
    served = zip(("Res50", "Res101", "Res152", "MobileNet-v2"), ("81.1", "82.0", "82.7", "79.2"), strict=True)
    expected |= {("voc", kind, "test server"): value for kind, value in served}
    expected |= {
        ("voc", "Res50, the authors' demo", "val"): "69.1",
        ("voc", "Res101, the authors' weights in PyTorch", "val"): "80.5",
        ("voc", "Res101, Ascend, one processor", "val"): "78.56",
        ("voc", "Res101, Ascend, eight processors", "val"): "77.34",
    }
    assert found == expected
    ours = [row for table in published().values() for row in table.others if row.sources]
    assert [{(source.experiment, source.protocol) for source in row.sources} for row in ours] == (
        [{("voc-res50-demo", "single")}]
    )


def test_others_are_told_apart_from_the_paper(results: Path) -> None:
    """In the csv by a column, in print by a mark and a note. The demo is like for like, on val; the paper is not."""
    rows = read(results, "voc")
    assert [row["published_by"] == "paper" for row in rows] == [True] * 11 + [False] * 8
    demo, served = rows[11], rows[-1]
    assert (demo["experiment"], demo["mean_paper"], demo["evaluated_on_paper"]) == (
        ("voc-res50-demo", "69.1", "val, 1449 images")
    )
    assert demo["published_by"].startswith("header of the authors' demo_refinenet_train.m")
    assert "the paper scores on" not in demo["notes"]
    assert "the paper scores on" in rows[10]["notes"]
    assert (served["experiment"], served["mean_paper"], served["aero_paper"]) == ("", "79.2", "")
    assert served["evaluated_on_paper"] == "test server, 1456 images"
    text = (results / "results/voc_table.md").read_text()
    assert "| **RefineNet-Res50, the authors' demo ‡** |" in text
    assert "| voc-res50-demo, single-scale, val |" in text
    note = "On val, 1449 images; single scale, converted weights. Source: README of DrSleep/refinenet-pytorch."
    assert f"\n- ‡ Not in the paper: RefineNet-Res101, the authors' weights in PyTorch. {note}\n" in text
    assert "‡" not in text.partition("RefineNet-Res50, the")[0]
    latex = (results / "results/voc_table.tex").read_text()
    assert r"RefineNet-Res101, the authors' weights in PyTorch $\ddagger$ &" in latex
    assert "‡" not in (results / "results/ade20k_table.md").read_text()


@pytest.mark.parametrize(
    "wrong",
    [
        {"values": {"IoU": "69.1"}},
        {"values": {"mean": 69.1}},
        {"labels": []},
        {"here": "person-res50"},
        {"here": "person-res50 both"},
        {"on": "val"},
        {"by": None},
        {"protocol": None},
    ],
)
def test_a_row_of_others_that_does_not_read(wrong: dict[str, Any]) -> None:
    right = {"labels": ["a"], "values": {"IoU": 69.1}, "scored_on": "val", "protocol": "single", "by": "somebody"}
    assert paper._other("person", right, ("Method",), ("IoU",)).values == ("69.1",)
    given = {key: value for key, value in (right | wrong).items() if value is not None}
    with pytest.raises(UserError, match=r"paper\.yaml: person: others: .* does not read as labels, values, scored_on"):
        paper._other("person", given, ("Method",), ("IoU",))


# What a table shows: every number in test_recomputed.py ---------------------------------------------------------------


def changed(root: Path, file: Path, **changes: Any) -> dict[str, Any]:
    """A metrics file of `write_metrics`, changed; what it holds now."""
    (root / file).parent.mkdir(parents=True, exist_ok=True)
    experiment = file.stem.partition("-seed")[0]
    metrics = scores(experiment) | changes
    (root / file).write_text(json.dumps(metrics))
    return metrics


@pytest.mark.parametrize("name", TABLES)
def test_a_mini_run_says_so_and_a_paper_run_does_not(name: str, results: Path, tmp_path: Path) -> None:
    says = "mini: synthetic images; shows that the pipeline works, says nothing about RefineNet's accuracy"
    above, _, below = (results / "results" / f"{name}_table.md").read_text().partition(f"\n## {tabulate.APART}\n")
    assert below.startswith(f"\n> **{says}**\n\n| Run | ")
    assert "this run" not in above
    write_metrics(tmp_path, tabulate.experiments(name), "paper")
    tabulate.tabulate(name, tmp_path)
    text = (tmp_path / "results" / f"{name}_table.md").read_text()
    assert "> " not in text
    assert tabulate.APART not in text
    profiles = {row[key] for row in read(tmp_path, name) for key in row if key.endswith("profile")}
    assert profiles <= {"paper", ""}


def test_synthetic_images_are_said_whatever_the_profile_is_called(tmp_path: Path) -> None:
    """A profile on top of mini draws as mini does; one that has the true archives says nothing of drawing."""
    write_comparable(tmp_path, "lab")
    for drawn in (True, False):
        for name in ("voc-res50-demo", "voc-res101", "voc-res152"):
            changed(tmp_path, path(name), profile="lab", drawn=drawn)
        tabulate.tabulate("voc", tmp_path)
        text = (tmp_path / "results" / "voc_table.md").read_text()
        (says,) = (line for line in text.splitlines() if line.startswith("> **lab: "))
        assert ("synthetic images; shows that the pipeline works, says nothing" in says) == drawn
        assert (f"\n## {tabulate.APART}\n\n{says}" in text) == drawn  # else it stands above the table
        assert {"synthetic" in row["profile"] for row in read(tmp_path, "voc") if row["experiment"]} == {drawn}


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("comparable", [True, False])
def test_a_profile_that_is_not_comparable_shows_no_difference(name: str, comparable: bool, tmp_path: Path) -> None:
    """By its setting, not its name. The numbers stay, and the columns of the csv."""
    write_metrics(tmp_path, tabulate.experiments(name), "lab")
    write_comparable(tmp_path, "lab", comparable=comparable)
    tabulate.tabulate(name, tmp_path)
    ours = [row for row in read(tmp_path, name) if any(row[key] for key in row if key.endswith("experiment"))]
    assert {row[key] for row in ours for key in row if key.endswith("comparable")} == {"yes" if comparable else "no"}
    assert any(row[key] for row in ours for key in row if key.endswith("_difference")) == comparable
    assert all(any(row[key] for key in row if key.endswith("_run")) for row in ours)
    for suffix in ("md", "tex"):
        text = (tmp_path / f"results/{name}_table.{suffix}").read_text()
        assert ("ifference" in text) == comparable
        assert ("lab: not comparable with the paper's numbers" in text) == (not comparable)


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("comparable", [True, False])
def test_scores_that_are_not_comparable_stand_in_no_row_of_the_paper(
    name: str, comparable: bool, tmp_path: Path
) -> None:
    """The printed table is then the paper's to the letter, and each score is in the one below, by its run's name."""
    write_metrics(tmp_path, tabulate.experiments(name), "lab")
    write_comparable(tmp_path, "lab", comparable=comparable)
    tabulate.tabulate(name, tmp_path)
    of = tabulate.table(name)
    runs = [
        record for record in read(tmp_path, name) if any(record[f"{prefix}experiment"] for prefix, _ in of.groups())
    ]
    scores = [[record[f"{tabulate.slug(score.column)}_run"] for score in of.scores] for record in runs]
    text = (tmp_path / f"results/{name}_table.md").read_text()
    above, _, below = text.partition(f"\n## {tabulate.APART}\n")
    cells = [
        [[cell.strip("* ") for cell in line.strip("|").split("|")] for line in part.splitlines() if line[:1] == "|"]
        for part in (above, below)
    ]
    printed = [[*row.marked(), *row.values] for row in of.all_rows]
    assert (cells[0][2:] == printed) == (not comparable)
    assert [line[1:] for line in cells[1][2:]] == ([] if comparable else scores)
    shown = [line[len(of.labels) :] for line in cells[0] if line[0].startswith("this run")]
    assert shown == (scores if comparable else [])
    floats = (tmp_path / f"results/{name}_table.tex").read_text().count("\\toprule")
    assert floats == (1 if comparable else 2)


def test_a_profile_that_settings_json_does_not_know_is_not_comparable(tmp_path: Path) -> None:
    write_metrics(tmp_path, ["person-res101"], "lab")
    write_comparable(tmp_path, "paper")
    tabulate.tabulate("person", tmp_path)
    assert (read(tmp_path, "person")[6]["comparable"], read(tmp_path, "person")[6]["iou_difference"]) == ("no", "")
    for text in (None, "{", "[]", "{}", '{"tables": {"lab": {}}}'):
        (tmp_path / "settings.json").unlink(missing_ok=True)
        if text is not None:
            (tmp_path / "settings.json").write_text(text)
        with pytest.raises(UserError, match=r"^settings\.json: .*; stage settings (makes|renews) it$"):
            tabulate.tabulate("person", tmp_path)


def test_a_class_that_does_not_occur(tmp_path: Path) -> None:
    write_metrics(tmp_path, ["voc-res101", "voc-res152", "voc-res50-demo"])
    without = scores("voc-res101")
    for protocol in without["protocols"].values():
        protocol["iou"]["boat"] = None
    (tmp_path / path("voc-res101")).write_text(json.dumps(without))
    tabulate.tabulate("voc", tmp_path)
    row = read(tmp_path, "voc")[9]
    assert row["method"] == "RefineNet-Res101"
    assert (row["boat_run"], row["boat_difference"]) == ("", "")
    assert "20 of 21 classes occur" in row["notes"]
    assert "20 of 21 classes occur" in (tmp_path / "results" / "voc_table.md").read_text()


def test_same_bytes_every_time(results: Path, tmp_path: Path) -> None:
    write_metrics(tmp_path, all_experiments())
    for name in TABLES:
        tabulate.tabulate(name, tmp_path)
    made = sorted((results / "results").iterdir())
    assert len(made) == 27
    assert [file.read_bytes() for file in made] == [(tmp_path / "results" / file.name).read_bytes() for file in made]


def test_seeds_are_averaged(tmp_path: Path) -> None:
    """By hand: 40, 42 and 47 percent are 43.0 ± 3.6; other files of the folder are not counted."""
    write_metrics(tmp_path, ["person-res101"])
    for seed, value in ((0, 0.40), (1, 0.42), (12, 0.47)):
        protocols = scores("person-res101")["protocols"]
        protocols["multi"] |= {"mean_iou": value, "interval": {"mean_iou": [value - 0.1, value + 0.05]}}
        name = f"metrics/seeds/person/person-res101-seed{seed}.json" if seed else path("person-res101")
        changed(tmp_path, Path(name), seed=seed, protocols=protocols)
    (tmp_path / "metrics/seeds/person/README.md").write_text("words")
    (tmp_path / "metrics/seeds/person/person-res101-seedling.json").write_text("{}")
    (tmp_path / "metrics/seeds/person/person-res101-seed3-draft.json").write_text("{}")
    tabulate.tabulate("person", tmp_path)
    ours = read(tmp_path, "person")[6]
    assert [ours[f"iou_{part}"] for part in ("run", "low", "high", "spread", "difference")] == (
        ["43.0", "33.0", "48.0", "3.6", ""]  # no difference: mini
    )
    assert (ours["seeds"], ours["seed"], ours["where"]) == ("3", "0 1 12", "val")
    text = (tmp_path / "results/person_table.md").read_text()
    assert "| deviation, 3 seeds | 3.6 |" in text
    assert "12 images of person, test; seeds 0, 1, 12; profile mini" in text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"seed": 1, "profile": "paper"},
            "profile paper, metrics/person/person-res101.json has mini; renew or remove it",
        ),
        ({"seed": 1, "images": 11}, "images 11, metrics/person/person-res101.json has 12"),
        ({"seed": 0}, "seed 0 is also that of metrics/person/person-res101.json"),
        ({"seed": 1, "dataset": "voc"}, "it is of experiment 'person-res101' on voc"),
        ({"seed": 1, "protocols": {}}, "no protocol 'multi', only"),
    ],
)
def test_seeds_that_do_not_belong(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_metrics(tmp_path, ["person-res101"])
    changed(tmp_path, Path("metrics/seeds/person/person-res101-seed1.json"), **changes)
    with pytest.raises(UserError) as error:
        tabulate.tabulate("person", tmp_path)
    assert str(error.value).startswith("metrics/seeds/person/person-res101-seed1.json: ")
    assert message in str(error.value)
    assert not (tmp_path / "results").exists()


def test_own_data_with_seeds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mean, interval, spread and number of seeds in all three forms; a repetition has no row of its own."""
    own = {"title": "50 % leaves", "classes": ["soil_1", "leaf"]}
    evaluated = {"leaves-a": {"data": "leaves", "of": None}, "leaves-a-seed4": {"data": "leaves", "of": "leaves-a"}}
    monkeypatch.setattr(resolve, "resolve", lambda: {"prepare": {"leaves": {"own": own}}, "evaluate": evaluated})
    monkeypatch.chdir(ROOT)
    for name, seed, value in (("leaves/leaves-a", 0, 0.25), ("seeds/leaves/leaves-a-seed4", 4, 0.5)):
        protocol = scores("voc-res101")["protocols"]["multi"] | {
            "mean_iou": value,
            "iou": {"leaf": None, "soil_1": value},
        }
        protocol["interval"] = {"mean_iou": [value - 0.125, value + 0.125]}
        metrics = {"experiment": "leaves-a", "dataset": "leaves", "seed": seed, "protocols": {"multi": protocol}}
        file = tmp_path / "metrics" / f"{name}.json"
        file.parent.mkdir(parents=True)
        file.write_text(json.dumps(scores("voc-res101") | metrics))
    tabulate.tabulate("leaves", tmp_path)
    (row,) = read(tmp_path, "leaves")
    shown = ["mean_iou", "mean_iou_low", "mean_iou_high", "mean_iou_spread", "iou soil_1", "iou leaf", "seed", "seeds"]
    assert [row[key] for key in shown] == ["37.5", "25.0", "50.0", "17.7", "37.5", "", "0 4", "2"]
    assert "| 37.5 | 25.0–50.0 | 2 (± 17.7) | 37.5 | – |" in (tmp_path / "results/leaves_table.md").read_text()
    tex = (tmp_path / "results/leaves_table.tex").read_text()
    assert r"& 37.5 & 25.0--50.0 & 2 ($\pm$ 17.7) \\" in tex
    assert r"    soil\_1 & 37.5 \\" in tex
    assert r"\caption{50 \% leaves. " in tex


NASTY = r"""100 % of $5 & #2, a_b ~ c^d \{e} \textbf{no} -- '' `` "q" <x> [y] *z | – − ± ×"""


def document(folder: Path, tables: list[str]) -> None:
    """A paper in two columns with nothing but tables, and what the files say they need."""
    needs = {
        name for text in tables for line in text.splitlines() for name in re.findall(r"^% .*\\usepackage\{(.*)\}", line)
    }
    body = "\n\\clearpage\n".join(tables)
    packages = "".join(f"\\usepackage{{{name}}}\n" for name in sorted(needs))
    text = f"\\documentclass[twocolumn]{{article}}\n{packages}\\begin{{document}}\n{body}\\end{{document}}\n"
    (folder / "paper.tex").write_text(text, encoding="utf-8")


def test_latex_is_whole(results: Path, tmp_path: Path) -> None:
    """Braces and environments close, each row has as many cells as the heading; and pdflatex agrees, where it is."""
    rows = [latex.Row([NASTY, "1.0"]), latex.Row(["[1]", "* 2"], bold=True, rule=True), latex.Row(["é", "–"])]
    extra = latex.table(NASTY, "tab:nasty", [NASTY, "a_b"], 1, rows, [NASTY, "see `a_b` at https://x.example/a_b%20/c"])
    classes = [latex.Row([f"class_{i}", *["1.0"] * 9]) for i in range(150)]
    texts = [(results / "results" / f"{name}_table.tex").read_text(encoding="utf-8") for name in TABLES] + [extra]
    for text in (one for each in texts for one in re.split(r"\n(?=% Written)", each)):  # a file may have two floats
        bare = re.sub(r"\\[\\{}&%#]", "", text.partition("\n")[2]).replace("{%\n", "{\n")
        assert bare.count("{") == bare.count("}")
        assert not re.findall("[%#]", bare)
        opened: list[str] = []
        for kind, name in re.findall(r"\\(begin|end)\{(.*?)\}", text):
            if kind == "begin":
                opened.append(name)
            else:
                assert opened.pop() == name
        assert not opened
        rows_there = [line for line in text.splitlines() if line.startswith("    ") and line.endswith(r" \\")]
        assert len({len(re.findall(r"(?<!\\)&", line)) for line in rows_there}) == 1
    texts.append(latex.long_table("Classes", "tab:long", ["Class", *["a long name, single-scale"] * 9], 1, classes))
    # A long table wants one column.
    document(tmp_path, [*texts[:-1], r"\onecolumn", texts[-1]])
    if shutil.which("pdflatex") is None:
        pytest.skip("no pdflatex: only the structure was tested")
    command = ["pdflatex", "-halt-on-error", "-interaction=batchmode", "-no-shell-escape", "paper.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False)
    log = (tmp_path / "paper.log").read_text(encoding="latin-1")
    assert done.returncode == 0, log[-3000:]
    assert "Undefined" not in log
    assert "Overfull" not in log.replace("Overfull \\hbox (0", "")


# What a user can get wrong --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda metrics: None, "no such file; `evaluate cityscapes-res101` makes it"),
        (lambda metrics: "{", "not the metrics of cityscapes-res101"),
        (lambda metrics: "[]", "not the metrics of cityscapes-res101"),
        (lambda metrics: metrics | {"experiment": "voc-res101"}, "it is of experiment 'voc-res101' on cityscapes"),
        (lambda metrics: metrics | {"dataset": "voc"}, "it is of experiment 'cityscapes-res101' on voc"),
        (lambda metrics: {key: metrics[key] for key in metrics if key != "profile"}, "key profile is missing"),
        (lambda metrics: metrics | {"protocols": {"single": metrics["protocols"]["single"]}}, "no protocol 'multi'"),
        (
            lambda metrics: metrics | {"protocols": {"multi": metrics["protocols"]["multi"] | {"mean_iou": 43.0}}},
            "protocols.multi.mean_iou is 43.0: Input should be less than or equal to 1",
        ),
        (
            lambda metrics: (
                metrics | {"protocols": {"multi": metrics["protocols"]["multi"] | {"mean_iou": float("nan")}}}
            ),
            "protocols.multi.mean_iou is nan: Input should be ",
        ),
    ],
)
def test_one_line_for_bad_metrics_and_no_table(change: Any, message: str, tmp_path: Path) -> None:
    file = tmp_path / path("cityscapes-res101")
    file.parent.mkdir(parents=True)
    write_comparable(tmp_path, "mini")
    changed = change(scores("cityscapes-res101"))
    if changed is not None:
        text = changed if isinstance(changed, str) else json.dumps(changed)
        file.write_text(text)
    with pytest.raises(UserError) as error:
        tabulate.tabulate("cityscapes", tmp_path)
    assert message in str(error.value)
    assert str(error.value).startswith("metrics/cityscapes/cityscapes-res101.json: ")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "results").exists()


def test_a_missing_class_is_named(tmp_path: Path) -> None:
    write_metrics(tmp_path, tabulate.experiments("voc"))
    renamed = json.loads((tmp_path / path("voc-res152")).read_text())
    renamed["protocols"]["multi"]["iou"]["tv"] = renamed["protocols"]["multi"]["iou"].pop("tvmonitor")
    (tmp_path / path("voc-res152")).write_text(json.dumps(renamed))
    with pytest.raises(UserError, match=r"voc-res152\.json: no IoU of class 'tvmonitor'"):
        tabulate.tabulate("voc", tmp_path)


def test_command_line(tmp_path: Path) -> None:
    """One line on an unknown table, and quickly: nothing large is imported."""
    command = [sys.executable, "-m", "pipeline.tabulate", "vco"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert ran.returncode == 1
    assert ran.stderr.startswith("error: no table 'vco'; the tables are person, ablation, ")
    assert ran.stderr.count("\n") == 1
    listed = "import sys, pipeline.tabulate as t; t.published(); print(*sys.modules)"
    ran = subprocess.run([sys.executable, "-c", listed], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"torch", "numpy", "mlflow", "matplotlib"} & set(ran.stdout.split())


@pytest.mark.parametrize(
    ("profile", "said"), [("mini", "mini: synthetic images"), ("lab", "lab: synthetic images"), ("paper", "")]
)
def test_where_results_lie_says_what_they_are_of(
    profile: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    (tmp_path / "profiles" / "lab.yaml").write_text("base: mini\n")
    (tmp_path / "params.yaml").write_text(f"profile: {profile}\n")
    (tmp_path / "results").mkdir()
    for name in TABLES:
        (tmp_path / "results" / f"{name}_table.md").touch()
    monkeypatch.chdir(tmp_path)
    report.where()
    line = capsys.readouterr().out.splitlines()[1]
    assert line.startswith(f"Profile {said or profile}")
    assert ("synthetic" in line) == bool(said)


# README and graph -----------------------------------------------------------------------------------------------------


def test_readme_block_of_a_run_that_is_not_comparable(results: Path, tmp_path: Path) -> None:
    """No number of the paper beside those of synthetic images: one line, and where their tables lie."""
    (tmp_path / "results").symlink_to(results / "results")
    (tmp_path / "README.md").write_text(f"{tabulate.START}\nold\n{tabulate.END}\n")
    tabulate.update_readme(tmp_path)
    (line,) = (tmp_path / "README.md").read_text().splitlines()[1:-1]
    assert line.startswith("**Tables 1 to 9 of the paper: 0 of 21 RefineNet rows run with its data and settings.** ")
    assert "mini: synthetic images; shows that the pipeline works" in line
    assert set(re.findall(r"\]\((.*?)\)", line)) == {f"results/{name}_table.md" for name in TABLES}
    assert not re.search(r"\d\.\d", line)


def test_readme_block(tmp_path: Path) -> None:
    root = tmp_path / "project"
    write_metrics(root, all_experiments(), "paper")
    for name in TABLES:
        tabulate.tabulate(name, root)
    (root / "README.md").write_text(f"# Name\n\n{tabulate.START}\nold\n{tabulate.END}\n\nThe end.\n")
    tabulate.update_readme(root)
    text = (root / "README.md").read_text()
    assert text == f"# Name\n\n{tabulate.START}\n{tabulate.summary(root)}\n{tabulate.END}\n\nThe end.\n"
    tabulate.update_readme(root)
    assert (root / "README.md").read_text() == text
    rows = [line for line in text.splitlines() if line.startswith("| [Table")]
    assert len(rows) == 1 + 12 + 1 + 3 + 1 + 2 + 2 + 2 + 4
    ours = f"{100 * scores('voc-res152')['protocols']['multi']['mean_iou']:.1f}"
    demo = f"{100 * scores('voc-res50-demo')['protocols']['single']['mean_iou']:.1f}"
    assert any(f"| RefineNet-Res50, the authors' demo ‡ | 69.1 ‡ | {demo} (val) | – |" in row for row in rows)
    assert (
        "\n\n‡ Not in the paper: RefineNet-Res50, the authors' demo. On val, 1449 images; single scale, trained on"
        in text
    )
    assert any(f"| RefineNet-Res152 | 83.4 | {ours} (val instead of test) | – |" in row for row in rows)


@pytest.mark.parametrize("text", ["no marks\n", "<!-- tables:end --> <!-- tables:start -->", None])
def test_readme_without_a_block(text: str | None, results: Path, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "README.md").write_text(text)
    with pytest.raises(UserError, match=r"README\.md: expected one block"):
        tabulate.update_readme(tmp_path)


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """README, results and metrics of the last commit: another machine's run may end in other digits, and may be new."""
    folder = tmp_path_factory.mktemp("committed")
    archive = ["git", "archive", "--format=tar", "HEAD", "README.md", "metrics", "results", "settings.json"]
    done = subprocess.run(archive, cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no commit with README.md, metrics and results: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder


def test_readme_shows_the_tables_in_results(committed: Path) -> None:
    """The block in this project's README is what its results/*.csv say."""
    readme = (committed / "README.md").read_text(encoding="utf-8")
    block = readme.partition(tabulate.START)[2].partition(tabulate.END)[0]
    assert block.strip() == tabulate.summary(committed).strip()


def test_tables_in_results_are_those_of_the_metrics(committed: Path, tmp_path: Path) -> None:
    """The tables in git are what the metrics in git give."""
    for name in ("metrics", "settings.json"):
        (tmp_path / name).symlink_to(committed / name)
    for name in TABLES:
        tabulate.tabulate(name, tmp_path)
        for suffix in tabulate.FORMATS:
            file = f"results/{name}_table.{suffix}"
            assert (tmp_path / file).read_bytes() == (committed / file).read_bytes(), file


def test_graph_feeds_each_table_its_experiments() -> None:
    """Stage table-<name> in dvc.yaml depends on the metrics of exactly the experiments that published.yaml names."""
    if not (ROOT / "dvc.yaml").is_file():
        pytest.skip("no dvc.yaml yet")
    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"]
    for name in TABLES:
        deps = [str(dep) for dep in stages[f"table-{name}"]["deps"]]
        metrics = {dep for dep in deps if dep.startswith("metrics/")}
        expected = {str(path(experiment)) for experiment in tabulate.experiments(name)}
        expected |= {f"metrics/seeds/{experiment.partition('-')[0]}" for experiment in tabulate.experiments(name)}
        assert metrics == expected | ({"metrics/servers"} if name in ("voc", "cityscapes") else set()), name
        outs = {path for out in stages[f"table-{name}"]["outs"] for path in out}
        assert outs == {f"results/{name}_table.{suffix}" for suffix in tabulate.FORMATS}, name


def test_the_tables_experiments_are_named_after_their_data() -> None:
    """By which a table finds their metrics: metrics/<data>/<experiment>.json."""
    experiments = yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))["experiments"]
    for name in all_experiments():
        assert name.partition("-")[0] == experiments[name]["data"]
