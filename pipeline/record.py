"""Keep a measured result as a folder that others can follow: docs/records/<date>-<experiment>/.

    README.md       scores with their intervals, commit, machine, versions, md5 of data and weights, the commands
    metrics.json    as `evaluate` wrote it           settings.json   every value that the result depends on
    curve.csv       as `train` wrote it              params.yaml and the profiles, as they were

Nothing is computed anew: all of it is read from what the run has left, and what does not fit together is an error.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pipeline import trace
from pipeline.config import profiles, resolve
from pipeline.runtime import git
from pipeline.runtime.cli import add_to, command_parser, run_cli
from pipeline.runtime.dvc_md5 import dvc_md5
from refinenet.atomic import atomic_folder
from refinenet.errors import UserError, expected_one_of

RECORDS = Path("docs/records")
VERSIONS = ("torch", "torchvision", "numpy", "timm", "onnxruntime", "scikit-image", "pyarrow")
_EXAMPLES = """\
examples:
  refinenet record camvid-lite0
  refinenet record camvid-lite0 --to docs/records/2026-12-01-camvid --note "two seeds more are beside it"
"""


def run(name: str, to: Path | None, note: str) -> None:
    """Write the record of the experiment `name`. Raises UserError where its files are missing or do not fit."""
    settings = resolve.everything()
    if name not in settings.get("evaluate", {}):
        known = list(settings["evaluate"])
        raise UserError(f"no experiment {name!r}{expected_one_of(name, known, 'refinenet trace')}")
    data, again = settings["evaluate"][name]["data"], settings["evaluate"][name]["of"]
    metrics_file = Path("metrics", *(["seeds"] if again else []), data, f"{name}.json")
    model, curve = Path("models", f"{name}.safetensors"), Path("curves", f"{name}.csv")
    for file in (metrics_file, model, curve):
        if not file.is_file():
            raise UserError(f"{file}: no such file; `snakemake --cores all {metrics_file}` makes it")
    metrics: dict[str, Any] = json.loads(metrics_file.read_bytes())
    weights = dvc_md5(model)
    if metrics["weights"]["md5"] != weights:
        raise UserError(f"{metrics_file}: of weights with md5 {metrics['weights']['md5']}, {model} has {weights}")
    target = to or RECORDS / f"{datetime.now(UTC):%Y-%m-%d}-{name}"
    if target.exists():
        raise UserError(f"{target}: is there already, expected a new folder; --to names another one")
    train = settings["train"][name]
    sources = sorted(resolve.data_of(train))
    md5s = {f"data/{one}": dvc_md5(Path("data", one)) for one in sources}
    md5s |= {f"weights/{train['start']}.safetensors": dvc_md5(Path("weights", f"{train['start']}.safetensors"))}
    md5s |= {str(model): weights, str(metrics_file): dvc_md5(metrics_file)}
    used = _files_of_the_settings(sources)
    page = _page(name, metrics_file, metrics, md5s, _runs(weights), used, note)
    with atomic_folder(target) as part:
        (part / "README.md").write_text(page, encoding="utf-8")
        shutil.copyfile(metrics_file, part / "metrics.json")
        shutil.copyfile(curve, part / "curve.csv")
        (part / "settings.json").write_text(
            json.dumps(_own_settings(name, settings), indent=1, sort_keys=True, ensure_ascii=False) + "\n",
            encoding="utf-8",
        )
        for file in used:
            (part / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, part / file)
    print(f"{target}: {', '.join(sorted(path.name for path in target.iterdir()))}")
    print(f"next: refinenet trace {target}")


def _own_settings(name: str, settings: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the settings that this result depends on: stage -> name -> values."""
    found: dict[str, dict[str, Any]] = {"evaluate": {name: settings["evaluate"][name]}, "train": {}}
    todo = [name]
    while todo:
        one = todo.pop()
        if one in settings["weights"]:
            found.setdefault("weights", {})[one] = settings["weights"][one]
            continue
        train = found["train"][one] = settings["train"][one]
        for data in resolve.data_of(train):
            for stage in ("download", "prepare"):
                found.setdefault(stage, {})[data] = settings[stage][data]
        todo.append(train["start"])
    return found


def _files_of_the_settings(data: Sequence[str]) -> list[Path]:
    """Return params.yaml, the profile with its bases, and the plans of these data sets."""
    params = profiles.read_params()
    names = [params.profile, *profiles.bases(params.profile)]
    plans = [profiles.plan_file(one) for one in data]
    return [profiles.PARAMS, *(profiles.PROFILES / f"{one}.yaml" for one in names), *(p for p in plans if p.is_file())]


