"""The command `refinenet <what>`, also `python -m pipeline <what>`: one page of help, and each command by its name.

It implements nothing itself. A command is a module of this package, which is run as `python -m pipeline.<what>` would
run it, in the project's root. The project is the folder where the user stands, or the first above it, that has
dvc.yaml, params.yaml and profiles/, as git looks for its own; paths of the command line stay relative to where she
stands (`pipeline.runtime.cli.user_path`). Commands that need a model file and nothing else run anywhere.
"""

from __future__ import annotations

import os
import re
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from pipeline.runtime import cli
from refinenet.errors import UserError, nearest

MARKS = ("dvc.yaml", "params.yaml", "profiles")  # a folder with all of them is a project


class Command(NamedTuple):
    """A command of the help page. `example`: its name and arguments; `anywhere`: it needs no project."""

    example: str
    text: str
    anywhere: bool = False
    default: Sequence[str] = ()  # arguments where none are given

    @property
    def name(self) -> str:
        """Return its name, which is that of its module."""
        return self.example.partition(" ")[0]


GROUPS = {
    "for you": (
        Command("add leaves --images photos --masks masks", "make a data set of your images and their masks"),
        Command("fit leaves --hours 1", "plan, train and score on it; ends in a page to look at"),
        Command("plan leaves --hours 3", "only the plan, with a reason for each value"),
        Command("predict photos/ --model FILE", "label images: class maps, and overlays to look at", True),
        Command("score FILE data/leaves/val.arrow", "mean IoU of a model on prepared images", True),
        Command("serve FILE --port 5001", "label images over HTTP", True),
        Command("export FILE --to leaves.onnx", "a file that runs without this project", True),
        Command("report", "where all results lie", default=("--where",)),
    ),
    "the paper": (
        Command("profile paper", "what a scale needs and costs, then switch to it; alone: list"),
        Command("preflight table-nyud", "what this machine lacks, for all or for some stages"),
        Command("rehearse --steps 20", "every stage for a few steps, and a forecast"),
        Command("cost --gpu a100 --gpus 4", "GPU hours, memory, disk"),
        Command("submit voc", "the archive for a test server, and its answer"),
        Command("trace voc-res101", "all that a footnote needs of a result; alone: list"),
        Command("verify", "are files and scores those of the commit?"),
        Command("record camvid-lite0", "keep a measured result as a folder"),
        Command("artifact", "the finished run for reviewers, readable by other programs"),
        Command("weights import FILE", "take over weights that others trained"),
        Command("tracking ui", "all runs, in MLflow"),
    ),
    "stages, which the graph runs": (
        Command("settings", "resolve params.yaml and the profile"),
        Command("download voc", "archives"),
        Command("prepare voc", "archives to images and labels"),
        Command("train voc-res101", "one training; `weights resnet101` is its start"),
        Command("evaluate voc-res101", "its scores"),
        Command("tabulate voc", "one table"),
    ),
}
COMMANDS = {command.name: command for group in GROUPS.values() for command in group}
# What people type who know the engines or other projects -> what it is here.
OTHERWISE = {
    **dict.fromkeys(("repro", "reproduce", "run", "all"), "make repro"),
    **dict.fromkeys(("infer", "label", "segment"), "refinenet predict"),
    **dict.fromkeys(("evaluation", "eval", "test"), "refinenet score"),
    **dict.fromkeys(("ui", "mlflow", "runs"), "refinenet tracking ui"),
    **dict.fromkeys(("pull", "push"), "dvc pull"),
}


def help_page(program: str) -> str:
    """Return the help: every command in the order of use, each as an example."""
    width = max(len(command.example) for command in COMMANDS.values())
    lines = [
        f"usage: {program} WHAT ...",
        "",
        f"RefineNet (CVPR 2017): the paper's tables, and your own images. `{program} WHAT --help` says more.",
    ]
    for group, commands in GROUPS.items():
        lines += ["", f"{group}:"]
        lines += [f"  {command.example:{width}}  {command.text}" for command in commands]
    lines += ["", "All that is out of date, in parallel: snakemake --cores all   (one at a time: dvc repro)"]
    return "\n".join(lines)


def find_project(folder: Path) -> Path | None:
    """Return the project that `folder` belongs to: itself or the first above it with all MARKS; None: none has."""
    return next((one for one in (folder, *folder.parents) if all((one / mark).exists() for mark in MARKS)), None)


def _here() -> str:
    """Return a line: which project this is, and its profile."""
    root = find_project(Path.cwd())
    if root is None:
        free = ", ".join(command.name for command in COMMANDS.values() if command.anywhere)
        return f"here: no project ({', '.join(MARKS)}) in this folder or above it; {free} work anywhere"
    found = re.search(r"^profile:\s*(\S+)", (root / "params.yaml").read_text(encoding="utf-8"), re.M)
    return f"here: {root}, profile {found[1] if found else 'none'}"


def _enter(command: Command) -> Path:
    """Go to the root of the project and return the folder where the user stands. Raises UserError."""
    stands = Path.cwd()
    root = find_project(stands)
    if root is None:
        raise UserError(
            f"{stands}: no project here or above, `refinenet {command.name}` needs one: a folder with "
            f"{', '.join(MARKS)}, as `git clone` makes it"
        )
    code = Path(__file__).parent
    if (root / "pipeline").is_dir() and not (root / "pipeline").samefile(code):
        raise UserError(
            f"{root}: has code of its own, `refinenet` is of {code.parent}; `make setup` there makes another"
        )
    os.chdir(root)
    return stands


def _version() -> str:
    """Return the version: of the installed package, or, where the project is only mounted, of its pyproject.toml."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("refinenet-repro")
    except PackageNotFoundError:
        import tomllib

        about = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8"))
        return str(about["project"]["version"])


def run(name: str, arguments: Sequence[str]) -> int:
    """Run the command `name` as a process of its own would; return its exit code."""
    command = COMMANDS[name]
    # Its help needs no project.
    if not command.anywhere and not {"-h", "--help"} & set(arguments):
        try:
            stands = _enter(command)
        except UserError as error:
            print(cli.marked(f"error: {error}"), file=sys.stderr)
            return 1
        cli.called_as_refinenet(None if stands == Path.cwd() else stands)
    else:
        cli.called_as_refinenet(None)
    sys.argv = [name, *(arguments or command.default)]
    try:
        runpy.run_module(f"pipeline.{name}", run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        if isinstance(ended.code, str):
            raise
        return ended.code or 0
    return 0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code, 2 for a command that is not known."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    program = "python -m pipeline" if Path(sys.argv[0]).name == "__main__.py" else "refinenet"
    if not given:
        print(f"{help_page(program)}\n{_here()}")
        return 0
    name = given[0]
    if name in ("-h", "--help", "help"):
        print(help_page(program))
        return 0
    if name == "--version":
        print(f"refinenet-repro {_version()}")
        return 0
    if name not in COMMANDS:
        kind = "option" if name.startswith("-") else "command"
        if name in OTHERWISE:
            meant = f"did you mean `{OTHERWISE[name]}`? "
        else:
            near = nearest(name, COMMANDS)
            meant = f"did you mean {near}? " if near else ""
        print(f"{program}: error: no {kind} {name!r}: {meant}`{program} --help` lists all", file=sys.stderr)
        return 2
    return run(name, given[1:])


if __name__ == "__main__":
    sys.exit(main())
