"""Resolve params.yaml and the profile it names: stage -> name -> the values that this stage reads."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal, overload

from pipeline import datasets
from pipeline.config.profiles import PARAMS, bases, merge, plan_file, read_params, read_profile
from pipeline.config.schema import (
    STAGES,
    Download,
    Evaluate,
    Params,
    Prepare,
    Pretraining,
    Profile,
    Running,
    Seed,
    Tables,
    Train,
    Training,
    Weights,
    build,
    check_folder,
)
from refinenet.config import Config, steps_of_epochs
from refinenet.errors import UserError, expected_one_of

SETTINGS = Path("settings.json")


def resolve(profile: str | None = None) -> dict[str, dict[str, Any]]:
    """Return stage -> name -> settings, from params.yaml and the profile it names, or another. Raises UserError.

    A training whose settings and data are the same in a base of the profile gets the base's name as `profile`: it need
    not be repeated because of a profile on top.
    """
    params = read_params()
    if profile is not None:
        params = replace(params, profile=profile)
    params = _without(params, left_out(params))
    settings = _resolve(params)
    for base in bases(params.profile):
        try:
            below = read_profile(base)[0]
            settings["tables"][base] = _tables(below)
            rows = _without(params, {*params.datasets, *params.own} - {*below.sources, *below.own})
            under = _resolve(replace(rows, profile=base))
        except UserError:
            continue  # a base need not have everything that params.yaml names
        for name in under["train"]:
            if _dependencies(name, under) == _dependencies(name, settings):
                for stage in ("train", "evaluate"):
                    settings[stage].get(name, {}).update(profile=base)
    return settings


def _dependencies(name: str, settings: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """Return all settings that the results of the training `name` depend on."""
    train, evaluate = ({**settings[stage].get(name, {}), "profile": None} for stage in ("train", "evaluate"))
    data, start = sorted(data_of(train)), train["start"]
    first = settings["weights"][start] if start in settings["weights"] else _dependencies(start, settings)
    return [train, evaluate, first, *(settings[stage][one] for one in data for stage in ("download", "prepare"))]


def data_of(train: Mapping[str, Any]) -> set[str]:
    """Return the data sets that a training with these settings reads."""
    return {train["data"], *(part[0] for phase in train["phases"] for part in phase.get("parts", []))}


def _seen(name: str, train: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """Return the data sets that the training `name`, and the one that it starts from, are made on."""
    return data_of(train[name]) | (_seen(train[name]["start"], train) if train[name]["start"] in train else set())


def left_out(params: Params) -> set[str]:
    """Return the data sets of one's own that have no plan yet, though the profile wants one and others have theirs.

    They are in no settings and in no graph until they are planned; so the others can be trained meanwhile.
    """
    profile, _ = read_profile(params.profile)
    unplanned = {data for data in params.own if data in profile.own and not plan_file(data).is_file()}
    return unplanned if profile.plan is not None and len(unplanned) < len(params.own) else set()


def no_plan(data: str) -> str:
    """Return what is said where the data set of one's own has no plan."""
    return f"{plan_file(data)}: no such file; `refinenet fit {data}` makes it and trains by it"


def _without(params: Params, data: set[str]) -> Params:
    """Return `params` without data sets, and without what is trained on them."""
    experiments = {name: one for name, one in params.experiments.items() if one.data not in data}
    seeds = {name: one for name, one in params.seeds.items() if one.data not in data}
    kept, own, further = (
        tuple(name for name in names if name not in data) for names in (params.datasets, params.own, params.further)
    )
    return replace(params, datasets=kept, own=own, further=further, experiments=experiments, seeds=seeds)


