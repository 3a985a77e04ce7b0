"""The tables of the README and of pages in docs/reference/, from records, code and the paper's profile.

python docs/generated.py    writes them between the markers, and docs/reference/commands.md and codemeta.json as a whole
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
import statistics
import sys
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest import mock
from urllib.parse import urlsplit

from pipeline import __main__ as command
from pipeline import cost, datasets
from pipeline.config import profiles, resolve
from pipeline.deposit import codemeta
from pipeline.runtime import cli
from pipeline.tables import others
from pipeline.tables.paper import NOT_PRINTED, published
from refinenet.atomic import atomic_file
from refinenet.config import Recipe

ROOT = Path(__file__).resolve().parents[1]
PAGES = {
    "docs/reference/data-sets.md": ("sets", "archives"),
    "docs/reference/rows.md": ("rows", "trainings"),
    "README.md": ("real", "roads"),
}
HEADS = {
    "sets": ("data set", "classes", "train", "val", "test", "`val` is"),
    "archives": ("data set", "file", "size", "checked by", "comes from"),
    "rows": ("table", "row", "metrics", "protocol", "images", "like for like"),
    "trainings": ("experiment", "starts from", "network", "steps x batch", "crop", "trained on"),
    "real": ("data set, images", "network", "starts from", "trained on", "one scale", "several, mirrored"),
    "roads": ("", "trains", "download", "H100 hours", "RTX 4090 hours"),
}
COMPARED = ("FC-DenseNet103", "ESPNet", "ENet")  # of what others have published, in the README
# What the paper scores on, where it is not the release's own "val".
SCORED = {"person": "the test list", "nyud": "the test split", "sunrgbd": "the test split", "coco": ""}


def sets() -> list[tuple[str, ...]]:
    """A row for each data set."""
    rows = []
    for name in datasets.NAMES:
        dataset = datasets.load(name)
        counts = [f"{dataset.COUNTS[split]:,}" if split in dataset.COUNTS else "" for split in ("train", "val", "test")]
        scored = SCORED.get(name, "the val split")
        if (split := datasets.evaluated(name)) != "val":
            scored += f", and {split} is scored"
        rows.append((f"`{name}` {dataset.TITLE}", str(len(dataset.CLASSES)), *counts, scored))
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
            listed = datasets.load(name).Reader.check_release is not datasets.Reader.check_release
            checked = ", ".join(sums) or ("a list of what is in it" if listed else "nothing published")
            rows.append((f"`{name}`", f"`{file}`", size, checked, f"{host}{note}"))
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
                lines.append(
                    (f"{of.number}", label, where, f"`{source.protocol}`", f"{count} of `{data}`, {of.split}", same)
                )
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


def real() -> list[tuple[str, ...]]:
    """A row for each experiment of docs/records, the mean of its seeds, and what others have published beside it."""
    found: dict[tuple[str, ...], list[Mapping[str, Any]]] = {}
    for file in sorted((ROOT / "docs/records").glob("*/metrics.json")):
        metrics, settings = (
            json.loads(file.with_name(name).read_bytes()) for name in ("metrics.json", "settings.json")
        )
        (name,) = settings["evaluate"]
        same = settings["evaluate"][name]["of"] or name
        dataset, count, split = datasets.load(metrics["dataset"]), metrics["images"], metrics["split"]
        whole = dataset.COUNTS[split]
        images = f"{dataset.TITLE}, {count if count == whole else f'a part: {count} of {whole:,}'} {split}"
        key = (metrics["dataset"], same, images, *others.circumstances(name, settings)[1:])
        found.setdefault(key, []).append(metrics)
    lines = []
    for (data, name, *about), seeds in found.items():
        images, begins, seen = about
        scores = [_seeds([seed["protocols"][protocol] for seed in seeds]) for protocol in ("single", "multi-flip")]
        lines.append((images, f"RefineNet, `{name}`, n = {len(seeds)}", begins, seen, *scores))
        theirs = others.read(data)
        rows = [row for row in theirs.rows if row.method in COMPARED] if theirs else []
        lines += [("", row.method, row.starts_from, row.trained_on, f"{row.mean_iou:.1f}", "") for row in rows]
    return lines


def _seeds(scores: Sequence[Mapping[str, Any]]) -> str:
    """Mean and standard deviation over seeds in percent; of one seed its interval over images."""
    means = [100 * score["mean_iou"] for score in scores]
    if len(means) > 1:
        return f"**{statistics.mean(means):.1f}** ± {statistics.stdev(means):.1f}"
    low, high = scores[0]["interval"]["mean_iou"]
    return f"**{means[0]:.1f}** ({100 * low:.1f} to {100 * high:.1f})"


def roads() -> list[tuple[str, ...]]:
    """What the cheapest table of the paper costs, the two of one data set, and all nine."""
    params, profile, where = cost.read("paper")
    works = {work.name: work for work in cost.works(params, profile, where)}
    tables = {of.number: {s.experiment for row in of.all_rows for s in row.sources} for of in published().values()}
    every = set().union(*tables.values())
    nyud = {name for name in tables[3] | tables[9] if name.startswith("nyud-")}
    lines = []
    for title, names in (
        ("Table 3, NYUDv2 (the cheapest)", tables[3]),
        ("Tables 3 and 9, NYUDv2", nyud),
        ("all nine tables", every),
    ):
        needed = names & works.keys()
        if not needed:
            continue  # this project does not train them
        while more := {works[name].after for name in needed} - needed - {None}:
            needed |= {str(name) for name in more}
        rows = {**params.pretrainings, **params.experiments}
        data = {rows[name].data for name in needed}
        data |= {params.pretrainings[name].also for name in needed & set(params.pretrainings)}
        size, _ = cost.archives(dataclasses.replace(profile, sources={one: profile.sources[one] for one in data}))
        hours = [cost.gpu_hours([works[name] for name in sorted(needed)], gpu) for gpu in ("h100", "rtx4090")]
        count = f"{len(needed)} training{'s' if len(needed) > 1 else ''}"
        lines.append((title, count, f"{size / 1e9:.0f} GB", *(f"{hour:.1f}" for hour in hours)))
    return lines


def table(name: str) -> str:
    """The Markdown table `name`."""
    made = {"sets": sets, "archives": archives, "rows": rows, "trainings": trainings, "real": real, "roads": roads}
    lines = made[name]()
    head = HEADS[name]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, tuple(":--" for _ in head), *lines])


def page(name: str) -> str:
    """The page of that path with its tables as they should be."""
    text = (ROOT / name).read_text(encoding="utf-8")
    for block in PAGES[name]:
        start, end = f"<!-- {block} -->\n", f"\n<!-- end of {block} -->"
        before, found, rest = text.partition(start)
        _, ended, behind = rest.partition(end)
        if not found or not ended:
            raise SystemExit(f"{name}: expected the lines {start.strip()} and {end.strip()}, with a line between them")
        text = before + start + table(block) + end + behind
    return text


# Commands that have commands of their own; what each of these takes is shown, too.
INNER = {"submit": ("voc", "check", "record"), "weights": ("import",), "tracking": ("find",)}
COMMANDS = "docs/reference/commands.md"
COLUMNS = "110"
HEAD = """\
# Commands

