"""Write the archive that the test server of VOC or Cityscapes takes (the paper's tables 4 and 5), checked first.

Beside the archive a .json notes which model, data and settings made it. Finished predictions are kept until the archive
is written, so that a run that was interrupted goes on where it was. What the server answers, `record` notes in
metrics/servers/, from where the tables take it.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from pipeline import datasets
from pipeline.config import resolve
from pipeline.runtime import git, progress
from pipeline.runtime.cli import add_to, command_parser, run_cli, user_path
from pipeline.runtime.dvc_md5 import dvc_md5
from pipeline.runtime.machine import cores
from pipeline.tables import server_records
from pipeline.tables.paper import published
from pipeline.test_servers import answers
from pipeline.test_servers.formats import COMPETITIONS, SERVERS, Server
from refinenet.atomic import atomic_file, sync
from refinenet.config import Protocol
from refinenet.data.split import Sample, Split
from refinenet.errors import UserError

if TYPE_CHECKING:
    from refinenet.inference.predictor import Predictor

_EXAMPLES = """\
examples:
  refinenet submit voc                                   submissions/voc-res152.tgz, the paper's best on VOC
  refinenet submit cityscapes --to submissions/first.zip
  refinenet submit voc --partial                         a trial with what is prepared, not for upload
  refinenet submit check submissions/first.zip --data cityscapes
  refinenet submit record voc --experiment voc-res152 --file scores.json --link http://host.robots.ox.ac.uk:8080/...
  refinenet submit record cityscapes --mean-iou 73.6 --link https://www.cityscapes-dataset.com/...
"""


def default_experiment(data: str) -> str:
    """Of the experiments in the paper's table of `data`, the one whose printed mean (the last column) is highest."""
    rows = [row for row in published()[data].rows if row.sources]
    return max(rows, key=lambda row: float(row.values[-1])).sources[-1].experiment


def open_split(server: Server, split: str) -> Split:
    """The prepared images; UserError says how to get them."""
    path = Path("data") / server.data / f"{split}.arrow"
    if split == "test" and not path.is_file():
        raise UserError(
            f"{path}: no test images are prepared: {server.missing}; then `python -m pipeline.prepare {server.data}`"
        )
    return Split(path)


def target(server: Server, options: argparse.Namespace, experiment: str) -> tuple[Path, str]:
    """The archive to write, and its name without the suffix."""
    known = (*server.suffixes, ".zip")
    usual = f"{experiment}{'' if options.split == 'test' else f'-{options.split}'}{server.suffixes[0]}"
    path: Path = options.to or Path("submissions") / usual
    suffix = next((known for known in known if path.name.endswith(known) and path.name != known), None)
    if suffix is None:
        raise UserError(f"{path}: expected a name that ends in {', '.join(dict.fromkeys(known))}")
    stem = path.name.removesuffix(suffix)
    if options.partial and not stem.endswith(".partial"):
        stem += ".partial"
    return path.with_name(stem + suffix), stem


