"""params.yaml, and the profile that it names: profiles/<profile>.yaml, a few lines on top of another one's."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from pipeline import datasets
from pipeline.config.schema import Params, Profile, build
from refinenet.config import RESNETS
from refinenet.errors import UserError

PARAMS = Path("params.yaml")
PROFILES = Path("profiles")

_OWN = ("prepare", "rendered", "network", "train", "evaluate", "phases")
_OF_EXPERIMENT = ("network", "train", "evaluate")


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file with a mapping. Raises UserError where it is missing, broken or not a mapping."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys and values, found {type(values).__name__}")
    return values


def read_params() -> Params:
    """Read params.yaml. Raises UserError for an unknown key or an invalid value."""
    return build(Params, read_yaml(PARAMS), str(PARAMS))


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """Merge `over` into a copy of `base`, key by key; where one of the two values is not a mapping, `over` wins.

    The length of a training is given as `steps` or as `epochs`: the one of `over` takes the other's place.
    """
    other = {"steps": "epochs", "epochs": "steps"}
    merged = {key: value for key, value in base.items() if other.get(key) not in over}
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def read_profile(name: str) -> tuple[Profile, str]:
    """Read profiles/<name>.yaml merged with its bases; return it and its path for messages. Raises UserError."""
    path = PROFILES / f"{name}.yaml"
    if not path.is_file():
        there = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise UserError(f"{PARAMS}: profile is {name!r}, but there is no {path}; there are {there}")
    values = read_yaml(path)
    seen = [name]
    while (base := values.pop("base", None)) is not None:
        if base in seen:
            raise UserError(f"{path}: base goes in a circle: {', '.join([*seen, base])}")
        seen.append(base)
        under = read_yaml(PROFILES / f"{base}.yaml")
        merged = merge(under, values)
        # What comes from elsewhere is replaced as a whole: a base's archives or address have no place beside others.
        for key, expected in (("sources", "data sets and their archives"), ("weights", "backbones and their weights")):
            if not isinstance(values.get(key, {}), dict):
                raise UserError(f"{path}: {key} is {values[key]!r}, expected {expected}")
            merged[key] = {**under.get(key, {}), **values.get(key, {})}
        values = {**merged, **({"base": under["base"]} if "base" in under else {})}
    profile = build(Profile, values, str(path))
    known: list[tuple[str, Mapping[str, object], Collection[str]]] = [
        ("sources", profile.sources, datasets.NAMES),
        ("weights", {name: 0 for name in profile.weights if not name.startswith("timm:")}, RESNETS),
        ("datasets", profile.datasets, (*datasets.NAMES, *profile.own)),
        *((f"datasets.{data}", own, _OWN) for data, own in profile.datasets.items()),
        *((f"experiments.{name}", own, _OF_EXPERIMENT) for name, own in profile.experiments.items()),
    ]
    for key, given, names in known:
        for unknown in sorted(given.keys() - set(names)):
            raise UserError(f"{path}: unknown key {key}.{unknown}, expected one of {', '.join(names)}")
    for name in profile.own:
        if name in datasets.NAMES or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise UserError(f"{path}: own.{name}: expected a name of a-z, 0-9 and _ that is no data set of the paper")
    return profile, str(path)


def bases(name: str) -> Iterator[str]:
    """Yield the profiles below this one: its base, the base of that, and so on."""
    while (base := read_yaml(PROFILES / f"{name}.yaml").get("base")) is not None:
        yield base
        name = base