Made from the commands' own `--help` by `python docs/generated.py`. Each is also `python -m pipeline.<what>`, which is
how the graph calls the stages. They work in any folder of the project; paths are relative to where you are. {free}
need a model file and no project. `--output` means the same as `--to`. What a profile can set is in
[settings.md](settings.md).

Exit codes: 0 done; 1 an error that you can mend, in one line; 2 a wrong command line; 73 another process is at work on
the same; 75 stopped by SIGTERM, the same command goes on; 130 Ctrl-C. `refinenet verify` has two more. Colours are for
terminals; `NO_COLOR=1` turns them off.
"""


def helped(*words: str) -> str:
    """What `refinenet <words> --help` prints on a terminal of COLUMNS columns."""
    text = io.StringIO()
    with (
        redirect_stdout(text),
        mock.patch.object(sys, "argv", ["refinenet"]),
        mock.patch.dict(os.environ, COLUMNS=COLUMNS),
        mock.patch.object(cli, "_prefix", "refinenet "),
        warnings.catch_warnings(action="ignore"),  # that modules were imported before they are run
    ):
        command.main([*words, "--help"])
    return text.getvalue().rstrip()


def commands() -> str:
    """The page COMMANDS."""
    free = [f"`{one.name}`" for one in command.COMMANDS.values() if one.anywhere]
    parts = [HEAD.format(free=f"{', '.join(free[:-1])} and {free[-1]}"), f"```text\n{helped()}\n```"]
    for name in command.COMMANDS:
        parts.append(f"\n## {name}\n\n```text\n{helped(name)}\n```")
        parts += [f"\n```text\n{helped(name, inner)}\n```" for inner in INNER.get(name, ())]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    for name in (*PAGES, COMMANDS):
        made = commands() if name == COMMANDS else page(name)
        with atomic_file(ROOT / name) as part:
            part.write_text(made, encoding="utf-8")
    with atomic_file(ROOT / codemeta.FILE) as part:
        part.write_text(codemeta.text(ROOT), encoding="utf-8")
