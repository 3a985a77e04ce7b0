"""What the page of a data set that is not in the paper says: contents, table, each experiment's pictures and origin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from hashlib import md5
from pathlib import Path
from typing import Any

from pipeline.config import resolve
from pipeline.config.profiles import PARAMS
from pipeline.fetch.input_md5 import input_md5
from pipeline.page import dataset_section, page, provenance, result_section
from pipeline.page.dataset_section import PARTS, DatasetContents
from pipeline.page.provenance import Archives, Provenance
from pipeline.page.result_section import Level
from pipeline.tables import custom, others
from pipeline.tables.metrics_files import Seeds
from pipeline.tables.paper import NOT_PRINTED, PROTOCOLS
from refinenet.errors import UserError


def archives(name: str, own: bool, cfg: Mapping[str, Any], root: Path) -> Archives:
    """What a data set was unpacked from; of a user's own the file that stage download-own has packed."""
    info = provenance.archives(name, cfg)
    if not own:
        return info
    file = Path("data", "raw", name, f"{name}.zip")
    try:
        content = (root / file).read_bytes()
    except FileNotFoundError:
        raise UserError(f"{file}: no such file; `download {name}` makes it") from None
    where = "the folders that the profile names"  # the machine's own paths are not published
    packed = {"file": file.as_posix(), "url": where, "size": f"{len(content):,}", "sha256": ""}
    return replace(info, files=[packed | {"md5": md5(content, usedforsecurity=False).hexdigest()}])


def split_notes(name: str, holding: DatasetContents, root: Path) -> list[str]:
    """What a reader of the scores has to know of the splits: what they lack, and what train and val have in common."""
    notes = []
    for part, of in holding.numbers.items():
        classes = holding.splits[part].schema.classes
        missing = [one for one, share in zip(classes, of.shares, strict=True) if not share]
        if missing and of.labelled:
            notes.append(f"No pixel in the {PARTS[part]} images: {', '.join(missing)}.")
    file = root / "data" / name / "checks.json"
    if not file.is_file():  # of a user's own data only
        return notes
    found = json.loads(file.read_bytes())
    near, groups = found["near_duplicates"], found["groups"]
    if near["found"]:
        share = f"{100 * near['found'] / near['val']:.0f}\N{NO-BREAK SPACE}%"
        examples = "; ".join(f"{val} and {train}" for val, train, _ in near["examples"])
        notes.append(
            f"{near['found']} of the {near['val']} evaluation images ({share}) look nearly like a training image, "
            f"so the scores flatter: {examples}."
        )
    else:
        notes.append("No evaluation image looks nearly like a training image.")
    if groups is not None:
        both = f"; in both: {', '.join(groups['both'])}" if groups["both"] else ", none in both"
        notes.append(f"Recordings (group): {groups['train']} in training, {groups['val']} in evaluation{both}.")
    return notes


def link(runs: Seeds, cfg: Mapping[str, Any], md5s: Mapping[str, str], root: Path) -> Provenance:
    """The chain of an experiment, with all its protocols: a profile may have others than the paper's."""
    made, run = provenance.provenance_of(runs, cfg, md5s, root), runs.first
    return replace(made, protocols=[(PROTOCOLS.get(one, one), run.protocols[one]) for one in custom.in_order(run)])


def html(name: str, root: Path = Path(), limit: int = page.LIMIT) -> str:
    """The page of the data set `name`, in at most `limit` bytes where fewer and smaller pictures make it so."""
    cfg = provenance.settings(root)
    own = [data for data, info in cfg["download"].items() if info.get("own") is not None]
    known = resolve.custom_datasets(cfg)
    if name not in known:
        expected = f"one of {', '.join(known)}" if known else f"one of {PARAMS}'s own and further, which are empty"
        raise UserError(f"{name!r}: no data set with a page of its own, expected {expected}")
    table = custom.table(name, root)
    runs = {seeds.first.experiment: seeds for seeds in table.runs}
    data = list(dict.fromkeys(one for experiment in runs for one in provenance.sources(experiment, cfg)))
    for one in data:
        if not (root / "data" / one).is_dir():
            raise UserError(f"data/{one}: no such folder; `prepare {one}` makes it")
    md5s = {one: input_md5(root / "data" / one) for one in data}
    behind = {one: [first] if (first := provenance.pretraining(one, cfg)) else [] for one in runs}
    trainings = list(dict.fromkeys(one for name in runs for one in (*behind[name], name)))
    made = {one: result_section.curve(one, root) for one in trainings}
    holding = dataset_section.open_dataset(root, name)
    schema = holding.splits["train"].schema
    ours, theirs, remarks = table.comparison()
    values = {
        "name": name,
        "title": table.title,
        "head": custom.HEAD,
        "rows": [(row.runs.first.experiment, row.shown()) for row in table.rows],
        "columns": [row.heading() for row in table.rows],
        "classes": [
            (one, "#{:02x}{:02x}{:02x}".format(*colour), [row.iou[i] or NOT_PRINTED for row in table.rows])
            for i, (one, colour) in enumerate(zip(schema.classes, schema.palette, strict=True))
        ],
        "notes": [(one, custom.notes(name, seeds)) for one, seeds in runs.items()],
        "published": {"head": others.HEAD, "ours": ours, "theirs": theirs, "remarks": remarks, "of": table.published},
        "experiments": [link(seeds, cfg, md5s, root) for seeds in runs.values()],
        "archives": [archives(one, one in own, cfg, root) for one in data],
        "costs": provenance.same_costs(
            [
                provenance.cost(one, curve, cfg, runs[one].first if one in runs else None, root)
                for one, curve in made.items()
            ]
        ),
        "packed": name in own,
        "split_notes": split_notes(name, holding, root),
        "elsewhere": [one for one in data if one != name],
    }

    def shown(level: Level) -> dict[str, Any]:
        chapters = []
        for one in runs:
            protocol = page.pictured(one, cfg)
            curves = {training: made[training] for training in (*behind[one], one)}
            chapters.append(
                {
                    "name": one,
                    "title": one,
                    "shown": f"{one}, {PROTOCOLS.get(protocol, protocol)}",
                    **page.results(one, protocol, curves, cfg, list(runs), schema, level, root),
                }
            )
        info = page.data_set(name, table.title, holding, level)
        return {"data": info | {"scored": None, "shown": None}, "chapters": chapters}

    return page.render_within_limit("custom_report.html.j2", values, shown, limit)