def _resolve(params: Params) -> dict[str, dict[str, Any]]:
    profile, where = read_profile(params.profile)
    common = {"profile": params.profile, "seed": profile.seed}
    settings: dict[str, dict[str, Any]] = {stage: {} for stage in STAGES}
    for model in profile.models:
        if model not in params.experiments:
            expected = ", ".join(params.experiments)
            raise UserError(f"{where}: models.{model} is not an experiment of {PARAMS}, expected one of {expected}")
    for data in params.datasets:
        own = profile.datasets.get(data, {})
        source = profile.sources.get(data)
        if source is None:
            raise UserError(f"{where}: sources.{data} is missing")
        if source == "rendered":
            download: dict[str, Any] = {"rendered": merge(asdict(profile.rendered), own.get("rendered", {}))}
        else:
            archives = {file: asdict(archive) for file, archive in source.items()}
            download = {"archives": archives, "mirror": profile.mirror}
        settings["download"][data] = download
        settings["prepare"][data] = merge(asdict(profile.prepare), own.get("prepare", {}))
    for data in params.own:
        if data not in profile.own:
            raise UserError(f"{where}: own.{data} is missing, {PARAMS} names it")
        _check_custom("own", data, params)
        if profile.plan is not None and not plan_file(data).is_file():
            raise UserError(no_plan(data))
        try:
            check_folder(data, profile.own[data])
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        settings["download"][data] = {"own": asdict(profile.own[data])}
        settings["prepare"][data] = {"own": asdict(profile.own[data])}
    for data in params.further:
        if data not in params.datasets:
            known = ", ".join(params.datasets)
            raise UserError(f"{PARAMS}: further: {data} is not among its datasets, expected one of {known}")
        _check_custom("further", data, params)
    for backbone in params.backbones:
        start = profile.weights.get(backbone)
        if start is None:
            raise UserError(f"{where}: weights.{backbone} is missing")
        settings["weights"][backbone] = {
            "backbone": backbone,
            "stem": profile.network.get("stem", 64),
            "seed": profile.seed,
            "source": None if start == "seeded" else asdict(start),
        }
    trainings: dict[str, Training] = {**params.pretrainings, **params.experiments}
    for name, training in trainings.items():
        own_settings = training_settings(name, training, params, profile, where)
        settings["train"][name] = {**common, **machine_settings(training.data, profile), **own_settings}
    for name, experiment in params.experiments.items():
        if name in params.pretrainings:
            raise UserError(f"{PARAMS}: {name} is an experiment and a pretraining, expected two names")
        settings["evaluate"][name] = {
            **common,
            **machine_settings(experiment.data, profile),
            "data": experiment.data,
            "input_scale": settings["train"][name]["recipe"].get("input_scale", 1.2),
            **evaluation_settings(name, experiment, profile),
            "split": evaluated_split(name, experiment, profile, where),
            "drawn": any("rendered" in settings["download"][data] for data in _seen(name, settings["train"])),
        }
    for name, again in params.seeds.items():
        _check_seed(name, again, params, profile)
        settings["train"][name] = {**settings["train"][again.of], "seed": again.seed}
        settings["evaluate"][name] = {**settings["evaluate"][again.of], "seed": again.seed, "of": again.of}
    settings["running"]["train"] = asdict(profile.running)
    settings["tables"][params.profile] = _tables(profile)
    for stage, entries in settings.items():
        for name, values in entries.items():
            made: Any = build(STAGES[stage], values, f"{where}: {stage} of {name}")
            entries[name] = _plain(asdict(made))
    return settings


def _tables(profile: Profile) -> dict[str, Any]:
    return asdict(Tables(profile.comparable))


def _check_custom(key: str, data: str, params: Params) -> None:
    """Raise UserError where a data set of the list `key` can have no table of its own."""
    if data in params.tables:
        raise UserError(f"{PARAMS}: {key}: {data} is a table of the paper, expected another name")
    if not any(experiment.data == data for experiment in params.experiments.values()):
        raise UserError(f"{PARAMS}: no experiment with data: {data}, expected one or more for its table")


def _check_seed(name: str, again: Seed, params: Params, profile: Profile) -> None:
    row = f"{PARAMS}: seeds.{name}"
    experiment = params.experiments.get(again.of)
    if experiment is None:
        raise UserError(f"{row}.of is {again.of!r}, expected one of {', '.join(params.experiments)}")
    if again.of in profile.models:
        raise UserError(f"{row}: {again.of} has finished weights in profile {params.profile}, no seed to change")
    if again.seed < 0 or again.seed == profile.seed:
        raise UserError(f"{row}.seed is {again.seed}, expected another one than the profile's, {profile.seed}")
    if name != f"{again.of}-seed{again.seed}":
        raise UserError(f"{row}: expected the name {again.of}-seed{again.seed}")
    for key in ("data", "start"):
        if getattr(again, key) != getattr(experiment, key):
            raise UserError(f"{row}.{key} is {getattr(again, key)!r}, expected {getattr(experiment, key)!r}")


