"""Pack a user's own data set: folders and lists -> data/raw/<name>/<name>.zip, used like an official archive.

    classes.txt               the class list, one name a line
    train.txt, val.txt        image names, one a line; only those that the profile names
    images/<name>.<ending>    .jpg, .jpeg, .png, .tif, .tiff, .bmp or .webp
    masks/<name>.<ending>     .png, .tif, .tiff, .bmp, .gif or .webp

A name is the path below the folder without its ending, "field/0001": the folder structure is part of the name.
The same files give the same bytes, whatever their times and the order in which the disk lists them.

The folders are outside the graph, so neither engine sees a change in them. `outdated` does: by names and sizes, and by
content where a file's time has changed since it was packed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import stat
import unicodedata
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.formats import decode
from pipeline.runtime import progress
from refinenet.atomic import atomic_file, atomic_folder
from refinenet.errors import UserError, several

if TYPE_CHECKING:
    from pipeline.config.schema import Folder

IMAGES = (".jpg", ".jpeg", ".png", ".tif", ".tiff", ".bmp", ".webp")
MASKS = (".png", ".tif", ".tiff", ".bmp", ".gif", ".webp")
LOSSY = ": JPEG changes values, expected a mask without loss"
_OR = f"{', '.join(IMAGES[:-1])} or {IMAGES[-1]}"
CHUNK = 1 << 20
_TIME = (1980, 1, 1, 0, 0, 0)  # of every member: the earliest that a zip can store


def place(text: str) -> Path:
    """Expand `~` and `${NAME}` in a path of the profile. Raises UserError where a variable is not set."""
    path = os.path.expandvars(text)
    if "$" in path:
        raise UserError(f"{text}: an environment variable in it is not set")
    return Path(path).expanduser()


@dataclass
class Files:
    """What lies below a folder: `found` by name, `others`, of other kinds, by name; `problems` in lines.

    A name is the path below `top` without the file's ending and without `suffix`, which follows the name: "_mask".
    """

    top: Path
    suffix: str
    found: dict[str, Path] = field(default_factory=dict)
    others: dict[str, Path] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    def expected(self, name: str, endings: Sequence[str]) -> str:
        """Return where the file of `name` would lie, and a file of another kind that lies there."""
        other = self.others.get(name) or self.others.get(f"{name}{self.suffix}")
        because = LOSSY if _is_lossy(other) and endings == MASKS else ""
        there = f" (there is {other}{because})" if other is not None else ""
        return f"{self.top / name}{self.suffix}{endings[0]}{there}"


def _is_lossy(path: Path | None) -> bool:
    return path is not None and path.suffix.lower() in (".jpg", ".jpeg")


def below(top: Path, endings: Sequence[str], suffix: str, without: Path) -> Files:
    """Return the files below `top`: those with one of the endings and the suffix, and those of other kinds.

    Hidden files and the folder `without`, which may be inside, are ignored; linked folders are followed.

    Raises:
        UserError: no such folder, or nothing of the kind in it.
    """
    if not top.is_dir():
        raise UserError(f"{top}: no such folder")
    files = Files(top, suffix)
    entered = {top.resolve(), without.resolve()}
    for root, folders, names in os.walk(top, onerror=_raise, followlinks=True):
        inside = {name: Path(root, name).resolve() for name in sorted(folders) if not name.startswith(".")}
        folders[:] = [name for name, path in inside.items() if path not in entered]
        entered.update(inside.values())
        for path in (Path(root, name) for name in sorted(names) if not name.startswith(".")):
            try:
                name = _name(path.relative_to(top))
            except UserError as error:
                files.problems.append(str(error))
                continue
            if path.suffix.lower() not in endings or not name.endswith(suffix):
                files.others[name] = path
                continue
            name = name.removesuffix(suffix)
            if name in files.found:
                there = files.found[name]
                files.problems.append(f"{path}: {there} has the same name, expected one image {name} and one mask")
            else:
                files.found[name] = path
    if not files.found and not files.problems:
        ending = f"{suffix}{f' or {suffix}'.join(endings)}" if suffix else " or ".join(endings)
        raise UserError(f"{top}: no {ending} in it{_and_others(files, endings)}")
    return files


def _and_others(files: Files, endings: Sequence[str]) -> str:
    if not files.others:
        return ""
    other = next(iter(files.others.values()))
    return f", but {other}" + (LOSSY if _is_lossy(other) and endings == MASKS else "")


def _raise(error: OSError) -> None:
    raise error  # os.walk ignores a folder that it cannot read


def _name(path: Path) -> str:
    # NFC, as most systems and lists have names: macOS separates letters and accents.
    name = unicodedata.normalize("NFC", path.with_suffix("").as_posix())
    if any(unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") for letter in name):
        raise UserError(f"{str(path)!r}: expected a name in UTF-8 and without control characters")
    return name


def unusable(path: Path) -> str | None:
    """Return, as one line, why a file that was listed cannot be read; None where nothing is in the way."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        fetch = "; of git-annex or DataLad: `git annex get` it" if path.is_symlink() else ""
        return f"{path}: a link to nothing{fetch}" if path.is_symlink() else f"{path}: gone since the folder was listed"
    except OSError as error:
        return f"{path}: {error.strerror}"
    if not stat.S_ISREG(mode):
        return f"{path}: no file"
    return None if os.access(path, os.R_OK) else f"{path}: not readable"


