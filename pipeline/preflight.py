"""What this machine lacks for the profile, in one screen, before anything is downloaded or written.

    refinenet preflight                     for the whole graph
    refinenet preflight table-nyud          for these of DVC's stages and what they need
    refinenet preflight table-nyud --gpu rtx4090    with the hours that it would take on this GPU

Checked: a GPU and packages, the accounts that archives need, whether their hosts answer, space on the disk. For given
stages the trainings that they need are counted, too, as `refinenet cost` does it. Exit code 1 if something is missing.
"""

from __future__ import annotations

import shutil
import socket
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit
from urllib.request import getproxies

from pipeline import cost, datasets
from pipeline.config.profiles import PARAMS, read_params
from pipeline.config.resolve import resolve
from pipeline.fetch import checksums, local, login
from pipeline.runtime.cli import command_parser, run_cli
from pipeline.runtime.machine import missing_crf, missing_gpu
from refinenet.errors import UserError

Settings = Mapping[str, Mapping[str, Any]]
Level = Literal["ok", "note", "MISSING"]
PATIENCE = 5.0  # seconds in which a host has to answer
PORTS = {"http": 80, "https": 443}


@dataclass(frozen=True)
class Finding:
    """What was looked at and what was found; MISSING: a stage will fail of it."""

    what: str
    text: str
    level: Level = "ok"


def here(data: str, file: str, source: Mapping[str, Any], mirror: Sequence[str]) -> bool:
    """Return whether an archive of the data set lies on this machine, wherever `download` would find it."""
    places = [Path("data/raw") / data / file, checksums.STORE / data / file]
    files = [local.folder(url) for url in (source["url"], *source["mirrors"]) if url.startswith("file://")]
    places += [path for path in files if path is not None]
    return any(path.is_file() for path in (*places, *local.candidate_paths(data, file, mirror)))


def _is_wanted(wanted: Collection[str] | None, *addresses: str) -> bool:
    return wanted is None or any(address in wanted for address in addresses)


def _absent(settings: Settings, wanted: Collection[str] | None) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Yield data set, name and source of each archive that would be downloaded."""
    for data, download in settings["download"].items():
        if _is_wanted(wanted, f"download@{data}"):
            for file, source in download["archives"].items():
                if not here(data, file, source, download["mirror"]):
                    yield data, file, source


def _answer(address: str) -> str | None:
    """Return why the host of `address` cannot be reached; None where it answers."""
    url = urlsplit(address)
    if url.scheme not in PORTS or getproxies().get(url.scheme):
        return None  # a file; or a proxy connects, not this machine
    try:
        socket.create_connection((url.hostname or "", url.port or PORTS[url.scheme]), PATIENCE).close()
        return None
    except OSError as error:
        return f"{url.hostname} ({error.strerror or error})"


def _machine(settings: Settings, wanted: Collection[str] | None) -> Iterator[Finding]:
    devices, crf = dict[str, str](), list[str]()
    for name, training in settings["train"].items():
        if _is_wanted(wanted, f"train@{name}", f"pretrain@{name}", f"evaluate@{name}"):
            devices.setdefault(training["device"], name)
            evaluation = settings["evaluate"].get(name)
            if evaluation and missing_crf(evaluation["protocols"]):
                crf.append(name)
    for device in devices:
        problem = missing_gpu(device)
        yield Finding("device", problem or f"{device}: found", "MISSING" if problem else "ok")
    if crf:
        yield Finding(
            "packages", f"pydensecrf2 is missing, for the dense CRF of {', '.join(crf)}; `make crf`", "MISSING"
        )


def _archives(settings: Settings, wanted: Collection[str] | None) -> Iterator[Finding]:
    absent = list(_absent(settings, wanted))
    whole = sum(
        len(download["archives"])
        for data, download in settings["download"].items()
        if _is_wanted(wanted, f"download@{data}")
    )
    if not whole:
        return
    yield Finding("archives", f"{whole - len(absent)} of {whole} are on this machine")
    addresses = dict.fromkeys(url for _, _, source in absent for url in (source["url"], *source["mirrors"]))
    with ThreadPoolExecutor(16) as pool:
        answers = dict(zip(addresses, pool.map(_answer, addresses), strict=True))
    reached = {urlsplit(url).hostname for url, problem in answers.items() if problem is None} - {None}
    if reached:
        yield Finding("hosts", f"answer: {', '.join(sorted(str(host) for host in reached))}")
    for data, file, source in absent:
        tried = [answers[url] for url in (source["url"], *source["mirrors"])]
        if all(tried):
            where = f"; by hand: data/incoming/{data}/" if source["page"] else ""
            optional = ", which is optional" if source["optional"] else ""
            text = f"{data}: {file}{optional}: no host answers: {'; '.join(map(str, tried))}{where}"
            yield Finding("hosts", text, "note" if source["optional"] else "MISSING")
    for account in sorted({source["login"] for _, _, source in absent if source["login"]}):
        problem = login.missing(account)
        yield Finding(
            "account", f"{account}: {problem or 'name and password are there'}", "MISSING" if problem else "ok"
        )


def _disk(settings: Settings, wanted: Collection[str] | None) -> Iterator[Finding]:
    # Two data sets have an archive in common, which is fetched once.
    sizes = {
        source["url"]: source["size"] or cost.FACTS["archives"].get(file, 0)
        for _, file, source in _absent(settings, wanted)
    }
    need = float(sum(sizes.values()))
    for data in settings["prepare"]:
        drawn = settings["download"][data]["rendered"]
        if data in datasets.NAMES and not drawn and _is_wanted(wanted, f"prepare@{data}"):
            need += 0 if (Path("data") / data).is_dir() else cost.prepared([data])
    free = shutil.disk_usage(".").free
    # By typical sizes, so a few GB prove nothing.
    level: Level = "ok" if need < 0.95 * free else "note" if need < 1.05 * free else "MISSING"
    text = f"{free / 1e9:.0f} GB are free, archives and prepared data still need about {need / 1e9:.0f} GB"
    yield Finding("disk", f"{text}; weights and checkpoints not counted (`refinenet cost`)", level)


def findings(settings: Settings, wanted: Collection[str] | None = None) -> list[Finding]:
    """Look at this machine. `wanted`: DVC's addresses of the stages that will run, "train@voc-res101"; None: all."""
    return [*_machine(settings, wanted), *_archives(settings, wanted), *_disk(settings, wanted)]


