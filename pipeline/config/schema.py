"""Types of params.yaml, profiles and settings.json; an unknown key is an error that names it."""

from __future__ import annotations

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from typing import Any, Literal, TypeVar, cast

from refinenet.config import SMALLEST_TILE, Average, Cascade, Config, Precision, Protocol, Recipe, Resizing
from refinenet.data import IGNORE_INDEX
from refinenet.errors import UserError


@dataclass(frozen=True)
class Source:
    """Where one archive comes from. `url`: https://, http:// or file://; `mirrors` are tried after it, in order.

    `size` in bytes. A checksum that is None is not published (see the profile's comments); the first 8 digits of a
    sha256 are enough, as in torchvision's file names.

    `page`: where a person gets the file, printed when no address works. `login`: the account that the address needs;
    its name and password are in the environment. `optional`: the stage goes on without the file.
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
    """Weights that an installed Python package contains (pipeline/convert/imagenet.py has the list)."""

    package: str


@dataclass(frozen=True)
class TorchvisionWeights:
    """ImageNet weights by their name in torchvision, which knows address, hash and moments: ResNet101_Weights.<entry>.

    Not by `DEFAULT`, which is another entry in another version.
    """

    torchvision: str

    def entry(self, backbone: str) -> Any:
        """Return torchvision's entry of these weights (an enum's member), which have to be of `backbone`."""
        import torchvision  # late: it takes seconds
        from torchvision.models import get_model_weights

        entries = {str(entry): entry for entry in get_model_weights(backbone)}
        if self.torchvision not in entries:
            near = ", ".join(get_close_matches(self.torchvision, entries, cutoff=0))
            raise UserError(
                f"weights.{backbone}.torchvision is {self.torchvision!r}, which torchvision {torchvision.__version__} "
                f"does not have for {backbone}; expected one of {near}"
            )
        return entries[self.torchvision]


@dataclass(frozen=True)
class Rendered:
    """Synthetic archives instead of downloads (pipeline/synthetic): number of images, size in pixels, seed."""

    train: int = 28
    val: int = 12
    height: int = 96
    width: int = 128
    seed: int = 0


SPLIT = "{split}"  # in the paths of a user's folders


@dataclass(frozen=True)
class Folder:
    """A user's own data set: a folder of images, a folder of masks under the same names, and what the values mean.

    `classes`: their names, in the order of the indices. A mask has values, grey or palette, or, with `colours`, one RGB
    colour a class. `values`: those of the classes in a mask, in the order of `classes`; None: 0, 1, 2 ... `void`: the
    value (or the colour) that is ignored in training and scores, None: there is none; the default is none where 255 is
    a class. `image_suffix`, `mask_suffix`: what follows the common name in the files' names, as "_mask"; files without
    it are no images and no masks.

    `train`, `val`: lists of image names, one a line; without them `val_share` of the images are drawn with `seed`.
    Where both paths have `{split}` in them, there are two of each folder, `split_folders`: of train and of val.
    `group`: images of one group stay in one split; a number: so many leading folders of the name are the group; a text:
    a regular expression whose first group, or whole match, in the name is. Paths may have `~` and `${NAME}`.
    """

    images: str
    masks: str
    classes: tuple[str, ...]
    title: str | None = None
    colours: tuple[tuple[int, int, int], ...] | None = None
    values: tuple[int, ...] | None = None
    void: int | tuple[int, int, int] | None = 255
    image_suffix: str = ""
    mask_suffix: str = ""
    train: str | None = None
    val: str | None = None
    val_share: float = 0.2
    seed: int = 0
    group: int | str | None = None
    split_folders: tuple[str, str] = ("train", "val")

    def parts(self) -> dict[str, tuple[str, str]]:
        """Return how an image's name begins -> folder of images, of masks; "" where there is one of each."""
        if SPLIT not in self.images:
            return {"": (self.images, self.masks)}
        named = zip(("train/", "val/"), self.split_folders, strict=True)
        return {part: (self.images.replace(SPLIT, one), self.masks.replace(SPLIT, one)) for part, one in named}

    def file(self, kind: Literal["images", "masks"], name: str, ending: str) -> str:
        """Return where an image or a mask lies, as the profile writes paths."""
        folders = self.parts()
        part = "" if "" in folders else name[: name.index("/") + 1]
        folder, suffix = (
            (folders[part][0], self.image_suffix) if kind == "images" else (folders[part][1], self.mask_suffix)
        )
        return f"{folder}/{name[len(part) :]}{suffix}{ending}"

    def class_values(self) -> tuple[int, ...]:
        """Return the value of each class in masks without colours."""
        return tuple(range(len(self.classes))) if self.values is None else self.values

    def void_value(self) -> int | None:
        """Return the value that is void in masks without colours; None: there is none."""
        return self.void if isinstance(self.void, int) and self.void not in self.class_values() else None

    def group_of(self, name: str) -> str | None:
        """Return the group of the image `name`; None: the regular expression does not match it."""
        if self.group is None:
            return name
        if isinstance(self.group, int):
            return "/".join(name.split("/")[:-1][: self.group])
        found = re.search(self.group, name)
        return None if found is None else str(found[1] if found.re.groups and found[1] is not None else found[0])


