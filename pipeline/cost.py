"""What a profile costs: GPU hours and memory of each training, disk, and how long it all takes on n GPUs.

    refinenet cost                        profile paper, on an H100 of which a share is assumed
    refinenet cost --gpu a100 --gpus 4    another GPU, and which training runs on which of four
    refinenet cost --rate 41.5            measured images/s of RefineNet-101, 480 x 480 (benchmarks/train.py)
    refinenet cost --page docs/explanation/cost.md    the same, between the marks of that page

Multiply-adds are counted in the network itself, on PyTorch's device "meta", which computes nothing; so is memory. What
is published or assumed and not counted is in pipeline/cost.yaml and, of images, in each data set's TYPICAL_SIZE.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, ArgumentTypeError
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pipeline import datasets
from pipeline.config import profiles, resolve
from pipeline.config.schema import Params, Profile, Training
from pipeline.runtime.cli import command_parser, run_cli, user_path
from refinenet.atomic import atomic_file
from refinenet.config import Protocol, Recipe, Resizing
from refinenet.errors import UserError, expected_one_of

FACTS: dict[str, Any] = profiles.read_yaml(Path(__file__).with_suffix(".yaml"))
START, END = "<!-- cost -->\n", "\n<!-- end of cost -->"
# Forward, gradient of the inputs, gradient of the weights: each is about one forward pass.
PASSES = 3
OPERATIONS = 2  # a multiplication and an addition
FLOAT = 4  # bytes
KEPT = 2  # checkpoints of a running training
# What `--rate` is of: the network that benchmarks/train.py measures on a GPU, 21 classes, 480 x 480.
REFERENCE = json.dumps({"backbone": "resnet101", "pools": 4}), 21, 480


@dataclass(frozen=True)
class Work:
    """One training and, of an experiment, its evaluation. Multiply-adds are of one image's forward pass.

    `side`: of a crop as the network sees it, pixels. `crops`: in all. `testing`: multiply-adds of the evaluation, and
    `crf`, the seconds of its dense CRFs on the CPU meanwhile. `memory`: bytes of weights, momentum and one step.
    `after`: the pretraining that has to be done.
    """

    name: str
    side: int
    multiply_adds: float
    crops: int
    testing: float
    crf: float
    memory: float
    parameters: int
    batch: int
    precision: str
    after: str | None

    def hours(self, rate: float) -> tuple[float, float]:
        """GPU hours of the training and of the evaluation at `rate` operations a second."""
        training = PASSES * OPERATIONS * self.multiply_adds * self.crops
        return training / rate / 3600, max(OPERATIONS * self.testing / rate, self.crf) / 3600


@dataclass(frozen=True)
class Slot:
    """When a work is on which GPU; hours."""

    name: str
    gpu: int
    begin: float
    end: float


@cache
def counted(network: str, classes: int, side: int, batch: int = 1) -> tuple[float, int, float]:
    """Multiply-adds of a forward pass of one image of side x side, weights, and bytes of a training step of `batch`.

    `network`: JSON of refinenet.config.Config without the classes. The bytes are maps and gradients at their most.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from refinenet import RefineNet
    from refinenet.training.memory import activation_bytes
    from refinenet.training.step import pixel_loss

    with torch.device("meta"):
        model = RefineNet(classes, **json.loads(network)).train()
        images = torch.zeros(batch, 3, side, side)
        labels = torch.zeros(batch, side, side, dtype=torch.uint8)
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            model(images[:1])
        held = activation_bytes(lambda: pixel_loss(model(images), labels))
    return counter.get_total_flops() / OPERATIONS, sum(p.numel() for p in model.parameters()), held


def rate_of(gpu: str, precision: str, batch: int) -> float:
    """Operations a second that a GPU of cost.yaml is assumed to reach."""
    share = max(share for least, share in FACTS["shares"].items() if batch >= least)
    return float(FACTS["gpus"][gpu][precision]) * 1e12 * float(share)


