"""A user's own data set, from the archive into which pipeline/fetch/own_folders.py packs its folders.

Masks have values, grey or palette, which are the classes, or colours, which are looked up exactly. Images are read as
people see them, upright and on white, since that is what a mask is drawn on.

Without lists an image is in val if the hash of seed and name says so: the same on every machine, and no image changes
sides because others are added or removed. Images of one `group` go to one side.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pipeline import datasets
from pipeline.config.schema import check_folder
from pipeline.datasets import near_duplicates
from pipeline.formats import decode, label_images, user_pictures
from refinenet.data import IGNORE_INDEX
from refinenet.data.split import RGB, Array
from refinenet.errors import UserError, several

if TYPE_CHECKING:
    from pipeline.config.schema import Folder

_NONE = 254  # in a table of classes: none; classes end at 253


def split(names: Iterable[str], share: float, seed: int) -> tuple[list[str], list[str]]:
    """(train, val), sorted: a name is in val if the hash of seed and name, as a fraction, is below `share`.

    So val has about that share. A split that would be empty gets the one image whose hash is nearest; it is the only
    one that can change sides when others come. UserError for fewer than two images.
    """
    drawn = sorted((int.from_bytes(hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8]), name) for name in names)
    if len(drawn) < 2:
        raise UserError(f"{len(drawn)} images, expected 2 or more to draw train and val from")
    below = sum(fraction < share * 2**64 for fraction, _ in drawn)
    cut = min(max(below, 1), len(drawn) - 1)
    return sorted(name for _, name in drawn[cut:]), sorted(name for _, name in drawn[:cut])


def split_groups(
    names: Iterable[str], share: float, seed: int, group_of: Callable[[str], str | None]
) -> tuple[list[str], list[str]]:
    """(train, val), sorted, with all images of a group in one of them.

    In the order of the hash of seed and group, a group is val's where that brings the number of val's images nearer to
    `share` of all. Raises UserError for images without a group, and for fewer than two groups.
    """
    groups: dict[str, list[str]] = {}
    without = []
    for name in sorted(names):
        if (group := group_of(name)) is None:
            without.append(f"{name}: no group")
        else:
            groups.setdefault(group, []).append(name)
    if without:
        raise several(f"the regular expression of `group` is not in {len(without)} names", without)
    if len(groups) < 2:
        raise UserError(f"{len(groups)} group ({', '.join(map(repr, groups))}), expected 2 or more for train and val")
    wanted = share * sum(map(len, groups.values()))
    order = sorted(groups, key=lambda group: hashlib.sha256(f"{seed}\0{group}".encode()).digest())
    chosen: set[str] = set()
    taken = 0
    for group in order:
        size = len(groups[group])
        if abs(taken + size - wanted) < abs(taken - wanted) and len(chosen) < len(groups) - 1:
            chosen.add(group)
            taken += size
    # A share that every group exceeds more than none falls short of it.
    chosen = chosen or {min(order, key=lambda group: len(groups[group]))}
    val = {name for group in chosen for name in groups[group]}
    return sorted(name for images in groups.values() for name in images if name not in val), sorted(val)


def split_lists(
    name: str, about: Folder, images: Iterable[str], given: Mapping[str, list[str]]
) -> dict[str, list[str]]:
    """Return the images of train and val: of the lists that are `given`, what they leave, or drawn without lists."""
    lists = dict(given)
    if not lists and about.group is None:
        lists["train"], lists["val"] = split(images, about.val_share, about.seed)
    elif not lists:
        try:
            lists["train"], lists["val"] = split_groups(images, about.val_share, about.seed, about.group_of)
        except UserError as error:
            raise UserError(f"own.{name}: group is {about.group!r}: {error}") from None
    for part, other in (("train", "val"), ("val", "train")):
        if part not in lists:
            lists[part] = sorted(set(images) - set(lists[other]))
            if not lists[part]:
                raise UserError(f"{about.val or about.train}: lists all images, expected some left for {part}")
    return lists


class Reader(datasets.Reader):
    """Reads `raw`/<name>.zip. Where an error names a file, it is the user's own and not the archive's copy."""

    def __init__(self, raw: Path, name: str, about: Folder) -> None:
        super().__init__(raw)
        self.name, self.about = name, about
        self._archive = self.archive(f"{name}.zip")
        decode.check_classes(self._text("classes"), about.classes, self._archive.where("classes.txt"))
        self._images, self._masks = (
            {
                Path(member).with_suffix("").as_posix().partition("/")[2]: member
                for member in self._archive
                if member.startswith(folder)
            }
            for folder in ("images/", "masks/")
        )
        lists = {part: self._text(part) for part in ("train", "val") if f"{part}.txt" in self._archive}
        self._lists = split_lists(name, about, self._images, lists)

    def names(self, split: str) -> list[str]:
        return list(self._lists[split])

    def where(self, split: str, name: str) -> str:
        return self.about.file("masks", name, Path(self._masks[name]).suffix)

    def read(self, split: str, name: str) -> tuple[Array, Array | None]:
        where, member = self.where(split, name), self._images[name]
        of_image = self.about.file("images", name, Path(member).suffix)
        image = user_pictures.photo(self._archive.read(member), of_image)
        label = self._label(self._archive.read(self._masks[name]), where)
        if label.shape != image.shape[:2]:
            (height, width), (rows, columns) = image.shape[:2], label.shape
            raise UserError(f"{where}: {columns} x {rows} pixels, expected {width} x {height} as its image has upright")
        return image, label

    def fingerprint(self, image: Array) -> bytes:
        return near_duplicates.fingerprint(image)

    def _text(self, member: str) -> list[str]:
        return decode.text(*self._archive.read_named(f"{member}.txt"))

    @cached_property
    def _table(self) -> Array:
        """The class of each value of a mask: of an index, or of a colour as red * 65536 + green * 256 + blue."""
        about = self.about
        table = np.full(256 if about.colours is None else 1 << 24, _NONE, np.uint8)
        if about.colours is None:
            table[list(about.class_values())] = np.arange(len(about.classes))
            keys = [] if (void := about.void_value()) is None else [void]
        else:
            table[[_key(colour) for colour in about.colours]] = np.arange(len(about.classes))
            keys = [_key(about.void)] if isinstance(about.void, tuple) else []
        table[keys] = IGNORE_INDEX
        return table

    def _label(self, data: bytes, where: str) -> Array:
        """A mask as H x W uint8 classes, 255 = void."""
        mask = user_pictures.mask(data, where)
        if self.about.colours is not None:
            rgb = mask.colours().astype(np.int32)
            values: Any = rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
        elif mask.values is None:
            raise UserError(f"{where}: an RGB picture, expected grey or palette values; for colours set `colours`")
        else:
            values = mask.values
            if mask.bits == 1 and 1 not in self.about.class_values() and mask.palette is None:
                values = values * np.uint8(255)  # white, where the others have it as 255
        label: Array = self._table[values]
        wrong = label == _NONE
        if wrong.any():
            row, column = np.unravel_index(int(wrong.argmax()), wrong.shape)
            odd = self._odd(int(values[row, column]))
            raise UserError(f"{where}: {odd} at row {row}, column {column} ({int(wrong.sum())} such pixels)")
        return label

    def _odd(self, value: int) -> str:
        """What is wrong with a value that has no class."""
        about = self.about
        if about.colours is not None:
            return f"no class has the colour [{value >> 16}, {value >> 8 & 255}, {value & 255}]"
        void = "" if (of_void := about.void_value()) is None else f", or {of_void} for void"
        last = len(about.classes) - 1
        expected = f"0 to {last}" if about.values is None else ", ".join(map(str, about.values))
        return f"value {value}, expected {expected}{void},"


def _key(colour: RGB) -> int:
    return colour[0] << 16 | colour[1] << 8 | colour[2]


def checks(
    about: Folder, train: Sequence[tuple[str, bytes]], val: Sequence[tuple[str, bytes]], void: bool
) -> tuple[dict[str, Any], list[str]]:
    """What speaks against a split, for the page, and as warnings: recordings and near-duplicates on both sides.

    train, val: the images' names and fingerprints. void: whether a class is missing where pixels are void.
    """
    near = near_duplicates.pairs(train, val)
    found: dict[str, Any] = {"near_duplicates": near_duplicates.report(near, len(val)), "groups": None}
    warnings = []
    if near:
        examples = ", ".join(f"{pair.val} and {pair.train}" for pair in near[:3])
        advice = (
            "keep recordings together with `group`"
            if about.group is None
            else "they are in groups of their own; is `group` what a recording is?"
        )
        warnings.append(
            f"{len(near)} of {len(val)} val images ({len(near) / len(val):.0%}) look nearly like one of train "
            f"({examples}), so the scores will flatter; {advice} (docs/how-to/own-data.md)"
        )
    if about.group is not None:
        groups = [{about.group_of(name) for name, _ in part} - {None} for part in (train, val)]
        both = sorted(group for group in groups[0] & groups[1] if group is not None)
        found["groups"] = {"train": len(groups[0]), "val": len(groups[1]), "both": both}
        if both:
            more = ", ..." if len(both) > 3 else ""
            warnings.append(
                f"the lists have images of {len(both)} groups in train and val: {', '.join(both[:3])}{more}"
            )
    if void and about.values is None and about.colours is None and about.void_value() == IGNORE_INDEX:
        warnings.append("255 counts as void; where it is a class, as in masks of 0 and 255, set `values: [0, 255]`")
    return found, warnings


@dataclass
class Own:
    """`pipeline.datasets.Dataset` of a user's own data."""

    TITLE: str
    CLASSES: tuple[str, ...]
    PALETTE: tuple[RGB, ...]
    Reader: Callable[[Path], datasets.Reader]
    COUNTS: Mapping[str, int] = field(default_factory=dict)


def dataset(name: str, about: Folder) -> datasets.Dataset:
    """The data set `name` as the profile says; UserError where that contradicts itself."""
    check_folder(name, about)
    palette = about.colours or label_images.colour_map(len(about.classes))
    made = Own(about.title or name, about.classes, palette, partial(Reader, name=name, about=about))
    return cast(datasets.Dataset, made)
