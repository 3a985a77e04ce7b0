"""Every number that a table shows, computed once more from metrics/ and paper.yaml alone; a changed digit is seen.

Nothing of pipeline/ takes part in the computing. Checked are the files of the last commit (profile mini) and those of a
made-up run with further seeds and a test server's answer.
"""

from __future__ import annotations

import csv
import io
import json
import random
import re
import shutil
import subprocess
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, ROUND_HALF_UP, Decimal
from fractions import Fraction
from functools import cache
from html.parser import HTMLParser
from math import sqrt
from pathlib import Path
from typing import Any

import pytest
import yaml
from fake_run import VOC, all_experiments, scores, write_metrics

from pipeline import tabulate

ROOT = Path(__file__).resolve().parents[2]
MINI = "mini: synthetic images; shows that the pipeline works, says nothing about RefineNet's accuracy"
WAYS = {"single": "single-scale", "multi": "multi-scale"}
NONE = "–"
BEHIND = ("experiment", "protocol", "evaluated_on_run", "where", "images", "seed", "seeds", "profile")
BEHIND += ("comparable", "notes")
WIDE = 6  # score columns with which the report has the mean first


# The computing --------------------------------------------------------------------------------------------------------


def rounded(value: Fraction | float) -> str:
    """A fraction in percent, one decimal."""
    exact = Fraction(value) * 100
    return str((Decimal(exact.numerator) / exact.denominator).quantize(Decimal("0.1"), ROUND_HALF_EVEN))


def mean(values: list[float]) -> Fraction:
    return sum(map(Fraction, values), Fraction(0)) / len(values)


@cache
def runs(root: Path, experiment: str) -> list[dict[str, Any]]:
    """The metrics of all its seeds, its own first."""
    own = root / "metrics" / experiment.split("-")[0] / f"{experiment}.json"
    again = [json.loads(file.read_text()) for file in (root / "metrics/seeds").glob("*/*.json")]
    further = sorted((run for run in again if run["experiment"] == experiment), key=lambda run: run["seed"])
    return [json.loads(own.read_text()), *further]


@cache
def answer(root: Path, experiment: str) -> dict[str, Any] | None:
    file = root / "metrics/servers" / f"{experiment}.json"
    return json.loads(file.read_text(), parse_float=Decimal) if file.is_file() else None


@dataclass
class Number:
    """What a table says beside one printed number."""

    run: str
    low: str = ""
    high: str = ""
    spread: str = ""
    comparable: bool = True

    def difference(self, paper: str) -> str:
        return "" if "" in (self.run, paper) or not self.comparable else str(Decimal(self.run) - Decimal(paper))

    def interval(self) -> str:
        return f"{self.low}–{self.high}" if self.low else ""


def on_val(root: Path, experiment: str, protocol: str, metric: str) -> Number:
    found = [run["protocols"][protocol] for run in runs(root, experiment)]
    values = [one["iou"][metric[4:]] if metric.startswith("iou ") else one[metric] for one in found]
    if None in values:
        return Number("")
    middle, result = mean(values), Number(rounded(mean(values)))
    if len(values) > 1:
        result.spread = rounded(sqrt(sum((Fraction(value) - middle) ** 2 for value in values) / (len(values) - 1)))
    if metric == "mean_iou" and all("interval" in one for one in found):
        result.low, result.high = (rounded(mean([one["interval"]["mean_iou"][i] for one in found])) for i in (0, 1))
    return result


def shown(root: Path, experiment: str, protocol: str, metric: str) -> Number:
    """Of a test server where its answer is recorded."""
    result = on_val(root, experiment, protocol, metric)
    if told := answer(root, experiment):
        percent = told["percent"]["iou"].get(metric[4:]) if metric != "mean_iou" else told["percent"]["mean_iou"]
        result = Number("" if percent is None else str(Decimal(percent).quantize(Decimal("0.1"), ROUND_HALF_UP)))
    result.comparable = comparable(root, experiment)
    return result