def measured_rates(path: Path) -> list[dict[str, Any]]:
    """Rows of the training steps that benchmarks/gpu.py measured, without those that no stage takes (CUDA graphs)."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        rows = [row for row in found["training"] if row["plain"] and float(row["images_per_second"]) > 0]
        if found["thin"] or not rows:
            raise ValueError("of a thin network, or without a rate")
        return [{**row, "device": str(found["device"]), "batch": int(row["batch"])} for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: expected gpu.json of benchmarks/gpu.py on a GPU ({error})") from None


def measured_rate(rows: Sequence[Mapping[str, Any]], precision: str, batch: int, path: Path) -> float:
    """Images a second of the reference network: the fastest plain step of this precision, at the next smaller batch."""
    own = [row for row in rows if row["precision"] == precision]
    if not own:
        raise UserError(f"{path}: has no training step in {precision}")
    batches = sorted({row["batch"] for row in own})
    near = max((found for found in batches if found <= batch), default=batches[0])
    return max(float(row["images_per_second"]) for row in own if row["batch"] == near)


def gpu_hours(works: Iterable[Work], gpu: str) -> float:
    """Hours of all trainings and evaluations on one GPU of cost.yaml, at the rate assumed of it."""
    return sum(sum(work.hours(rate_of(gpu, work.precision, work.batch))) for work in works)


def read(profile: str) -> tuple[Params, Profile, str]:
    """params.yaml and a profile; UserError where that one trains on no GPU."""
    params = profiles.read_params()
    found, where = profiles.read_profile(profile)
    if not found.device.startswith("cuda"):
        raise UserError(f"{where}: device is {found.device}, expected cuda: this command counts the cost on GPUs")
    return params, found, where


def add_gpu(line: ArgumentParser) -> None:
    """Add `--gpu NAME` to a command line that tells hours."""

    def known(name: str) -> str:
        if name not in FACTS["gpus"]:
            raise ArgumentTypeError(name + expected_one_of(name, sorted(FACTS["gpus"]), "refinenet cost --help"))
        return name

    line.add_argument(
        "--gpu", default="h100", type=known, metavar="NAME", help="whose hours are counted; default: h100"
    )


def works(params: Params, profile: Profile, where: str, names: Collection[str] | None = None) -> list[Work]:
    """All trainings of params.yaml, or those in `names`, but none on a user's own folders; pretrainings first."""
    rows: dict[str, Training] = {**params.pretrainings, **params.experiments}
    rows |= {name: params.experiments[again.of] for name, again in params.seeds.items()}
    found: list[Work] = []
    for name, training in rows.items():
        if names is not None and name not in names:
            continue
        if training.data in params.own:
            continue  # nobody has said how large its images are
        made = resolve.training_settings(name, training, params, profile, where)
        recipe, early = Recipe(**made["recipe"]), name in params.pretrainings
        if early and not made["phases"]:
            continue  # it passes its start on
        side = round(recipe.crop * recipe.input_scale)
        network = json.dumps(made["network"], sort_keys=True)
        classes = len(datasets.load(training.data).CLASSES)
        adds, parameters, step = counted(network, classes, side, recipe.batch_size)
        pixels, crf = (0.0, 0.0) if early else tested(name, profile, training, recipe, where)
        found.append(
            Work(
                name=name,
                side=side,
                multiply_adds=adds,
                crops=0 if name in profile.models else recipe.steps * recipe.batch_size,
                testing=adds / side**2 * pixels,
                crf=crf,
                memory=2 * FLOAT * parameters + step,  # weights and momentum
                parameters=parameters,
                batch=recipe.batch_size,
                precision="bfloat16" if recipe.precision == "auto" else recipe.precision,  # these GPUs all have it
                after=training.start if training.start in {work.name for work in found} else None,
            )
        )
    return found


def tested(name: str, profile: Profile, training: Training, recipe: Recipe, where: str) -> tuple[float, float]:
    """Pixels that go through the network in the evaluation, over all protocols and scales; seconds of the CRF.

    The CRF is computed beside the network, in as many processes as the profile has threads.
    """
    settings = resolve.evaluation_settings(name, training, profile)
    edges = settings.get("short_edge")
    height, width = datasets.load(training.data).TYPICAL_SIZE
    factor = Resizing(recipe.input_scale, tuple(edges) if edges else None).factor(height, width)
    views, crfs = 0.0, 0
    for given in settings["protocols"].values():
        protocol = Protocol(**given)
        views += sum(scale**2 for scale in protocol.scales) * (1 + protocol.flip)
        crfs += protocol.crf
    count = datasets.load(training.data).COUNTS[resolve.evaluated_split(name, training, profile, where)]
    threads = resolve.machine_settings(training.data, profile)["threads"]
    return count * height * width * factor**2 * views, count * crfs * FACTS["crf"] / threads


