"""The report on made-up results: complete, self-contained, readable, the same bytes every time."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_project
import yaml
from fake_run import COUNTS, SPLITS, all_experiments, classes, scene, write_metrics, write_run
from html_page import Page
from hypothesis import given
from hypothesis import strategies as st

from pipeline import report, tabulate
from pipeline.formats import label_images
from pipeline.page import charts, dataset_section, paper, result_section, summary
from pipeline.page import page as page_of_both
from pipeline.runtime.dvc_md5 import dvc_md5
from pipeline.tables import columns
from pipeline.tables.paper import published, slug
from refinenet.data.split import Schema, Split
from refinenet.data.writer import write_split
from refinenet.errors import UserError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("run")
    write_run(root)
    report.run(root=root)
    return root


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page((run / "results" / "report.html").read_text(encoding="utf-8"))


def test_asks_for_nothing_from_outside(run: Path, page: Page) -> None:
    html = (run / "results" / "report.html").read_text(encoding="utf-8")
    assert not page.all("script")
    assert not page.all("link")
    assert not re.search(r"url\((?!%23)|@import|<base", html)
    for _, attributes in page.elements:
        for name in ("src", "srcset", "href", "poster", "data", "action"):
            assert (attributes.get(name) or "#").startswith(("data:image/", "#")), attributes
    policy = [meta["content"] for meta in page.all("meta") if meta.get("http-equiv") == "Content-Security-Policy"]
    assert policy == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_says_nothing_of_this_machine_or_hour(run: Path) -> None:
    html = (run / "results" / "report.html").read_text(encoding="utf-8")
    assert str(run) not in html
    assert str(Path.home()) not in html or str(Path.home()) == "/"
    assert not re.search(r"\b20[2-9]\d-\d\d-\d\d|dc:date|T\d\d:\d\d:\d\d", html)


def test_same_bytes_in_another_folder_and_process(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "again")
    (tmp_path / "again" / "results" / "report.html").unlink()
    command = [sys.executable, "-m", "pipeline.report"]
    subprocess.run(command, check=True, cwd=tmp_path / "again", env={"PYTHONPATH": str(ROOT), "PYTHONHASHSEED": "7"})
    again = (tmp_path / "again" / "results" / "report.html").read_bytes()
    assert again == (run / "results" / "report.html").read_bytes()


def test_every_cell_of_the_nine_tables(run: Path, page: Page) -> None:
    """A printed row is followed by its values, a row of ours by this run's values, how many seeds and which images."""
    words = " ".join(page.text.split())
    for of in published().values():
        assert f"Table {of.number}. {of.title}" in words
        for row, record in zip(of.all_rows, columns.read(of, run), strict=True):
            order = paper.shown_order(of)
            printed = " ".join(row.values[i] for i in order)
            if row.by and of.name == "voc":
                printed = f"{row.values[-1]} {row.protocol}. Source: {row.by}."
            assert f"{' '.join(row.marked())} {printed}" in words
            if row.sources:
                ours = " ".join(record[f"{slug(of.scores[i].column)}_run"] for i in order)
                assert f"{ours} 1 {of.split} (12)" in words


def test_a_mini_run_says_so_and_is_not_compared(page: Page) -> None:
    """The caveat stands at the top, over this run's scores and where it is said how to report; no difference is."""
    assert page.text.count("mini: synthetic images; shows that the pipeline works") == 2 + len(published())
    assert "None of the paper’s numbers is confirmed or refuted: 0 of its 21 RefineNet rows" in page.text
    assert "difference" not in page.text.rpartition("The nine tables of")[2]
    assert "mean IoU of the paper beside" not in " ".join(str(image["alt"]) for image in page.all("img"))


