"""Make a data set of a folder of images and a folder of masks: look at both, write profile and rows of params.yaml.

    refinenet add leaves --images ~/leaves/photos --masks ~/leaves/masks --classes soil,leaf,stem
    refinenet add street ~/CamVid           a folder in a usual layout: images/ and masks/, train/ and
                                            trainannot/, VOC's
    refinenet add polyps ~/polyps --classes background=0,polyp=255

Nothing is written into the folders, and nothing at all while a file of them cannot be used: all such are named at once.
What it took things for stands in one table. In a terminal it asks for the classes' names.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipeline import datasets
from pipeline.config import profiles
from pipeline.config.names import check_names
from pipeline.config.schema import SPLIT, Folder, check_folder
from pipeline.fetch import own_folders
from pipeline.own_data.classes import Classes, propose, shown
from pipeline.own_data.layout import Layout, suffixes, usual
from pipeline.own_data.survey import Survey, colour
from pipeline.runtime.cli import command_parser, run_cli, user_path, warn
from refinenet.config import RESNETS, steps_of_epochs
from refinenet.errors import UserError

THIN = 256  # pixels of the short edge, above which images are too large for profile mini's networks and time
_EXAMPLES = """\
exit code: 0 where the files are written; 1 where something is wrong, and nothing is
"""


def run(options: argparse.Namespace) -> None:
    """Look at the folders, say what they hold, ask where somebody is there to answer, and write."""
    from pipeline.own_data import survey, writing
    from pipeline.own_data.table import describe

    name = options.name
    _check_name(name, options.force)
    base = _base(name, options.base)
    backbone = _backbone(options.backbone, base)
    layout = _layout(options)
    image_suffix, mask_suffix = suffixes(layout)
    about = Folder(
        **vars(layout),
        classes=("?",),
        image_suffix=image_suffix,
        mask_suffix=mask_suffix,
        group=int(options.group) if (options.group or "").isdecimal() else options.group,
    )
    check_folder(name, about)
    own_folders.check_place(name, about)
    pairs, lists = _pairs(about)
    found = survey.survey(pairs)
    classes = propose(found, options.classes, options.void)
    named = options.classes
    if named is None and not options.yes and sys.stdin.isatty():
        named = _ask(classes, found)
        classes = classes.renamed(named)
    about = _with_classes(about, classes, found)
    check_folder(name, about)
    text, warnings = describe(name, about, found, classes, lists)
    print(text)
    for warning in warnings:
        warn(warning)
    if sys.stdin.isatty() and not options.yes and not _agreed(name):
        raise UserError("nothing is written")
    profile = writing.profile_text(name, base, about, _more(base, found, lists, about))
    params = writing.params_text(profiles.PARAMS.read_text(encoding="utf-8"), name, backbone)
    writing.write(name, profile, params)
    file = profiles.PROFILES / f"{name}.yaml"
    print(f"{file} and {profiles.PARAMS}: written, experiment {writing.row_name(name, backbone)}")
    if named is None:
        print(f"classes: names are proposed; change them in {file}, or give --classes and --force")
    planned = profiles.read_profile(name)[0].plan is not None
    print(f"next: refinenet fit {name}{' --hours 1' if planned else ''}")


def _check_name(name: str, force: bool) -> None:
    params = profiles.read_params()
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name in datasets.NAMES:
        raise UserError(f"{name!r}: expected a name of a-z, 0-9 and _ that is no data set of the paper")
    check_names(replace(params, own=(*params.own, name)), str(profiles.PARAMS))
    file = profiles.PROFILES / f"{name}.yaml"
    if file.exists() and not force:
        raise UserError(f"{file}: is there already; --force replaces it, and another name leaves it")


def _base(name: str, given: str | None) -> str:
    """The profile below: as given, the present one where it has other data of one's own, `fit`, or `mini`."""
    params = profiles.read_params()
    others = [one for one in params.own if one != name]
    there = sorted(path.stem for path in profiles.PROFILES.glob("*.yaml"))
    if given is not None and given not in there:
        raise UserError(f"--base {given}: no such profile, expected one of {', '.join(there)}")
    if given is None and others and params.profile != name:
        return params.profile
    if given is None and name in there:  # it is replaced
        given = profiles.read_yaml(profiles.PROFILES / f"{name}.yaml").get("base")
    base = given or ("fit" if "fit" in there else "mini")
    if missing := [one for one in others if one not in profiles.read_profile(base)[0].own]:
        raise UserError(
            f"--base {base}: it does not have {', '.join(missing)}, which {profiles.PARAMS} names under own; expected "
            f"--base {params.profile}, or that list without"
        )
    return base


def _backbone(given: str | None, base: str) -> str:
    """What the experiment starts from: as given, or the base's own backbone of timm, or ResNet-50."""
    weights = profiles.read_profile(base)[0].weights
    of_timm = [one for one in weights if one.startswith("timm:")]
    backbone = given or (of_timm[0] if of_timm else "resnet50")
    if backbone not in weights and f"timm:{backbone}" in weights:
        backbone = f"timm:{backbone}"
    if backbone not in weights:
        known = ", ".join([*(one for one in RESNETS if one in weights), *of_timm])
        raise UserError(f"--backbone {backbone}: profile {base} has no weights for it, expected one of {known}")
    return backbone