def machine_settings(data: str, profile: Profile) -> dict[str, Any]:
    """Return device, threads and portable of trainings and evaluations on a data set. Raises UserError."""
    own = profile.datasets.get(data, {})
    made = {key: own.get(key, getattr(profile, key)) for key in ("device", "threads", "portable")}
    if made["portable"] and made["device"] == "cpu" and made["threads"] != 1:
        raise UserError(f"datasets.{data}: threads is {made['threads']}, expected 1: it is portable")
    return made | {"portable": made["portable"] and made["device"] == "cpu"}


def _layers(key: str, name: str, training: Training, profile: Profile) -> dict[str, Any]:
    """Merge what the profile says under `key`: of everything, of the data set, of the experiment; then its row."""
    merged: dict[str, Any] = dict(getattr(profile, key))
    for over in (profile.datasets.get(training.data, {}), profile.experiments.get(name, {})):
        merged = merge(merged, over.get(key, {}))
    return merge(merged, getattr(training, key, {}))


def evaluation_settings(name: str, training: Training, profile: Profile) -> dict[str, Any]:
    """Return what the profile and a row of params.yaml say of its evaluation; a protocol set to null is left out."""
    made = _layers("evaluate", name, training, profile)
    return made | {"protocols": {key: one for key, one in made.get("protocols", {}).items() if one is not None}}


def evaluated_split(name: str, training: Training, profile: Profile, where: str) -> str:
    """Return the split that an experiment is scored on: its data set's official one, unless the profile has another.

    Raises UserError for a split that the data set does not have, and for test images without labels.
    """
    of_paper = training.data in datasets.NAMES
    official = datasets.evaluated(training.data) if of_paper else "val"
    split = evaluation_settings(name, training, profile).get("split", official)
    there = datasets.load(training.data).COUNTS if of_paper else ("train", "val")
    labelled = [one for one in there if one != "test" or official == "test"]
    if split not in labelled:
        expected = ", ".join(labelled)
        raise UserError(f"{where}: evaluate.split of {name} is {split!r}, expected a split with labels: {expected}")
    return str(split)


def _steps(given: Mapping[str, Any], parts: Sequence[Sequence[str]], batch_size: int, where: str) -> int:
    """Return the length of a training or phase in steps. Raises UserError where it is not given once."""
    if ("steps" in given) == ("epochs" in given):
        both = "both" if "steps" in given else "neither"
        raise UserError(f"{where}: steps and epochs say how long it is and {both} is there, expected one of them")
    if "steps" in given:
        if not isinstance(steps := given["steps"], int):
            raise UserError(f"{where}: steps is {steps!r}, expected a whole number")
        return steps
    if not isinstance(epochs := given["epochs"], (int, float)) or epochs <= 0:
        raise UserError(f"{where}: epochs is {epochs!r}, expected a number above 0")
    images = 0
    for data, split in parts:
        counts = datasets.load(data).COUNTS if data in datasets.NAMES else {}
        if split not in counts:
            raise UserError(
                f"{where}: epochs is {epochs}, but how many images {data} {split} has is not known before it is "
                "prepared, expected steps"
            )
        images += counts[split]
    return steps_of_epochs(epochs, images, batch_size)


