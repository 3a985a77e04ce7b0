"""metrics/ + published.yaml -> results/<table>_table.csv and .md: the paper's rows, this run's, the difference.

    python -m pipeline.tabulate voc         one table
    python -m pipeline.tabulate leaves      the table of a data set of one's own (pipeline/own_table.py)
    python -m pipeline.tabulate --readme    the summary in README.md, from the nine results/*_table.csv

The columns of the csv are described in pipeline/tables.py.
"""

from __future__ import annotations

import argparse
import csv
import io
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from pipeline import scores, stage, tables
from pipeline.published import NOT_PRINTED, Row, Table, caveat, published, slug, table
from pipeline.scores import Scores
from refinenet.files import UserError, whole_file

START, END = "<!-- tables:start -->", "<!-- tables:end -->"


@dataclass(frozen=True)
class Line:
    """A printed row beside this run: in `run` and `difference` a text for each score column, "" where there is none."""

    row: Row
    run: tuple[str, ...]
    difference: tuple[str, ...]
    behind: tuple[Scores, ...]  # for each score column, whose number it is; () in a competitor's row


def experiments(name: str) -> list[str]:
    """The experiments whose metrics table `name` reads, sorted."""
    return table(name).experiments()


def difference(run: str, paper: str) -> str:
    """Points between two printed numbers, as a reader would subtract them; "" where one is missing."""
    return "" if run == "" or paper == NOT_PRINTED else str(Decimal(run) - Decimal(paper))


def lines(of: Table, root: Path) -> list[Line]:
    """All rows of a table with what this run has for them."""
    metrics = {experiment: scores.load(experiment, root) for experiment in of.experiments()}
    result = []
    for row in of.rows:
        behind = tuple(metrics[source.experiment] for source in row.sources)
        run = tuple(
            tables.percent(metrics[source.experiment].value(source.protocol, score.metric))
            for source, score in zip(row.sources, of.scores, strict=False)
        )
        result.append(Line(row, run, tuple(map(difference, run, row.values)), behind))
    return result


def _elsewhere(of: Table, run: Scores) -> list[str]:
    """Says where the run's images are not those that the paper scores."""
    return [] if of.same_images else [f"the paper scores on the {of.evaluated_on}, this run on {run.split}"]


def as_csv(of: Table, content: Sequence[Line]) -> str:
    """The table as csv, columns as in pipeline/tables.py."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(tables.columns(of))
    for index, line in enumerate(content, start=1):
        cells = [str(of.number), str(index), *line.row.labels]
        for i, paper in enumerate(line.row.values):
            ours = [line.run[i], line.difference[i]] if line.behind else ["", ""]
            cells += ["" if paper == NOT_PRINTED else paper, *ours]
        cells.append(of.evaluated_on)
        for _, (first, *_) in of.groups():
            if not line.behind:
                cells += [""] * len(tables.BEHIND)
                continue
            source, run = line.row.sources[first], line.behind[first]
            notes = "; ".join(_elsewhere(of, run) + run.absent())
            profile = caveat(run.profile) or run.profile
            cells += [source.experiment, source.protocol, run.split, str(run.images), str(run.seed), profile, notes]
        writer.writerow(cells)
    return text.getvalue()


def as_markdown(of: Table, content: Sequence[Line]) -> str:
    """The table as the paper prints it; under each row of ours this run's numbers and the difference."""
    rows: list[Sequence[str]] = []
    blank = [""] * (len(of.labels) - 1)
    for line in content:
        ours = bool(line.behind)
        rows.append([f"**{text}**" if ours else text for text in line.row.labels] + list(line.row.values))
        if ours:
            names = ", ".join(dict.fromkeys(source.experiment for source in line.row.sources))
            who = f"this run: {names}, {tables.how(of, line.row.sources[0], line.behind[0].split)}"
            rows.append([who, *blank, *(text or NOT_PRINTED for text in line.run)])
            rows.append(["difference", *blank, *map(tables.signed, line.difference)])
    behind = {run.experiment: run for line in content for run in line.behind}
    notes = list(of.notes)
    if not of.same_images:
        splits = ", ".join(sorted({run.split for run in behind.values()}))
        notes.append(
            f"Not the paper's images: the paper scores on the {of.evaluated_on}, this run on {splits}, whose labels "
            "are public. The difference shows both side by side; it is not a like-for-like comparison."
        )
    for run in behind.values():
        scored = f"`{run.experiment}`: {run.images} images of {run.dataset} {run.split}"
        notes.append("; ".join([scored, f"seed {run.seed}", f"profile {run.profile}", *run.absent()]))
    text = [f"# Table {of.number}. {of.title}", ""]
    for warning in _caveats(run.profile for run in behind.values()):
        text += [f"> **{warning}**", ""]
    text += [f"{of.measure}. Paper: {of.evaluated_on}. Difference in points: this run − paper.", ""]
    text += [*tables.markdown([*of.labels, *(score.column for score in of.scores)], len(of.labels), rows), ""]
    text += [f"- {note}" for note in notes]
    return "\n".join(text) + "\n"


