"""DVC's graph for Snakemake. dvc.yaml defines the graph; this reads DVC's own index of it.

The two engines share one set of files and decide differently what is out of date: DVC by content (dvc.lock), Snakemake
by file times. `view` says which times agree with the contents. A run sets them before Snakemake reads them
(`sync_mtimes`); a look (`snakemake -n`, `--summary`) sees them and writes nothing (`overlay`). `commit` records in DVC
what Snakemake has run, so that after either of the two the other finds nothing to do.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import hashlib
import json
import os
import re
import stat
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
from pipeline.config.profiles import read_params
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
        """Return how many of `every` cores the stage gets.

        All if its meta says so and its data is not synthetic; as many as its threads where it computes on the CPU: two
        trainings of two threads each on two cores take about eight times as long together as one after the other. An
        evaluation with a dense CRF computes it on the CPU, whatever its device.
        """
        if self.meta.get("cores") == "all" and not self.drawn:
            return every
        crf = any(protocol.get("crf") for protocol in (self._settings.get("protocols") or {}).values())
        return min(every, int(self._settings.get("threads", 1))) if crf or not self._on_gpu else 1

    @property
    def gpus(self) -> int:
        """Return how many GPUs the stage gets: `gpu` of its meta times its processes; 0 on another device."""
        processes = int((self._settings.get("recipe") or {}).get("num_processes", 1))
        return int(self.meta.get("gpu", 0)) * processes if self._on_gpu else 0

    @property
    def _settings(self) -> Mapping[str, Any]:
        settings = next(iter(self.params.values()), None)
        return settings if isinstance(settings, Mapping) else {}

    @property
    def _on_gpu(self) -> bool:
        return str(self._settings.get("device", "cuda")).startswith("cuda")

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
    """Return the stages of `repo`'s index (dvc.repo.Repo), in its order. Raises UserError for invalid settings.

    Without those of data sets that are left out of the settings (`resolve.left_out`).
    """
    resolved, rows = resolve.resolve(), read_params()
    absent = resolve.left_out(rows)
    absent |= {name for named in (rows.experiments, rows.seeds) for name, one in named.items() if one.data in absent}
    # Without files under version control that nothing makes: networks/*.dvc.
    known = [
        one for one in repo.index.stages if not one.is_data_source and one.addressing.partition("@")[2] not in absent
    ]
    produced = {out.def_path for stage in known for out in stage.outs}
    found = []
    for stage in known:
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
    """Return whether this entry of dvc.lock has the stage's command, outputs and parameter values."""
    values = {key: value for file in entry.get("params", {}).values() for key, value in file.items()}
    made = {out["path"] for out in entry.get("outs", ())}
    return entry.get("cmd") == stage.command and made == set(stage.outputs) and values == stage.params


class Times:
    """File times as Snakemake reads them, each file looked at once, with those on top that a run would set."""

    def __init__(self) -> None:
        self.set: dict[str, float] = {}
        self._seen: dict[str, tuple[float, float] | None] = {}

    def _look(self, path: str) -> tuple[float, float] | None:
        """Return the times as output (of a link: its own) and as input (or its target's, if later); None: missing."""
        if path in self.set:
            return self.set[path], self.set[path]
        if path not in self._seen:
            try:
                own, target = Path(path).lstat(), Path(path).stat()
                if stat.S_ISDIR(target.st_mode):
                    with contextlib.suppress(FileNotFoundError):
                        target = Path(path, ".snakemake_timestamp").stat()  # Snakemake's own, for the age of a folder
                at = own.st_mtime if stat.S_ISLNK(own.st_mode) else target.st_mtime
                self._seen[path] = at, max(at, target.st_mtime)
            except FileNotFoundError:
                self._seen[path] = None
        return self._seen[path]

    def of(self, path: str | Path) -> float:
        """Return the time of an input; 0 where it is missing."""
        return seen[1] if (seen := self._look(str(path))) else 0.0

    def whole(self, paths: Iterable[str]) -> bool:
        """Return whether all paths exist."""
        return all(self._look(path) for path in paths)

    def newer(self, outputs: Sequence[str], inputs: Sequence[str]) -> bool:
        """Return whether all paths exist and no output is older than an input."""
        made, given = [self._look(path) for path in outputs], [self._look(path) for path in inputs]
        if not all(made) or not all(given):
            return False
        return max((one[1] for one in given if one), default=0.0) <= min(one[0] for one in made if one)

    def of_the_future(self, paths: Iterable[str]) -> set[str]:
        """Return the paths whose time is in the future: the clock was set back."""
        return {path for path in paths if self.of(path) > time.time() + SKEW}


def _touch(path: str) -> None:
    try:
        os.utime(path, follow_symlinks=False)  # a link may lead into a cache whose files are a colleague's
        if Path(path).is_dir() and (timestamp := Path(path, ".snakemake_timestamp")).exists():
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


