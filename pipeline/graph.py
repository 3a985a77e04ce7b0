"""DVC's graph as Snakemake needs it. dvc.yaml is where the graph is written; this reads DVC's own index of it.

The two engines share one set of files and judge differently what is out of date: DVC by content (dvc.lock), Snakemake
by file times. `sync_mtimes` brings the times in line with the contents before Snakemake looks at them, `commit` tells
DVC what Snakemake has done, so that after either of the two the other finds nothing to do.
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
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import yaml

from pipeline.config import resolve, schema
from pipeline.fetch import own_folders
from refinenet.atomic import atomic_file
from refinenet.errors import UserError

_T = TypeVar("_T")

STAMPS = Path(".snakemake/stamps")  # one file a stage: command and parameter values as last seen
DONE = Path(".snakemake/done")  # one file a stage that Snakemake ran and DVC has not been told of
SKEW = 60  # seconds by which the clock of a file server may be ahead of this machine's


@dataclass(frozen=True)
class Stage:
    """A stage of DVC's index, every foreach expanded. Paths are relative to the project's root."""

    address: str  # DVC's: "train@voc-res101"
    rule: str  # Snakemake's: "train_voc_res101"
    command: str
    inputs: tuple[str, ...]
    param_files: tuple[str, ...]  # what counts is the values read from them, not their time
    outputs: tuple[str, ...]
    params: Mapping[str, Any]  # key of settings.json -> its value
    meta: Mapping[str, Any]
    drawn: bool  # from archives that are drawn, which are small

    def cores(self, every: int) -> int:
        """How many cores it is to have of `every` one: all if its meta says so, but a single one for drawn archives."""
        return every if self.meta.get("cores") == "all" and not self.drawn else 1

    @property
    def gpus(self) -> int:
        """How many GPUs it is to have: none on another device, else its meta's times its processes."""
        settings = next(iter(self.params.values()), None)
        values: Mapping[str, Any] = settings if isinstance(settings, Mapping) else {}
        if not str(values.get("device", "cuda")).startswith("cuda"):
            return 0
        return int(self.meta.get("gpu", 0)) * int((values.get("recipe") or {}).get("num_processes", 1))

    @property
    def stamp(self) -> Path:
        """A file that is newer than the outputs exactly when command or parameters are not those in dvc.lock."""
        return STAMPS / self.rule

    @property
    def done(self) -> Path:
        """A file that exists from the end of Snakemake's job until `dvc commit`."""
        return DONE / self.rule

    def digest(self) -> str:
        text = json.dumps([self.command, self.params], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def is_folder(output: str) -> bool:
    """Whether an output is a folder. DVC need not know before it exists; here a name without a suffix is one."""
    return not Path(output).suffix


def _look_up(values: Mapping[str, Any], key: str) -> Any:
    for part in key.split("."):
        values = values[part]
    return values


def stages(repo: Any) -> list[Stage]:
    """All stages of `repo`'s index (dvc.repo.Repo), in its order. UserError where the settings do not resolve."""
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
                # A folder into which other stages write: DVC sees them in it, Snakemake knows files by their own paths.
                inputs += inside
            elif not Path(dep.def_path).is_dir():
                inputs.append(dep.def_path)
            else:
                # A folder of sources: an edit changes the time of a file in it, not the folder's.
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
    """Whether this entry of dvc.lock has the stage's command and parameter values."""
    values = {key: value for file in entry.get("params", {}).values() for key, value in file.items()}
    return entry.get("cmd") == stage.command and values == stage.params


def _time(path: str | Path) -> float:
    return Path(path).stat().st_mtime


def _newer(outputs: Sequence[str], inputs: Sequence[str]) -> bool:
    """Whether all of them exist and no output is older than an input."""
    whole = all(Path(p).exists() for p in (*inputs, *outputs))
    return whole and max(map(_time, inputs), default=0) <= min(map(_time, outputs))


def _touch(path: str) -> None:
    try:
        os.utime(path)
        timestamp = Path(path, ".snakemake_timestamp")  # Snakemake's own, by which it tells the age of a folder
        if timestamp.exists():
            os.utime(timestamp)
    except OSError as error:
        raise UserError(
            f"{path}: its content is up to date, its time is not, and cannot be set ({error.strerror}); Snakemake goes "
            "by times, `dvc repro` by contents"
        ) from None


def _retry_on_lock(action: Callable[[], _T], seconds: float = 600) -> _T:
    """Do what needs DVC's lock, as soon as another `dvc` has given it back."""
    from dvc.lock import LockError

    end = time.monotonic() + seconds
    while True:
        try:
            return action()
        except LockError:
            if time.monotonic() > end:
                raise UserError(".dvc/tmp/lock: held by another dvc command; wait for it, then again") from None


def _commit(repo: Any, stage: Any) -> None:
    from dvc.repo import lock_repo

    stage.save()  # hashes what was made, before the lock: another dvc waits three seconds for it and gives up
    with lock_repo(repo):
        stage.commit()
        for out in stage.outs:
            # Where not all files of a folder could be copied, DVC prints errors and goes on.
            if out.use_cache and out.changed_cache():
                raise OSError(errno.EIO, "not all of it was taken")
        stage.dump(update_pipeline=False)


def _status(repo: Any) -> dict[str, Any]:
    """What `dvc status` tells, without the lock that it holds meanwhile: reading, it keeps nobody from anything."""
    unlocked = [type(stage).status.__wrapped__(stage) for stage in repo.index.stages]  # as under DVC's decorators
    return {address: status for stage in unlocked for address, status in stage.items()}


def register_engine() -> None:
    """Let the stages that this process starts end when it does (pipeline/runtime/cli.py)."""
    os.environ["PIPELINE_ENGINE"] = str(os.getpid())


def commit(repo: Any, known: Sequence[Stage]) -> None:
    """Tell DVC of the stages that Snakemake ran to their end. UserError where its cache cannot be written.

    A mark that is older than an input, or of other parameters, is of an earlier run that was killed: not valid.
    """
    by_address = {stage.addressing: stage for stage in repo.index.stages}
    marked = [stage for stage in known if stage.done.exists()]
    # Looked at before the first commit: DVC links outputs anew, and their times would then be those of the commit.
    valid = [stage for stage in marked if _marker_is_valid(stage)]
    for stage in sorted(valid, key=lambda stage: _time(stage.done)):
        try:
            _retry_on_lock(partial(_commit, repo, by_address[stage.address]))
        except OSError as error:
            raise UserError(
                f"{stage.outputs[0]}: is made, but could not be put into DVC's cache ({error.strerror}); once that is "
                "put right, the same command does so and runs nothing again"
            ) from None
    for stage in marked:
        stage.done.unlink()


def commit_or_exit(repo: Any, known: Sequence[Stage]) -> None:
    """Do the same at the end of a run: what the user can put right is one line and exit code 1."""
    try:
        commit(repo, known)
    except UserError as error:
        sys.exit(f"error: {error}")


def _marker_is_valid(stage: Stage) -> bool:
    whole = all(Path(p).exists() for p in (*stage.inputs, *stage.outputs))
    fresh = whole and all(_time(p) <= _time(stage.done) for p in stage.inputs)
    return fresh and not _of_the_future(stage.done) and stage.done.read_text().strip() == stage.digest()


def _of_the_future(path: str | Path) -> bool:
    """Whether a file's time is one that this machine's clock has yet to show: the clock was set back."""
    return _time(path) > time.time() + SKEW


def _own_data_changed(stage: Stage) -> bool:
    """Whether a stage that packs a user's own folders would find a change in them: they are no files of the graph."""
    for key, value in stage.params.items():
        kind, _, name = key.partition(".")
        if kind == "download" and value["own"] is not None:
            about = schema.build(schema.Folder, value["own"], f"{resolve.SETTINGS}: {key}")
            return own_folders.outdated(name, about, Path(stage.outputs[0]))
    return False


def _modified(stage: Any, status: Sequence[Any]) -> bool:
    """Whether, by `dvc status`, an input or output of a stage has another content than when the stage had run."""
    changes = [paths for entry in status if isinstance(entry, dict) for paths in entry.values()]
    # Of parameters it has a word for each value; those are in the stamp.
    how = {word for paths in changes if isinstance(paths, dict) for word in paths.values() if isinstance(word, str)}
    # Of an output that is not in the cache DVC says that, and nothing about its content.
    return "modified" in how or ("not in cache" in how and any(o.exists and o.changed_checksum() for o in stage.outs))


def _stale_settings() -> bool:
    """Whether settings.json, whatever its time, is not what params.yaml and the profile resolve to."""
    try:
        written = json.loads(resolve.SETTINGS.read_bytes())
    except (FileNotFoundError, ValueError):
        return True
    return json.dumps(written, sort_keys=True) != json.dumps(resolve.resolve(), sort_keys=True)


def sync_mtimes(repo: Any, known: Sequence[Stage], elsewhere: bool = False) -> None:
    """Make file times say what DVC knows. Called once, before Snakemake builds its graph.

    The stage that writes the parameters runs here and not as a job: each job reads its own few values, so none may
    depend on the time of the whole file, and without that nothing would tell Snakemake to run it first. `elsewhere`:
    the jobs run on other machines than this one, which need not have their GPU.
    """
    for path in {path for stage in known for path in (*stage.inputs, *stage.outputs)}:
        if Path(path).exists() and _of_the_future(path):
            _touch(path)  # or it would be newer than all that is made from it, until the clock has caught up
    param_files = {file for stage in known for file in stage.param_files}
    for stage in known:
        if param_files & set(stage.outputs) and (not _newer(stage.outputs, stage.inputs) or _stale_settings()):
            environment = {**os.environ, **({"PIPELINE_ELSEWHERE": "1"} if elsewhere else {})}
            if code := subprocess.run(stage.command, shell=True, check=False, env=environment).returncode:
                sys.exit(code)
            stage.done.parent.mkdir(parents=True, exist_ok=True)
            stage.done.write_text(stage.digest())
    commit(repo, known)
    lockfile = Path("dvc.lock")
    entries = yaml.load(lockfile.read_bytes(), yaml.CSafeLoader)["stages"] if lockfile.exists() else {}
    # "always changed" says that DVC cannot know; `_own_data_changed` does.
    changed = {address: status for address, status in _status(repo).items() if status != ["always changed"]}
    # What no time of a file tells: a change in a user's folders, and one that came with an old time (cp -p, rsync -t).
    unseen = {stage.address for stage in known if _own_data_changed(stage)}
    by_address = {stage.addressing: stage for stage in repo.index.stages}
    for stage in known:
        status = changed.get(stage.address, ())
        if status and _newer(stage.outputs, stage.inputs) and _modified(by_address[stage.address], status):
            unseen.add(stage.address)
    for stage in known:
        # Snakemake passes over a newer file whose content is what it was: for what it cannot see, it is another.
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