def _caveats(profiles: Iterable[str]) -> list[str]:
    return [warning for profile in sorted(set(profiles)) if (warning := caveat(profile))]


# What a table is written as: suffix -> renderer.
FORMATS = {"csv": as_csv, "md": as_markdown}


def tabulate(name: str, root: Path = Path()) -> None:
    """Write every form of table `name` under `root`/results; raise UserError before any where a metric is missing."""
    if name in published():
        content = lines(table(name), root)
        forms = {suffix: form(table(name), content) for suffix, form in FORMATS.items()}
    else:
        from pipeline import own_table

        forms = own_table.forms(name, root)
    for suffix, text in forms.items():
        with whole_file(root / "results" / f"{name}_table.{suffix}") as part:
            part.write_text(text, encoding="utf-8", newline="\n")


def summary(root: Path = Path()) -> str:
    """The tables in brief: mean IoU of each row of ours, from `root`/results/*_table.csv."""
    rows, profiles = [], set()
    for of in published().values():
        for record in tables.read(of, root):
            labels = {label: record[slug(label)] for label in of.labels if record[slug(label)] != NOT_PRINTED}
            row = ", ".join(f"{label} {text}" if text in ("yes", "no") else text for label, text in labels.items())
            for prefix, columns in of.groups():
                if not record[f"{prefix}experiment"]:
                    continue
                score = of.scores[columns[-1]].column  # where the paper prints several, the last is the mean IoU
                where = f"[Table {of.number}{f', {score}' if prefix else ''}](results/{of.name}_table.md)"
                paper, run, points = (record[f"{slug(score)}_{part}"] for part in ("paper", "run", "difference"))
                mark = "" if of.same_images else f" ({record[f'{prefix}evaluated_on_run']} instead of test)"
                rows.append([where, row, paper, run + mark, tables.signed(points)])
                profiles.add(record[f"{prefix}profile"])
    warnings = [f"> **{profile}**\n" for profile in sorted(profiles - {"paper"})]
    header = ["Table", "Row", "Paper", "This run", "Difference"]
    return "\n".join([*warnings, "Mean IoU in percent.", "", *tables.markdown(header, 2, rows)])


def update_readme(root: Path = Path()) -> None:
    """Rewrite the marked block of `root`/README.md; raise UserError unless it has both marks, once, in order."""
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not end or START in rest or END in before + after:
        raise UserError(f"README.md: expected one block from {START} to {END}")
    with whole_file(readme) as part:
        part.write_text(f"{before}{start}\n{summary(root)}\n{end}{after}", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("name", metavar="TABLE", nargs="?", help=", ".join(published()))
    what.add_argument("--readme", action="store_true", help="rewrite the block of tables in README.md")
    given = parser.parse_args()
    sys.exit(stage.report(update_readme if given.readme else lambda: tabulate(given.name)))
