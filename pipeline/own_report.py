"""A user's own data on one page -> results/<data>_report.html, which asks for nothing from outside.

    python -m pipeline.own_report leaves

What the data set holds, its table, and for each experiment what it left to look at and what its numbers were made from.
No times, no run ids, no paths of a machine: the same results give the same page, byte for byte.
"""

from __future__ import annotations

from pathlib import Path

from pipeline.page.custom import html, path
from pipeline.runtime.cli import main
from refinenet.atomic import whole_file


def report(name: str, root: Path = Path()) -> None:
    """Write `root`/results/<name>_report.html."""
    text = html(name, root)
    with whole_file(root / path(name)) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


if __name__ == "__main__":
    main(report, __doc__, "DATA")