def schedule(hours: Mapping[str, float], after: Mapping[str, str | None], gpus: int) -> list[Slot]:
    """Which work runs when on which of `gpus` GPUs: whoever is free takes, of what can begin, what holds up most.

    Longest first, where a work's length is its own and that of the longest chain that waits for it. `after`: work ->
    what it has to wait for.
    """
    if gpus < 1:
        raise UserError(f"--gpus is {gpus}, expected 1 or more")

    def length(name: str) -> float:
        return hours[name] + max((length(other) for other, first in after.items() if first == name), default=0.0)

    order = sorted(hours, key=lambda name: (-length(name), name))
    free, ended, slots = [0.0] * gpus, dict[str, float](), list[Slot]()
    while order:
        # Of all that can come next, what begins first; of those the first in order.
        gpu = free.index(min(free))
        begins = {name: max(free[gpu], _ready(after[name], ended)) for name in order}
        name = min(order, key=lambda name: begins[name])
        free[gpu] = ended[name] = begins[name] + hours[name]
        slots.append(Slot(name, gpu, begins[name], free[gpu]))
        order.remove(name)
    return slots


def _ready(first: str | None, ended: Mapping[str, float]) -> float:
    return 0.0 if first is None else ended.get(first, float("inf"))


def archives(profile: Profile) -> tuple[float, list[str]]:
    """Bytes of all archives, each counted once, and those whose size nobody publishes."""
    sizes: dict[str, float] = {}
    unknown = []
    for sources in profile.sources.values():
        for file, source in sources.items() if not isinstance(sources, str) else ():
            size = source.size or FACTS["archives"].get(file)
            if size is None:
                unknown.append(file)
            else:
                sizes[source.url] = float(size)
    return sum(sizes.values()), unknown


