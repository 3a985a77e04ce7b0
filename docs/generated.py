"""The tables of docs/data.md and docs/reproducing.md, from the code, paper.yaml and profiles/paper.yaml.

python docs/generated.py           writes them between the markers of the pages
"""

from __future__ import annotations

from pathlib import Path
from urllib.parse import urlsplit

from pipeline import datasets
from pipeline.config import profiles, resolve
from pipeline.tables.paper import NOT_PRINTED, published
from refinenet.atomic import atomic_file
from refinenet.config import Recipe

FOLDER = Path(__file__).parent
PAGES = {"data": ("sets", "archives"), "reproducing": ("rows", "trainings")}
HEADS = {
    "sets": ("data set", "classes", "train", "val", "test", "`val` is"),
    "archives": ("data set", "file", "size", "checked by", "comes from"),
    "rows": ("table", "row", "metrics", "protocol", "images", "like for like"),
    "trainings": ("experiment", "starts from", "network", "steps x batch", "crop", "trained on"),
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
    profile, _ = profiles.read_profile("paper")
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


def rows() -> list[tuple[str, ...]]:
    """A line for each row of ours in the paper's tables."""
    lines = []
    for of in published().values():
        like = "yes" if of.same_images else "no: the paper's are on a test server"
        for row in of.all_rows:
            for source in dict.fromkeys(row.sources):
                data = source.experiment.partition("-")[0]
                label = ", ".join(text for text in row.marked() if text != NOT_PRINTED)
                same = like if not row.by else f"yes: published on {row.on}"
                where = f"`metrics/{data}/{source.experiment}.json`"
                count = f"{datasets.load(data).COUNTS['val']:,}"
                lines.append((f"{of.number}", label, where, f"`{source.protocol}`", f"{count} of `{data}` val", same))
    return lines


def trainings() -> list[tuple[str, ...]]:
    """A line for each training of the paper's profile."""
    params = profiles.read_params()
    profile, where = profiles.read_profile("paper")
    lines = []
    for name, training in {**params.pretrainings, **params.experiments}.items():
        made = resolve.training_settings(name, training, params, profile, where)
        recipe, phases = Recipe(**made["recipe"]), made["phases"]
        network = f"{made['network']['cascade']}, {made['network']['pools']} pools"
        on = "; ".join(
            f"{' + '.join(' '.join(part) for part in phase['parts'])}: {phase['steps']:,}" for phase in phases
        )
        lines.append(
            (
                f"`{name}`",
                f"`{training.start}`",
                network,
                f"{recipe.steps:,} x {recipe.batch_size}",
                f"{recipe.crop} x {recipe.input_scale}",
                on or f"{training.data} {training.split}",
            )
        )
    return lines


def table(name: str) -> str:
    """The Markdown table `name`."""
    lines = {"sets": sets, "archives": archives, "rows": rows, "trainings": trainings}[name]()
    head = HEADS[name]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, tuple(":--" for _ in head), *lines])


def page(name: str) -> str:
    """docs/<name>.md with its tables as they should be."""
    text = (FOLDER / f"{name}.md").read_text(encoding="utf-8")
    for block in PAGES[name]:
        start, end = f"<!-- {block} -->\n", f"\n<!-- end of {block} -->"
        before, _, rest = text.partition(start)
        text = before + start + table(block) + end + rest.partition(end)[2]
    return text


if __name__ == "__main__":
    for name in PAGES:
        made = page(name)
        with atomic_file(FOLDER / f"{name}.md") as part:
            part.write_text(made, encoding="utf-8")
