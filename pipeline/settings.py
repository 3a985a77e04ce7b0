"""params.yaml + profiles/<profile>.yaml -> settings.json: every value that this run uses, resolved and checked.

This is the first stage of the graph. Each later stage names the one key of settings.json that it reads
(`train.voc-res101`), so that a change in a profile reruns what it touches and nothing else, and a profile can be ten
lines that say only where it differs from another one (`base: mini`). JSON, because DVC reads the file once for each
stage and its YAML reader takes 0.2 s for it.
"""

from __future__ import annotations

import ctypes
import json
import re
import socket
import sys
from collections.abc import Collection, Hashable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, overload
from urllib.parse import urlsplit

import yaml

from pipeline import copies, datasets
from pipeline.datasets import folder
from refinenet.config import RESNETS, Average, Cascade, Config, Protocol, Recipe
from refinenet.files import UserError, whole_file

SETTINGS = Path("settings.json")
PARAMS = Path("params.yaml")
PROFILES = Path("profiles")


@dataclass(frozen=True)
class Source:
    """Where one archive comes from. `url`: https://, http:// or file://; `mirrors` are tried after it, in order.

    `size` in bytes. A checksum that is None is not published (see the profile's comments); of one that is published
    in part, as the sha256 in torchvision's file names, the first 8 digits or more are enough.

    `page`: where a person gets the file, told where no address gives it. `login`: the account that the address asks
    for; its name and password are in the environment. `optional`: without the file the stage goes on.
    """

    url: str
    size: int | None = None
    md5: str | None = None
    sha256: str | None = None
    mirrors: tuple[str, ...] = ()
    page: str | None = None
    login: Literal["cityscapes"] | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        for name, digits in (("md5", 32), ("sha256", 8)):
            value = getattr(self, name)
            if value is not None and (len(value) < digits or not set(value.lower()) <= set("0123456789abcdef")):
                raise UserError(f"{self.url}: {name} is {value!r}, expected {digits} hexadecimal digits or more")


@dataclass(frozen=True)
class Package:
    """Weights that an installed Python package carries (pipeline/sources.py knows which)."""

    package: str


@dataclass(frozen=True)
class Rendered:
    """Archives drawn instead of fetched (pipeline/rendered): how many images, how large, from which seed."""

    train: int = 28
    val: int = 12
    height: int = 96
    width: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Folder:
    """A user's own data set: a folder of images, a folder of masks under the same names, and what the values mean.

    `classes`: their names, in the order of the indices. A mask is a PNG: with `colours` a colour picture, one colour a
    class; without, grey or palette, whose values are the indices. `void`: the value (or the colour) that is neither
    trained on nor scored, None: there is none. `train`, `val`: lists of image names, one a line; without them
    `val_share` of the images are drawn with `seed`. Paths may have `~` and `${NAME}`.
    """

    images: str
    masks: str
    classes: tuple[str, ...]
    title: str | None = None
    colours: tuple[tuple[int, int, int], ...] | None = None
    void: int | tuple[int, int, int] | None = 255
    train: str | None = None
    val: str | None = None
    val_share: float = 0.2
    seed: int = 0


@dataclass(frozen=True)
class Download:
    """Settings of `download`: exactly one of the first three is given. `archives`: official file name -> source.

    `mirror`: folders in which archives are looked for before any address is asked.
    """

    rendered: Rendered | None = None
    archives: Mapping[str, Source] = field(default_factory=dict)
    own: Folder | None = None
    mirror: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepare:
    """Settings of `prepare`. `official_counts`: stop unless each split has as many images as the paper says."""

    official_counts: bool = False
    own: Folder | None = None


@dataclass(frozen=True)
class Weights:
    """Settings of `weights`: what the backbone starts from. Without a source it is a seeded, untrained start."""

    backbone: str
    stem: int = 64
    seed: int = 0
    source: Source | Package | None = None


@dataclass(frozen=True)
class Train:
    """Settings of `train`. `network`: `refinenet.config.Config` but for the classes, which the data decides.

    `dtype`: of the written weights. `source`: finished weights, which are brought in instead of training.
    """

    data: str
    network: Mapping[str, Any]
    recipe: Recipe
    profile: str
    device: str
    threads: int
    seed: int
    dtype: Literal["float32", "float16"]
    source: Source | None = None