def prepared(names: Iterable[str]) -> float:
    """Bytes of the prepared splits of data sets: three of a pixel and one of its label, which some test images lack."""
    total = 0.0
    for data in names:
        height, width = datasets.load(data).TYPICAL_SIZE
        for split, count in datasets.load(data).COUNTS.items():
            labelled = split != "test" or datasets.evaluated(data) == "test"
            total += count * height * width * (4 if labelled else 3)
    return total


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table in Markdown, all columns but the first aligned to the right."""
    align = [":--", *("--:" for _ in head[1:])]
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, align, *rows))


def tell(name: str, gpu: str, rate: float | None, gpus: int | None, measured: Path | None = None) -> str:
    """The tables of the profile `name`, as Markdown.

    Args:
        name: of the profile.
        gpu: whose assumed rate is taken where none was measured.
        rate: images/s measured.
        gpus: how many, for a time table; None: what 1 to 16 would take.
        measured: gpu.json of benchmarks/gpu.py, whose rates are taken by precision and batch size.
    """
    params, profile, where = read(name)
    found = works(params, profile, where)
    adds, _, _ = counted(*REFERENCE)
    reached = {
        work.name: rate * PASSES * OPERATIONS * adds if rate else rate_of(gpu, work.precision, work.batch)
        for work in found
    }
    steps = measured_rates(measured) if measured else []
    for work in found if measured else ():
        assert measured is not None
        images = measured_rate(steps, work.precision, work.batch, measured)
        reached[work.name] = images * PASSES * OPERATIONS * adds
    hours = {work.name: work.hours(reached[work.name]) for work in found}
    rows = [
        [
            f"`{work.name}`",
            f"{work.side}",
            f"{work.multiply_adds / 1e9:.0f}",
            f"{work.crops:,}",
            f"{hours[work.name][0]:.1f}",
            f"{hours[work.name][1]:.2f}" if work.testing else "",
            f"{work.memory / 1e9:.1f}",
        ]
        for work in found
    ]
    both = {name: sum(pair) for name, pair in hours.items()}
    total = sum(both.values())
    trained, evaluated = (sum(pair[column] for pair in hours.values()) for column in (0, 1))
    rows.append(["all", "", "", f"{sum(w.crops for w in found):,}", f"{trained:.1f}", f"{evaluated:.2f}", ""])
    if measured:
        kinds = sorted({(reached[w.name], w.precision, w.batch) for w in found})
        told = " and ".join(
            f"{done / (PASSES * OPERATIONS * adds):.1f} images/s in {kind} at a batch of {batch}"
            for done, kind, batch in kinds
        )
        basis = f"Measured on {steps[0]['device']}: {told} for RefineNet-101 at 480 x 480; the others by multiply-adds."
    elif rate:
        basis = f"Measured: {rate:g} images/s for RefineNet-101 at 480 x 480; the others by their multiply-adds."
    else:
        about = FACTS["gpus"][gpu]
        peaks = sorted({(reached[w.name], w.precision) for w in found})
        shares = " and ".join(f"{100 * done / about[kind] / 1e12:.0f} % of its {kind} peak" for done, kind in peaks)
        rates = " and ".join(f"{done / (PASSES * OPERATIONS * adds):.0f}" for done, _ in peaks)
        basis = (
            f"**Assumed, not measured**: an NVIDIA {about['title']} at {shares}, which would be {rates} images/s for "
            "RefineNet-101 at 480 x 480."
        )
    head = ("training", "side", "GMAC a crop", "crops", "GPU hours, training", "evaluation", "GPU memory, GB")
    after = {work.name: work.after for work in found}
    parts = [f"Profile `{name}`. {basis}", table(head, rows)]
    if gpus is not None:
        slots = sorted(schedule(both, after, gpus), key=lambda slot: (slot.gpu, slot.begin))
        begun = [[str(s.gpu), f"`{s.name}`", f"{s.begin:.1f}", f"{s.end:.1f}"] for s in slots]
        parts.append(table(("GPU", "training", "from hour", "to hour"), begun))
    counts = (1, 2, 4, 8, 16) if gpus is None else (gpus,)
    divided = []
    for count in counts:
        wall = max(slot.end for slot in schedule(both, after, count))
        divided.append([str(count), f"{wall:.1f}", f"{wall / 24:.1f}", f"{100 * total / wall / count:.0f} %"])
    parts.append(table(("GPUs", "hours", "days", "busy"), divided))
    parts.append(table(("disk", "GB"), disk(params, profile, found, max(counts))))
    return "\n\n".join(parts)


def disk(params: Params, profile: Profile, found: Sequence[Work], gpus: int) -> list[list[str]]:
    """Rows of what the profile keeps on disk; checkpoints are those of `gpus` trainings at once."""
    known, unknown = archives(profile)
    models = sum(work.parameters for work in found) * (FLOAT if profile.dtype == "float32" else FLOAT / 2)
    one = 2 * FLOAT * max(work.parameters for work in found)  # weights and momentum
    splits = prepared(params.datasets)
    missing = f"; without {', '.join(f'`{file}`' for file in unknown)}, whose size nobody publishes" if unknown else ""
    rows = [
        (f"archives, each once{missing}", known),
        ("prepared data", splits),
        ("trained weights", models),
        (f"checkpoints of {gpus} trainings at once, {KEPT} each", gpus * KEPT * one),
        ("DVC's cache, where the file system has no reflinks and links are not allowed", splits + models),
    ]
    return [[what, f"{size / 1e9:.1f}"] for what, size in rows]


def rewrite(path: Path, text: str) -> str:
    """The page `path` with `text` between its marks; UserError where it has none."""
    before, start, rest = path.read_text(encoding="utf-8").partition(START)
    _, end, behind = rest.partition(END)
    if not start or not end:
        raise UserError(f"{path}: expected the lines {START.strip()} and {END.strip()}")
    return before + START + text + END + behind


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = command_parser("cost", __doc__)
    parser.add_argument("--profile", default="paper", help="a file of profiles/ without .yaml (default: paper)")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--gpu", choices=sorted(FACTS["gpus"]), default="h100", help="default: h100")
    which.add_argument("--rate", type=float, help="images/s that benchmarks/train.py measured for RefineNet-101")
    which.add_argument("--measured", type=Path, help="gpu.json that benchmarks/gpu.py wrote on a GPU")
    parser.add_argument("--gpus", type=int, help="tell which training runs when on so many")
    parser.add_argument("--page", type=user_path, help="write it between the marks of this file instead")
    given = parser.parse_args(arguments)
    if given.rate is not None and given.rate <= 0:
        raise UserError(f"--rate is {given.rate:g}, expected images a second, above 0")
    text = tell(given.profile, given.gpu, given.rate, given.gpus, given.measured)
    if given.page is None:
        print(text)
        return
    made = rewrite(given.page, text)
    with atomic_file(given.page) as part:
        part.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_cli(main))