def training_settings(name: str, training: Training, params: Params, profile: Profile, where: str) -> dict[str, Any]:
    """Return the settings of `train` for the experiment or pretraining `name`.

    Args:
        name: its row in params.yaml.
        training: the row.
        params: params.yaml.
        profile: the profile, merged with its bases.
        where: the profile's path, for messages.

    Raises:
        UserError: the row names unknown data, weights or settings.
    """
    early = isinstance(training, Pretraining)
    row = f"{PARAMS}: {'pretrainings' if early else 'experiments'}.{name}"
    known = (*params.datasets, *params.own)
    starts = params.backbones if early else (*params.backbones, *params.pretrainings)
    for key, value, expected in (
        ("data", training.data, known),
        ("start", training.start, starts),
        *((("also", training.also, known),) if isinstance(training, Pretraining) else ()),
    ):
        if value not in expected:
            raise UserError(f"{row}.{key} is {value!r}, expected one of {', '.join(expected)}")
    first = params.pretrainings.get(training.start)
    own = profile.datasets.get(training.data, {})
    varied = {
        "backbone": first.start if first else training.start,
        "cascade": training.cascade,
        "pools": training.pools,
    }
    values = {"classes": 1, **_layers("network", name, training, profile), **varied, **training.network}
    network = asdict(build(Config, values, f"{where}: network of {name}"))
    del network["classes"]
    recipe = _layers("train", name, training, profile)
    size = recipe.get("batch_size", 1)
    batch_size = size if isinstance(size, int) and size > 0 else 1  # a wrong one is told of with the other settings
    # An experiment without a pretraining trains on the whole training set, in one phase.
    phases = own.get("phases", {}).get("pretrain" if early else "train", []) if early or first else []
    allowed = {training.data, training.also} if isinstance(training, Pretraining) else {training.data}
    for data, _ in (tuple(part) for phase in phases for part in phase.get("parts", [])):
        if data not in allowed:
            raise UserError(f"{where}: phases of {name} have {data}, expected {' or '.join(sorted(allowed))}")
    if phases:
        phases = [
            {**phase, "steps": _steps(phase, phase.get("parts", []), batch_size, f"{where}: phases of {name}")}
            for phase in phases
        ]
        for phase in phases:
            phase.pop("epochs", None)
        recipe["steps"] = sum(phase["steps"] for phase in phases)
    elif not early:
        parts = [(training.data, training.split)]
        recipe["steps"] = _steps(recipe, parts, batch_size, f"{where}: train of {name}")
        if training.split != "train":
            phases = [{"parts": parts, "steps": recipe["steps"]}]
    else:
        recipe.setdefault("steps", 1)  # it trains nothing
    recipe.pop("epochs", None)
    return {
        "data": training.data,
        "start": training.start,
        "phases": phases,
        "target": "weights" if early else "models",
        "dtype": "float32" if early else profile.dtype,
        "network": network,
        "recipe": recipe,
        "source": asdict(profile.models[name]) if name in profile.models else None,
    }


def custom_datasets(resolved: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, list[str]]]:
    """Title and classes of each data set that no table of the paper is about: params.yaml's `own` and `further`.

    The classes of one's own folders are settings, those of another data set stand in its module.
    """
    own = {data: values["own"] for data, values in resolved.get("prepare", {}).items() if values["own"] is not None}
    found = {data: (about["title"] or data, list(about["classes"])) for data, about in own.items()}
    for data in read_params().further if PARAMS.is_file() else ():
        module = datasets.load(data)
        found[data] = (module.TITLE, list(module.CLASSES))
    return found


def image_size(data: str, resolved: Mapping[str, Mapping[str, Any]]) -> tuple[int, int] | None:
    """Return height and width of the images of a data set; None of a user's own, whose sizes nobody has said."""
    if drawn := resolved["download"][data]["rendered"]:
        return drawn["height"], drawn["width"]
    return datasets.load(data).TYPICAL_SIZE if data in datasets.NAMES else None


def _plain(value: Any) -> Any:
    """Return `value` with JSON's types only: tuples become lists."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    return value


@overload
def load(stage: Literal["download"], name: str) -> Download: ...


@overload
def load(stage: Literal["prepare"], name: str) -> Prepare: ...


@overload
def load(stage: Literal["weights"], name: str) -> Weights: ...


@overload
def load(stage: Literal["train"], name: str) -> Train: ...


@overload
def load(stage: Literal["evaluate"], name: str) -> Evaluate: ...


@overload
def load(stage: Literal["running"], name: str) -> Running: ...


def load(stage: str, name: str) -> Any:
    """Read the settings of one stage from settings.json. Raises UserError for a name that params.yaml does not have."""
    try:
        entries = everything()[stage]
    except (KeyError, TypeError) as error:
        raise UserError(f"{SETTINGS}: not as `python -m pipeline.settings` writes it ({error!r})") from None
    if name not in entries:
        raise UserError(f"{stage}: unknown name {name!r}{expected_one_of(name, entries, 'refinenet trace')}")
    return build(STAGES[stage], entries[name], f"{SETTINGS}: {stage}.{name}")


def everything() -> dict[str, dict[str, Any]]:
    """Read settings.json: stage -> name -> settings; where it was not written yet, what it would have."""
    try:
        entries: dict[str, dict[str, Any]] = json.loads(SETTINGS.read_text(encoding="utf-8"))
        return entries
    except FileNotFoundError:
        return resolve()
    except ValueError as error:
        raise UserError(f"{SETTINGS}: not as `python -m pipeline.settings` writes it ({error!r})") from None