def check_folder(name: str, about: Folder) -> None:
    """Raise UserError where the settings of a user's own data set `name` contradict each other."""
    where, classes = f"own.{name}", about.classes
    if not 0 < len(classes) < IGNORE_INDEX:
        raise UserError(f"{where}: {len(classes)} classes, expected 1 to {IGNORE_INDEX - 1}")
    for one in classes:
        if not one.strip() or not one.isprintable():
            raise UserError(f"{where}: class {one!r}, expected a name")
        if classes.count(one) > 1:
            raise UserError(f"{where}: class {one!r} is there twice")
    if not 0 < about.val_share < 1:
        raise UserError(f"{where}: val_share is {about.val_share}, expected a number between 0 and 1")
    for key in ("image_suffix", "mask_suffix"):
        if "/" in (suffix := getattr(about, key)) or not (suffix + "x").isprintable():
            raise UserError(f"{where}: {key} is {suffix!r}, expected the end of a file's name")
    if (SPLIT in about.images) != (SPLIT in about.masks):
        raise UserError(f"{where}: {SPLIT} stands in one of images and masks, expected it in both or in none")
    if SPLIT in about.images and (about.train is not None or about.val is not None):
        raise UserError(f"{where}: {SPLIT} and a list, expected one of them: what tells train from val")
    _check_group(where, about.group)
    if about.colours is None:
        _check_values(where, about)
    else:
        _check_colours(where, about, about.colours)


def _check_group(where: str, group: int | str | None) -> None:
    if isinstance(group, int) and group < 1:
        raise UserError(f"{where}: group is {group}, expected 1 or more folders, or a regular expression")
    if isinstance(group, str):
        try:
            re.compile(group)
        except re.error as error:
            raise UserError(f"{where}: group is {group!r}, no regular expression: {error}") from None


def _check_values(where: str, about: Folder) -> None:
    classes, values = len(about.classes), about.values
    if isinstance(about.void, tuple):
        raise UserError(f"{where}: void is the colour {list(about.void)}, expected a value: there are no colours")
    if values is None:
        if about.void is not None and not classes <= about.void <= 255:
            raise UserError(f"{where}: void is {about.void}, expected {classes} to 255: lower values are classes")
        return
    if len(values) != classes or len(set(values)) != classes or not all(0 <= value <= 255 for value in values):
        raise UserError(f"{where}: values is {list(values)}, expected {classes} different numbers from 0 to 255")
    if about.void not in (None, IGNORE_INDEX) and (not 0 <= about.void <= 255 or about.void in values):
        raise UserError(f"{where}: void is {about.void}, expected a number from 0 to 255 that is no class's value")


def _check_colours(where: str, about: Folder, colours: tuple[tuple[int, int, int], ...]) -> None:
    if about.values is not None:
        raise UserError(f"{where}: values and colours, expected one of them: what tells the classes in a mask")
    if len(colours) != len(about.classes):
        raise UserError(f"{where}: {len(colours)} colours, expected {len(about.classes)}, one for each class")
    if isinstance(about.void, int) and about.void != IGNORE_INDEX:  # the default, which no colour picture has
        raise UserError(f"{where}: void is {about.void}, expected a colour [red, green, blue] or null")
    void = (about.void,) if isinstance(about.void, tuple) else ()
    for colour in (*colours, *void):
        if not all(0 <= value <= 255 for value in colour):
            raise UserError(f"{where}: colour {list(colour)}, expected three numbers from 0 to 255")
        if (*colours, *void).count(colour) > 1:
            raise UserError(f"{where}: colour {list(colour)} is there twice, expected one for each class and for void")


