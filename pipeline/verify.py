"""Verify a run: are its files as dvc.lock says, and are its scores those of the commit?

    refinenet verify                    `make repro` ends with it, with --quick
    refinenet verify --against v1.0     the scores of another commit

The whole cache of DVC and all outputs are read once: DVC itself trusts file times. Files damaged by a disk, an
interrupted copy or an edit are listed. In the cache they are removed; in the working folder they get a new time, so
that DVC checks them again: `dvc pull` or `dvc repro` then restores them. With --quick large files that were read
before and have the same size, time and inode are not read again.

The scores in metrics/ are compared with those of the commit, of each experiment that has the same settings there, the
seed aside.
Exit code 0: the same. 10: not the same, but within noise. 11: different. 1: files are broken or something is missing.
Noise is twice the spread of the commit's seeds where it has three or more, else its interval over images.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Any, Literal

import yaml

from pipeline.fetch.input_md5 import input_md5
from pipeline.runtime import git
from pipeline.runtime.cli import coloured, command_parser, run_cli
from pipeline.runtime.dvc_md5 import dvc_md5
from pipeline.runtime.progress import bar
from refinenet.errors import UserError

EXIT_WITHIN_NOISE = 10
EXIT_DIFFERENT = 11
LOCK = "dvc.lock"

Md5 = Callable[[Path], str]


def broken_objects(cache: Path, md5: Md5 = dvc_md5) -> list[Path]:
    """Return the files of a cache (.dvc/cache/files/md5) whose md5 is not their name; skip those being written."""
    broken = []
    objects = sorted(path for path in cache.glob("??/*") if not path.name.startswith("."))
    with bar("cache", "file", total=len(objects)) as progress:
        for path in objects:
            if md5(path) != (path.parent.name + path.name).removesuffix(".dir"):
                broken.append(path)
            progress.update()
    return broken


def changed_outputs(repo: Any, md5: Md5 = dvc_md5) -> list[Path]:
    """Return the outputs of `repo` (dvc.repo.Repo), cached ones and those in git, that differ from dvc.lock."""
    outs = [out for out in repo.index.outs if out.hash_info and Path(out.fs_path).exists()]
    changed = []
    with bar("outputs", "output", total=len(outs)) as progress:
        for out in outs:
            if md5(Path(out.fs_path)) != out.hash_info.value:
                changed.append(Path(out.fs_path).relative_to(repo.root_dir))
            progress.update()
    return changed


def check_files(md5: Md5) -> None:
    """Check cache and outputs; make DVC notice what is broken, then raise UserError."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        repo = Repo(".")
        objects = broken_objects(Path(repo.cache.local.path), md5)
        outputs = changed_outputs(repo, md5)
    except DvcException as error:
        raise UserError(" ".join(str(error).split())) from None
    for path in objects:
        path.unlink()
        print(f"{path}: its md5 is not its name, removed")
    for output in outputs:
        for path in (output, *output.rglob("*")):
            os.utime(path, follow_symlinks=False)
    if objects or outputs:
        named = ", ".join(map(str, outputs)) or "nothing in the working folder"
        raise UserError(
            f"DVC's cache: {len(objects)} broken; not as dvc.lock says: {named}; `dvc pull` or `dvc repro` restores it"
        )
    print("all files match dvc.lock")


@dataclass(frozen=True)
class Difference:
    """A mean IoU that is not the commit's, as fractions; `interval` and `spread` (of the seeds) are the commit's."""

    experiment: str
    protocol: str
    here: float
    there: float
    interval: tuple[float, float] | None
    spread: float | None

    @property
    def within_noise(self) -> bool:
        """Return whether seeds spread that far, or, where that is not known, the choice of images matters as much."""
        if self.spread is not None:
            return abs(self.here - self.there) <= 2 * self.spread
        return self.interval is not None and self.interval[0] <= self.here <= self.interval[1]


@dataclass(frozen=True)
class Comparison:
    """How the scores here stand to those of a commit."""

    same: int
    differences: Sequence[Difference]
    weights: Sequence[str]  # experiments whose trained weights are others
    other: Sequence[str]  # experiments with other settings, or not in both: not compared

    @property
    def verdict(self) -> str:
        """Return "same", "within noise" or "different"."""
        if not self.differences and not self.weights:
            return "same"
        return "within noise" if all(one.within_noise for one in self.differences) else "different"


def _metrics_of(revision: str) -> dict[str, Any]:
    """Return path -> content of each file of metrics/ in a commit."""
    listing = git.ask("ls-tree", "-r", "-z", "--name-only", revision, "metrics/").decode().split("\0")
    names = [name for name in listing if name.endswith(".json") and not name.startswith("metrics/servers/")]
    return {name: json.loads(git.ask("show", f"{revision}:./{name}")) for name in names}


def _settings_of(path: str, lock: Mapping[str, Any]) -> list[Any]:
    """Return the values of settings.json that an output depends on, by dvc.lock: its stage's, and all before it.

    Without what makes it another run of the same: the seed, and the profile's name.
    """
    makers = {out["path"]: entry for entry in lock.values() for out in entry.get("outs", ())}
    waiting, seen, found = [path], set[str](), list[Any]()
    while waiting:
        entry = makers.get(output := waiting.pop())
        if entry is None or output in seen:
            continue
        seen |= {out["path"] for out in entry["outs"]}
        for key, values in entry.get("params", {}).get("settings.json", {}).items():
            found.append((key, {k: v for k, v in values.items() if k not in ("seed", "profile")}))
        waiting += [dep["path"] for dep in entry.get("deps", ()) if dep["path"] != "settings.json"]
    return sorted(found, key=repr)