def comparable(root: Path, experiment: str) -> bool:
    """By the setting of the profile behind its scores, and never of synthetic images."""
    first, told = runs(root, experiment)[0], answer(root, experiment)
    profiles = json.loads((root / "settings.json").read_text())["tables"]
    return not first.get("drawn") and profiles.get((told or first)["profile"], {"comparable": False})["comparable"]


def called(table: dict[str, Any], split: str) -> str:
    """What the paper calls the images of a split."""
    return table.get("split", "val") if split == "val" else "test server" if split == "test" else split


@dataclass
class About:
    """What a table says of the experiment behind a number."""

    split: str
    images: int
    profile: str
    seeds: list[int]
    notes: list[str]
    warnings: list[str]


def about(root: Path, experiment: str, protocol: str) -> About:
    first, *further = runs(root, experiment)
    iou = next(iter(first["protocols"].values()))["iou"]
    occur = sum(value is not None for value in iou.values())
    absent = [] if occur == len(iou) else [f"{occur} of {len(iou)} classes occur"]
    seeds = [run["seed"] for run in (first, *further)]
    if not (told := answer(root, experiment)):
        return About(first["split"], first["images"], first["profile"], seeds, absent, [])
    val = on_val(root, experiment, protocol, "mean_iou")
    words = f"{val.run} on {first['split']}" + (f" ({val.interval()})" if val.low else "")
    words += f", mean of {len(seeds)} seeds ± {val.spread}" if val.spread else ""
    warnings, weights = [], first.get("weights", {}).get("md5")
    if weights and weights != told["weights"]["md5"]:
        warnings = [
            f"recorded for other weights than models/{experiment}.safetensors: md5 {told['weights']['md5']}, "
            f"metrics/{first['dataset']}/{experiment}.json is of {weights}"
        ]
    notes = [f"test server: {told['link']}", words, *warnings]
    return About("test", told["images"], told["profile"], seeds[:1], notes, warnings)


@dataclass
class Row:
    """A printed row: its labels, its numbers, and for a row of ours this run's with (experiment, protocol) of each.

    `by`: where it is published, if not in the paper, and `on` which images.
    """

    labels: list[str]
    paper: list[str]
    ours: list[Number]
    sources: list[tuple[str, str]]
    by: str = ""
    on: str = ""
    way: str = ""

    @property
    def marked(self) -> list[str]:
        return [self.labels[0] + " ‡" * bool(self.by), *self.labels[1:]]

    def same(self, table: dict[str, Any], split: str) -> bool:
        """Whether this run's number on `split` is of the published one's images."""
        if self.by:
            return self.on.split(",")[0] == called(table, split)
        return table["same_images"] or split == "test"


def rows(root: Path, table: dict[str, Any]) -> list[Row]:
    first, metrics = len(table["labels"]), list(table["scores"].values())
    result = []
    for row in table["rows"]:
        paper = ["" if value == NONE else f"{value:.1f}" for value in row[first : first + len(metrics)]]
        named = [tuple(source.split()) for source in row[first + len(metrics) :]]
        sources = named * len(metrics) if len(named) == 1 else named
        ours = [shown(root, *source, metric) for source, metric in zip(sources, metrics, strict=False)]
        result.append(Row(row[:first], paper, ours, sources))
    for row in table.get("others", []):
        paper = [str(row["values"].get(column, "")) for column in table["scores"]]
        sources = [tuple(row["here"].split())] * len(metrics) if "here" in row else []
        ours = [shown(root, *source, metric) for source, metric in zip(sources, metrics, strict=False)]
        result.append(Row(row["labels"], paper, ours, sources, row["by"], row["scored_on"], row["protocol"]))
    return result


def notes_of_others(published: list[Row]) -> list[str]:
    """A sentence for each source."""
    alike = dict.fromkeys((row.on, row.way, row.by) for row in published if row.by)
    names = {one: [row.labels[0] for row in published if (row.on, row.way, row.by) == one] for one in alike}
    return [f"‡ Not in the paper: {'; '.join(names[one])}. On {one[0]}; {one[1]}. Source: {one[2]}." for one in alike]


