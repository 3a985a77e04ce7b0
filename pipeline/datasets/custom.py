"""A user's own data set, from the archive into which pipeline/fetch/own_folders.py packs its folders.

Masks are PNGs of 8 bits a channel: grey or palette, whose values are the classes, or in colours, which are looked up
exactly. Images are read as people see them, upright and on white, since that is what a mask is drawn on.

Without lists an image is in val if the hash of seed and name says so: the same on every machine, and no image changes
sides because others are added or removed.
"""

from __future__ import annotations

import hashlib
import io
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from pipeline import datasets
from pipeline.config.schema import check_folder
from pipeline.formats import decode, label_images
from refinenet.data import IGNORE_INDEX
from refinenet.data.split import RGB, Array
from refinenet.errors import UserError

if TYPE_CHECKING:
    from pipeline.config.schema import Folder

_NONE = 254  # in a table of classes: none; classes end at 253
_PNG = b"\x89PNG\r\n\x1a\n"
_GREY, _COLOUR, _PALETTE = 0, 2, 3  # what PNG calls its kinds; 4 is added for an alpha channel


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


class Reader(datasets.Reader):
    """Reads `raw`/<name>.zip. Where an error names a file, it is the user's own and not the archive's copy."""

    def __init__(self, raw: Path, name: str, about: Folder) -> None:
        super().__init__(raw)
        self.name, self.about = name, about
        self._archive = self.archive(f"{name}.zip")
        decode.check_classes(self._text("classes"), about.classes, self._archive.where("classes.txt"))
        self._images = {
            Path(member).with_suffix("").as_posix().partition("/")[2]: member
            for member in self._archive
            if member.startswith("images/")
        }
        lists = {part: self._text(part) for part in ("train", "val") if f"{part}.txt" in self._archive}
        if not lists:
            lists["train"], lists["val"] = split(self._images, about.val_share, about.seed)
        for part, other in (("train", "val"), ("val", "train")):
            if part not in lists:
                lists[part] = sorted(self._images.keys() - set(lists[other]))
                if not lists[part]:
                    raise UserError(f"{about.val or about.train}: lists all images, expected some left for {part}")
        self._lists = lists

    def names(self, split: str) -> list[str]:
        return list(self._lists[split])

    def where(self, split: str, name: str) -> str:
        return f"{self.about.masks}/{name}.png"

    def read(self, split: str, name: str) -> tuple[Array, Array | None]:
        where = self.where(split, name)
        member = self._images[name]
        image = _photo(self._archive.read(member), f"{self.about.images}/{member.partition('/')[2]}")
        label = self._label(self._archive.read(f"masks/{name}.png"), where)
        if label.shape != image.shape[:2]:
            (height, width), (rows, columns) = image.shape[:2], label.shape
            raise UserError(f"{where}: {columns} x {rows} pixels, expected {width} x {height} as its image has upright")
        return image, label

    def _text(self, member: str) -> list[str]:
        return decode.text(*self._archive.read_named(f"{member}.txt"))

    @cached_property
    def _table(self) -> Array:
        """The class of each value of a mask: of an index, or of a colour as red * 65536 + green * 256 + blue."""
        about = self.about
        table = np.full(256 if about.colours is None else 1 << 24, _NONE, np.uint8)
        if about.colours is None:
            table[: len(about.classes)] = np.arange(len(about.classes))
            keys = [] if about.void is None else [about.void]
        else:
            table[[_key(colour) for colour in about.colours]] = np.arange(len(about.classes))
            keys = [_key(about.void)] if isinstance(about.void, tuple) else []
        table[keys] = IGNORE_INDEX
        return table

    def _label(self, data: bytes, where: str) -> Array:
        """A mask as H x W uint8 classes, 255 = void."""
        depth, kind = _header(data, where)
        if depth > 8:
            raise UserError(f"{where}: {depth} bits a channel, expected 8")
        if kind >= 4:
            raise UserError(f"{where}: has an alpha channel, expected none")
        if self.about.colours is None:
            if kind == _COLOUR:
                raise UserError(f"{where}: an RGB picture, expected grey or palette values; for colours set `colours`")
            if kind == _GREY and depth < 8:  # whose values decoders spread over 0 to 255
                raise UserError(f"{where}: grey of {depth} bits a pixel, expected 8")
            values: Any = decode.index_png(data, where, modes=("L", "P"))
        else:
            rgb = decode.photo(data, where).astype(np.int32)
            values = rgb[..., 0] << 16 | rgb[..., 1] << 8 | rgb[..., 2]
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
        void = "" if about.void is None else f", or {about.void} for void"
        return f"value {value}, expected 0 to {len(about.classes) - 1}{void},"


def _key(colour: RGB) -> int:
    return colour[0] << 16 | colour[1] << 8 | colour[2]


def _header(data: bytes, where: str) -> tuple[int, int]:
    """Bits a channel and kind of a PNG. Pillow tells neither: it cuts 16-bit colours to 8 and spreads 4-bit grey."""
    if len(data) < 26 or not data.startswith(_PNG):
        raise UserError(f"{where}: no PNG")
    depth, kind = struct.unpack_from("BB", data, 24)
    return depth, kind


def _photo(data: bytes, where: str) -> Array:
    """An image as H x W x 3 uint8 RGB, as people see it."""
    from PIL import Image

    from pipeline.formats import photo

    pixels = decode.photo(data, where)
    with Image.open(io.BytesIO(data)) as picture:
        if photo.is_plain(picture):
            return pixels
        try:
            return photo.as_seen(picture)
        except ValueError as error:
            raise UserError(f"{where}: {error}") from None


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