def _layout(options: argparse.Namespace) -> Layout:
    train, val = (None if text is None else _as_written(text) for text in (options.train, options.val))
    if options.folder is not None:
        layout = usual(_as_written(options.folder))
        if (train or val) and SPLIT in layout.images:
            raise UserError(f"{options.folder}: has folders of train and val, expected no --train and --val")
    else:
        layout = Layout(_as_written(options.images), _as_written(options.masks))
    return replace(layout, train=train or layout.train, val=val or layout.val)


def _as_written(text: str) -> str:
    """A path as the profile has it: below the home folder with ~, else as it was typed, relative to the project."""
    if not text.startswith(("~", "$")) and (here := user_path(text)) != Path(text):
        text = str(here)
    path, home = Path(text), Path.home()
    if path.is_absolute() and path.is_relative_to(home) and path != home:
        return f"~/{path.relative_to(home)}"
    return text.rstrip("/") or text


def _pairs(about: Folder) -> tuple[list[tuple[str, Path, Path]], dict[str, list[str]]]:
    """(name, image, mask) of each image, and the lists that there are."""
    packed = own_folders.contents(about)
    files: dict[str, dict[str, Path]] = {"images": {}, "masks": {}}
    lists = {}
    for member, content in packed.items():
        kind, _, rest = member.partition("/")
        if isinstance(content, Path):
            files[kind][Path(rest).with_suffix("").as_posix()] = content
        elif member != "classes.txt":
            lists[member.removesuffix(".txt")] = content.decode().splitlines()
    return [(name, image, files["masks"][name]) for name, image in files["images"].items()], lists


def _with_classes(about: Folder, classes: Classes, found: Survey) -> Folder:
    """The settings that say which value or colour is which class."""
    values = tuple(classes.names)
    made = replace(about, classes=tuple(classes.names.values()))
    if found.kind == "colours":
        void = None if classes.void is None else colour(classes.void)
        return replace(made, colours=tuple(colour(value) for value in values), void=void)
    plain = values == tuple(range(len(values)))
    # 255, the default, hurts nobody where it is in no mask.
    harmless = 255 not in found.pixels or 255 in values
    void_value = classes.void if classes.void is not None else 255 if harmless else None
    return replace(made, values=None if plain else values, void=void_value)


def _ask(classes: Classes, found: Survey) -> list[str]:
    print("The classes' names; Enter takes the one in brackets:")
    names: list[str] = []
    for value, proposed in classes.names.items():
        share = found.pixels[value] / sum(found.pixels.values())
        asked = f"  {shown(value, found.kind == 'colours')}, {found.images[value]} images, {share:.1%} [{proposed}]: "
        while (name := input(asked).strip() or proposed) in names:
            print(f"  {name!r} is there already")
        names.append(name)
    return names


def _agreed(name: str) -> bool:
    return input(f"write profiles/{name}.yaml and change params.yaml? [Y/n] ").strip().lower() in ("", "y", "yes")


def _more(base: str, found: Survey, lists: Mapping[str, list[str]], about: Folder) -> dict[str, Any]:
    """What the profile says of training on these images, where the base does not know them."""
    profile = profiles.read_profile(base)[0]
    if profile.plan is not None:
        return {}
    more: dict[str, Any] = {}
    train: dict[str, Any] = {}
    if "epochs" in profile.train:  # of an official number of images
        images = len(lists["train"]) if "train" in lists else round(len(found.seen) * (1 - about.val_share))
        batch = int(profile.train.get("batch_size", 1))
        train["steps"] = steps_of_epochs(float(profile.train["epochs"]), images, batch)
    if profile.train.get("crop", THIN) < THIN and sorted(min(one.width, one.height) for one in found.seen)[-1] > THIN:
        train["short_edge"] = [96, THIN]
        more["evaluate"] = {"short_edge": [96, THIN]}
    return ({"train": train} if train else {}) | more


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"{text!r}, expected names with commas between them")
    return names


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    line = command_parser("add", __doc__, _EXAMPLES)
    add = line.add_argument
    add("name", metavar="NAME", help="of the data set: a-z, 0-9 and _")
    add("folder", nargs="?", metavar="DIR", help="a data set in a usual layout, instead of --images and --masks")
    add("--images", metavar="DIR", help="folder of images, with folders in it or without")
    add("--masks", metavar="DIR", help="folder of masks, of the same names but for what follows them")
    add("--classes", type=_names, metavar="A,B", help="names in the order of the values, or each with its own: leaf=3")
    add("--void", metavar="VALUE", help="value or colour that is no class; none: there is none")
    add("--base", metavar="PROFILE", help="what trains on it; default: fit")
    add("--backbone", metavar="NAME", help="what the experiment starts from; default: the base's")
    add("--group", metavar="GROUP", help="keeps recordings in one split: a number of folders, or a regular expression")
    add("--train", metavar="LIST", help="names of the training images, one a line")
    add("--val", metavar="LIST", help="names of the validation images")
    add("--yes", action="store_true", help="ask nothing")
    add("--force", action="store_true", help="replace profiles/NAME.yaml")
    return line


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    line = parser()
    options = line.parse_args(arguments)
    if (options.folder is None) == (options.images is None or options.masks is None) or (
        options.folder is not None and (options.images or options.masks)
    ):
        line.error("expected DIR, or --images and --masks")
    return run_cli(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