def check(settings: Settings, wanted: Collection[str] | None = None) -> None:
    """Raise UserError, in one line, with what this machine lacks for the stages `wanted` (None: all)."""
    problems = [finding.text for finding in findings(settings, wanted) if finding.level == "MISSING"]
    if problems:
        more = f" (and {len(problems) - 1} more: `refinenet preflight`)" if len(problems) > 1 else ""
        raise UserError(f"profiles/{read_params().profile}.yaml: {problems[0]}{more}")


def needed(targets: Sequence[str]) -> set[str]:
    """Return the addresses of the stages `targets` of dvc.yaml (or of outputs) and of all that they need."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    repo = Repo(".")
    found: set[str] = set()
    try:
        waiting = [stage for target in targets for stage in repo.stage.collect(target)]
        outputs = {out.def_path: stage for stage in repo.index.stages for out in stage.outs}
        if not waiting:
            raise UserError(f"{', '.join(targets)}: no such stage or output of dvc.yaml")
    except DvcException as error:
        raise UserError(" ".join(str(error).split())) from None
    while waiting:
        stage = waiting.pop()
        if stage.addressing in found:
            continue
        found.add(stage.addressing)
        for dep in stage.deps:
            path = getattr(dep, "def_path", "")
            waiting += [made for out, made in outputs.items() if out == path or out.startswith(f"{path}/")]
    return found


def price(settings: Settings, wanted: Collection[str], gpu: str) -> str:
    """Return what the trainings on a GPU among the stages `wanted` cost, in a line; "" where there are none."""
    names = [
        name
        for name, training in settings["train"].items()
        if training["device"].startswith("cuda") and (f"train@{name}" in wanted or f"pretrain@{name}" in wanted)
    ]
    works = cost.works(*cost.read(read_params().profile), names) if names else []
    if not works:
        return ""
    hours, memory = cost.gpu_hours(works, gpu), max(work.memory for work in works) / 1e9
    count = f"{len(works)} training{'s' if len(works) > 1 else ''}"
    title = cost.FACTS["gpus"][gpu]["title"]
    return f"{count}: about {hours:.1f} hours of {title} (assumed, not measured), {memory:.0f} GB"


def run(targets: Sequence[str], gpu: str) -> None:
    """Print what was found; UserError if a stage will fail."""
    profile, settings = read_params().profile, resolve()
    wanted = needed(targets) if targets else None
    found = findings(settings, wanted)
    print(f"{PARAMS}: profile {profile}{', for ' + ', '.join(targets) if targets else ''}")
    for finding in found:
        print(f"  {finding.level:8} {finding.what:9} {finding.text}")
    if wanted is not None and (line := price(settings, wanted, gpu)):
        print(f"  {'':8} {'cost':9} {line}")
    if problems := sum(finding.level == "MISSING" for finding in found):
        raise UserError(f"profiles/{profile}.yaml: {problems} missing, see above")
    print("next:", " ".join(["dvc repro", *targets]) if targets else "snakemake --cores all")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    parser = command_parser("preflight", __doc__)
    parser.add_argument("targets", nargs="*", metavar="STAGE", help="of dvc.yaml, or an output; default: all")
    cost.add_gpu(parser)
    options = parser.parse_args(arguments)
    return run_cli(lambda: run(options.targets, options.gpu))


if __name__ == "__main__":
    sys.exit(main())
