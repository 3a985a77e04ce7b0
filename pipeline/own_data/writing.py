"""The profile of a user's own data, and its rows in params.yaml, whose comments and order stay."""

from __future__ import annotations

import io
import re
import shutil
import tempfile
from collections.abc import Mapping
from contextlib import chdir
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml

from pipeline.config import profiles, resolve
from pipeline.config.schema import Folder, check_folder
from refinenet.atomic import atomic_file
from refinenet.errors import UserError

_HEAD = """\
# Own images and masks as the data set `{name}`: written by `refinenet add`; change it as you like.
# docs/how-to/own-data.md has every key.
"""


def profile_text(name: str, base: str, about: Folder, more: Mapping[str, Any]) -> str:
    """Return profiles/<name>.yaml: what differs from `base`, and `more` for datasets.<name>."""
    lines = [_HEAD.format(name=name), f"base: {base}\n", f"title: {_flow(name)}\n", f"own:\n  {name}:\n"]
    for field in fields(Folder):
        value = getattr(about, field.name)
        if field.name in ("images", "masks", "classes") or value != field.default:
            lines.append(f"    {field.name}: {_flow(value)}\n")
    if more:
        lines.append(f"datasets:\n  {name}:\n")
        lines += [f"    {key}: {_flow(value)}\n" for key, value in more.items()]
    return "".join(lines)


def _flow(value: Any) -> str:
    """A value as YAML in one line, or several of a list that is long."""
    plain = [list(one) if isinstance(one, tuple) else one for one in value] if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=100).removesuffix("...\n").strip()
    return text.replace("\n", "\n      ")


def row_name(name: str, backbone: str) -> str:
    """Return what the experiment is called: leaves-res50, leaves-lite0."""
    short = backbone.removeprefix("timm:").replace("tf_efficientnet_", "").replace("resnet", "res")
    return f"{name}-{re.sub(r'[^A-Za-z0-9_]+', '-', short)}"


def params_text(text: str, name: str, backbone: str) -> str:
    """Return params.yaml with the data set, its experiment and its profile; every other line as it was."""
    from ruamel.yaml import YAML
    from ruamel.yaml.comments import CommentedMap, CommentedSeq
    from ruamel.yaml.scalarstring import DoubleQuotedScalarString

    editor = YAML()
    editor.width, editor.preserve_quotes = 1 << 16, True
    editor.indent(mapping=2, sequence=4, offset=2)
    values = editor.load(text)
    values["profile"] = name
    start = DoubleQuotedScalarString(backbone) if ":" in backbone else backbone
    for key, entry in (("own", name), ("backbones", start)):
        listed = values.setdefault(key, CommentedSeq())
        if entry not in listed:
            if not listed:
                listed.fa.set_flow_style()
            listed.append(entry)
            last = len(listed) - 2
            if last in listed.ca.items:  # the blank line or comment behind the list belongs behind its new end
                listed.ca.items[last + 1] = listed.ca.items.pop(last)
    row = CommentedMap(data=name, start=start)
    row.fa.set_flow_style()
    values["experiments"][row_name(name, backbone)] = row
    sink = io.StringIO()
    editor.dump(values, sink)
    return sink.getvalue()


def write(name: str, profile: str, params: str) -> None:
    """Write both files once a copy of the project has taken them. Raises UserError where it does not."""
    with tempfile.TemporaryDirectory() as scratch:
        copy = Path(scratch, profiles.PROFILES)
        shutil.copytree(profiles.PROFILES, copy, ignore=lambda _, names: [one for one in names if one == "snakemake"])
        (copy / f"{name}.yaml").write_text(profile, encoding="utf-8")
        Path(scratch, profiles.PARAMS).write_text(params, encoding="utf-8")
        with chdir(scratch):
            read, where = profiles.read_profile(name)
            if read.plan is None:
                resolve.resolve()
            else:  # without its plan nothing is resolved
                for data in profiles.read_params().own:
                    if data not in read.own:
                        raise UserError(f"{where}: own.{data} is missing, {profiles.PARAMS} names it")
                check_folder(name, read.own[name])
    file = profiles.PROFILES / f"{name}.yaml"
    before = file.read_text(encoding="utf-8") if file.is_file() else None
    with atomic_file(file) as part:
        part.write_text(profile, encoding="utf-8")
    try:
        with atomic_file(profiles.PARAMS) as part:
            part.write_text(params, encoding="utf-8")
    except BaseException:
        file.unlink() if before is None else file.write_text(before, encoding="utf-8")
        raise