def _read_lock(content: bytes) -> Mapping[str, Any]:
    stages: Mapping[str, Any] = (yaml.load(content, yaml.CSafeLoader) or {}).get("stages", {})
    return stages


def _spread(experiment: str, protocol: str, files: Mapping[str, Any]) -> float | None:
    """Return the standard deviation of an experiment's mean IoU over its seeds; None for fewer than three."""
    runs = [one for one in files.values() if one["experiment"] == experiment and protocol in one["protocols"]]
    return stdev(one["protocols"][protocol]["mean_iou"] for one in runs) if len(runs) > 2 else None


def compare(here: Mapping[str, Any], there: Mapping[str, Any], comparable: Callable[[str], bool]) -> Comparison:
    """Compare metrics files, path -> content. `comparable(path)`: whether both have the same settings."""
    same, differences, weights, other = 0, list[Difference](), list[str](), list[str]()
    for path in sorted({*here, *there}):
        mine, theirs, name = here.get(path), there.get(path), Path(path).stem
        if mine is None or theirs is None or not comparable(path):
            other.append(name)
            continue
        if mine["weights"] != theirs["weights"]:
            weights.append(name)
        for protocol, of_commit in theirs["protocols"].items():
            if (scores := mine["protocols"][protocol]) == of_commit:
                same += 1
                continue
            ends = of_commit.get("interval", {}).get("mean_iou")
            spread = _spread(theirs["experiment"], protocol, there)
            pair = scores["mean_iou"], of_commit["mean_iou"]
            differences.append(Difference(name, protocol, *pair, (ends[0], ends[1]) if ends else None, spread))
    return Comparison(same, differences, weights, other)


def report(found: Comparison, commit: str) -> Iterator[str]:
    """Yield what to print: a table of what differs, what was not compared, the verdict."""
    if found.differences:
        rows = [("experiment", "protocol", "here", commit, "change", "interval", "seeds")]
        for one in found.differences:
            interval = f"{100 * one.interval[0]:.1f} to {100 * one.interval[1]:.1f}" if one.interval else "-"
            seeds = "-" if one.spread is None else f"± {100 * one.spread:.2f}"
            pair = f"{100 * one.here:.2f}", f"{100 * one.there:.2f}", f"{100 * (one.here - one.there):+.2f}"
            rows.append((one.experiment, one.protocol, *pair, interval, seeds))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        for row in rows:
            yield "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        yield "  mean IoU in percent; docs/explanation/same-bytes.md says what to expect on which machine"
    if found.other:
        yield f"not compared, with other settings or not in both: {', '.join(found.other)}"
    compared = found.same + len(found.differences)
    if not compared:
        yield f"no score to compare with commit {commit}"
        return
    some = len(found.weights)
    weights = f", the weights of {some} experiment{'s are' if some > 1 else ' are'} others" if some else ""
    yield f"{found.same} of {compared} scores identical to those of commit {commit}{weights}: {found.verdict}"


def run(against: str, quick: bool) -> int:
    """Check everything, print what was found; return the exit code. Raises UserError for broken files."""
    check_files(input_md5 if quick else dvc_md5)
    try:
        commit = git.ask("rev-parse", "--short=9", "--verify", f"{against}^{{commit}}").decode().strip()
        there, lock = _metrics_of(commit), _read_lock(git.ask("show", f"{commit}:./{LOCK}"))
    except UserError as error:
        if against != "HEAD":
            raise UserError(f"{against}: {error}") from None
        print(f"scores were not compared with those of the commit: {error}")
        return 0
    files = sorted(path for path in Path("metrics").rglob("*.json") if path.parts[1] != "servers")
    here = {path.as_posix(): json.loads(path.read_bytes()) for path in files}
    mine = _read_lock(Path(LOCK).read_bytes()) if Path(LOCK).is_file() else {}
    found = compare(here, there, lambda path: _settings_of(path, mine) == _settings_of(path, lock))
    colour: Mapping[str, Literal["green", "yellow", "red"]] = {"same": "green", "within noise": "yellow"}
    for line in report(found, commit):
        last = line.removesuffix(f": {found.verdict}")
        if last != line:
            line = f"{last}: {coloured(found.verdict, colour.get(found.verdict, 'red'), sys.stdout)}"
        print(line)
    return {"same": 0, "within noise": EXIT_WITHIN_NOISE, "different": EXIT_DIFFERENT}[found.verdict]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = command_parser("verify", __doc__)
    parser.add_argument("--against", metavar="COMMIT", default="HEAD", help="whose scores are compared; default: HEAD")
    parser.add_argument("--quick", action="store_true", help="do not read large files again that have not changed")
    options = parser.parse_args(arguments)
    codes: list[int] = []
    failed = run_cli(lambda: codes.append(run(options.against, options.quick)))
    return failed or codes[0]


if __name__ == "__main__":
    sys.exit(main())