@dataclass(frozen=True)
class Evaluate:
    """Settings of `evaluate`. `protocols`: name in the tables -> how to test; `pictures`: how many are kept."""

    data: str
    protocols: Mapping[str, Protocol]
    input_scale: float
    profile: str
    device: str
    threads: int
    seed: int
    short_edge: tuple[int, int] | None = None
    average: Average = "probability"
    pictures: int = 4


@dataclass(frozen=True)
class Experiment:
    """A row of params.yaml: what sets this training apart.

    `network`, `train` and `evaluate` change the profile's values.
    """

    data: str
    backbone: str
    cascade: str | Cascade = "four"
    pools: int = 2
    network: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)
    evaluate: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Params:
    """params.yaml. Its lists name stages of the graph; dvc.yaml loops over them. `own`: a user's own data sets."""

    profile: str
    datasets: tuple[str, ...]
    backbones: tuple[str, ...]
    tables: tuple[str, ...]
    experiments: Mapping[str, Experiment]
    own: tuple[str, ...] = ()


@dataclass(frozen=True)
class Profile:
    """A file of profiles/, with its base merged in.

    `sources`: for each data set `rendered`, or file name -> source. `mirror`: folders that have archives already.
    `own`: the user's own data sets. `weights`: for each backbone `seeded`, a source or a package. `models`: experiment
    -> finished weights, which it takes instead of training. `datasets`: what differs for one data set, under the keys
    `prepare`, `rendered`, `network`, `train` and `evaluate`.
    """

    title: str
    device: str
    threads: int
    seed: int
    sources: Mapping[str, Literal["rendered"] | Mapping[str, Source]]
    weights: Mapping[str, Literal["seeded"] | Source | Package]
    rendered: Rendered
    prepare: Prepare
    network: Mapping[str, Any]
    train: Mapping[str, Any]
    evaluate: Mapping[str, Any]
    dtype: Literal["float32", "float16"] = "float32"
    models: Mapping[str, Source] = field(default_factory=dict)
    datasets: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    own: Mapping[str, Folder] = field(default_factory=dict)
    mirror: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", self.device):
            raise UserError(f"device is {self.device!r}, expected cpu, cuda, cuda:<number> or mps")
        if self.threads < 1 or self.seed < 0:
            raise UserError(f"threads is {self.threads}, seed is {self.seed}; expected 1 or more, and 0 or more")


_OWN = ("prepare", "rendered", "network", "train", "evaluate")
# Not keys: how pydantic calls the kinds of which a value may be one.
_KINDS = ("Source", "Package", "Cascade", "int")


_T = TypeVar("_T")
_STAGES: Mapping[str, type] = {
    "download": Download,
    "prepare": Prepare,
    "weights": Weights,
    "train": Train,
    "evaluate": Evaluate,
}


@cache
def _checker(kind: Hashable) -> Any:
    """Pydantic's reader of the dataclass `kind`, which refuses unknown keys; made once, a run reads dozens."""
    from pydantic import ConfigDict, TypeAdapter

    for known in (
        Source,
        Package,
        Rendered,
        Folder,
        *_STAGES.values(),
        Config,
        Cascade,
        Recipe,
        Protocol,
        Experiment,
        Params,
        Profile,
    ):
        setattr(known, "__pydantic_config__", ConfigDict(extra="forbid"))  # noqa: B010 - no attribute a checker knows
    return TypeAdapter(cast(type, kind))


