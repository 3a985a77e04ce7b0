"""Choose at which scale to run: what a profile needs of this machine and costs, then the one word in params.yaml.

    refinenet profile                    which there are; the one in force is marked
    refinenet profile paper              look, then switch
    refinenet profile paper --dry-run    only look

Checked as `refinenet preflight` does: a GPU and packages, accounts, hosts, disk. What is missing is named and hinders
nobody: one table may need less than all do. A profile that does not fit the rest of params.yaml is not switched to.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pipeline import cost, preflight
from pipeline.config import profiles
from pipeline.config.profiles import PARAMS, PROFILES
from pipeline.config.resolve import resolve
from pipeline.runtime.cli import command_parser, run_cli
from refinenet.atomic import atomic_file
from refinenet.errors import UserError, expected_one_of

_WORD = re.compile(r"""^(profile:[ \t]*)("[^"\n]*"|'[^'\n]*'|[^\s#]+)""", re.M)


def listing() -> Iterator[str]:
    """Yield a line for each profile: its name, marked where it is in force, and its title."""
    names, present = profiles.profile_names(), profiles.read_yaml(PARAMS).get("profile")
    width = max(map(len, names), default=0)
    for name in names:
        try:
            title = profiles.read_profile(name)[0].title
        except UserError as error:
            title = f"cannot be read: {error}"
        yield f"{'*' if name == present else ' '} {name:{width}}  {title}"
    if present not in names:
        yield f"* {present}  no such file in {PROFILES}/"


def switched(text: str, name: str) -> str:
    """Return params.yaml with the profile `name`: one word changes, every comment stays. Raises UserError."""
    new, count = _WORD.subn(rf"\g<1>{name}", text)
    if count != 1:
        raise UserError(f"{PARAMS}: {count} lines that begin with `profile:`, expected one, `profile: {name}`")
    return new


def prices(name: str, device: str, gpu: str) -> Iterator[str]:
    """Yield lines on what a profile costs, as `refinenet cost` counts it."""
    if not device.startswith("cuda"):
        yield "runs on the CPU; `refinenet rehearse` measures how long it takes"
        return
    print("counting what the trainings cost ...", file=sys.stderr, flush=True)
    params, profile, where = cost.read(name)
    found = cost.works(params, profile, where)
    hours = cost.gpu_hours(found, gpu)
    memory = max(work.memory for work in found) / 1e9
    title = cost.FACTS["gpus"][gpu]["title"]
    yield f"about {hours:.0f} hours of {title} for all {len(found)} trainings (assumed, not measured), {memory:.0f} GB"
    known, unknown = cost.archives(profile)
    more = f", {len(unknown)} of unpublished size not counted" if unknown else ""
    yield f"{known / 1e9:.0f} GB of archives{more}; {cost.prepared(params.datasets) / 1e9:.0f} GB of prepared data"
    yield f"by training: refinenet cost --profile {name}"


def run(name: str, dry: bool, gpu: str) -> None:
    """Show what the profile `name` needs, then switch to it unless `dry`. Raises UserError where it cannot be used."""
    names = profiles.profile_names()
    if name not in names:
        raise UserError(f"no profile {name!r}{expected_one_of(name, names, 'refinenet profile')}")
    text = PARAMS.read_text(encoding="utf-8")
    new = switched(text, name)
    profile, where = profiles.read_profile(name)
    planned = [data for data in profile.own if profile.plan is not None and not profiles.plan_file(data).is_file()]
    settings: Mapping[str, Mapping[str, Any]] | None = None if planned else resolve(name)
    print(f"{where}: {profile.title}")
    missing = 0
    if settings is not None:
        for finding in preflight.findings(settings):
            print(f"  {finding.level:8} {finding.what:9} {finding.text}")
            missing += finding.level == "MISSING"
    for line in prices(name, profile.device, gpu):
        print(f"  {'':8} {'cost':9} {line}")
    if dry:
        print(f"{PARAMS}: left as it is; `refinenet profile {name}` switches")
        return
    if new == text:
        print(f"{PARAMS}: profile is {name} already")
    else:
        with atomic_file(PARAMS) as part:
            part.write_text(new, encoding="utf-8")
        print(f"{PARAMS}: profile is now {name}")
    if planned:
        print(f"next: refinenet fit {planned[0]}")
    elif missing:
        print("next: mend what is MISSING, or `refinenet preflight table-nyud`: what of it this one table needs")
    elif profile.device.startswith("cuda"):
        print("next: refinenet rehearse, then snakemake --cores all --resources gpu=1")
    else:
        print("next: snakemake --cores all")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    line = command_parser("profile", __doc__)
    line.add_argument(
        "name", nargs="?", metavar="PROFILE", help="a file of profiles/ without .yaml; default: list them"
    )
    line.add_argument("--dry-run", action="store_true", help="show what it needs, change nothing")
    cost.add_gpu(line)
    given = line.parse_args(arguments)
    if given.name is None:
        return run_cli(lambda: print(*listing(), "switch: refinenet profile NAME", sep="\n"))
    return run_cli(lambda: run(given.name, given.dry_run, given.gpu))


if __name__ == "__main__":
    sys.exit(main())