def _read_parameters_once(repo: Any) -> None:
    """Have DVC look the parameters' values up in settings.json as it is now.

    Its own way parses the file and walks through all of it for each value: minutes at 672 stages.
    """
    files: dict[str, Any] = {}

    def values(dep: Any, flatten: bool = True, **_: Any) -> dict[str, Any]:
        path = dep.def_path
        if path not in files:
            files[path] = json.loads(Path(path).read_bytes()) if Path(path).exists() else {}
        found = {}
        for key in dep.params:
            with contextlib.suppress(KeyError):
                # Each its own: what stages share would become an alias in dvc.lock, and another text one by one.
                found[key] = copy.deepcopy(_look_up(files[path], key))
        return found

    for stage in repo.index.stages:
        for dep in stage.deps:
            if hasattr(dep, "params") and dep.params and dep.def_path.endswith(".json"):
                dep.read_params = partial(values, dep)


def _commit(repo: Any, stages: Sequence[Any]) -> None:
    """Store the outputs of DVC's `stages` in its cache, then write dvc.lock once.

    Once, because DVC parses and rewrites the whole file each time: 2.3 s a stage at 72 stages, 14 s at 372. Whoever is
    killed before that loses nothing: the markers still stand, and the cache has what it has.
    """
    stored: list[Any] = []
    _read_parameters_once(repo)
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
    """Return what `dvc status` reports of inputs and outputs; parameters are compared by `_matches_lock`.

    Without its lock: this only reads, so others need not wait.
    """
    found = {}
    _read_parameters_once(repo)
    for stage in repo.index.stages:
        for address, entries in type(stage).status.__wrapped__(stage).items():  # without DVC's decorators
            kept = [_without_values(entry) for entry in entries if entry != "always changed"]
            if kept := [entry for entry in kept if entry]:
                found[address] = kept
    return found


def _without_values(entry: Any) -> Any:
    """Return an entry of `dvc status` without parameters: for each of their files it has a word a value.

    A stage that reads settings.json as a whole has it as a file among its inputs, with one word.
    """
    if not isinstance(entry, dict) or "changed deps" not in entry:
        return entry
    kept = {path: what for path, what in entry["changed deps"].items() if not isinstance(what, dict)}
    return {"changed deps": kept} if kept else None


def register_engine() -> None:
    """Make the stages that this process starts end when it ends (pipeline/runtime/cli.py)."""
    os.environ["PIPELINE_ENGINE"] = str(os.getpid())


def mark_done(addresses: Iterable[str]) -> None:
    """Note that stages were run by hand with the settings as they are; the next Snakemake run then tells DVC."""
    from dvc.exceptions import NotDvcRepoError
    from dvc.repo import Repo

    try:
        repo = Repo(".")
    except NotDvcRepoError:
        return  # then there is no engine either
    wanted = set(addresses)
    for stage in stages(repo):
        if stage.address in wanted:
            with atomic_file(stage.done) as part:
                part.write_text(stage.digest())


def commit(repo: Any, known: Sequence[Stage]) -> None:
    """Commit to DVC the stages that Snakemake has finished. Raises UserError where its cache cannot be written.

    A marker that is older than an input, or of other parameters, is from an earlier run that was killed: not valid.
    """
    by_address = {stage.addressing: stage for stage in repo.index.stages}
    marked = [stage for stage in known if stage.done.exists()]
    # Checked before the first commit, because DVC links outputs again, which changes their times.
    times = Times()
    valid = [stage for stage in marked if _marker_is_valid(stage, times)]
    if valid:
        _commit(repo, [by_address[stage.address] for stage in sorted(valid, key=lambda stage: times.of(stage.done))])
    for stage in marked:
        stage.done.unlink()


def _marker_is_valid(stage: Stage, times: Times) -> bool:
    whole = times.whole((*stage.inputs, *stage.outputs))
    fresh = whole and max(map(times.of, stage.inputs), default=0.0) <= times.of(stage.done)
    return fresh and not times.of_the_future([str(stage.done)]) and stage.done.read_text().strip() == stage.digest()


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
    how = {word for paths in changes for word in paths.values()}
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
    """Raise UserError where this machine lacks what the jobs of `rules`, which are about to run, need."""
    if elsewhere:
        os.environ[ELSEWHERE] = "1"
    addresses = {stage.rule: stage.address for stage in known}
    preflight.check(resolve.resolve(), {addresses[rule] for rule in rules if rule in addresses})


def _stale_writers(known: Sequence[Stage], times: Times) -> list[Stage]:
    """Return the stages that write parameters of others (settings.json) and have to run."""
    param_files = {file for stage in known for file in stage.param_files}
    writers = [stage for stage in known if param_files & set(stage.outputs)]
    return [stage for stage in writers if not times.newer(stage.outputs, stage.inputs) or _stale_settings()]


def _paths(known: Sequence[Stage]) -> set[str]:
    return {path for stage in known for path in (*stage.inputs, *stage.outputs)}


