"""params.yaml, and the profile that it names: profiles/<profile>.yaml, a few lines on top of another one's."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import yaml

from pipeline import datasets
from pipeline.config.names import check_names
from pipeline.config.schema import Params, Profile, build
from refinenet.config import RESNETS
from refinenet.errors import UserError, nearest

PARAMS = Path("params.yaml")
PROFILES = Path("profiles")

PLANS = PROFILES / "plans"

_OWN = ("prepare", "rendered", "network", "train", "evaluate", "phases", "device", "threads", "portable")
_PLANNED = ("network", "train", "evaluate", "device", "threads", "portable")
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
    """Read params.yaml. Raises UserError for an unknown key, an invalid value or a name that cannot be one."""
    values = read_yaml(PARAMS)
    for key in ("experiments", "pretrainings", "seeds"):
        for name in values[key] if isinstance(values.get(key), dict) else ():
            if not isinstance(name, str):
                raise UserError(f"{PARAMS}: {key}: YAML reads a name as {name!r}, expected a word")
    params = build(Params, values, str(PARAMS))
    check_names(params, str(PARAMS))
    return params


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


def profile_names() -> list[str]:
    """Return the names of all profiles, sorted."""
    return sorted(file.stem for file in PROFILES.glob("*.yaml"))


def read_profile(name: str, plans: Mapping[str, Mapping[str, Any]] | None = None) -> tuple[Profile, str]:
    """Read profiles/<name>.yaml merged with its bases; return it and its path for messages. Raises UserError.

    `plans`: data set -> plan, instead of what is written under profiles/plans.
    """
    path = PROFILES / f"{name}.yaml"
    if not path.is_file():
        there = profile_names()
        near = nearest(name, there)
        meant = f" (did you mean {near}?)" if near else ""
        raise UserError(f"{PARAMS}: profile is {name!r}, but there is no {path}{meant}; there are {', '.join(there)}")
    values = read_yaml(path)
    layers = [values.copy()]
    seen = [name]
    while (base := values.pop("base", None)) is not None:
        if base in seen:
            raise UserError(f"{path}: base goes in a circle: {', '.join([*seen, base])}")
        seen.append(base)
        under = read_yaml(PROFILES / f"{base}.yaml")
        layers.append(under)
        merged = merge(under, values)
        # What comes from elsewhere is replaced as a whole: a base's archives or address have no place beside others.
        for key, expected in (("sources", "data sets and their archives"), ("weights", "backbones and their weights")):
            if not isinstance(values.get(key, {}), dict):
                raise UserError(f"{path}: {key} is {values[key]!r}, expected {expected}")
            merged[key] = {**under.get(key, {}), **values.get(key, {})}
        values = {**merged, **({"base": under["base"]} if "base" in under else {})}
    if isinstance(values.get("plan"), dict) and isinstance(values.get("own", {}), dict):
        values["datasets"] = {**values.get("datasets", {}), **_planned(values, layers, plans or {})}
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


def plan_file(data: str) -> Path:
    """Return where the plan of a data set of one's own is kept."""
    return PLANS / f"{data}.json"


def read_plan(data: str) -> dict[str, Any] | None:
    """Read profiles/plans/<data>.json: the values, without their reasons; None where there is no plan yet."""
    file = plan_file(data)
    try:
        made = json.loads(file.read_text(encoding="utf-8"))
        found: dict[str, Any] = {}
        for key, entry in made["values"].items():
            flat = "value" in entry
            found[key] = entry["value"] if flat else {name: one["value"] for name, one in entry.items()}
        return found
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: not as `refinenet plan {data}` writes it ({error!r})") from None


def _planned(
    values: Mapping[str, Any], layers: Sequence[Mapping[str, Any]], plans: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what `datasets` has of each data set under `own`, with its plan and the recipe that it is made for.

    They lie on top of the profile that brings in `plan`; what profiles above that one say, of all data sets or of this
    one, is the user's and wins.

    Args:
        values: the profile, merged with its bases.
        layers: the profile itself, its base, the base of that, and so on.
        plans: as of `read_profile`.
    """
    lowest = max(number for number, layer in enumerate(layers) if "plan" in layer)
    none: Mapping[str, Any] = {}
    users = reduce(merge, reversed(layers[:lowest]), none)
    above = {key: value for key, value in users.items() if key in _PLANNED}
    recipe = values["plan"].get("recipe") or {}
    found: dict[str, Any] = {}
    for data in values.get("own", {}):
        plan = plans[data] if data in plans else read_plan(data) or {}
        given: list[Mapping[str, Any]] = [recipe, plan, above, values.get("datasets", {}).get(data, {})]
        found[data] = reduce(merge, given)
    return found


def bases(name: str) -> Iterator[str]:
    """Yield the profiles below this one: its base, the base of that, and so on."""
    while (base := read_yaml(PROFILES / f"{name}.yaml").get("base")) is not None:
        yield base
        name = base