def build(kind: type[_T], values: object, where: str) -> _T:
    """Make a settings object; UserError names `where`, the key and what was expected."""
    from pydantic import ValidationError

    try:
        made: _T = _checker(cast(Hashable, kind)).validate_python(values)
        return made
    except ValidationError as error:
        # Of "a word, or a mapping" both are told; what went further in is what was meant.
        first = max(error.errors(), key=lambda told: len(told["loc"]))
        key = ".".join(str(part) for part in first["loc"] if "[" not in str(part) and part not in _KINDS)
        if first["type"] == "unexpected_keyword_argument":
            raise UserError(f"{where}: unknown key {key}") from None
        if first["type"] in ("missing", "missing_argument"):
            raise UserError(f"{where}: key {key} is missing") from None
        raise UserError(f"{where}: {key} is {first['input']!r}: {first['msg']}") from None
    except UserError as error:  # of a __post_init__, which does not know what file its values are from
        raise UserError(f"{where}: {error}") from None


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; UserError where it is missing, broken or no mapping."""
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: expected keys and values, found {type(values).__name__}")
    return values


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, key by key; where one of the two is no mapping, `over` wins."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, Mapping) and isinstance(value, Mapping) else value
    return merged


def read_profile(name: str) -> tuple[Profile, str]:
    path = PROFILES / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise UserError(f"{PARAMS}: profile is {name!r}, but there is no {path}; there are {known}")
    values = read_yaml(path)
    seen = [name]
    while (base := values.pop("base", None)) is not None:
        if base in seen:
            raise UserError(f"{path}: base goes in a circle: {', '.join([*seen, base])}")
        seen.append(base)
        under = read_yaml(PROFILES / f"{base}.yaml")
        if not isinstance(values.get("sources", {}), dict):
            raise UserError(f"{path}: sources is {values['sources']!r}, expected data sets and their archives")
        # Sources of one data set are replaced as a whole: a base's archives have no place beside others.
        sources = {**under.get("sources", {}), **values.get("sources", {})}
        values = {**_merge(under, values), "sources": sources, **({"base": under["base"]} if "base" in under else {})}
    profile = build(Profile, values, str(path))
    expected: list[tuple[str, Mapping[str, object], Collection[str]]] = [
        ("sources", profile.sources, datasets.NAMES),
        ("weights", {name: 0 for name in profile.weights if not name.startswith("timm:")}, RESNETS),
        ("datasets", profile.datasets, (*datasets.NAMES, *profile.own)),
        *((f"datasets.{data}", own, _OWN) for data, own in profile.datasets.items()),
    ]
    for key, given, names in expected:
        for unknown in sorted(given.keys() - set(names)):
            raise UserError(f"{path}: unknown key {key}.{unknown}, expected one of {', '.join(names)}")
    for name in profile.own:
        if name in datasets.NAMES or not re.fullmatch(r"[a-z][a-z0-9_]*", name):
            raise UserError(f"{path}: own.{name}: expected a name of a-z, 0-9 and _ that is no data set of the paper")
    return profile, str(path)


def resolve() -> dict[str, dict[str, Any]]:
    """Stage -> name -> the settings that this stage reads, from params.yaml and the profile it names."""
    params = build(Params, read_yaml(PARAMS), str(PARAMS))
    profile, where = read_profile(params.profile)
    common = {"profile": params.profile, "device": profile.device, "threads": profile.threads, "seed": profile.seed}
    settings: dict[str, dict[str, Any]] = {stage: {} for stage in _STAGES}
    for model in profile.models:
        if model not in params.experiments:
            expected = ", ".join(params.experiments)
            raise UserError(f"{where}: models.{model} is no experiment of {PARAMS}, expected one of {expected}")
    for data in params.datasets:
        own = profile.datasets.get(data, {})
        source = profile.sources.get(data)
        if source is None:
            raise UserError(f"{where}: sources.{data} is missing")
        if source == "rendered":
            download: dict[str, Any] = {"rendered": _merge(asdict(profile.rendered), own.get("rendered", {}))}
        else:
            archives = {file: asdict(archive) for file, archive in source.items()}
            download = {"archives": archives, "mirror": profile.mirror}
        settings["download"][data] = download
        settings["prepare"][data] = _merge(asdict(profile.prepare), own.get("prepare", {}))
    for data in params.own:
        if data not in profile.own:
            raise UserError(f"{where}: own.{data} is missing, {PARAMS} names it")
        if data in params.tables:
            raise UserError(f"{PARAMS}: own: {data} is a table of the paper, expected another name")
        if not any(experiment.data == data for experiment in params.experiments.values()):
            raise UserError(f"{PARAMS}: no experiment with data: {data}, expected one or more for its table")
        try:
            folder.check(data, profile.own[data])
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        settings["download"][data] = {"own": asdict(profile.own[data])}
        settings["prepare"][data] = {"own": asdict(profile.own[data])}
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
    for name, experiment in params.experiments.items():
        for key, value, known in (
            ("data", experiment.data, (*params.datasets, *params.own)),
            ("backbone", experiment.backbone, params.backbones),
        ):
            if value not in known:
                raise UserError(f"{PARAMS}: experiments.{name}.{key} is {value!r}, expected one of {', '.join(known)}")
        own = profile.datasets.get(experiment.data, {})
        varied = {"backbone": experiment.backbone, "cascade": experiment.cascade, "pools": experiment.pools}
        chosen = {"classes": 1, **profile.network, **own.get("network", {}), **varied, **experiment.network}
        network = asdict(build(Config, chosen, f"{where}: network of {name}"))
        del network["classes"]
        recipe = _merge(_merge(profile.train, own.get("train", {})), experiment.train)
        settings["train"][name] = {
            **common,
            "data": experiment.data,
            "network": network,
            "recipe": recipe,
            "dtype": profile.dtype,
            "source": asdict(profile.models[name]) if name in profile.models else None,
        }
        evaluate = _merge(_merge(profile.evaluate, own.get("evaluate", {})), experiment.evaluate)
        settings["evaluate"][name] = {
            **common,
            "data": experiment.data,
            "input_scale": recipe.get("input_scale", 1.2),
            **evaluate,
        }
    for stage, entries in settings.items():
        for name, values in entries.items():
            made: Any = build(_STAGES[stage], values, f"{where}: {stage} of {name}")
            entries[name] = _plain(asdict(made))
    return settings


def _plain(value: Any) -> Any:
    """Only what JSON has: tuples become lists."""
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


def load(stage: str, name: str) -> Any:
    """The settings of one stage, from settings.json. UserError for a name that params.yaml does not know."""
    try:
        entries = json.loads(SETTINGS.read_text(encoding="utf-8"))[stage]
    except FileNotFoundError:
        entries = resolve()[stage]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{SETTINGS}: not as `python -m pipeline.settings` writes it ({error!r})") from None
    if name not in entries:
        raise UserError(f"{stage}: unknown name {name!r}, expected one of {', '.join(entries)}")
    return build(_STAGES[stage], entries[name], f"{SETTINGS}: {stage}.{name}")


def _hosts(settings: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """The first host of every archive that is not in place yet and has to come over a network."""
    for name, download in settings["download"].items():
        for file, source in download["archives"].items():
            url = urlsplit(source["url"])
            here = [folder / name / file for folder in (Path("data/raw"), copies.STORE)]
            here += copies.places(name, file, download["mirror"])
            if url.scheme in ("http", "https") and not source["optional"] and not any(map(Path.is_file, here)):
                yield url.hostname or ""


def check_machine(settings: Mapping[str, Mapping[str, Any]]) -> None:
    """UserError, before anything is written, where this machine lacks what the profile needs: a GPU, a network."""
    profile = next((PROFILES / f"{s['profile']}.yaml" for s in settings["train"].values()), PROFILES)
    if any(str(s["device"]).startswith("cuda") for s in settings["train"].values()):
        try:
            count = ctypes.c_int(0)
            driver = ctypes.CDLL("libcuda.so.1")  # asked directly: importing torch to ask takes seconds
            missing = driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or not count.value
        except OSError:
            missing = True
        if missing:
            raise UserError(
                f"{profile}: trains on a GPU (device: cuda) and this machine has none; `profile: mini` needs none"
            )
    for host in dict.fromkeys(_hosts(settings)):
        try:
            socket.getaddrinfo(host, 443)
        except OSError as error:
            raise UserError(f"{profile}: downloads from {host}, which cannot be reached ({error})") from None


def run() -> None:
    """Write settings.json."""
    settings = resolve()
    check_machine(settings)
    with whole_file(SETTINGS) as part:
        part.write_text(json.dumps(settings, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    from pipeline.stage import report

    sys.exit(report(run))
