"""Pack a user's own data set: folders and lists -> data/raw/<name>/<name>.zip, used like an official archive.

    classes.txt               the class list, one name a line
    train.txt, val.txt        image names, one a line; only those that the profile names
    images/<name>.<suffix>    .jpg, .jpeg or .png
    masks/<name>.png

A name is the path below the folder without its suffix, "field/0001": the folder structure is part of the name.
The same files give the same bytes, whatever their times and the order in which the disk lists them.

The folders are outside the graph, so neither engine sees a change in them. `outdated` does: by names and sizes, and by
content where a file's time has changed since it was packed.
"""

from __future__ import annotations

import json
import os
import shutil
import unicodedata
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.formats import decode
from pipeline.runtime import progress
from refinenet.atomic import atomic_file, atomic_folder
from refinenet.errors import UserError

if TYPE_CHECKING:
    from pipeline.config.schema import Folder

IMAGES, MASKS = (".jpg", ".jpeg", ".png"), (".png",)
CHUNK = 1 << 20
_TIME = (1980, 1, 1, 0, 0, 0)  # of every member: the earliest that a zip can store


def place(text: str) -> Path:
    """Expand `~` and `${NAME}` in a path of the profile. Raises UserError where a variable is not set."""
    path = os.path.expandvars(text)
    if "$" in path:
        raise UserError(f"{text}: an environment variable in it is not set")
    return Path(path).expanduser()


def _below(top: Path, suffixes: tuple[str, ...], without: Path) -> tuple[dict[str, Path], dict[str, Path]]:
    """Return the files below `top` by name: those with one of the suffixes, and those of other kinds.

    Hidden files and the folder `without`, which may be inside, are ignored; linked folders are followed.
    """
    if not top.is_dir():
        raise UserError(f"{top}: no such folder")
    found: dict[str, Path] = {}
    others: dict[str, Path] = {}
    entered = {top.resolve(), without.resolve()}
    for root, folders, files in os.walk(top, onerror=_raise, followlinks=True):
        inside = {name: Path(root, name).resolve() for name in sorted(folders) if not name.startswith(".")}
        folders[:] = [name for name, path in inside.items() if path not in entered]
        entered.update(inside.values())
        for path in (Path(root, name) for name in sorted(files) if not name.startswith(".")):
            name = _name(path.relative_to(top))
            if path.suffix.lower() not in suffixes:
                others[name] = path
            elif name in found:
                raise UserError(f"{path}: {found[name]} has the same name, expected one image {name} and one mask")
            else:
                found[name] = path
    if not found:
        raise UserError(f"{top}: no {' or '.join(suffixes)} in it")
    return found, others


def _raise(error: OSError) -> None:
    raise error  # os.walk ignores a folder that it cannot read


def _name(path: Path) -> str:
    # NFC, as most systems and lists have names: macOS separates letters and accents.
    name = unicodedata.normalize("NFC", path.with_suffix("").as_posix())
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
        raise UserError(f"{str(path)!r}: expected a name in UTF-8 and without control characters")
    return name


def _listed(text: str, images: Mapping[str, Path], top: Path) -> list[str]:
    """Return the names in a list, in which suffixes are optional. Raises UserError for a missing or repeated image."""
    file = place(text)
    try:
        lines = decode.text(file.read_bytes(), str(file))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}), expected a list of images") from None
    names: dict[str, None] = {}
    for line in lines:
        name = unicodedata.normalize("NFC", line)
        if name not in images and name.lower().endswith(IMAGES):
            name = name.rpartition(".")[0]
        if name not in images:
            raise UserError(f"{file}: {line!r} is no image in {top}")
        if name in names:
            raise UserError(f"{file}: {line!r} is there twice")
        names[name] = None
    if not names:
        raise UserError(f"{file}: an empty list, expected one image name a line")
    return list(names)


def contents(about: Folder) -> dict[str, bytes | Path]:
    """Return member of the archive -> its text or the file to copy, in the archive's order.

    With both lists only the images in them are packed, with their masks. With one list, the other images are the other
    split. Raises UserError where images, masks and lists do not match.
    """
    tops = {"images": place(about.images), "masks": place(about.masks)}
    if tops["images"].resolve() == tops["masks"].resolve():
        raise UserError(f"{about.images}: holds images and masks, expected a folder for each")
    images, strange = _below(tops["images"], IMAGES, tops["masks"])
    masks, strange_masks = _below(tops["masks"], MASKS, tops["images"])
    given = {split: text for split, text in (("train", about.train), ("val", about.val)) if text is not None}
    lists = {split: _listed(text, images, tops["images"]) for split, text in given.items()}
    if len(lists) == 2 and (both := sorted(set(lists["train"]) & set(lists["val"]))):
        raise UserError(f"{about.val}: {both[0]!r} is in {about.train}, too, expected no image in both lists")
    packed_names = sorted({name for names in lists.values() for name in names} if len(lists) == 2 else images)
    for image in packed_names:
        if image not in masks:
            there = f" (there is {strange_masks[image]})" if image in strange_masks else ""
            raise UserError(f"{images[image]}: no mask {tops['masks'] / image}.png{there}")
    for mask in sorted(masks.keys() - images.keys()) if len(lists) < 2 else ():
        there = f" (there is {strange[mask]})" if mask in strange else ""
        raise UserError(f"{masks[mask]}: no image {tops['images'] / mask}.jpg, .jpeg or .png{there}")
    packed: dict[str, bytes | Path] = {"classes.txt": _lines(about.classes)}
    packed |= {f"{split}.txt": _lines(names) for split, names in lists.items()}
    packed |= {f"images/{name}{images[name].suffix.lower()}": images[name] for name in packed_names}
    return packed | {f"masks/{name}.png": masks[name] for name in packed_names}