def test_no_row_of_the_paper_has_a_score_of_mini(run: Path, page: Page) -> None:
    """They are folded, in a table whose rows have the experiments' names; no sentence to copy has one, either."""
    html = (run / "results/report.html").read_text(encoding="utf-8")
    unfolded = re.sub(r"<details>.*?</details>", "", html, flags=re.S)
    chapter = unfolded.partition('<section id="tables">')[2].partition('<section id="report">')[0]
    assert chapter.count("<table>") == len(published())
    assert "this run:" not in chapter
    assert 'class="run"' not in chapter
    assert ">Seeds</th>" not in chapter, "of nobody's number it is known"
    assert html.count('<tr class="run"><th scope="row"><a href="#') == 9 + 13
    quoted = re.findall(r"<blockquote>(.*?)</blockquote>", html)
    assert quoted == [
        "RefineNet-Res101, our reproduction: … % mean IoU on PASCAL Person-Part test (… images); multi-scale (0.6, "
        "0.8, 1); mean of … seeds (…) ± …; 95 % bootstrap interval over images …; profile …; weights md5 …."
    ]


def test_in_the_order_of_what_readers_want(page: Page) -> None:
    """Verdict, tables, a chapter for each data set, provenance; what is long is folded."""
    sections = [attributes["id"] for attributes in page.all("section") if "id" in attributes]
    sets = ["person", "nyud", "voc", "cityscapes", "context", "sunrgbd", "ade20k", "coco"]
    assert sections == ["verdict", "tables", "report", *(f"data-{name}" for name in sets), "cost", "chain"]
    titles = re.findall(r"(\d+) classes: share of pixels", page.text)
    assert sorted(map(int, titles)) == sorted(COUNTS.values())
    # How to read; this run's scores; classes; colours; md5s, archives, by hand.
    assert len(page.all("details")) == 1 + len(published()) + len(COUNTS) + 7 + 3


def test_others_are_told_apart(page: Page) -> None:
    words = " ".join(page.text.split())
    assert words.count("Not in the paper: published by others ‡") == sum(bool(of.others) for of in published().values())
    assert "RefineNet-Res101, the authors' weights in PyTorch ‡ 80.5 single scale, converted weights. Source: " in words
    assert "On test; single scale; another, smaller network. Source: README of DrSleep/light-weight-refinenet." in words


def test_each_number_leads_to_its_md5s(run: Path, page: Page) -> None:
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    links = {(attributes["href"] or "")[1:] for attributes in page.all("a")}
    assert links <= set(ids)
    assert set(all_experiments()) <= links
    for experiment in all_experiments():
        metrics = f"metrics/{experiment.partition('-')[0]}/{experiment}.json"
        for file in (metrics, f"models/{experiment}.safetensors"):
            assert f"{file} {dvc_md5(run / file)}" in page.text
    for name in COUNTS.keys() - {"coco"}:  # no number is of COCO
        assert f"data/{name} {dvc_md5(run / 'data' / name)}" in page.text


def test_a_caption_names_the_protocol_that_evaluate_drew(page: Page) -> None:
    """It draws the last one of settings.json, where keys are sorted; the tables' own is another."""
    captions = re.findall(r"(Image, truth and prediction|Confusion matrix) of [a-z0-9-]+, ([a-z]+-scale)", page.text)
    assert captions == [("Image, truth and prediction", "single-scale"), ("Confusion matrix", "multi-scale")] * 7