def heading(column: str) -> str:
    return re.sub("[^a-z0-9]+", "_", column.lower()).strip("_")


def signed(points: str) -> str:
    return (
        NONE
        if points == ""
        else points.replace("-", "−")
        if float(points) < 0
        else f"{'+' * (points != '0.0')}{points}"
    )


# What each form of a table must be ------------------------------------------------------------------------------------


def as_csv(root: Path, table: dict[str, Any]) -> list[dict[str, str]]:
    """The rows of the csv, whole."""
    columns, split_up = (
        list(map(heading, table["scores"])),
        any(len(row) > len(table["labels"]) + len(table["scores"]) + 1 for row in table["rows"]),
    )
    result = []
    for index, row in enumerate(rows(root, table), start=1):
        cells = {"table": str(table["number"]), "row": str(index), "published_by": row.by or "paper"}
        cells |= dict(zip(map(heading, table["labels"]), row.labels, strict=True))
        for i, column in enumerate(columns):
            one = row.ours[i] if row.ours else Number("")
            parts = {"paper": row.paper[i], "run": one.run, "difference": one.difference(row.paper[i])}
            parts |= {"low": one.low, "high": one.high, "spread": one.spread}
            cells |= {f"{column}_{part}": text for part, text in parts.items()}
        cells["evaluated_on_paper"] = row.on or table["evaluated_on"]
        for i, prefix in enumerate([f"{column}_" for column in columns] if split_up else [""]):
            behind = dict.fromkeys(BEHIND, "")
            if row.ours:
                of, (experiment, protocol) = about(root, *row.sources[i]), row.sources[i]
                where = "test server" if of.split == "test" else of.split
                same = row.same(table, of.split)
                elsewhere = [] if same else [f"the paper scores on the {table['evaluated_on']}, this run on {of.split}"]
                told = [experiment, protocol, of.split, where, str(of.images), " ".join(map(str, of.seeds))]
                told += [
                    str(len(of.seeds)),
                    MINI if of.profile == "mini" else of.profile,
                    "yes" if row.ours[i].comparable else "no",
                    "; ".join(elsewhere + of.notes),
                ]
                behind = dict(zip(behind, told, strict=True))
            cells |= {prefix + key: text for key, text in behind.items()}
        result.append(cells)
    return result


def apart(row: Row) -> bool:
    """Whether a row's numbers of this run stand below the printed table, because they are not comparable."""
    return bool(row.ours) and not all(one.comparable for one in row.ours)


def grid(root: Path, table: dict[str, Any], tex: bool) -> Iterator[tuple[list[str], list[str]]]:
    """(label cells, number cells) of each line that people read; then those of the table below, where there is one."""
    for row in rows(root, table):
        yield row.marked, [text or NONE for text in row.paper]
        if not apart(row):
            yield from of_this_run(root, table, row, tex)
    if separate := [row for row in rows(root, table) if apart(row)]:
        yield ["Run"], list(table["scores"])
        for row in separate:
            yield from of_this_run(root, table, row, False)


def of_this_run(root: Path, table: dict[str, Any], row: Row, tex: bool) -> Iterator[tuple[list[str], list[str]]]:
    """The lines of a row of ours."""
    if row.ours:
        split, way = about(root, *row.sources[0]).split, WAYS[row.sources[0][1]]
        same = row.same(table, split)
        mark, where = "" if same else " †", f", {split} instead of test server" if not same else ""
        if split == "test":
            where = ", test server"
        if row.by:
            where = f", {split}"
        names = ", ".join(dict.fromkeys(experiment for experiment, _ in row.sources))
        begin = "" if apart(row) else "this run: "
        label = f"this run, {way}{mark}" if tex else f"{begin}{names}, {way}{where}{mark}"
        yield [label], [one.run or NONE for one in row.ours]
        if any(one.low for one in row.ours):
            yield ["95 % interval"], [one.interval() for one in row.ours]
        if any(one.spread for one in row.ours):
            most = max(len(about(root, *source).seeds) for source in row.sources)
            yield [f"deviation, {most} seeds"], [one.spread or NONE for one in row.ours]
        if any(one.comparable for one in row.ours):
            yield [f"difference{mark}"], [signed(one.difference(p)) for one, p in zip(row.ours, row.paper, strict=True)]


