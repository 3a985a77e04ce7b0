"""Stage `download`: the official archives of one data set, found, downloaded, or drawn in the same layout.

    settings.json  ->  data/raw/<name>/<official file names>, data/raw/<name>.json

The output of the graph is the second, a record of the archives' sizes and md5: who has pulled prepared data need not
fetch what it was prepared from. `prepare` runs this stage where it misses the archives.

Archives are kept in data/archives/<name>/ and linked into data/raw/<name>/. Neither is an output of the graph, so they
survive a kill and the engines, which delete a stage's outputs before they run it again. A copy that is on this machine
already, in another data set's folder, a `mirror` of the profile or data/incoming/<name>/, is linked. A user's own
folders are packed into an archive that is itself the output: nobody else has them.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from threading import Event

from pipeline.config import resolve
from pipeline.config.schema import Download, Source
from pipeline.fetch import checksums, http, local, login, sources
from pipeline.fetch.checksums import ChecksumCache, StoppedError, say
from pipeline.fetch.input_md5 import input_md5
from pipeline.fetch.sources import run_parallel
from pipeline.runtime.cli import main
from pipeline.runtime.dvc_md5 import dvc_md5
from refinenet.atomic import atomic_file, atomic_folder
from refinenet.errors import UserError

RAW = Path("data/raw")


def run(name: str) -> None:
    """Download, link or draw the archives of the data set `name`. Raises UserError for what the user can fix."""
    cfg = resolve.load("download", name)
    folder = RAW / name
    if cfg.own is not None:
        from pipeline.fetch import own_folders

        own_folders.pack(name, cfg.own, folder)
        return
    if cfg.rendered is not None:
        from pipeline import synthetic

        with atomic_folder(folder) as part:
            synthetic.render(name, cfg.rendered, part)
        _record(name)
        print(f"{folder}: drawn, {' '.join(sorted(file.name for file in folder.iterdir()))}")
        return
    if not cfg.archives:
        raise UserError(f"settings.json: download.{name} has neither archives nor `rendered`")
    for file in cfg.archives:
        if Path(file).name != file or file.startswith("."):
            raise UserError(f"settings.json: download.{name}: {file!r}, expected the plain name of an archive")
    from filelock import FileLock, Timeout

    store = checksums.STORE / name
    store.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(f"{store}.lock", timeout=0):
            known = ChecksumCache(store / checksums.MEMORY)
            new, missing = _bring(name, cfg, known)
            with atomic_folder(folder) as part:
                for file in cfg.archives:
                    if file not in missing:
                        _put(store / file, part / file)
            noted = {file: known.valid(store / file).get("md5", "") for file in cfg.archives if file not in missing}
            _record(name, noted)
            _tell_unpublished(name, cfg, known, new, not missing)
        print(f"{folder}: {len(new)} archives fetched, {len(cfg.archives) - len(missing | new)} were there")
    except Timeout:
        raise UserError(f"{store}.lock: held by another `download {name}`; wait for it") from None


def record(name: str) -> Path:
    """Return where size and md5 of the archives of the data set `name` are recorded."""
    return RAW / f"{name}.json"


def _record(name: str, known: Mapping[str, str] | None = None) -> None:
    """Write the record; one that says the same stays, with its time. `known`: md5 of files that need not be read."""
    files = {file.relative_to(RAW / name).as_posix(): file for file in (RAW / name).rglob("*") if file.is_file()}
    md5 = known or {}
    found = {
        path: {"size": file.stat().st_size, "md5": md5.get(path) or input_md5(file)} for path, file in files.items()
    }
    text = json.dumps(found, indent=1, sort_keys=True) + "\n"
    if not record(name).is_file() or record(name).read_text(encoding="utf-8") != text:
        with atomic_file(record(name)) as part:
            part.write_text(text, encoding="utf-8")


def _bring(name: str, cfg: Download, known: ChecksumCache) -> tuple[set[str], set[str]]:
    """Bring all archives into the store; return the files that are new there, and the optional ones that failed."""
    store, stop = checksums.STORE / name, Event()

    def look(file: str, source: Source) -> str:
        if sources.already_there(source, store / file, known, stop):
            return "kept"
        where = local.candidate_paths(name, file, cfg.mirror)
        return "taken" if local.link_local_copy(name, source, store / file, where, known, stop) else ""

    def fetch(file: str, source: Source) -> None:
        with _turn(source.url, file, stop):
            # Meanwhile another data set may have fetched it.
            if not local.link_local_copy(name, source, store / file, local.in_store(name, file), known, stop):
                sources.fetch(source, store / file, known, room, stop)

    for entry in cfg.mirror:
        if (mirror := local.folder(entry)) is not None and not mirror.is_dir():
            say(f"warning: mirror {mirror}: no such folder")
    looked, _ = run_parallel({file: partial(look, file, source) for file, source in cfg.archives.items()}, stop)
    absent = {file: source for file, source in cfg.archives.items() if not looked.get(file)}
    room = http.DiskBudget(store)
    sizes = {file: source.size for file, source in absent.items() if not source.url.startswith("file://")}
    room.expect(*((store / file, size) for file, size in sizes.items() if size is not None))
    _, failed = run_parallel({file: partial(fetch, file, source) for file, source in absent.items()}, stop)
    needed = {file: error for file, error in failed.items() if not absent[file].optional}
    if needed:
        by_hand = _by_hand(name, {file: absent[file] for file in needed})
        raise UserError(". ".join(["; ".join(map(str, needed.values())), *by_hand]))
    for file, error in failed.items():
        by_hand = _by_hand(name, {file: absent[file]}) or [f"By hand: put it into {local.INCOMING / name}/"]
        say(
            f"{name}: without {file}, which is optional: data that needs it is left out ({error}). "
            f"{by_hand[0]}, then run `python -m pipeline.download {name}`"
        )
    return {file for file, found in looked.items() if found != "kept"} - failed.keys(), set(failed)


@contextmanager
def _turn(url: str, file: str, stop: Event) -> Iterator[None]:
    """Hold a lock on `url` within this block: two data sets have archives in common."""
    from filelock import FileLock, Timeout

    lock = FileLock(checksums.STORE / f".{hashlib.sha256(url.encode()).hexdigest()[:16]}.lock")
    announced = False
    while True:
        try:
            lock.acquire(timeout=0.5)
            break
        except Timeout:
            if stop.is_set():
                raise StoppedError from None
            if not announced:
                say(f"{file}: another stage is fetching it; waiting")
                announced = True
    try:
        yield
    finally:
        lock.release()


def _by_hand(name: str, files: Mapping[str, Source]) -> list[str]:
    """Return how a person can get archives that could not be downloaded: one sentence for each page."""
    pages: dict[str, list[str]] = {}
    for file, source in files.items():
        if source.page is not None:
            pages.setdefault(source.page, []).append(file)
    folder = local.INCOMING / name
    sentences = []
    for page, names in pages.items():
        folder.mkdir(parents=True, exist_ok=True)
        described = []
        for file in names:
            source = files[file]
            known = [http.amount(source.size)] if source.size is not None else []
            known += [f"md5 {source.md5}"] if source.md5 is not None else []
            known += [f"sha256 {source.sha256}"] if source.md5 is None and source.sha256 is not None else []
            described.append(f"{file} ({', '.join(known)})" if known else file)
        sentence = f"By hand: take {' and '.join(described)} from {page} and put {'it' if len(names) == 1 else 'them'}"
        sentence += f" into {folder}/"
        for account in {files[file].login for file in names} - {None}:
            assert account is not None
            sentence += f"; or set {' and '.join(login.variables(account))}"
            sentence += f", or run `csDownload -d {folder} {' '.join(names)}`"
        sentences.append(sentence)
    return sentences


def _put(file: Path, name: Path) -> None:
    """Link a file of the store to `name`; copy it where the disk has no links."""
    if file.is_symlink():
        name.symlink_to(file.parent.absolute() / file.readlink())
        return
    try:
        os.link(file, name)
    except OSError:
        try:
            name.symlink_to(file.absolute())
        except OSError:
            shutil.copyfile(file, name)


def _tell_unpublished(name: str, cfg: Download, known: ChecksumCache, new: set[str], whole: bool) -> None:
    """Print the md5 of new archives that have no published checksum; warn where dvc.lock has another one.

    `whole`: no optional archive is missing; else the record is another one because of that.
    """
    unsure = [file for file in cfg.archives if file in new and not checksums.has_checksum(cfg.archives[file])]
    if not unsure:
        return
    md5 = {file: known.recorded(checksums.STORE / name / file)["md5"] for file in unsure}
    recorded = _recorded(name, cfg)
    now = dvc_md5(record(name))
    if recorded and whole and now != recorded:
        files = ", ".join(f"{file} (md5 {md5[file]})" for file in unsure)
        say(
            f"warning: {record(name)}: md5 {now}, dvc.lock recorded {recorded} for the same settings; no checksum is "
            f"published of {files}, and its source has changed"
        )
    elif not recorded:
        for file in unsure:
            say(f"{name}: {file}: no published checksum; md5 {md5[file]}, recorded in {record(name)}")


def _recorded(name: str, cfg: Download) -> str:
    """Return the md5 of data/raw/<name>.json in dvc.lock; "" where it was made with other settings."""
    import yaml

    try:
        text = Path("dvc.lock").read_text(encoding="utf-8")
        entry = yaml.load(text, yaml.CSafeLoader)["stages"][f"download@{name}"]
        values = entry["params"][str(resolve.SETTINGS)][f"download.{name}"]
        (out,) = (out for out in entry["outs"] if out["path"] == str(record(name)))
        return str(out["md5"]) if values == json.loads(json.dumps(asdict(cfg))) else ""
    except (OSError, yaml.YAMLError, KeyError, TypeError, ValueError):
        return ""


if __name__ == "__main__":
    main(run, __doc__, "DATASET")