@pytest.mark.slow
def test_the_commands_of_the_page_lead_from_a_number_to_its_md5s(run: Path, tmp_path: Path) -> None:
    import mlflow

    page = (run / "results" / "report.html").read_text(encoding="utf-8")
    experiment = re.findall(r"<p>For ([a-z0-9-]+), in the project", page)[0]
    commands = unescape(re.findall(r"<code># the number(.*?)</code>", page, re.S)[0])
    data = experiment.partition("-")[0]
    environment = small_project.environment(ROOT)
    folder = shutil.copytree(run, tmp_path / "run")
    (folder / "data" / "raw" / data).mkdir(parents=True)
    (folder / "data" / "raw" / data / "archive.tar").write_bytes(b"archive")
    weights, split = f"models/{experiment}.safetensors", f"data/{data}"
    md5s = {path: dvc_md5(folder / path) for path in (weights, split)}
    outs = [{"path": path, "hash": "md5", "md5": md5} for path, md5 in md5s.items()]
    stages = {"made": {"cmd": "made", "outs": outs}}
    (folder / "dvc.lock").write_text(yaml.safe_dump({"schema": "2.0", "stages": stages}, sort_keys=False))
    (folder / "dvc.yaml").write_text(yaml.safe_dump({"stages": {"made": {"cmd": "made", "outs": list(md5s)}}}))
    for command in (
        ["git", "init", "--quiet"],
        ["dvc", "init", "--quiet"],
        ["git", "add", "metrics", "dvc.yaml", "dvc.lock"],
    ):
        subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True)
    identity = ["-c", "user.name=somebody", "-c", "user.email=somebody@example.org"]
    subprocess.run(["git", *identity, "commit", "-qm", "results"], cwd=folder, check=True)
    client = mlflow.MlflowClient(f"sqlite:///{folder}/mlflow.db")
    tagged = client.create_run(client.create_experiment(data), tags={"weights.md5": md5s[weights]}).info.run_id
    done = subprocess.run(
        ["bash", "-ec", f"# the number{commands}"],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert tagged in done.stdout
    assert done.stdout.count(md5s[weights]) > 2  # of the metrics or the run, dvc.lock, md5sum
    assert done.stdout.count(md5s[split]) > 1
    assert (
        subprocess.run(["git", "rev-parse", "HEAD"], cwd=folder, capture_output=True, text=True).stdout in done.stdout
    )


def test_pictures_have_alt_texts_and_labels_keep_their_colours(run: Path, page: Page) -> None:
    images = page.all("img")
    # 4 training and 2 other images a data set, with labels; COCO has only training images, two sets have 2 test images
    sheets = 2 * (8 * 4 + 7 * 2) + 2 * 2
    # 3 times image | truth | prediction, curves and confusion matrix of a data set
    assert len(images) == sheets + 7 * (3 * 3 + 2)
    assert all(image["alt"] and image["width"] and image["height"] for image in images)
    assert any((image["alt"] or "").startswith("Prediction of voc-res152 for picture_0: ") for image in images)
    split = Split(run / "data" / "voc" / "train.arrow")
    label = split[0].label
    assert label is not None
    named = [image for image in images if (image["alt"] or "").startswith("Label of voc_train_0000: ")]
    assert len(named) == 1
    biggest = split.schema.classes[int(np.argmax(np.bincount(label[label < 255])))]
    assert (named[0]["alt"] or "").startswith(f"Label of voc_train_0000: {biggest}, ")
    shown = decode(named[0]["src"])
    assert np.array_equal(shown[label < 255], np.array(split.schema.palette)[label[label < 255]])
    assert [image["alt"] for image in images if "voc_test" in (image["alt"] or "")] == [
        "Image voc_test_0000",
        "Image voc_test_0001",
    ]


def decode(uri: str | None) -> np.ndarray[Any, Any]:
    import io
    from base64 import b64decode

    from PIL import Image

    assert uri is not None
    return np.asarray(Image.open(io.BytesIO(b64decode(uri.partition(",")[2]))).convert("RGB"))


@pytest.mark.parametrize("name", COUNTS)
def test_the_numbers_of_a_data_set(name: str, run: Path, page: Page) -> None:
    """As counted pixel by pixel, and on the page: images, sizes, void, and each class's share and images."""
    words = " ".join(page.text.split())
    cells: dict[str, str] = dict.fromkeys(classes(name), "")
    for part in SPLITS.get(name, ("train", "val")):
        split = Split(run / "data" / name / f"{part}.arrow")
        found = dataset_section.numbers(split)
        areas = sorted((sample.image.shape[0] * sample.image.shape[1], sample.image.shape[1::-1]) for sample in split)
        assert found.images == len(areas)
        assert [size for _, size in (areas[0], areas[(len(areas) - 1) // 2], areas[-1])] == list(found.sizes)
        of_paper = "test" if name in published() and published()[name].split == "test" else "validation"
        called = of_paper if part == "val" else dataset_section.PARTS[part]
        told = f"{called} {len(areas)} 64 × {areas[0][1][1]} to 64 × {areas[-1][1][1]}, median 64 × "
        if part == "test":
            assert (found.labelled, found.void) == (0, None)
            assert f"{told}48 no labels –" in words
            continue
        labels = [sample.label for sample in split if sample.label is not None]
        pixels = np.concatenate([label.ravel() for label in labels])
        assert found.void == pytest.approx(np.mean(pixels == 255))
        assert f"{told}{areas[(len(areas) - 1) // 2][1][1]} {100 * np.mean(pixels == 255):.2f} %" in words
        for index, one in enumerate(classes(name)):
            share = float(np.mean(pixels[pixels != 255] == index))
            images = sum(bool((label == index).any()) for label in labels)
            assert (found.shares[index], found.containing[index]) == (pytest.approx(share), images)
            cells[one] += f" {dataset_section.percent(share)} {images} ({100 * images / len(labels):.1f} %)"
    for one, text in cells.items():
        assert f"{one}{text}" in words


def test_rare_classes_are_named(tmp_path: Path) -> None:
    schema = Schema("voc", "train", tuple("abcdef"), label_images.colour_map(6))
    with write_split(tmp_path / "data" / "voc" / "train.arrow", schema) as writer:
        label = np.zeros((100, 200), np.uint8)
        label[0] = 255
        label[1, :3], label[2], label[3:50] = 2, 3, 4
        writer.add("one", np.zeros((100, 200, 3), np.uint8), label)
        writer.add("two", np.zeros((1, 1, 3), np.uint8), np.zeros((1, 1), np.uint8))
    told = dataset_section.facts(dataset_section.open_dataset(tmp_path, "voc"))
    assert told["facts"][0]["rarest"] == (
        "2 never: b, f; c (0.02 %, 1 image), d (1.01 %, 1 image), e (47.47 %, 1 image)"
    )
    assert (told["facts"][0]["sizes"], told["facts"][0]["void"]) == ("1 × 1 to 200 × 100, median 1 × 1", "1.00 %")
    assert [dataset_section.percent(share) for share in (0, 1e-9, 0.5, 1)] == [
        "0.00 %",
        "< 0.01 %",
        "50.00 %",
        "100.00 %",
    ]


@given(st.integers(1, 500), st.integers(1, 20))
def test_sheets_are_from_all_over_the_split(count: int, wanted: int) -> None:
    chosen = dataset_section.evenly_spaced(count, wanted)
    assert len(chosen) == len(set(chosen)) == min(count, wanted)
    assert chosen == sorted(chosen)
    assert chosen[0] >= 0
    assert chosen[-1] < count
    gaps = np.diff([-chosen[0] - 1, *chosen, 2 * count - 1 - chosen[-1]])  # mirrored at the ends
    assert gaps.max() - gaps.min() <= 2


def luminance(colour: str) -> float:
    """WCAG 2.2's relative luminance of #rrggbb."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_is_aa_in_light_and_dark(run: Path) -> None:
    """Text 4.5:1 on every surface it stands on, lines of charts 3:1 (WCAG 2.2, 1.4.3 and 1.4.11)."""
    html = (run / "results" / "report.html").read_text(encoding="utf-8")
    blocks = re.findall(r":root \{(.*?)\}", html, re.DOTALL)[:2]
    for side, block in enumerate(blocks):
        colours = dict(re.findall(r"--(\w[\w-]*): (#[0-9a-f]{6});", block))
        for surface in ("page", "card", "ours"):
            for text in ("ink", "quiet", "link"):
                assert contrast(colours[text], colours[surface]) >= 4.5, (side, text, surface)
        assert contrast(colours["warn"], colours["warn-page"]) >= 4.5
        assert contrast(colours["ink"], colours["bar"]) >= 4.5
        for role in ("ink", "quiet"):
            assert contrast(label_images.ROLES[role][side], colours["page"]) >= 4.5
        for pair in charts.SERIES:
            assert contrast(pair[side], colours["page"]) >= 3


def test_names_from_data_are_escaped(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    schema = Schema("person", "train", ("<script>x</script>", *"abcdef"), label_images.colour_map(7))
    with write_split(tmp_path / "run" / "data" / "person" / "train.arrow", schema) as writer:
        writer.add('"><b>', *scene(np.random.default_rng(0), 7, 48, 64))
    html = paper.html(tmp_path / "run")
    assert "<script" not in html
    assert "<b>" not in re.sub(r"<b>[^<]*</b>", "", html)
    assert "&lt;script&gt;x&lt;/script&gt;" in html


def test_large_pictures_still_fit(run: Path) -> None:
    """Where pictures at full size would be too much for a file in git, fewer and smaller ones are shown."""
    full = len(paper.html(run).encode())
    assert full < page_of_both.LIMIT
    assert len(paper.html(run, full - 1).encode()) < full


def test_paper_profile_counts_what_is_close(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    write_metrics(tmp_path / "run", all_experiments(), "paper")
    for name in published():
        tabulate.tabulate(name, tmp_path / "run")
    text = paper.html(tmp_path / "run")
    assert "shows that the pipeline works" not in text
    assert "mean IoU of the paper beside this run" in text
    found = summary.numbers({of.name: columns.read(of, tmp_path / "run") for of in published().values()})
    comparable = [number for number in found if not number.experiment.startswith(("voc", "cityscapes"))]
    assert [number for number in found if number.same_images] == comparable
    close = sum(abs(number.paper - number.run) < 1.05 for number in comparable)
    assert f"<b>{close} of {len(comparable)}</b> mean IoU within 1 point of the paper" in text
    points = columns.signed(columns.read(published()["nyud"], tmp_path / "run")[4]["iou_difference"])
    assert ">difference</th>" in text
    assert f"<td>{points}</td>" in text
    assert (len(found), len(comparable)) == (24, 21)


@pytest.mark.parametrize(
    ("gone", "message"),
    [
        ("results/voc_table.csv", "results/voc_table.csv: no such file; stage table-voc makes it"),
        ("metrics/nyud/nyud-res50.json", "metrics/nyud/nyud-res50.json: no such file; `evaluate nyud-res50` makes it"),
        ("curves/person-res50.csv", "curves/person-res50.csv: no such file; `train person-res50` makes it"),
        (
            "predictions/ade20k-res152",
            "predictions/ade20k-res152/confusion-multi.npy: no such file; `evaluate ade20k-res152` makes it",
        ),
        ("settings.json", "settings.json: no such file; stage settings makes it"),
        ("models/voc-res101.safetensors", "models/voc-res101.safetensors: "),
        ("data/context", "data/context: no such folder; `prepare context` makes it"),
        ("data/coco", "data/coco: no such folder; `prepare coco` makes it"),
        ("data/person/train.arrow", "data/person/train.arrow: no such file; `prepare person` makes it"),
    ],
)
def test_a_missing_input_is_named(gone: str, message: str, run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    victim = tmp_path / "run" / gone
    (tmp_path / "run" / "results" / "report.html").unlink()
    if victim.is_dir():
        shutil.rmtree(victim)
    else:
        victim.unlink()
    with pytest.raises(UserError) as error:
        report.run(root=tmp_path / "run")
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "results" / "report.html").exists()


@pytest.mark.parametrize("text", ["", "step,loss\n1,2\n", "step,loss,lr\n1,x,3\n"])
def test_a_malformed_curve_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / "curves").mkdir()
    (tmp_path / "curves" / "voc-res101.csv").write_text(text)
    with pytest.raises(UserError, match=r"^curves/voc-res101\.csv: "):
        result_section.curve("voc-res101", tmp_path)