@dataclass(frozen=True)
class Download:
    """Settings of `download`: exactly one of the first three is given. `archives`: official file name -> source.

    `mirror`: folders that are searched for archives before downloading.
    """

    rendered: Rendered | None = None
    archives: Mapping[str, Source] = field(default_factory=dict)
    own: Folder | None = None
    mirror: tuple[str, ...] = ()


@dataclass(frozen=True)
class Prepare:
    """Settings of `prepare`. `official_counts`: stop unless each split has as many images as the official release.

    Where no source confirms that number (Person-Part's test list), another one is a warning. `limit`: at most so many
    images of each split, to try something out (pipeline/rehearse.py); None: all.
    """

    official_counts: bool = False
    limit: int | None = None
    own: Folder | None = None

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 1:
            raise UserError(f"prepare.limit is {self.limit}, expected 1 or more, or null: all images")


@dataclass(frozen=True)
class Weights:
    """Settings of `weights`, the initial weights of a backbone. Without a source they are drawn from `seed`."""

    backbone: str
    stem: int = 64
    seed: int = 0
    source: Source | Package | TorchvisionWeights | None = None


def check_portable(precision: Precision, compiled: bool) -> None:
    """Raise UserError for what computes differently on another processor, whatever it is held to."""
    if precision != "float32":
        raise UserError(f"precision is {precision}, expected float32: the profile is portable")
    if compiled:
        raise UserError(
            "compile is true, expected false: the profile is portable, and compiled code is this processor's"
        )


@dataclass(frozen=True)
class PhaseSettings:
    """A phase of a training: `steps` steps on `parts` together, each a data set and a split: ("coco", "train").

    The learning rate starts again at `lr` (None: the recipe's), the momentum at 0.
    """

    parts: tuple[tuple[str, str], ...]
    steps: int
    lr: float | None = None

    def __post_init__(self) -> None:
        if not self.parts or self.steps < 1:
            raise UserError(f"phase has parts {list(self.parts)} and {self.steps} steps, expected one or more of both")


@dataclass(frozen=True)
class Train:
    """Settings of `train`. `network`: `refinenet.config.Config` without the classes, which come from the data.

    `start`: weights/<start>.safetensors, of a backbone or of a pretraining. `target`: the folder of the result;
    a pretraining's is "weights". `phases`: run one after the other; together they have the recipe's steps. An
    experiment without phases trains on its data set's "train"; a pretraining without phases trains nothing, the file of
    its start is copied under its name. `dtype`: of the written weights. `source`: finished weights, which are converted
    instead of training. `portable`: see `Profile`.
    """

    data: str
    start: str
    phases: tuple[PhaseSettings, ...]
    target: Literal["models", "weights"]
    network: Mapping[str, Any]
    recipe: Recipe
    profile: str
    device: str
    threads: int
    seed: int
    dtype: Literal["float32", "float16"]
    source: Source | None = None
    portable: bool = False

    def __post_init__(self) -> None:
        if self.portable:
            check_portable(self.recipe.precision, self.recipe.compile)


@dataclass(frozen=True)
class Running:
    """Settings of how trainings run, which change no byte of a result: no stage depends on them.

    `checkpoint_minutes`: between two checkpoints; 0: one after each step.
    """

    checkpoint_minutes: float = 10

    def __post_init__(self) -> None:
        if not 0 <= self.checkpoint_minutes < float("inf"):
            raise UserError(f"checkpoint_minutes is {self.checkpoint_minutes}, expected 0 or more")


@dataclass(frozen=True)
class Tables:
    """What the tables need to know of a profile whose scores they show. `comparable`: see `Profile`."""

    comparable: bool