def _lines(names: tuple[str, ...] | list[str]) -> bytes:
    return "".join(f"{name}\n" for name in names).encode()


def _archive(name: str, raw: Path) -> Path:
    return raw / f"{name}.zip"


def _times(raw: Path) -> Path:
    """Return the file with file times, next to the archive: another copy of the same data has other times."""
    return raw.with_name(f"{raw.name}.times.json")


def pack(name: str, about: Folder, raw: Path) -> None:
    """Update `raw`/<name>.zip where the folders have changed. Raises UserError for what the user can fix."""
    archive = _archive(name, raw)
    if archive.is_file() and not _here(about):
        print(f"{name}: {about.images} is not on this machine, using {archive}")
        return
    packed = contents(about)
    if not _differs(packed, raw, archive):
        print(f"{name}: no change in {about.images} and {about.masks}")
        return
    files = {member: path for member, path in packed.items() if isinstance(path, Path)}
    stats = {member: path.stat() for member, path in files.items()}
    size = sum(stat.st_size for stat in stats.values())
    raw.parent.mkdir(parents=True, exist_ok=True)
    if size > (free := shutil.disk_usage(raw.parent).free):
        raise UserError(f"{raw.parent}: {free} bytes free, {size} needed for {name}")
    with (
        atomic_folder(raw) as part,
        progress.bar(f"pack {name}", "B", total=size, unit_scale=True, unit_divisor=1024) as bar,
        zipfile.ZipFile(_archive(name, part), "w") as target,
    ):
        for member, content in packed.items():
            # Stored: photographs and PNGs are compressed already, and zlib's output depends on its version.
            info = zipfile.ZipInfo(member, _TIME)
            info.create_system, info.external_attr = 3, 0o644 << 16
            if isinstance(content, bytes):
                target.writestr(info, content)
                continue
            info.file_size = stats[member].st_size
            try:
                with content.open("rb") as source, target.open(info, "w") as sink:
                    while chunk := source.read(CHUNK):
                        sink.write(chunk)
                        bar.update(len(chunk))
            except PermissionError:
                raise UserError(f"{content}: not readable") from None
    _remember({member: [stat.st_size, stat.st_mtime_ns] for member, stat in stats.items()}, raw)
    print(f"{name}: {len(files) // 2} images packed")


def outdated(name: str, about: Folder, raw: Path) -> bool:
    """Return whether `pack` would write another archive, or raise an error about the folders."""
    archive = _archive(name, raw)
    try:
        if archive.is_file() and not _here(about):
            return False
        return _differs(contents(about), raw, archive)
    except (UserError, OSError):
        return True


def _here(about: Folder) -> bool:
    """Return whether the user's folders are on this machine: `dvc pull` brings the archive only."""
    try:
        return place(about.images).exists()
    except UserError:
        return False


def _differs(packed: Mapping[str, bytes | Path], raw: Path, archive: Path) -> bool:
    try:
        with zipfile.ZipFile(archive) as old:
            members = {info.filename: info for info in old.infolist()}
            if list(members) != list(packed):
                return True
            if any(old.read(member) != text for member, text in packed.items() if isinstance(text, bytes)):
                return True
    except (OSError, zipfile.BadZipFile):
        return True
    try:
        times = json.loads(_times(raw).read_text())
    except (OSError, ValueError):
        times = {}
    seen = {}
    for member, path in packed.items():
        if isinstance(path, Path):
            stat = path.stat()
            seen[member] = [stat.st_size, stat.st_mtime_ns]
            info = members[member]
            if stat.st_size != info.file_size or (times.get(member) != seen[member] and _crc(path) != info.CRC):
                return True
    if seen != times:
        _remember(seen, raw)
    return False


def _crc(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc


def _remember(seen: Mapping[str, list[int]], raw: Path) -> None:
    with atomic_file(_times(raw)) as part:
        part.write_text(json.dumps(seen))