def sentences(root: Path, table: dict[str, Any]) -> list[str]:
    """What must stand above or below the table, word by word."""
    interval = any(one.low for row in rows(root, table) for one in row.ours)
    told = ["95 % interval of the mean IoU: "] * interval
    told += [table["title"], f"{table['measure']}. Paper: {table['evaluated_on']}.", *table["notes"]]
    told += notes_of_others(rows(root, table))
    if any(one.comparable for row in rows(root, table) if not apart(row) for one in row.ours):
        told.append("Difference in points: this run − paper.")
    for row in rows(root, table):
        for experiment, protocol in row.sources:
            of = about(root, experiment, protocol)
            data, many = experiment.split("-")[0], "s" * (len(of.seeds) > 1)
            words = [
                f"`{experiment}`: {of.images} images of {data}, {called(table, of.split)}",
                f"seed{many} {', '.join(map(str, of.seeds))}",
            ]
            told.append("; ".join([*words, f"profile {of.profile}", *of.notes]))
            told += [MINI] * (of.profile == "mini") + [f"`{experiment}`: {warning}" for warning in of.warnings]
            if not row.same(table, of.split):
                told.append(
                    f"Not the paper's images: the paper scores on the {table['evaluated_on']}, this run on {of.split}"
                )
    return list(dict.fromkeys(told))


# Reading the files ----------------------------------------------------------------------------------------------------


def plain(tex: str) -> str:
    """What LaTeX prints."""
    tex = re.sub(r"\\textbf\{(.*)\}", r"\1", re.sub(r"\\rotatebox\{90\}\{(.*)\}", r"\1", tex.strip()))
    tex = re.sub(r"\\texttt\{([^}]*)\}", r"`\1`", tex.replace(r"\allowbreak{}", ""))
    signs = {
        "$-$": "−",
        "--": "–",
        r"$\pm$": "±",
        r"$\dagger$": "†",
        r"$\ddagger$": "‡",
        r"\%": "%",
        r"\_": "_",
        r"\#": "#",
        r"\&": "&",
    }
    for code, sign in signs.items():
        tex = tex.replace(code, sign)
    return re.sub(r"\\textasciitilde\{\}|\{([\[\]*])\}", lambda found: found[1] or "~", tex)


def markdown_lines(text: str) -> list[list[str]]:
    lines = [line for line in text.splitlines() if line.startswith("|") and not line.startswith("| :--")]
    return [[cell.strip().strip("*") for cell in line.strip("|").split("|")] for line in lines]


def latex_lines(text: str) -> list[list[str]]:
    bodies = [part.partition("\\bottomrule")[0] for part in text.split("\\toprule")[1:]]
    return [
        list(map(plain, line.strip().removesuffix(r"\\").split(" & ")))
        for body in bodies
        for line in body.splitlines()
        if line.endswith(r"\\")
    ]


def check_table(root: Path, name: str, table: dict[str, Any]) -> None:
    """AssertionError unless all three files of a table are what metrics and paper.yaml give."""
    file = root / "results" / f"{name}_table.csv"
    assert list(csv.DictReader(io.StringIO(file.read_text(encoding="utf-8")))) == as_csv(root, table)
    head, labels = [*table["labels"], *table["scores"]], len(table["labels"])
    for suffix, lines in (("md", markdown_lines), ("tex", latex_lines)):
        text = file.with_suffix(f".{suffix}").read_text(encoding="utf-8")
        found = lines(text)
        assert found[0] == head
        below = False  # the printed table, whose rows have names in so many columns
        for got, (left, numbers) in zip(found[1:], grid(root, table, suffix == "tex"), strict=True):
            below = below or left == ["Run"]
            assert got == left + [""] * (0 if below else labels - len(left)) + numbers, (name, suffix)
        words = text if suffix == "md" else " ".join(map(plain, text.splitlines()))
        for sentence in sentences(root, table):
            assert sentence in words, (name, suffix)
        if suffix == "md":
            assert text.startswith(f"# Table {table['number']}. ")