@dataclass(frozen=True)
class Evaluate:
    """Settings of `evaluate`. `protocols`: name in the tables -> how to test; `pictures`: how many images are kept.

    `split`: of `data`, what is scored; it needs labels.
    `of`: the experiment that this one repeats with another seed; None: it repeats none. `seed` is the training's.
    `drawn`: whether images that the model was trained on, or that it is evaluated on, are drawn ones.
    `tile`: side, in pixels of the scaled image, above which it is cut into overlapping tiles. `batch_size`: images of
    one size in a batch. `precision`, `channels_last`, `compile`: as for a training. `fast`: norms folded into the
    convolutions, on a CPU in float32 also Winograd's convolution (refinenet/inference/fast.py). `portable`: see
    `Profile`.
    """

    data: str
    protocols: Mapping[str, Protocol]
    input_scale: float
    profile: str
    device: str
    threads: int
    seed: int
    split: str = "val"
    of: str | None = None
    drawn: bool = False
    short_edge: tuple[int, int] | None = None
    average: Average = "probability"
    pictures: int = 4
    tile: int | None = None
    batch_size: int = 1
    precision: Precision = "float32"
    channels_last: bool = False
    compile: bool = False
    fast: bool = False
    portable: bool = False

    def __post_init__(self) -> None:
        if self.portable:
            check_portable(self.precision, self.compile)
        if self.batch_size < 1:
            raise UserError(f"evaluate.batch_size is {self.batch_size}, expected 1 or more")
        if self.tile is not None and self.tile < SMALLEST_TILE:
            raise UserError(f"evaluate.tile is {self.tile} pixels a side, expected {SMALLEST_TILE} or more")

    def predictor_settings(self) -> dict[str, Any]:
        """Return the keyword arguments of `refinenet.inference.predictor.Predictor`."""
        names = ("average", "precision", "tile", "fast", "channels_last", "compile")
        return {name: getattr(self, name) for name in names} | {"resizing": Resizing(self.input_scale, self.short_edge)}


@dataclass(frozen=True, kw_only=True)
class Training:
    """A row of params.yaml: how a training differs. `network` and `train` override the profile's values.

    `split`: of `data`, what is trained on where there are no phases.
    """

    data: str
    start: str
    split: str = "train"
    cascade: str | Cascade = "four"
    pools: int = 2
    network: Mapping[str, Any] = field(default_factory=dict)
    train: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Experiment(Training):
    """A training that is evaluated; `evaluate` overrides the profile's values, too.

    `start`: the backbone whose weights it starts from, or a pretraining, whose whole network it continues.
    """

    evaluate: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Pretraining(Training):
    """A training on `data` and, before that, on `also`, too; its result in weights/ is where experiments start.

    Its phases are in the profile: datasets.<data>.phases.pretrain; without phases it is skipped.
    """

    also: str


@dataclass(frozen=True)
class Seed:
    """A row of params.yaml: the experiment `of` again with `seed`; data and start are the experiment's."""

    of: str
    seed: int
    data: str
    start: str


@dataclass(frozen=True)
class Params:
    """params.yaml. Its lists name stages of the graph; dvc.yaml loops over them.

    `own`: a user's own folders. `further`: those of `datasets` that no table of the paper is about. Both get a table
    and a page of their own.
    """

    profile: str
    datasets: tuple[str, ...]
    backbones: tuple[str, ...]
    tables: tuple[str, ...]
    experiments: Mapping[str, Experiment]
    pretrainings: Mapping[str, Pretraining] = field(default_factory=dict)
    seeds: Mapping[str, Seed] = field(default_factory=dict)
    own: tuple[str, ...] = ()
    further: tuple[str, ...] = ()


@dataclass(frozen=True)
class Planning:
    """What `python -m pipeline.plan` plans for: `hours` of training on this machine, `passes` over the images at most.

    `recipe`: what does not depend on the images, of the data sets under `own`; the keys of `Profile.datasets`.
    """

    hours: float = 1.0
    passes: float = 200
    recipe: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not 0 < self.hours < float("inf") or self.passes <= 0:
            raise UserError(f"plan has {self.hours} hours and {self.passes} passes, expected numbers above 0")