def run(server: Server, options: argparse.Namespace) -> None:
    """Predict, pack, check, write. UserError for whatever the server would refuse."""
    experiment: str = options.experiment or default_experiment(server.data)
    cfg = resolve.load("evaluate", experiment)
    if cfg.data != server.data:
        raise UserError(f"--experiment {experiment}: trained on {cfg.data}, expected an experiment on {server.data}")
    if options.protocol not in cfg.protocols:
        raise UserError(f"--protocol {options.protocol}: {experiment} has {', '.join(cfg.protocols)}")
    protocol = cfg.protocols[options.protocol]
    path, stem = target(server, options, experiment)
    images = open_split(server, options.split)
    sizes = server.sizes(images, options.split, options.partial)

    from refinenet.device import repeatable_device
    from refinenet.inference.predictor import Predictor

    model = Predictor(
        Path("models") / f"{experiment}.safetensors",
        repeatable_device(cfg.device, cfg.seed, cfg.threads),
        void=server.void is not None,
        **cfg.predictor_settings(),
    )
    model.expect_classes(images.schema.classes, cfg.data)
    if (size := images.path.stat().st_size) > 1e9:
        print(f"{images.path}: taking the md5 of {size / 1e9:.1f} GB", file=sys.stderr)

    kept = path.with_name(f".{stem}.parts")
    kept.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(kept / "lock", timeout=0):
            # All that decides a prediction, down to its last bit: the order of sums is that of the threads.
            key: dict[str, Any] = {
                "model": {"file": model.path.as_posix(), "md5": dvc_md5(model.path)},
                "data": {"file": images.path.as_posix(), "md5": dvc_md5(images.path)},
                "protocol": {"name": options.protocol, **asdict(protocol)},
                **{k: getattr(cfg, k) for k in ("input_scale", "short_edge", "average", "device", "threads")},
            }
            predict(server, model, {"it": protocol}, images, kept, key)
            built = kept / f"whole{path.name.removeprefix(stem)}"
            files = ((image, (kept / f"{image}.png").read_bytes()) for image in sizes)
            server.write(built, options.split, options.competition, files)
            server.check(built, images, options.split, options.partial)
            notes = {
                "archive": {"file": path.name, "md5": dvc_md5(built), "images": len(sizes), "partial": options.partial},
                "server": {"data": server.data, "split": options.split, "competition": options.competition},
                "experiment": experiment,
                "profile": cfg.profile,
                "commit": _commit(),
                **key,
            }
            beside = path.with_name(f"{stem}.json")
            beside.unlink(missing_ok=True)  # at no moment the notes of another archive
            built.replace(path)
            sync(path.parent)
            with atomic_file(beside) as part:
                part.write_text(json.dumps(notes, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
            shutil.rmtree(kept)
    except Timeout:
        raise UserError(f"{path}: another process is writing it") from None
    print(_line(server, path, len(sizes), options))


def predict(
    server: Server,
    model: Predictor,
    protocol: Mapping[str, Protocol],
    images: Split,
    kept: Path,
    key: Mapping[str, Any],
) -> None:
    """Make `kept`/<image>.png for each image that has none of this very `key` yet."""
    note, text = kept / "key.json", json.dumps(key, indent=1)
    if not note.is_file() or note.read_text(encoding="utf-8") != text:
        for left in kept.iterdir():
            if left.name != "lock":
                left.unlink()
        with atomic_file(note) as part:
            part.write_text(text, encoding="utf-8")
    from refinenet.inference.crf_processes import CRFProcesses

    todo = [index for index, sample in enumerate(images) if not _finished(server, kept, sample)]
    pixels = ([images[index].image] for index in todo)
    with (
        progress.bar(f"submit {model.path.stem}", "image", total=len(images), initial=len(images) - len(todo)) as bar,
        CRFProcesses(cores()) as crf,
    ):
        for index, (labels,) in zip(todo, model.stream(pixels, protocol, crf), strict=True):
            (label,) = labels.values()
            with atomic_file(kept / f"{images[index].name}.png") as part:
                part.write_bytes(server.png(label.cpu().numpy()))
            bar.update()


def _finished(server: Server, kept: Path, sample: Sample) -> bool:
    file = kept / f"{sample.name}.png"
    try:
        server.check_png(file.read_bytes(), str(file), sample.image.shape[:2])
    except (FileNotFoundError, UserError):
        return False
    return True


def _commit() -> str | None:
    """The checked-out commit, with "-dirty" where tracked files differ from it."""
    try:
        return git.ask("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*").decode().strip()
    except UserError:
        return None


def _line(server: Server, path: Path, count: int, options: argparse.Namespace) -> str:
    size = path.stat().st_size
    size_text = f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.1f} kB"
    text = f"{path}: {count} images, {size_text}: {server.contents(options.split, options.competition)}"
    if options.partial or options.split != "test":
        return f"{text}; not for upload"
    if not path.name.endswith(server.suffixes):
        text += f"; the server's page names {', '.join(server.suffixes)} only"
    competition = f", as {options.competition} ({COMPETITIONS[options.competition]})" if server.data == "voc" else ""
    return f"{text}; upload it{competition} at {server.upload}"


def check(options: argparse.Namespace) -> None:
    """Check the archive `options.file`; UserError for the first thing that is wrong."""
    server = SERVERS[options.data]
    count = server.check(options.file, open_split(server, options.split), options.split, options.partial)
    print(f"{options.file}: {count} images, as the server of {server.title} takes them")


def _notes(file: Path, server: Server, experiment: str) -> dict[str, Any]:
    """What `run` noted beside the archive; UserError unless that was one for the server, of this experiment."""
    try:
        notes: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        seen = notes["server"]["data"], notes["server"]["split"], notes["experiment"], notes["protocol"]["name"]
        partial, _ = notes["archive"]["partial"], (notes["archive"]["md5"], notes["model"]["md5"], notes["commit"])
    except FileNotFoundError:
        raise UserError(
            f"{file}: no such file; `submit {server.data} --experiment {experiment}` writes it beside the archive "
            "(--submission names another)"
        ) from None
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: not the notes beside an archive ({type(error).__name__}: {error})") from None
    wanted = server.data, "test", experiment, server_records.protocol(server.data, experiment)
    for what, found, expected in zip(("data", "split", "experiment", "protocol"), seen, wanted, strict=True):
        if found != expected:
            raise UserError(f"{file}: {what} {found}, expected {expected}")
    if partial:
        raise UserError(f"{file}: of a trial (--partial), expected an archive of all test images")
    return notes


def record(options: argparse.Namespace) -> None:
    """Note what a server answered; UserError where it cannot be of this archive or does not add up."""
    server = SERVERS[options.data]
    experiment: str = options.experiment or default_experiment(server.data)
    server_records.protocol(server.data, experiment)
    notes = _notes(options.submission or Path("submissions") / f"{experiment}.json", server, experiment)
    if not re.fullmatch(r"https?://\S+\.\S+", options.link):
        raise UserError(f"--link {options.link}: expected the address of the result, http:// or https://")
    classes = datasets.load(server.data).CLASSES
    if options.file and (options.mean_iou or options.iou):
        raise UserError(f"--file {options.file}: expected numbers in a file or on the command line, not both")
    if options.file:
        answer = answers.read(options.file, classes)
    else:
        answer = answers.typed(options.mean_iou, options.iou, classes)
    file = server_records.write(notes, answer, options.link)
    print(f"{file}: mean IoU {answer.mean_iou} of {notes['archive']['file']}; `dvc repro table-{server.data}` shows it")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = command_parser("submit", __doc__, _EXAMPLES)
    commands = parser.add_subparsers(dest="command", required=True, metavar="voc | cityscapes | check | record")
    lines = {name: commands.add_parser(name, help=f"for the server of {one.title}") for name, one in SERVERS.items()}
    for name, line in lines.items():
        add = line.add_argument
        add("--experiment", metavar="NAME", help=f"whose model; default: {default_experiment(name)}")
        add("--protocol", default="multi", metavar="NAME", help="of the experiment's settings; default: multi")
        usual = f"submissions/<experiment>{SERVERS[name].suffixes[0]}"
        add_to(line, "FILE", f"default: {usual}")
        line.set_defaults(competition=None)
    usage = "; ".join(f"{name}: {meaning}" for name, meaning in COMPETITIONS.items())
    lines["voc"].add_argument("--competition", choices=COMPETITIONS, default="comp6", help=f"{usage}; default: comp6")
    lines["check"] = commands.add_parser("check", help="check an archive")
    lines["check"].add_argument("file", type=user_path, metavar="FILE")
    lines["check"].add_argument("--data", choices=SERVERS, required=True, help="whose server it is for")
    for line in lines.values():
        line.add_argument("--split", choices=("test", "val"), default="test", help="default: test")
        line.add_argument("--partial", action="store_true", help="a trial with what is prepared, never for upload")
    add = commands.add_parser("record", help="note what a server answered, for the tables").add_argument
    add("data", choices=SERVERS, help="whose server it was")
    add("--experiment", metavar="NAME", help="whose model; default: as for its archive")
    add("--link", required=True, metavar="URL", help="where the server shows the result")
    add("--file", type=user_path, metavar="FILE", help=f"its numbers as JSON: {answers.EXPECTED}; - is stdin")
    add("--mean-iou", metavar="PERCENT", help="without a file: the mean over the classes, as the server prints it")
    add("--iou", nargs="+", action="extend", default=[], metavar="CLASS=PERCENT", help="and that of each class")
    add(
        "--submission",
        type=user_path,
        metavar="FILE",
        help="the .json beside the archive; default: submissions/<experiment>",
    )
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; its exit code."""
    options = parser().parse_args(arguments)
    if options.command == "check":
        return run_cli(lambda: check(options))
    if options.command == "record":
        return run_cli(lambda: record(options))
    return run_cli(lambda: run(SERVERS[options.command], options))


if __name__ == "__main__":
    sys.exit(main())