def _runs(weights: str) -> list[str]:
    """Return lines about the runs in MLflow that made or scored these weights; one line where there are none."""
    try:
        found = trace.runs(weights)
    except UserError as error:
        return [f"- not in MLflow: {error}"]
    lines = []
    for run in found:
        rate = f", {run.rate:.2f} images/s in its last interval" if run.rate else ""
        lines.append(f"- {run.stage}: run `{run.id}`, {run.minutes:.1f} minutes{rate}, commit `{run.commit}`")
    return lines or ["- MLflow knows no finished run with these weights"]


def _git() -> list[str]:
    """Return lines: the commit, and what of the project's files differed from it."""
    try:
        commit = git.ask("rev-parse", "HEAD").decode().strip()
        changed = [line[3:] for line in git.ask("status", "--porcelain").decode().splitlines()]
    except UserError as error:
        return [f"- not recorded: {error}"]
    made = ("metrics/", "results/", "docs/records/", "dvc.lock", "settings.json")
    theirs = [path for path in changed if not path.startswith(made)]
    return [f"- `{commit}`", f"- other than there: {', '.join(f'`{path}`' for path in theirs) or 'nothing'}"]


def _page(
    name: str,
    metrics_file: Path,
    metrics: Mapping[str, Any],
    md5s: Mapping[str, str],
    runs: Sequence[str],
    used: Sequence[Path],
    note: str,
) -> str:
    from refinenet.device import processor

    rows = []
    for protocol, found in metrics["protocols"].items():
        low, high = found["interval"]["mean_iou"]
        scales = ", ".join(f"{scale:g}" for scale in found["scales"]) + (", mirrored" if found["flip"] else "")
        rows.append(
            f"| {protocol} | {scales} | {100 * found['mean_iou']:.2f} | {100 * low:.1f} to {100 * high:.1f} | "
            f"{100 * found['pixel_accuracy']:.2f} |"
        )
    classes = list(next(iter(metrics["protocols"].values()))["iou"])
    heads = list(metrics["protocols"])
    table = [
        f"| {klass} | " + " | ".join(_percent(metrics["protocols"][head]["iou"][klass]) for head in heads) + " |"
        for klass in classes
    ]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30 if hasattr(os, "sysconf") else 0
    images = f"{metrics['images']} images of `{metrics['dataset']}` {metrics['split']}"
    about = (
        f"{images}, seed {metrics['seed']}, profile `{metrics['profile']}`. The interval is of 95 %, over other images "
        "of the same kind; how far another seed would move it, it does not say.\n"
    )
    system = f"{platform.system()} {platform.machine()}, Python {platform.python_version()}"
    drawn = "**Synthetic images: it shows that the pipeline works and says nothing about accuracy.**\n\n"
    return "\n".join(
        [
            f"# {name}\n",
            (drawn if metrics.get("drawn") else "") + (f"{note}\n\n" if note else "") + about,
            "| protocol | scales | mean IoU, % | 95 % interval | pixel accuracy, % |",
            "| :-- | :-- | --: | --: | --: |",
            *rows,
            "",
            "| IoU, % | " + " | ".join(heads) + " |",
            "| :-- |" + " --: |" * len(heads),
            *table,
            "\n## Commit\n",
            *_git(),
            "\n## Runs\n",
            *runs,
            "\n## Machine and versions, when this was written\n",
            f"- {processor()}, {os.cpu_count()} processors, {memory:.0f} GiB; {system}",
            f"- {', '.join(f'{one} {version(one)}' for one in VERSIONS)}",
            "\n## md5, as DVC computes it\n",
            *(f"- `{path}`: {md5}" for path, md5 in md5s.items()),
            "\n## To follow it\n",
            "With that commit and this folder's "
            + ", ".join(f"`{path.as_posix()}`" for path in used)
            + " in their places:\n",
            f"    snakemake --cores all {metrics_file}\n",
        ]
    )


def _percent(value: float | None) -> str:
    return "not in the truth" if value is None else f"{100 * value:.1f}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    line = command_parser("record", __doc__, _EXAMPLES)
    line.add_argument("name", metavar="EXPERIMENT", help="an experiment that was trained and evaluated")
    add_to(line, "FOLDER", "default: docs/records/<date>-<experiment>")
    line.add_argument("--note", default="", help="a sentence for the top of its page")
    given: argparse.Namespace = line.parse_args(arguments)
    return run_cli(lambda: run(given.name, given.to, given.note))


if __name__ == "__main__":
    sys.exit(main())