@dataclass(frozen=True)
class View:
    """What Snakemake has to see to decide as DVC does, where it differs from the files.

    Attributes:
        times: path -> its time, s.
        stamps: path of a stamp -> its text and its time.
    """

    times: Mapping[str, float]
    stamps: Mapping[Path, tuple[str, float]]


def view(repo: Any, known: Sequence[Stage], done: Iterable[str] = ()) -> View:
    """Return what Snakemake has to see. Only reads.

    Args:
        repo: dvc.repo.Repo.
        known: its stages.
        done: addresses of stages that are up to date, whatever DVC says: a run would run or commit them first.
    """
    done, times, now = set(done), Times(), time.time()
    # Or they would be newer than everything made from them, until the clock has caught up.
    times.set |= dict.fromkeys(times.of_the_future(_paths(known)), now)
    for stage in known:
        if stage.address in done and not times.newer(stage.outputs, stage.inputs):
            times.set |= dict.fromkeys(stage.outputs, now)
    lockfile = Path("dvc.lock")
    entries = yaml.load(lockfile.read_bytes(), yaml.CSafeLoader)["stages"] if lockfile.exists() else {}
    matching = {stage.address for stage in known if _matches_lock(entries.get(stage.address, {}), stage)} | done
    changed = {address: status for address, status in _status(repo).items() if address not in done}
    # Changes that file times do not show: in a user's own folders, or with an old time (cp -p, rsync -t).
    unseen = {stage.address for stage in known if stage.address not in done and _own_data_changed(stage)}
    by_address = {stage.addressing: stage for stage in repo.index.stages}
    for stage in known:
        status = changed.get(stage.address, ())
        # Also beside a newer input: where its content is that of its last run, Snakemake takes no notice of either.
        if status and _modified(by_address[stage.address], status):
            unseen.add(stage.address)
    stamps = {}
    for stage in known:
        # Snakemake ignores a newer file with unchanged content, and the values may be those with which it made outputs
        # once, when DVC has made others since. So the stamp of what is to run has a content of its own until then.
        text, old = stage.digest(), stage.stamp.read_text() if stage.stamp.exists() else ""
        if stage.address not in matching - unseen:
            waits = old.startswith(f"{text} ") and not times.newer(stage.outputs, [str(stage.stamp)])
            text = old if waits and stage.address not in unseen else f"{text} {time.time_ns()}"
        same = old == text
        before = times.of(stage.stamp) if same else 0.0
        after = 0.0 if stage.address in matching - unseen else before or now
        if not same or after != before:
            stamps[stage.stamp] = text, after
    for stage in known:
        up_to_date = stage.address in matching - unseen and stage.address not in changed
        whole = up_to_date and times.whole((*stage.inputs, *stage.outputs))
        if whole and not times.newer(stage.outputs, stage.inputs):
            times.set |= dict.fromkeys(stage.outputs, now)
    return View(times.set, stamps)


def sync_mtimes(repo: Any, known: Sequence[Stage]) -> None:
    """Make file times agree with what DVC knows, before Snakemake builds its graph for a run.

    The stage that writes settings.json runs here and not as a job: each job depends on a few of its values, so none may
    depend on the time of the whole file, and then Snakemake would not know to run that stage first.
    """
    for path in Times().of_the_future(_paths(known)):
        _touch(path)
    for stage in _stale_writers(known, Times()):
        if code := subprocess.run(stage.command, shell=True, check=False).returncode:
            sys.exit(code)
        stage.done.parent.mkdir(parents=True, exist_ok=True)
        stage.done.write_text(stage.digest())
    commit(repo, known)
    seen = view(repo, known)
    for stamp, (text, at) in seen.stamps.items():
        with atomic_file(stamp) as part:
            part.write_text(text)
        os.utime(stamp, (at, at))
    for path in seen.times:
        _touch(path)


def overlay(repo: Any, known: Sequence[Stage], cache: Any) -> None:
    """Show Snakemake, in `cache` (its IOCache), what `sync_mtimes` would make of the files, and write nothing."""
    from snakemake_interface_storage_plugins.io import Mtime

    times = Times()
    marked = [stage for stage in known if stage.done.exists() and _marker_is_valid(stage, times)]
    seen = view(repo, known, {stage.address for stage in (*marked, *_stale_writers(known, times))})
    for path, at in seen.times.items():
        cache.mtime[path], cache.exists_local[path] = Mtime(local=at), True
    for stamp, (text, at) in seen.stamps.items():
        path, content = str(stamp), text.encode()
        cache.mtime[path], cache.exists_local[path] = Mtime(local=at), True
        cache.checksum[path] = f"sha256:{hashlib.sha256(content).hexdigest()}"
        # Too long to be compared by its content: a stamp that is not there has none.
        cache.size[path] = len(content) if stamp.exists() else sys.maxsize