def common_suffix(images: Iterable[str], masks: Iterable[str]) -> str | None:
    """Return what most masks' names have after an image's name ("_mask"); None where no mask has more than its image.

    Of several images whose names a mask's name begins with, the longest counts.
    """
    known = set(images)
    seen: Counter[str] = Counter()
    for mask in masks:
        folder = mask.rfind("/") + 1
        longest = next((end for end in range(len(mask), folder, -1) if mask[:end] in known), None)
        if longest is not None:
            seen[mask[longest:]] += 1
    suffix, _ = max(seen.items(), key=lambda item: (item[1], item[0]), default=("", 0))
    return suffix or None


def _keys(files: Files) -> dict[str, str]:
    """Return all that a list may call an image, without its folder -> name: with and without ending and suffix."""
    keys = {name: name for name in files.found}
    for name, path in files.found.items():
        whole = unicodedata.normalize("NFC", path.relative_to(files.top).as_posix())
        keys.setdefault(whole, name)
        keys.setdefault(f"{name}{files.suffix}", name)
    return keys


def _called(entry: str, keys: Mapping[str, str], top: Path, endings: Sequence[str]) -> str | None:
    """Return the name that a list's entry is of, None where it is of none. The entry may be a path: see `_listed`."""
    entry = unicodedata.normalize("NFC", entry)
    while entry.startswith("./"):
        entry = entry[2:]
    parts = entry.split("/")
    # What stands in front of the folder's own name; of an absolute path, which may be another machine's, anything.
    before = None if entry.startswith("/") else _called_itself(top)
    starts = [at for at in range(1, len(parts)) if before is None or parts[at - 1] in before]
    tails = [entry, *("/".join(parts[at:]) for at in starts)]
    for tail in tails:
        if tail in keys:
            return keys[tail]
        if tail.lower().endswith(tuple(endings)) and (bare := tail.rpartition(".")[0]) in keys:
            return keys[bare]
    return None


def _called_itself(top: Path) -> set[str]:
    return {unicodedata.normalize("NFC", one.name) for one in (top, top.absolute(), top.resolve())}


def _listed(text: str, images: Files, masks: Files) -> list[str]:
    """Return the names in a list: of images, or of images and their masks in two columns.

    Endings are optional; an entry may be a path that leads through the folder of the images, or an absolute one of
    another machine, whose end is a name.

    Raises:
        UserError: images that are missing or repeated, masks that are another image's.
    """
    file = place(text)
    try:
        lines = decode.text(file.read_bytes(), str(file))
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}), expected a list of images") from None
    keys, of_masks = _keys(images), _keys(masks)
    names: dict[str, None] = {}
    problems = []
    for line in lines:
        name = _called(line, keys, images.top, IMAGES)
        gaps = list(re.finditer(r"\s*[,;]\s*|\s+", line)) if name is None else []
        for gap in gaps:
            name = _called(line[: gap.start()], keys, images.top, IMAGES)
            if name is not None:
                mask = line[gap.end() :]
                if (of := _called(mask, of_masks, masks.top, MASKS)) != name:
                    because = f"is the mask of {of}" if of is not None else f"is no mask in {masks.top}"
                    problems.append(f"{file}: {line!r}: {mask} {because}, expected that of {name}")
                break
        if name is None:
            problems.append(f"{file}: {line!r} is no image in {images.top}")
        elif name in names:
            problems.append(f"{file}: {line!r} is there twice")
        else:
            names[name] = None
    if problems:
        raise several(f"{file}: {len(problems)} lines are wrong", problems)
    if not names:
        raise UserError(f"{file}: an empty list, expected one image name a line")
    return list(names)


