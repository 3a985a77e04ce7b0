"""DVC's graph for Snakemake. dvc.yaml defines the graph; this reads DVC's own index of it.

The two engines share one set of files and decide differently what is out of date: DVC by content (dvc.lock), Snakemake
by file times. `sync_mtimes` makes the times agree with the contents before Snakemake reads them, `commit` records in
DVC what Snakemake has run, so that after either of the two the other finds nothing to do.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pipeline import preflight
from pipeline.config import resolve, schema
from pipeline.fetch import own_folders
from pipeline.runtime import progress
from pipeline.runtime.machine import ELSEWHERE
from refinenet.atomic import atomic_file
from refinenet.errors import UserError

_T = TypeVar("_T")

STAMPS = Path(".snakemake/stamps")  # one file a stage: command and parameter values as last seen
DONE = Path(".snakemake/done")  # one file a stage that Snakemake ran and that is not yet in dvc.lock
SKEW = 60  # seconds that a file server's clock may be ahead of this machine's


@dataclass(frozen=True)
class Stage:
    """A stage of DVC's index, every foreach expanded. Paths are relative to the project's root."""

    address: str  # DVC's: "train@voc-res101"
    rule: str  # Snakemake's: "train_voc_res101"
    command: str
    inputs: tuple[str, ...]
    param_files: tuple[str, ...]  # compared by the values read from them, not by time
    outputs: tuple[str, ...]
    params: Mapping[str, Any]  # key of settings.json -> its value
    meta: Mapping[str, Any]
    drawn: bool  # works on synthetic archives, which are small

    def cores(self, every: int) -> int:
        """Return how many of `every` cores the stage gets: all if its meta says so and its data is not synthetic."""
        return every if self.meta.get("cores") == "all" and not self.drawn else 1

    @property
    def gpus(self) -> int:
        """Return how many GPUs the stage gets: `gpu` of its meta times its processes; 0 on another device."""
        settings = next(iter(self.params.values()), None)
        values: Mapping[str, Any] = settings if isinstance(settings, Mapping) else {}
        if not str(values.get("device", "cuda")).startswith("cuda"):
            return 0
        return int(self.meta.get("gpu", 0)) * int((values.get("recipe") or {}).get("num_processes", 1))

    @property
    def stamp(self) -> Path:
        """Return a file that is newer than the outputs exactly when command or parameters differ from dvc.lock."""
        return STAMPS / self.rule

    @property
    def done(self) -> Path:
        """Return a file that exists from the end of Snakemake's job until `commit`."""
        return DONE / self.rule

    def digest(self) -> str:
        """Return the SHA-256 of command and parameter values, in hexadecimal digits."""
        text = json.dumps([self.command, self.params], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def is_folder(output: str) -> bool:
    """Return whether an output is a folder, before it exists: here names without a suffix are folders."""
    return not Path(output).suffix


def _look_up(values: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def stages(repo: Any) -> list[Stage]:
    """Return the stages of `repo`'s index (dvc.repo.Repo), in its order. Raises UserError for invalid settings."""
    resolved = resolve.resolve()
    produced = {out.def_path for stage in repo.index.stages for out in stage.outs}
    found = []
    for stage in repo.index.stages:
        inputs: list[str] = []
        param_files: list[str] = []
        params: dict[str, Any] = {}
        for dep in stage.deps:
            if hasattr(dep, "params"):
                param_files.append(dep.def_path)
                params.update({key: _look_up(resolved, key) for key in dep.params})
            elif dep.def_path in produced:
                inputs.append(dep.def_path)
            elif inside := sorted(out for out in produced if out.startswith(f"{dep.def_path}/")):
                # A folder into which other stages write. DVC links stages by containment, Snakemake by equal paths.
                inputs += inside
            elif not Path(dep.def_path).is_dir():
                inputs.append(dep.def_path)
            else:
                # A folder of source code: an edit changes the time of the file, not of the folder.
                folder = Path(dep.def_path)
                inputs += sorted(str(p) for p in folder.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
        found.append(
            Stage(
                address=stage.addressing,
                rule=re.sub(r"\W", "_", stage.addressing),
                command=stage.cmd,
                inputs=tuple(inputs),
                param_files=tuple(param_files),
                outputs=tuple(out.def_path for out in stage.outs),
                params=params,
                meta=stage.meta or {},
                drawn=bool(resolved["download"].get(stage.addressing.partition("@")[2], {}).get("rendered")),
            )
        )
    return found


def _matches_lock(entry: Mapping[str, Any], stage: Stage) -> bool:
    """Return whether this entry of dvc.lock has the stage's command and parameter values."""
    values = {key: value for file in entry.get("params", {}).values() for key, value in file.items()}
    return entry.get("cmd") == stage.command and values == stage.params


def _time(path: str | Path) -> float:
    return Path(path).stat().st_mtime


def _newer(outputs: Sequence[str], inputs: Sequence[str]) -> bool:
    """Return whether all paths exist and no output is older than an input."""
    whole = all(Path(p).exists() for p in (*inputs, *outputs))
    return whole and max(map(_time, inputs), default=0) <= min(map(_time, outputs))


def _touch(path: str) -> None:
    try:
        os.utime(path)
        timestamp = Path(path, ".snakemake_timestamp")  # Snakemake's own, for the age of a folder
        if timestamp.exists():
            os.utime(timestamp)
    except OSError as error:
        raise UserError(
            f"{path}: the content is up to date, the file time is not and cannot be set ({error.strerror}); Snakemake "
            "compares times, `dvc repro` contents"
        ) from None


def _retry_on_lock(action: Callable[[], _T], seconds: float = 600) -> _T:
    """Run `action`, which takes DVC's lock; retry for `seconds` while another `dvc` holds it, then raise UserError."""
    from dvc.lock import LockError

    end = time.monotonic() + seconds
    while True:
        try:
            return action()
        except LockError:
            if time.monotonic() > end:
                raise UserError(".dvc/tmp/lock: held by another dvc command; wait for it, then again") from None


def _commit(repo: Any, stages: Sequence[Any]) -> None:
    """Store the outputs of DVC's `stages` in its cache, then write dvc.lock once.

    Once, because DVC parses and rewrites the whole file each time: 2.3 s a stage at 72 stages, 14 s at 372. Whoever is
    killed before that loses nothing: the markers still stand, and the cache has what it has.
    """
    stored: list[Any] = []
    try:
        for stage in progress.bar("tell DVC", "stage", stages):
            stage.save()  # hashes the outputs before the lock is taken: another dvc gives up after three seconds
            _retry_on_lock(partial(_store, repo, stage))
            stored.append(stage)
    finally:
        if stored:
            _retry_on_lock(partial(_write_lock, repo, stored))


def _write_lock(repo: Any, stages: Sequence[Any]) -> None:
    from dvc.repo import lock_repo

    with lock_repo(repo):
        stages[0].dvcfile.dump_stages(stages, update_pipeline=False)


def _store(repo: Any, stage: Any) -> None:
    from dvc.repo import lock_repo

    try:
        with lock_repo(repo):
            stage.commit()
        for out in stage.outs:
            # Where not all files of a folder could be copied, DVC prints errors and goes on.
            if out.use_cache and out.changed_cache():
                raise OSError(errno.EIO, "not all of it was taken")
    except OSError as error:
        raise UserError(
            f"{stage.outs[0].def_path}: made, but could not be stored in DVC's cache ({error.strerror}); fix that and "
            "repeat the command, which then stores it and runs no stage again"
        ) from None


def _status(repo: Any) -> dict[str, Any]:
    """Return what `dvc status` reports, without its lock: this only reads, so others need not wait."""
    unlocked = [type(stage).status.__wrapped__(stage) for stage in repo.index.stages]  # without DVC's decorators
    return {address: status for stage in unlocked for address, status in stage.items()}


def register_engine() -> None:
    """Make the stages that this process starts end when it ends (pipeline/runtime/cli.py)."""
    os.environ["PIPELINE_ENGINE"] = str(os.getpid())


def commit(repo: Any, known: Sequence[Stage]) -> None:
    """Commit to DVC the stages that Snakemake has finished. Raises UserError where its cache cannot be written.

    A marker that is older than an input, or of other parameters, is from an earlier run that was killed: not valid.
    """
    by_address = {stage.addressing: stage for stage in repo.index.stages}
    marked = [stage for stage in known if stage.done.exists()]
    # Checked before the first commit, because DVC links outputs again, which changes their times.
    valid = [stage for stage in marked if _marker_is_valid(stage)]
    if valid:
        _commit(repo, [by_address[stage.address] for stage in sorted(valid, key=lambda stage: _time(stage.done))])
    for stage in marked:
        stage.done.unlink()


def commit_or_exit(repo: Any, known: Sequence[Stage]) -> None:
    """Commit as `commit` at the end of a run; a UserError becomes one line and exit code 1."""
    try:
        commit(repo, known)
    except UserError as error:
        sys.exit(f"error: {error}")


def _marker_is_valid(stage: Stage) -> bool:
    whole = all(Path(p).exists() for p in (*stage.inputs, *stage.outputs))
    fresh = whole and all(_time(p) <= _time(stage.done) for p in stage.inputs)
    return fresh and not _of_the_future(stage.done) and stage.done.read_text().strip() == stage.digest()


def _of_the_future(path: str | Path) -> bool:
    """Return whether a file's time is in the future: the clock was set back."""
    return _time(path) > time.time() + SKEW


def _own_data_changed(stage: Stage) -> bool:
    """Return whether a user's own folders, which are not files of the graph, differ from what the stage has packed."""
    for key, value in stage.params.items():
        kind, _, name = key.partition(".")
        if kind == "download" and value["own"] is not None:
            about = schema.build(schema.Folder, value["own"], f"{resolve.SETTINGS}: {key}")
            return own_folders.outdated(name, about, Path(stage.outputs[0]))
    return False


def _modified(stage: Any, status: Sequence[Any]) -> bool:
    """Return whether, by `dvc status`, an input's or output's content has changed since the stage ran."""
    changes = [paths for entry in status if isinstance(entry, dict) for paths in entry.values()]
    # For parameters there is a word for each value; those are compared by the stamp.
    how = {word for paths in changes if isinstance(paths, dict) for word in paths.values() if isinstance(word, str)}
    # For an output that is not in the cache DVC says so, and nothing about its content.
    return "modified" in how or ("not in cache" in how and any(o.exists and o.changed_checksum() for o in stage.outs))


def _stale_settings() -> bool:
    """Return whether settings.json differs from what params.yaml and the profile resolve to."""
    try:
        written = json.loads(resolve.SETTINGS.read_bytes())
    except (FileNotFoundError, ValueError):
        return True
    return json.dumps(written, sort_keys=True) != json.dumps(resolve.resolve(), sort_keys=True)


def check_machine(known: Sequence[Stage], rules: Iterable[str], elsewhere: bool = False) -> None:
    """Exit with one line where this machine lacks what the jobs of `rules`, which are about to run, need."""
    if elsewhere:
        os.environ[ELSEWHERE] = "1"
    addresses = {stage.rule: stage.address for stage in known}
    try:
        preflight.check(resolve.resolve(), {addresses[rule] for rule in rules if rule in addresses})
    except UserError as error:
        sys.exit(f"error: {error}")


def sync_mtimes(repo: Any, known: Sequence[Stage]) -> None:
    """Make file times agree with what DVC knows. Called once, before Snakemake builds its graph.

    The stage that writes settings.json runs here and not as a job: each job depends on a few of its values, so none may
    depend on the time of the whole file, and then Snakemake would not know to run that stage first.
    """
    for path in {path for stage in known for path in (*stage.inputs, *stage.outputs)}:
        if Path(path).exists() and _of_the_future(path):
            _touch(path)  # or it would be newer than everything made from it, until the clock has caught up
    param_files = {file for stage in known for file in stage.param_files}
    for stage in known:
        if param_files & set(stage.outputs) and (not _newer(stage.outputs, stage.inputs) or _stale_settings()):
            if code := subprocess.run(stage.command, shell=True, check=False).returncode:
                sys.exit(code)
            stage.done.parent.mkdir(parents=True, exist_ok=True)
            stage.done.write_text(stage.digest())
    commit(repo, known)
    lockfile = Path("dvc.lock")
    entries = yaml.load(lockfile.read_bytes(), yaml.CSafeLoader)["stages"] if lockfile.exists() else {}
    # "always changed": DVC cannot know; `_own_data_changed` does.
    changed = {address: status for address, status in _status(repo).items() if status != ["always changed"]}
    # Changes that file times do not show: in a user's own folders, or with an old time (cp -p, rsync -t).
    unseen = {stage.address for stage in known if _own_data_changed(stage)}
    by_address = {stage.addressing: stage for stage in repo.index.stages}
    for stage in known:
        status = changed.get(stage.address, ())
        if status and _newer(stage.outputs, stage.inputs) and _modified(by_address[stage.address], status):
            unseen.add(stage.address)
    for stage in known:
        # Snakemake ignores a newer file with unchanged content, so changes that it cannot see need another content.
        text = stage.digest() + (f" {time.time_ns()}" if stage.address in unseen else "")
        if not stage.stamp.exists() or stage.stamp.read_text() != text:
            with atomic_file(stage.stamp) as part:
                part.write_text(text)
        if _matches_lock(entries.get(stage.address, {}), stage) and stage.address not in unseen:
            os.utime(stage.stamp, (0, 0))
        elif _time(stage.stamp) == 0:
            os.utime(stage.stamp)
    for stage in known:
        whole = all(Path(p).exists() for p in (*stage.inputs, *stage.outputs))
        up_to_date = stage.address not in unseen and stage.address not in changed
        if whole and up_to_date and not _newer(stage.outputs, stage.inputs):
            for output in stage.outputs:
                _touch(output)
