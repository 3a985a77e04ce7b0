"""The tables of docs/data.md, from the code and profiles/paper.yaml.

python docs/data.py           writes them between the markers of docs/data.md
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from pipeline import datasets, settings
from refinenet.files import whole_file

PAGE = Path(__file__).with_name("data.md")
HEADS = {
    "sets": ("data set", "classes", "train", "val", "test", "`val` is"),
    "archives": ("data set", "file", "size", "checked by", "comes from"),
}
# What the paper scores on, where it is not the release's own "val".
SCORED = {"person": "the test list", "nyud": "the test split", "sunrgbd": "the test split", "coco": ""}


def sets() -> list[tuple[str, ...]]:
    """A row for each data set."""
    rows = []
    for name in datasets.NAMES:
        dataset = datasets.load(name)
        counts = [f"{dataset.COUNTS[split]:,}" if split in dataset.COUNTS else "" for split in ("train", "val", "test")]
        rows.append(
            (f"`{name}` {dataset.TITLE}", str(len(dataset.CLASSES)), *counts, SCORED.get(name, "the val split"))
        )
    return rows


def archives() -> list[tuple[str, ...]]:
    """A row for each archive of the paper's profile."""
    rows = []
    profile, _ = settings.read_profile("paper")
    for name in datasets.NAMES:
        found = profile.sources[name]
        assert not isinstance(found, str), "the paper's profile draws nothing"
        for file, source in found.items():
            size = "not published" if source.size is None else f"{source.size:,} bytes"
            sums = [kind for kind in ("sha256", "md5") if getattr(source, kind)]
            host = urlsplit(source.url).hostname or ""
            note = " (account)" if source.login else " (optional)" if source.optional else ""
            rows.append((f"`{name}`", f"`{file}`", size, ", ".join(sums) or "nothing published", f"{host}{note}"))
    return rows


def table(name: str) -> str:
    """The Markdown table `name`."""
    rows = {"sets": sets, "archives": archives}[name]()
    head = HEADS[name]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, tuple(":--" for _ in head), *rows])


def page() -> str:
    """docs/data.md with both tables as they should be."""
    text = PAGE.read_text(encoding="utf-8")
    for name in HEADS:
        start, end = f"<!-- {name} -->\n", f"\n<!-- end of {name} -->"
        before, _, rest = text.partition(start)
        text = before + start + table(name) + end + rest.partition(end)[2]
    return text


if __name__ == "__main__":
    made = page()
    with whole_file(PAGE) as part:
        part.write_text(made, encoding="utf-8")
