"""The site that `make docs` builds with Sphinx from README.md, docs/ and benchmarks/: public/README.html.

The pages are plain Markdown, to be read in the repository; what a site needs beyond that is added here. A warning is an
error, a dead link or anchor, too.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = {
    "Tutorials": ["docs/tutorials/first-run", "docs/tutorials/own-images", "docs/tutorials/one-table"],
    "How-to": ["docs/how-to/*"],
    "Reference": ["docs/reference/*"],
    "Explanation": ["docs/explanation/*"],
    "Measured": [
        "docs/records/README",
        "docs/records/*/README",
        "docs/records/*/*/README",
        "networks/README",
        "benchmarks/*",
        "results/*",
    ],
    "Project": ["docs/README", "CONTRIBUTING", "CHANGELOG"],
}

project = "refinenet-repro"
root_doc = "README"
include_patterns = ["*.md", "docs/*.md", "docs/**/*.md", "benchmarks/*.md", "networks/*.md", "results/*.md"]
exclude_patterns = [
    path.name
    for path in ROOT.iterdir()
    if path.name not in ("docs", "benchmarks", "networks", "results") and path.is_dir()
]
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "RefineNet, reproduced"
html_extra_path = [str(page) for page in (ROOT / "results").glob("*report.html")]
myst_heading_anchors = 4  # named as GitHub names them


def _adapt(_: Any, name: str, source: list[str]) -> None:
    """Take links to folders away, which only a repository can show; give the first page its contents."""

    def link(found: re.Match[str]) -> str:
        return found[1] if (ROOT / name).parent.joinpath(found[2]).is_dir() else found[0]

    source[0] = re.sub(r"\[([^\]]*)\]\((?!https?:|#)([^)#\s]+)\)", link, source[0])
    if name == root_doc:
        for caption, pages in SECTIONS.items():
            listed = "\n".join(f"/{page}" for page in pages)
            source[0] += f"\n```{{toctree}}\n:hidden:\n:glob:\n:caption: {caption}\n\n{listed}\n```\n"


def setup(app: Any) -> None:
    """Register `_adapt`, which Sphinx calls with each page as it is read."""
    app.connect("source-read", _adapt)