def check_readme(root: Path, printed: dict[str, Any]) -> None:
    """AssertionError unless README.md's block has exactly the mean IoU of each row of ours that is comparable."""
    expected, readme = [], (root / "README.md").read_text(encoding="utf-8")
    printed_rows, others = [], []
    for name, table in printed.items():
        columns = [i for i, metric in enumerate(table["scores"].values()) if metric == "mean_iou"]
        for row in rows(root, table):
            if row.ours and not row.by:
                printed_rows.append(all(row.ours[i].comparable for i in columns))
            for i in [i for i in columns if row.ours and row.ours[i].comparable]:
                of, one = about(root, *row.sources[i]), row.ours[i]
                which = f", {list(table['scores'])[i]}" if len(columns) > 1 else ""
                here = "test server" if of.split == "test" else f"{of.split} instead of test"
                if row.by:
                    here = of.split
                    others.append(row)
                run = one.run if table["same_images"] else f"{one.run} ({here})"
                seeds = f"{len(of.seeds)} (± {one.spread})" if one.spread else str(len(of.seeds))
                link = f"[Table {table['number']}{which}](results/{name}_table.md)"
                points = signed(one.difference(row.paper[i]))
                expected.append([link, row.paper[i] + " ‡" * bool(row.by), run, one.interval() or NONE, points, seeds])
    block = readme.partition("<!-- tables:start -->")[2].partition("<!-- tables:end -->")[0]
    assert [line[:1] + line[2:] for line in markdown_lines(block)[1:]] == expected
    assert all(note in block for note in notes_of_others(others))
    told = f"**Tables 1 to 9 of the paper: {sum(printed_rows)} of {len(printed_rows)} RefineNet rows run "
    assert (told in block) == (not all(printed_rows))