@dataclass(frozen=True)
class Profile:
    """A file of profiles/, with its base merged in.

    `sources`: for each data set `rendered`, or file name -> source. `mirror`: folders that have archives already.
    `own`: the user's own data sets. `weights`: for each backbone `seeded`, a source, a package or torchvision's name.
    `models`: experiment -> finished weights, used instead of training. `datasets`: what differs for one data
    set, under the keys `prepare`, `rendered`, `network`, `train`, `evaluate`, `device`, `threads`, `portable` and
    `phases`, which has those of its `pretrain` and its `train`. `plan`: for the data sets under `own`. `experiments`:
    what differs for one of them, under `network`, `train` and `evaluate`; names that params.yaml does not have are
    passed over. `running`: what changes no result. `portable`: trainings and evaluations on a CPU give the same bytes
    on every x86-64 processor with AVX2 (refinenet/portable.py). `comparable`: whether scores may stand against the
    paper's; where not, tables, README and report say nothing of a difference.

    How long a training or a phase is: `steps`, or `epochs` of the authors' kind (refinenet/config.py), which become
    steps here, by the number of images that a data set officially has.
    """

    title: str
    device: str
    threads: int
    seed: int
    sources: Mapping[str, Literal["rendered"] | Mapping[str, Source]]
    weights: Mapping[str, Literal["seeded"] | Source | Package | TorchvisionWeights]
    rendered: Rendered
    prepare: Prepare
    network: Mapping[str, Any]
    train: Mapping[str, Any]
    evaluate: Mapping[str, Any]
    dtype: Literal["float32", "float16"] = "float32"
    models: Mapping[str, Source] = field(default_factory=dict)
    datasets: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    plan: Planning | None = None
    own: Mapping[str, Folder] = field(default_factory=dict)
    mirror: tuple[str, ...] = ()
    running: Running = Running()
    experiments: Mapping[str, Mapping[str, Mapping[str, Any]]] = field(default_factory=dict)
    portable: bool = False
    comparable: bool = True

    def __post_init__(self) -> None:
        if self.portable and self.device == "cpu" and self.threads != 1:
            raise UserError(f"threads is {self.threads}, expected 1: the profile is portable")
        if not re.fullmatch(r"cpu|mps|cuda(:\d+)?", self.device):
            raise UserError(f"device is {self.device!r}, expected cpu, cuda, cuda:<number> or mps")
        if self.threads < 1 or self.seed < 0:
            raise UserError(f"threads is {self.threads}, seed is {self.seed}; expected 1 or more, and 0 or more")


STAGES: Mapping[str, type] = {
    "download": Download,
    "prepare": Prepare,
    "weights": Weights,
    "train": Train,
    "evaluate": Evaluate,
    "running": Running,
    "tables": Tables,
}

# Names of pydantic's union members, which are not keys.
_KINDS = ("Source", "Package", "TorchvisionWeights", "Cascade", "int")

_T = TypeVar("_T")


@cache
def _checker(kind: Hashable) -> Any:
    """Return pydantic's validator of the dataclass `kind`, which forbids unknown keys; cached, a run uses it often."""
    from pydantic import ConfigDict, TypeAdapter

    for known in (
        Source,
        Package,
        TorchvisionWeights,
        Rendered,
        Folder,
        *STAGES.values(),
        Config,
        Cascade,
        Recipe,
        Protocol,
        Experiment,
        Pretraining,
        Seed,
        Params,
        PhaseSettings,
        Planning,
        Profile,
    ):
        setattr(known, "__pydantic_config__", ConfigDict(extra="forbid"))  # noqa: B010 - no attribute a checker knows
    return TypeAdapter(cast(type, kind))


def build(kind: type[_T], values: object, where: str) -> _T:
    """Validate `values` as a settings object. Raises UserError with `where`, the key and what was expected.

    `values`: a mapping, or the bytes of a JSON file, in which a number must not be a text.
    """
    from pydantic import ValidationError

    checker = _checker(cast(Hashable, kind))
    try:
        text = isinstance(values, bytes)
        made: _T = checker.validate_json(values, strict=True) if text else checker.validate_python(values)
        return made
    except ValidationError as error:
        # For "a word or a mapping" there is an error for each; the deeper one is about what the user meant.
        first = max(error.errors(), key=lambda item: len(item["loc"]))
        key = ".".join(str(part) for part in first["loc"] if "[" not in str(part) and part not in _KINDS)
        if first["type"] == "unexpected_keyword_argument":
            raise UserError(f"{where}: unknown key {key}") from None
        if first["type"] in ("missing", "missing_argument"):
            raise UserError(f"{where}: key {key} is missing") from None
        if not key:  # it is the whole: no JSON, or no mapping
            raise UserError(f"{where}: {first['msg']}") from None
        raise UserError(f"{where}: {key} is {first['input']!r}: {first['msg']}") from None
    except UserError as error:  # of a __post_init__, which does not know the file of its values
        raise UserError(f"{where}: {error}") from None
