"""metrics/ + paper.yaml -> results/<table>_table.csv, .md and .tex: the paper's rows, this run's, the difference.

    python -m pipeline.tabulate voc         one table
    python -m pipeline.tabulate leaves      the table of a data set that is not in the paper (pipeline/tables/custom.py)
    python -m pipeline.tabulate --readme    the summary in README.md, from the nine results/*_table.csv

Against the paper's numbers stand only those of a profile that is `comparable`. Others have a table of their own below,
without the paper's names of rows and without differences; of them README.md has how many of the rows are run.

The columns of the csv are described in pipeline/tables/columns.py. Where a test server's scores are recorded
(metrics/servers/), they stand in the place of those on val.
"""

from __future__ import annotations

import csv
import io
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from decimal import Decimal
from pathlib import Path

from pipeline.runtime import cli
from pipeline.tables import columns as tables
from pipeline.tables import latex
from pipeline.tables.compare import Cell, ResultRow, rows
from pipeline.tables.paper import ELSEWHERE, NOT_PRINTED, PROTOCOLS, Row, Table, notes_of_others, published, slug, table
from refinenet.atomic import atomic_file
from refinenet.errors import UserError

START, END = "<!-- tables:start -->", "<!-- tables:end -->"
APART = "Scores of this run, not comparable with the paper's"


def experiments(name: str) -> list[str]:
    """The experiments whose metrics table `name` reads, sorted."""
    return table(name).experiments()


def _elsewhere(of: Table, row: Row, split: str) -> list[str]:
    """Says where the run's images are not those that the paper scores."""
    if tables.like_for_like(of, row, split):
        return []
    return [f"the paper scores on the {of.evaluated_on}, this run on {split}"]


