"""What `make repro` says at the end: what was made, where it lies, how to open it."""

from __future__ import annotations

import sys
from pathlib import Path

from pipeline.config import profiles
from pipeline.runtime.cli import report
from pipeline.tables.paper import caveat, published
from refinenet.errors import UserError


def run() -> None:
    """Print the results that exist; UserError where one of the nine tables or of the user's own does not."""
    params = profiles.read_yaml(profiles.PARAMS)
    profile = params["profile"]
    print(f"\nProfile {profile}. {caveat(profile)}".rstrip())
    titles = {name: f"Table {table.number}" for name, table in published().items()}
    own = params.get("own") or ()
    for name, title in (titles | dict.fromkeys(own, "Own data")).items():
        path = Path("results") / f"{name}_table.md"
        if not path.is_file():
            raise UserError(f"{path}: was not made; `snakemake --cores all {path}` makes it and shows why not")
        print(f"  {title:8} {path}")
    print("  all on one page   results/report.html      open it in a browser")
    for name in own:
        print(f"  own data, to see  results/{name}_report.html")
    print("  runs and curves   make ui                  then http://127.0.0.1:5000")
    print("  trained weights   models/                  versioned: dvc push, dvc pull train")
    print(
        "The tables are there as .csv, too; metrics/ has every score, `dvc metrics diff` what changed since the commit."
    )


if __name__ == "__main__":
    sys.exit(report(run))
