"""Stage: everything that a run ends in -> results/report.html; of other data -> results/<data>_report.html.

    python -m pipeline.report             the paper's data sets and tables
    python -m pipeline.report leaves      a data set that is not in the paper: own or further in params.yaml
    python -m pipeline.report --where     which results exist and how to open them; `make repro` ends with it

A page is one file that asks for nothing from outside. No times, no run ids, no paths of a machine: the same results
give the same page, byte for byte.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from pipeline.config import profiles
from pipeline.page import custom, paper
from pipeline.runtime import cli
from pipeline.tables.paper import caveat, published
from refinenet.atomic import atomic_file
from refinenet.errors import UserError


def path(name: str | None = None) -> Path:
    """Return where the page of the data set `name` lies, or that of the paper."""
    return Path("results", "report.html" if name is None else f"{name}_report.html")


def run(name: str | None = None, root: Path = Path()) -> None:
    """Write the page of the paper, or of the data set `name` that is not in it, under `root`/results/."""
    text = paper.html(root) if name is None else custom.html(name, root)
    with atomic_file(root / path(name)) as part:
        part.write_text(text, encoding="utf-8", newline="\n")
    print(f"{root / path(name)}: {len(text) / 1e6:.1f} MB, open it in a browser")


def where() -> None:
    """Print the results that exist; UserError where one of the nine tables or a further one does not."""
    params = profiles.read_yaml(profiles.PARAMS)
    profile = params["profile"]
    read = profiles.read_profile(profile)[0]
    drawn = any(read.sources.get(name) == "rendered" for name in published())
    print(f"\nProfile {caveat(profile, read.comparable, drawn) or profile}")
    titles = {name: f"Table {table.number}" for name, table in published().items()}
    own, further = params.get("own") or (), params.get("further") or ()
    for name, title in (titles | dict.fromkeys(own, "Own data") | dict.fromkeys(further, "Further")).items():
        table = Path("results") / f"{name}_table.md"
        if not table.is_file():
            raise UserError(f"{table}: was not made; `snakemake --cores all {table}` makes it and shows why not")
        print(f"  {title:8} {table}")
    print(f"  all on one page   {path()}      open it in a browser")
    for name in own:
        print(f"  own data, to see  {path(name)}")
    for name in further:
        print(f"  further, to see   {path(name)}")
    print("  runs and curves   make ui                  then http://127.0.0.1:5000")
    print("  trained weights   models/                  versioned: dvc push, dvc pull train")
    print("The tables are there as .csv and .tex, too; metrics/ has every score, `dvc metrics diff` what a change did.")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    alone = "`refinenet report` alone is --where; `python -m pipeline.report` alone writes the page of the paper"
    parser = cli.command_parser("report", (__doc__ or "").partition("\n\n")[0], alone)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("data", nargs="?", metavar="DATA", help="whose page to write, of one that is not in the paper")
    what.add_argument("--where", action="store_true", help="say which results exist and how to open them")
    options = parser.parse_args(arguments)
    cli.attach()
    return cli.run_cli(where if options.where else lambda: run(options.data))


if __name__ == "__main__":
    sys.exit(main())