def as_csv(of: Table, content: Sequence[ResultRow]) -> str:
    """The table as csv, columns as in pipeline/tables/columns.py."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(tables.columns(of))
    for index, line in enumerate(content, start=1):
        cells = [str(of.number), str(index), line.row.by or "paper", *line.row.labels]
        for i, paper in enumerate(line.row.values):
            ours = line.cells[i] if line.behind else Cell("")
            cells.append("" if paper == NOT_PRINTED else paper)
            cells += [ours.run, ours.difference, ours.low, ours.high, ours.spread]
        cells.append(line.row.on or of.evaluated_on)
        for _, (first, *_) in of.groups():
            if not line.behind:
                cells += [""] * len(tables.BEHIND)
                continue
            behind = line.behind[first]
            cells += [behind.source.experiment, behind.source.protocol, behind.split, tables.where(behind.split)]
            cells += [str(behind.images), " ".join(map(str, behind.seeds)), str(len(behind.seeds))]
            cells += [behind.caveat or behind.profile, "yes" if behind.comparable else "no"]
            cells.append("; ".join(_elsewhere(of, line.row, behind.split) + behind.notes()))
        writer.writerow(cells)
    return text.getvalue()


def below(of: Table, line: ResultRow) -> list[tuple[str, list[str]]]:
    """What stands under a row of ours: a label and a text for each score column; a difference where one is said."""
    behind = line.behind[0]
    mark = "" if tables.like_for_like(of, line.row, behind.split) else f" {tables.MARK}"
    rows = [(f"this run, {PROTOCOLS[behind.source.protocol]}{mark}", [cell.run or NOT_PRINTED for cell in line.cells])]
    if any(cell.low for cell in line.cells):
        intervals = [tables.interval(cell.low, cell.high) if cell.low else "" for cell in line.cells]
        rows.append(("95 % interval", intervals))
    if most := max(len(one.seeds) for one in line.behind) if any(cell.spread for cell in line.cells) else 0:
        rows.append((f"deviation, {most} seeds", [cell.spread or NOT_PRINTED for cell in line.cells]))
    if any(one.comparable for one in line.behind):
        rows.append((f"difference{mark}", [tables.signed(cell.difference) for cell in line.cells]))
    return rows


def warnings(content: Sequence[ResultRow]) -> list[str]:
    """What must be read before any number of this run."""
    behind = [one for line in content for one in line.behind]
    found = sorted({one.caveat for one in behind if one.caveat})
    return list(dict.fromkeys(found + [f"`{one.source.experiment}`: {w}" for one in behind for w in one.warnings()]))


def remarks(of: Table, content: Sequence[ResultRow]) -> list[str]:
    """What is to be said below the numbers of this run, experiment by experiment."""
    behind = {one.source.experiment: one for line in content for one in line.behind}
    notes = []
    others = {one.split for line in content for one in line.behind if not tables.like_for_like(of, line.row, one.split)}
    if splits := sorted(others):
        text = (
            f"{tables.MARK} Not the paper's images: the paper scores on the {of.evaluated_on}, this run on "
            f"{', '.join(splits)}, whose labels are public."
        )
        shown = " The difference shows both side by side; it is not a like-for-like comparison."
        notes.append(text + (shown if _differ(content) else ""))
    cells = [cell for line in content for cell in line.cells]
    if any(cell.low for cell in cells):
        notes.append("95 % interval of the mean IoU: bootstrap over images, weights fixed (not other training seeds).")
    if any(cell.low and not Decimal(cell.low) <= Decimal(cell.run) <= Decimal(cell.high) for cell in cells):
        notes.append("Of few images a bootstrap sample can lack whole classes, so that an interval can miss its score.")
    if any(cell.spread for cell in cells):
        notes.append("Several seeds: the mean of their scores and intervals; deviation: their standard deviation.")
    for name, one in behind.items():
        counted = f"`{name}`: {one.images} images of {one.val.first.dataset}, {tables.split_name(of, one.split)}"
        seeds = f"seed{'s' if len(one.seeds) > 1 else ''} {', '.join(map(str, one.seeds))}"
        notes.append("; ".join([counted, seeds, f"profile {one.profile}", *one.notes()]))
    return notes


def _differ(content: Sequence[ResultRow]) -> bool:
    """Whether a table shows differences from the paper."""
    return any(cell.difference for line in content for cell in line.cells)


def lead(of: Table, content: Sequence[ResultRow]) -> str:
    """What a table measures and where."""
    difference = " Difference in points: this run − paper." if _differ(content) else ""
    return f"{of.measure}. Paper: {of.evaluated_on}.{difference}"


def parted(content: Sequence[ResultRow]) -> tuple[list[ResultRow], list[ResultRow]]:
    """Return the printed rows, each with this run's numbers where they are comparable, and the rows whose are not.

    Nobody should find the score of a toy run in a row that has the paper's name for it.
    """
    inside = [line if line.comparable else replace(line, cells=(), behind=()) for line in content]
    return inside, [line for line in content if line.behind and not line.comparable]


def _run_rows(of: Table, line: ResultRow, label: str) -> Iterator[tuple[str, list[str]]]:
    """Yield what stands under a row of ours; `label`: what its first line begins with, before the experiments."""
    for place, (text, cells) in enumerate(below(of, line)):
        if place == 0:
            names = ", ".join(dict.fromkeys(one.source.experiment for one in line.behind))
            mark = f" {tables.MARK}" if text.endswith(tables.MARK) else ""
            text = f"{label}{names}, {tables.how(of, line.row, line.behind[0].split)}{mark}"
        yield text, cells


def as_markdown(of: Table, content: Sequence[ResultRow]) -> str:
    """The table as the paper prints it, under each row of ours this run's numbers and the difference.

    What of this run is not comparable has a table of its own below.
    """
    rows: list[Sequence[str]] = []
    blank = [""] * (len(of.labels) - 1)
    inside, apart = parted(content)
    for line in inside:
        ours = bool(line.row.sources)
        rows.append([f"**{text}**" if ours else text for text in line.row.marked()] + list(line.row.values))
        if line.behind:
            rows += [[text, *blank, *cells] for text, cells in _run_rows(of, line, "this run: ")]
    columns = [score.column for score in of.scores]
    text = [f"# Table {of.number}. {of.title}", ""]
    for warning in warnings(inside):
        text += [f"> **{warning}**", ""]
    text += [lead(of, inside), "", *tables.markdown([*of.labels, *columns], len(of.labels), rows), ""]
    text += [f"- {note}" for note in (*of.notes, *remarks(of, inside), *notes_of_others(of.others))]
    if apart:
        if text[-1]:
            text.append("")
        text += [f"## {APART}", "", *(line for warning in warnings(apart) for line in (f"> **{warning}**", ""))]
        own = [[text, *cells] for line in apart for text, cells in _run_rows(of, line, "")]
        text += [*tables.markdown(["Run", *columns], 1, own), "", *(f"- {note}" for note in remarks(of, apart))]
    return "\n".join(text) + "\n"


def as_latex(of: Table, content: Sequence[ResultRow]) -> str:
    """The same for LaTeX: floats to \\input, as pipeline/tables/latex.py has them."""
    inside, apart = parted(content)
    rows: list[latex.Row] = []
    for line in inside:
        first = line.row in of.others[:1]  # a line between the paper's rows and those of others
        ours, cells = bool(line.row.sources), [*line.row.marked(), *line.row.values]
        rows.append(latex.Row(cells, bold=ours, rule=ours or first))
        blank = [""] * (len(of.labels) - 1)
        rows += [latex.Row([label, *blank, *cells]) for label, cells in (below(of, line) if line.behind else [])]
    columns = [score.column for score in of.scores]
    text = latex.table(
        caption=f"{of.title}. {lead(of, inside)}",
        label=f"tab:{of.name}",
        header=[*of.labels, *columns],
        left=len(of.labels),
        rows=rows,
        notes=[*warnings(inside), *of.notes, *remarks(of, inside), *notes_of_others(of.others)],
    )
    if apart:
        own = [
            latex.Row([label, *cells], rule=place == 0)
            for line in apart
            for place, (label, cells) in enumerate(_run_rows(of, line, ""))
        ]
        notes = [*warnings(apart), *remarks(of, apart)]
        text += "\n" + latex.table(f"{of.title}. {APART}", f"tab:{of.name}-run", ["Run", *columns], 1, own, notes)
    return text


# What a table is written as: suffix -> renderer.
FORMATS = {"csv": as_csv, "md": as_markdown, "tex": as_latex}


def tabulate(name: str, root: Path = Path()) -> None:
    """Write every form of table `name` under `root`/results; raise UserError before any where a metric is missing."""
    if name in published():
        content = rows(table(name), root)
        forms = {suffix: form(table(name), content) for suffix, form in FORMATS.items()}
    else:
        from pipeline.tables import custom

        forms = custom.forms(name, root)
    for suffix, text in forms.items():
        with atomic_file(root / "results" / f"{name}_table.{suffix}") as part:
            part.write_text(text, encoding="utf-8", newline="\n")
    count = len(forms["csv"].splitlines()) - 1
    print(f"{root / 'results' / name}_table.md, .csv and .tex: {count} {'row' if count == 1 else 'rows'}")


def summary(root: Path = Path()) -> str:
    """The tables in brief, from `root`/results/*_table.csv: the mean IoU of each row of ours that is comparable.

    Of the other rows nothing but their number, and where their tables lie.
    """
    rows, elsewhere = [], []
    profiles: dict[bool, set[str]] = {True: set(), False: set()}  # of comparable numbers, and of others
    printed = done = 0
    for of in published().values():
        for line, record in zip(of.all_rows, tables.read(of, root), strict=True):
            shown = zip(of.labels, line.marked(), strict=True)
            labels = {label: text for label, text in shown if text != NOT_PRINTED}
            row = ", ".join(f"{label} {text}" if text in ("yes", "no") else text for label, text in labels.items())
            ours = {
                prefix: record[f"{prefix}comparable"] == "yes"
                for prefix, _ in of.groups()
                if record[f"{prefix}experiment"]
            }
            if ours and not line.by:
                printed, done = printed + 1, done + all(ours.values())
            for prefix, compared in ours.items():
                profiles[compared].add(record[f"{prefix}profile"])
            for prefix, columns in of.groups():
                if not ours.get(prefix):
                    continue
                score = of.scores[columns[-1]].column  # where the paper prints several, the last is the mean IoU
                where = f"[Table {of.number}{f', {score}' if prefix else ''}](results/{of.name}_table.md)"
                paper, run, points, low, high, spread = (record[f"{slug(score)}_{part}"] for part in tables.PARTS)
                if line.by:
                    paper += f" {ELSEWHERE}"
                    elsewhere.append(line)
                split = record[f"{prefix}evaluated_on_run"]
                if not of.same_images:
                    run += (
                        f" ({tables.where(split)})"
                        if tables.like_for_like(of, line, split)
                        else f" ({split} instead of test)"
                    )
                seeds = record[f"{prefix}seeds"] + (f" (± {spread})" if spread else "")
                rows.append([where, row, paper, run, tables.interval(low, high), tables.signed(points), seeds])
    blocks = []
    if profiles[False]:
        links = ", ".join(f"[{of.number}](results/{of.name}_table.md)" for of in published().values())
        numbers = f"Tables 1 to {len(published())} of the paper"
        told = f"**{numbers}: {done} of {printed} RefineNet rows run with its data and settings.**"
        blocks.append(
            f"{told} What the tables in results/ ({links}) have instead is of {'; '.join(sorted(profiles[False]))}."
        )
    if rows:
        header = ["Table", "Row", "Paper", "This run", "95 % interval", "Difference", "Seeds"]
        blocks += [f"> **{profile}**" for profile in sorted(profiles[True] - {"paper"})]
        blocks += ["Mean IoU in percent.", "\n".join(tables.markdown(header, 2, rows))]
        blocks += notes_of_others(elsewhere)
    return "\n\n".join(blocks)


def update_readme(root: Path = Path()) -> None:
    """Rewrite the marked block of `root`/README.md; raise UserError unless it has both marks, once, in order."""
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not end or START in rest or END in before + after:
        raise UserError(f"README.md: expected one block from {START} to {END}")
    with atomic_file(readme) as part:
        part.write_text(f"{before}{start}\n{summary(root)}\n{end}{after}", encoding="utf-8", newline="\n")


if __name__ == "__main__":
    parser = cli.command_parser("tabulate", (__doc__ or "").partition("\n\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("name", metavar="TABLE", nargs="?", help=", ".join(published()))
    what.add_argument("--readme", action="store_true", help="rewrite the block of tables in README.md")
    given = parser.parse_args()
    sys.exit(cli.run_cli(update_readme if given.readme else lambda: tabulate(given.name)))
