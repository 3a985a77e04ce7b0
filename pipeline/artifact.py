"""Pack a finished run, or a record, for reviewers and archives: one folder, and the same as a zip.

    README.md                  what is in it and how to check it
    results/ metrics/ curves/  tables, report, scores       settings.json, params.yaml, profiles/, *.lock
    ro-crate-metadata.json     every step, what it read and wrote (Workflow Run RO-Crate)
    models/<name>.md           a model card for each training    data/<name>/croissant.json   Croissant
    codemeta.json              the software                      SHA256SUMS                   `sha256sum -c SHA256SUMS`

Trained weights and prepared data are named by md5, sha256 and DVC's path; with --with-weights the weights are in it.
The same run gives the same bytes: no time but the day of its commit, no path of this machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import shutil
import sys
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.deposit import cards, codemeta, crate, croissant, finished
from pipeline.deposit.finished import Run
from pipeline.runtime.cli import command_parser, run_cli
from pipeline.tables.paper import caveat
from refinenet.atomic import atomic_file, atomic_folder
from refinenet.errors import UserError

FOLDER = Path("artifact")
SUMS = "SHA256SUMS"
LIBRARIES = ("rocrate", "mlcroissant", "huggingface_hub")
_OF_THE_PROJECT = ("LICENSE", "CITATION.cff")
_FIRST_TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can hold
_EXAMPLES = """\
examples:
  refinenet artifact                                               of the run in this folder
  refinenet artifact docs/records/2026-11-29-camvid-lite0 --to artifact-camvid
"""


def run(record: Path | None, to: Path, with_weights: bool) -> None:
    """Write the artifact to the folder `to` and to <to>.zip. Raises UserError where the run is not finished."""
    if missing := [name for name in LIBRARIES if importlib.util.find_spec(name) is None]:
        raise UserError(f"{missing[0]}: not installed, expected it by `make setup` or as refinenet-repro[artifact]")
    _check_target(to)
    found = finished.of_run(with_weights) if record is None else finished.of_record(record)
    with atomic_folder(to) as part:
        fill(found, part)
        pack(part, to.with_name(f"{to.name}.zip"), to.name)
    size = to.with_name(f"{to.name}.zip").stat().st_size
    print(f"{to}: {sum(1 for path in to.rglob('*') if path.is_file())} files; {to}.zip: {size / 1e6:.1f} MB")
    print(f"next: (cd {to} && sha256sum --quiet -c {SUMS}), then docs/how-to/artifact.md")


def _check_target(to: Path) -> None:
    inside = to.resolve().is_relative_to(Path.cwd())
    if inside and not to.resolve().relative_to(Path.cwd()).as_posix().startswith("artifact"):
        raise UserError(
            f"{to}: DVC would read its dvc.yaml as this project's, expected artifact* or a folder elsewhere"
        )
    if to.exists() and not (to / SUMS).is_file():
        raise UserError(f"{to}: is there already and no artifact, expected a new folder; --to names another one")


def fill(of: Run, folder: Path) -> None:
    """Write all files of the artifact into `folder`, SHA256SUMS last."""
    for path, source in of.copies.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, folder / path)
    for name in _OF_THE_PROJECT:
        shutil.copyfile(name, folder / name)
    (folder / codemeta.FILE).write_text(codemeta.text(), encoding="utf-8")
    for data in of.data:
        croissant.write(data, of, folder / data.folder)
    for trained in of.trained:
        cards.write(trained, of, folder)
    (folder / "README.md").write_text(page(of), encoding="utf-8", newline="\n")
    crate.write(of, folder)
    files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    text = "".join(f"{finished.sums(folder / path)[1]}  {path}\n" for path in files)
    (folder / SUMS).write_text(text, encoding="utf-8", newline="\n")


def pack(folder: Path, target: Path, top: str) -> None:
    """Zip `folder` as the folder `top`; names in order, no times."""
    with atomic_file(target) as part, zipfile.ZipFile(part, "w") as archive:
        for path in sorted(path for path in folder.rglob("*") if path.is_file()):
            entry = zipfile.ZipInfo(f"{top}/{path.relative_to(folder).as_posix()}", _FIRST_TIME)
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            entry.compress_type = zipfile.ZIP_STORED if path.suffix == ".safetensors" else zipfile.ZIP_DEFLATED
            with path.open("rb") as source, archive.open(entry, "w", force_zip64=True) as out:
                shutil.copyfileobj(source, out, 1 << 20)


def page(of: Run) -> str:
    """Return the artifact's README.md."""
    return "\n".join([f"# {of.title}", "", *_lines(of)]) + "\n"


def _lines(of: Run) -> Iterator[str]:
    if warning := caveat(of.profile, True, of.drawn):
        yield f"**{warning[0].upper()}{warning[1:]}.**\n"
    yield f"Of {of.date}, commit `{of.commit or 'not known'}`" + (
        f"; not in that commit: {', '.join(f'`{path}`' for path in of.changed)}." if of.changed else "."
    )
    yield "\nCheck that nothing is damaged: `sha256sum --quiet -c SHA256SUMS`."
    if of.is_record:
        yield "How to run it again is at the end of record/README.md.\n"
    else:
        yield "Run it again, in the project at that commit:\n"
        yield "    make repro\n    refinenet verify\n"
    yield "What shows which of the reviewers' points is in docs/how-to/artifact.md of the project.\n"
    yield "| here | what it is |\n| :-- | :-- |"
    yield "| ro-crate-metadata.json | each step, with what it read and wrote; ro-crate-preview.html shows it |"
    if of.is_record:
        yield "| record/ | the record: scores, curve, settings, versions |"
    else:
        yield "| results/, metrics/, curves/ | tables, report, scores, losses |"
        yield "| settings.json, params.yaml, profiles/ | every value that a result depends on |"
        yield "| dvc.lock, Snakefile, dvc.yaml | every step with the md5 of code, data and result; the graph |"
        yield "| requirements.lock, bootstrap.lock, crf.lock | the packages, with hashes |"
    yield "| models/\\*.md, weights/\\*.md | model cards |"
    yield "| data/\\*/croissant.json | the prepared data sets |"
    yield "| codemeta.json, CITATION.cff, LICENSE | the software |"
    large = [
        item
        for item in of.items.values()
        if not item.kept and item.path.partition("/")[0] in ("data", "models", "weights")
    ]
    if large:
        yield "\n## Named, not in here\n"
        yield ("The record names them." if of.is_record else "In the project `dvc pull` gets them.") + "\n"
        yield "| path | bytes | md5, as DVC computes it | sha256 |\n| :-- | --: | :-- | :-- |"
        for item in large:
            size = "" if item.size is None else f"{item.size:,}"
            yield f"| {item.path} | {size} | {item.md5} | {item.sha256} |"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    line = command_parser("artifact", __doc__, _EXAMPLES)
    line.add_argument(
        "record", nargs="?", type=Path, metavar="RECORD", help="a folder of docs/records; default: the run here"
    )
    line.add_argument("--to", type=Path, default=FOLDER, metavar="FOLDER", help=f"default: {FOLDER}")
    line.add_argument("--with-weights", action="store_true", help="the trained weights too, not only their checksums")
    given: argparse.Namespace = line.parse_args(arguments)
    return run_cli(lambda: run(given.record, given.to, given.with_weights))


if __name__ == "__main__":
    sys.exit(main())