class Tables(HTMLParser):
    """The cells of every table on a page, row by row."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tables: list[list[list[str]]] = []
        self._inside = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "table":
            self.tables.append([])
        elif tag == "tr" and self.tables:
            self.tables[-1].append([])
        elif tag in ("td", "th") and self.tables and self.tables[-1]:
            self.tables[-1][-1].append("")
            self._inside = True

    def handle_endtag(self, tag: str) -> None:
        self._inside = self._inside and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.tables[-1][-1][-1] += data


def check_report(root: Path, printed: dict[str, Any]) -> None:
    """AssertionError unless the nine tables in the report show these numbers and no others."""
    tables = Tables((root / "results/report.html").read_text(encoding="utf-8")).tables
    for name, table in printed.items():
        count, expected = len(table["scores"]), rows(root, table)
        order = list(range(count)) if count < WIDE else [count - 1, *range(count - 1)]
        head = [*table["labels"], *(list(table["scores"])[i] for i in order)]
        for row in expected:
            row.paper, row.ours = ([cells[i] for i in order] if cells else [] for cells in (row.paper, row.ours))
        printed_rows = [[*row.marked, *(text or NONE for text in row.paper)] for row in expected]
        for i, row in enumerate(expected):
            if row.by and count >= WIDE:  # the mean alone, then in words
                printed_rows[i] = [*row.marked, row.paper[0], f"{row.way}. Source: {row.by}."]
        stripped = [[[cell.strip() for cell in line] for line in found] for found in tables]
        # These columns are of other tests; of seeds there is one where a number of this run stands among the paper's.
        others = ["Seeds", "Split"] if any(row.ours and not apart(row) for row in expected) else ["Split"]
        mine = [found for found in stripped if found[:1] == [[*head, *others]]]
        cut = [[line[: -len(others)] for line in found] for found in mine]
        (alike,) = [found for found in cut if found[1] == printed_rows[0]]
        starts = list(map(alike.index, printed_rows))
        for row, start in zip(expected, starts, strict=True):
            below = alike[start + 1 : min((other for other in starts if other > start), default=len(alike))]
            if not row.ours:
                continue
            if apart(row):
                assert not any("this run" in cell for line in below for cell in line), (name, row.labels)
                names = ", ".join(dict.fromkeys(experiment for experiment, _ in row.sources))
                below = [
                    line[:-2]
                    for found in stripped
                    if found[:1] == [["Run", *head[len(table["labels"]) :], "Seeds", "Split"]]
                    for line in found
                    if line[0].startswith(f"{names}, {WAYS[row.sources[0][1]]}")
                ]
            points = [signed(one.difference(paper)) for one, paper in zip(row.ours, row.paper, strict=True)]
            compared = any(one.comparable for one in row.ours)
            assert any(line[-count:] == points for line in below) == compared, (name, row.labels)
            assert any("difference" in line for line in below) == compared, (name, row.labels)
            first = [[re.split(r"[\s(\[]", cell, maxsplit=1)[0] for cell in line[-count:]] for line in below]
            assert [one.run or NONE for one in row.ours] in first, (name, row.labels)
            for line in below:
                if len(line) < count:
                    continue
                for cell, one, point in zip(line[-count:], row.ours, points, strict=True):
                    allowed = {one.run, one.low, one.high, one.spread, point.lstrip("+−")}
                    assert set(re.findall(r"\d+\.\d", cell)) <= allowed, (name, row.labels, cell)


def check(root: Path) -> None:
    """Everything under `root`: metrics, results, README.md and paper.yaml."""
    runs.cache_clear()
    answer.cache_clear()
    printed = yaml.load((root / "paper.yaml").read_bytes(), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    for name, table in printed.items():
        check_table(root, name, table)
    check_readme(root, printed)
    if (root / "results/report.html").is_file():
        check_report(root, printed)


# The files ------------------------------------------------------------------------------------------------------------


def make(root: Path) -> None:
    """Tables and README from the metrics under `root`."""
    shutil.copy(ROOT / "pipeline/tables/paper.yaml", root / "paper.yaml")
    (root / "README.md").write_text(f"{tabulate.START}\n{tabulate.END}\n")
    for name in yaml.safe_load((root / "paper.yaml").read_text()):
        tabulate.tabulate(name, root)
    tabulate.update_readme(root)


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """README, results and metrics of the last commit."""
    folder = tmp_path_factory.mktemp("committed")
    archive = [
        "git",
        "archive",
        "--format=tar",
        "HEAD",
        "README.md",
        "metrics",
        "results",
        "settings.json",
        "pipeline/tables/paper.yaml",
    ]
    done = subprocess.run(archive, cwd=ROOT, capture_output=True, check=False)
    if done.returncode:
        pytest.skip(f"no commit with README.md, metrics and results: {done.stderr.decode().strip()}")
    with tarfile.open(fileobj=io.BytesIO(done.stdout)) as tar:
        tar.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    (folder / "pipeline/tables/paper.yaml").rename(folder / "paper.yaml")
    return folder


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up metrics of mini, which are not comparable, with intervals."""
    root = tmp_path_factory.mktemp("toy")
    write_metrics(root, all_experiments())
    for file in (root / "metrics").glob("*/*.json"):
        metrics = json.loads(file.read_text()) | {"drawn": True}
        for protocol in metrics["protocols"].values():
            protocol["interval"] = {"mean_iou": [protocol["mean_iou"] - 0.05, protocol["mean_iou"] + 0.04]}
        file.write_text(json.dumps(metrics))
    make(root)
    return root


