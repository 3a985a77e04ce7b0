"""Everything that a run ends in -> results/report.html, one page that asks for nothing from outside.

    python -m pipeline.report

What the data sets hold, the tables with this run's numbers, the training curves, images beside truth and prediction,
and what each number was made from. No times, no run ids, no paths of a machine: the same results give the same page,
byte for byte.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipeline.page.paper import html
from pipeline.runtime import cli
from refinenet.atomic import whole_file

REPORT = Path("results", "report.html")


def report(root: Path = Path()) -> None:
    """Write `root`/results/report.html."""
    text = html(root)
    with whole_file(root / REPORT) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0]).parse_args()
    sys.exit(cli.report(report))