def contents(about: Folder) -> dict[str, bytes | Path]:
    """Return member of the archive -> its text or the file to copy, in the archive's order.

    With both lists only the images in them are packed, with their masks. With one list, the other images are the other
    split. Raises UserError where images, masks and lists do not match, for all of them at once.
    """
    lists: dict[str, list[str]] = {}
    images: dict[str, Path] = {}
    masks: dict[str, Path] = {}
    problems = []
    for part, folders in about.parts().items():
        tops = [place(folder) for folder in folders]
        if tops[0].resolve() == tops[1].resolve():
            raise UserError(f"{folders[0]}: holds images and masks, expected a folder for each")
        of_images = below(tops[0], IMAGES, about.image_suffix, tops[1])
        of_masks = below(tops[1], MASKS, about.mask_suffix, tops[0])
        for split, text in (("train", about.train), ("val", about.val)):
            if text is not None:
                lists[split] = _listed(text, of_images, of_masks)
        both = len(lists) == 2 and not part
        names = sorted({name for names in lists.values() for name in names} if both else of_images.found)
        problems += _problems(names, of_images, of_masks, all_masks=not both)
        if part:
            lists[part.rstrip("/")] = [f"{part}{name}" for name in names]
        images |= {f"{part}{name}": of_images.found[name] for name in names}
        masks |= {f"{part}{name}": of_masks.found[name] for name in names if name in of_masks.found}
    if len(lists) == 2 and (both_have := sorted(set(lists["train"]) & set(lists["val"]))):
        raise UserError(f"{about.val}: {both_have[0]!r} is in {about.train}, too, expected no image in both lists")
    if problems:
        raise several(f"{about.images} and {about.masks}: {len(problems)} files do not fit", problems)
    packed: dict[str, bytes | Path] = {"classes.txt": _lines(about.classes)}
    packed |= {f"{split}.txt": _lines(names) for split, names in lists.items()}
    for kind, files in (("images", images), ("masks", masks)):
        packed |= {f"{kind}/{name}{files[name].suffix.lower()}": files[name] for name in sorted(files)}
    return packed


def _problems(names: Sequence[str], images: Files, masks: Files, all_masks: bool) -> list[str]:
    """Return what is wrong unless each of `names` has an image and a mask that can be read, and each mask its image."""
    lonely = [name for name in names if name not in masks.found]
    odd = sorted(masks.found.keys() - images.found.keys()) if all_masks else []
    ending = common_suffix(images.found, odd) if lonely else None
    if ending is not None and 2 * sum(f"{name}{ending}" in masks.found for name in lonely) > len(lonely):
        # The mask of "a" is called "a_mask": one key of the profile and not one line for each file.
        suffix = f"{ending}{masks.suffix}"
        return [f"{masks.top}: names end in {suffix}, those of images do not; set `mask_suffix: {suffix}`"]
    problems = [*images.problems, *masks.problems]
    problems += [f"{images.found[name]}: no mask {masks.expected(name, MASKS)}" for name in lonely]
    problems += [f"{masks.found[name]}: no image {images.expected(name, (_OR,))}" for name in odd]
    for files in (images, masks):
        reasons = (unusable(files.found[name]) for name in names if name in files.found)
        problems += [reason for reason in reasons if reason is not None]
    return problems


def _lines(names: tuple[str, ...] | list[str]) -> bytes:
    return "".join(f"{name}\n" for name in names).encode()


def _archive(name: str, raw: Path) -> Path:
    return raw / f"{name}.zip"


def _times(raw: Path) -> Path:
    """Return the file with file times, next to the archive: another copy of the same data has other times."""
    return raw.with_name(f"{raw.name}.times.json")


def check_place(name: str, about: Folder) -> None:
    """Raise UserError where a stage would replace files of the user's: those of the data set, or others of its name."""
    for folder, ours in ((Path("data", name), ("*.arrow", "checks.json")), (Path("data/raw", name), (f"{name}.zip",))):
        texts = [*(text for pair in about.parts().values() for text in pair), about.train, about.val]
        given = {text: place(text).resolve() for text in texts if text}
        for text, path in given.items():
            if path.is_relative_to(folder.absolute()):
                raise UserError(f"own.{name}: {text} lies in {folder}, which stages replace; expected another place")
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            if not path.name.startswith(".") and not any(path.match(pattern) for pattern in ours):
                raise UserError(
                    f"{path}: no stage has written it, and {folder} is replaced; move it, or rename own.{name}"
                )


def pack(name: str, about: Folder, raw: Path) -> None:
    """Update `raw`/<name>.zip where the folders have changed. Raises UserError for what the user can fix."""
    archive = _archive(name, raw)
    if archive.is_file() and not _here(about):
        print(f"{name}: {about.images} is not on this machine, using {archive}")
        return
    check_place(name, about)
    try:
        _pack(name, about, raw, contents(about))
    except FileNotFoundError as error:
        raise UserError(f"{error.filename}: gone since the folder was listed") from None


def _pack(name: str, about: Folder, raw: Path, packed: Mapping[str, bytes | Path]) -> None:
    if not _differs(packed, raw, _archive(name, raw)):
        print(f"{name}: no change in {about.images} and {about.masks}")
        return
    files = {member: path for member, path in packed.items() if isinstance(path, Path)}
    stats = {member: path.stat() for member, path in files.items()}
    size = sum(found.st_size for found in stats.values())
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
    _remember({member: [found.st_size, found.st_mtime_ns] for member, found in stats.items()}, raw)
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
        return all(place(images).exists() for images, _ in about.parts().values())
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
            now = path.stat()
            seen[member] = [now.st_size, now.st_mtime_ns]
            info = members[member]
            if now.st_size != info.file_size or (times.get(member) != seen[member] and _crc(path) != info.CRC):
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