@pytest.fixture(scope="module")
def invented(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made-up metrics with intervals, three seeds of six experiments and the test servers' answers on two."""
    root = tmp_path_factory.mktemp("invented")
    write_metrics(root, all_experiments(), "paper")
    draw = random.Random(5)
    for folder in ("seeds", "servers"):
        (root / "metrics" / folder).mkdir()
    for experiment in all_experiments():
        file = root / "metrics" / experiment.split("-")[0] / f"{experiment}.json"
        metrics = json.loads(file.read_text()) | {"weights": {"md5": f"{draw.getrandbits(128):032x}"}}
        for protocol in metrics["protocols"].values():
            middle = protocol["mean_iou"]
            protocol["interval"] = {"mean_iou": [middle - draw.uniform(0, 0.1), middle + draw.uniform(0, 0.1)]}
        if experiment == "voc-res152":
            metrics["protocols"]["multi"]["iou"]["boat"] = metrics["protocols"]["single"]["iou"]["boat"] = None
        file.write_text(json.dumps(metrics))
        for seed in (1, 10) if experiment.endswith(("res101", "res50")) else ():
            other = json.loads(json.dumps(metrics)) | {"seed": seed}
            for kind, protocol in other["protocols"].items():
                again = scores(f"{experiment} {seed}")["protocols"][kind]
                protocol |= {key: again[key] for key in ("pixel_accuracy", "mean_accuracy", "mean_iou")}
                protocol["iou"] = {name: draw.uniform(0, 1) for name in protocol["iou"]}
            further = root / "metrics/seeds" / experiment.split("-")[0] / f"{experiment}-seed{seed}.json"
            further.parent.mkdir(exist_ok=True)
            further.write_text(json.dumps(other))
    iou = {name: round(draw.uniform(0, 100), 3) for name in VOC}
    answers = {
        "voc-res101": {"mean_iou": round(sum(iou.values()) / 21, 2), "iou": iou},
        "cityscapes-res101": {"mean_iou": round(draw.uniform(0, 100), 2), "iou": {}},
    }
    for experiment, told in answers.items():
        data = experiment.split("-")[0]
        weights = json.loads((root / "metrics" / data / f"{experiment}.json").read_text())["weights"]
        record = {"experiment": experiment, "dataset": data, "protocol": "multi", "profile": "paper"}
        record |= {"images": 1456, "weights": weights, "link": "https://server.example/a_b/1", "percent": told}
        if experiment.startswith("cityscapes"):
            record["weights"] = {"md5": "0" * 32}
        (root / "metrics/servers" / f"{experiment}.json").write_text(json.dumps(record))
    make(root)
    return root


def test_what_is_committed(committed: Path) -> None:
    """The tables, the README and the report in git are what the metrics in git give."""
    check(committed)


def test_a_run_that_is_not_comparable(toy: Path) -> None:
    check(toy)


def test_a_run_with_seeds_and_servers(invented: Path) -> None:
    check(invented)
    cells = (invented / "results/voc_table.md").read_text()
    assert "voc-res101, multi-scale, test server |" in cells
    assert "voc-res152, multi-scale, val instead of test server † |" in cells
    assert "recorded for other weights" in (invented / "results/cityscapes_table.md").read_text()
    assert "recorded for other weights" not in cells


# A changed digit ------------------------------------------------------------------------------------------------------

# The digits of a file that a table shows or that are its own. The paper prints no background, .tex has more than text.
PLACES = {
    "paper.yaml": r"(?<=[\s,])\d\d\.\d(?=[,\]])",
    "metrics/servers/*.json": r'(?<!"background": )(?<=: )\d+\.\d(?=\d*[,}])',
    "results/*.csv": r"\d+",
    "results/*.md": r"\d+",
    "results/*.tex": r"\d+",
    "README.md": r"(?<=\| )[−+]?\d+\.\d|(?<=[–−+])\d+\.\d|\d+(?= \|$)|\d+ of \d+",
}
NO_TEXT = re.compile(r"\\label\{.*?\}|\{3pt\}|\{90\}")


def spots(root: Path, pattern: str) -> list[tuple[Path, int]]:
    """Each digit that counts, as a file and a place in it; tables that are not the paper's have a test of their own."""
    found = []
    ours = {f"{name}_table" for name in yaml.safe_load((root / "paper.yaml").read_text())}
    for file in sorted(root.glob(pattern)):
        if pattern.startswith("results/") and file.stem not in ours:
            continue
        text = file.read_text(encoding="utf-8")
        masked = NO_TEXT.sub(lambda match: "x" * len(match[0]), text) if file.suffix == ".tex" else text
        if file.name == "README.md":
            before, start, rest = text.partition(tabulate.START)
            masked = "x" * len(before + start) + rest.partition(tabulate.END)[0]
        for match in re.finditer(PLACES[pattern], masked, re.MULTILINE):
            found += [(file, place) for place in range(*match.span()) if text[place].isdigit()]
    return found


def shown_digits(root: Path) -> list[tuple[Path, int]]:
    """The digits of the metrics that decide a shown percent: three of a fraction, two where it is one seed of three."""
    found = []
    for table in yaml.safe_load((root / "paper.yaml").read_text()).values():
        for row in rows(root, table):
            for (experiment, protocol), metric in zip(row.sources, table["scores"].values(), strict=False):
                data = experiment.split("-")[0]
                further = sorted((root / "metrics/seeds").glob(f"{experiment}-seed*.json"))
                if answer(root, experiment) and metric != "mean_iou":
                    continue
                for file in (root / "metrics" / data / f"{experiment}.json", *further):
                    text = file.read_text(encoding="utf-8")
                    one = json.loads(text)["protocols"][protocol]
                    values = [one["iou"][metric[4:]] if metric.startswith("iou ") else one[metric]]
                    values += one["interval"]["mean_iou"] if metric == "mean_iou" else []
                    for value in map(repr, values):
                        if re.match(r"0\.\d{4}\d*$", value) and text.count(value) == 1:
                            found += [(file, text.index(value) + 2 + i) for i in range(2 if further else 3)]
    return found


@pytest.mark.parametrize("pattern", ["metrics", *PLACES])
@pytest.mark.parametrize("which", ["committed", "invented"])
def test_a_changed_digit_is_caught(which: str, pattern: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    root: Path = request.getfixturevalue(which)
    copy = tmp_path / "copy"
    shutil.copytree(root, copy)
    runs.cache_clear()
    found = shown_digits(copy) if pattern == "metrics" else spots(copy, pattern)
    assert found or (which, pattern) == ("committed", "metrics/servers/*.json")
    draw = random.Random(pattern)
    for file, place in draw.sample(found, min(6, len(found))):
        text = file.read_text(encoding="utf-8")
        digit = draw.choice([other for other in "0123456789" if other != text[place]])
        file.write_text(text[:place] + digit + text[place + 1 :], encoding="utf-8")
        try:
            check(copy)
        except (AssertionError, ValueError):
            file.write_text(text, encoding="utf-8")
        else:
            pytest.fail(f"{file.name}: {digit} for {text[place]} not seen in {text[place - 60 : place + 10]!r}")
    check(copy)


def test_the_committed_table_of_camvid(committed: Path) -> None:
    """What this run scored, from metrics/, and what others have published, each number as its file has it."""
    published = yaml.safe_load((ROOT / "pipeline/tables/published/camvid.yaml").read_text())["rows"]
    with (committed / "results/camvid_table.csv").open(newline="") as file:
        table = list(csv.DictReader(file))
    ours, others = ([row for row in table if bool(row["experiment"]) is run] for run in (True, False))
    assert ours
    for row in ours:
        metrics = json.loads((committed / f"metrics/camvid/{row['experiment']}.json").read_text())
        protocol = metrics["protocols"][row["protocol"]]
        assert row["mean_iou"] == rounded(protocol["mean_iou"])
        assert (row["mean_iou_low"], row["mean_iou_high"]) == tuple(
            rounded(end) for end in protocol["interval"]["mean_iou"]
        )
    assert len(others) == len(published)
    for row, wanted in zip(others, published, strict=True):
        assert Decimal(row["mean_iou"]) == Decimal(str(wanted["mean_iou"]))
    text = (committed / "results/camvid_table.md").read_text()
    assert all(row["mean_iou"] in text for row in table)
