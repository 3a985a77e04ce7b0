"""Upload formats of the test servers of PASCAL VOC 2012 and Cityscapes: an archive with a label PNG for each image.

| server     | archive             | name of a PNG                                                      | values    |
|------------|---------------------|--------------------------------------------------------------------|-----------|
| VOC 2012   | .tgz, .tar.gz, .tar | results/VOC2012/Segmentation/<competition>_<split>_cls/<image>.png | 0 to 20   |
| Cityscapes | .zip                | <city>_<sequence>_<frame>*.png, in any folder                      | label ids |

VOC: "Submission of Results" on the challenge's page names the archives; names, palette and values are those of the
devkit (VOCinit.m, VOClabelcolormap.m), whose scorer stops at a value above 20. Cityscapes: cityscapesScripts'
evalPixelLevelSemanticLabeling.py, exactly one PNG an image, no train ids. No limit on an archive's size was found.
"""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

from pipeline import datasets
from pipeline.datasets import cityscapes, voc
from pipeline.formats import decode, label_images
from pipeline.formats.archive import Archive
from pipeline.formats.encode import write_tar, write_zip
from pipeline.runtime import progress
from refinenet.data.split import Array, Split
from refinenet.errors import UserError

# VOC's two: for comp5 only VOC's own training and validation data are allowed, so no ImageNet, SBD or COCO.
COMPETITIONS = {"comp5": "trained on VOC's own data only", "comp6": "trained on other data, too"}
COLOUR_MAP = bytes(channel for colour in label_images.colour_map(256) for channel in colour)

_COLOUR_TYPES = {"L": 0, "P": 3}  # as the PNG header has them


@dataclass(frozen=True)
class Server:
    """One test server.

    `suffixes`: of the archives it documents, the usual one first. `member`: a name in the archive, from `image`,
    `split` and `competition`; `pattern`: every name that it accepts. `values`: pixel value of each class; `void`: pixel
    value of no class, None where every pixel must have one. `size`: height and width of all official images.
    """

    data: str
    suffixes: tuple[str, ...]
    upload: str
    missing: str
    member: str
    pattern: str
    mode: Literal["L", "P"]
    values: tuple[int, ...]
    void: int | None = None
    size: tuple[int, int] | None = None

    @property
    def title(self) -> str:
        """Return the data set's title."""
        return datasets.load(self.data).TITLE

    def png(self, label: Array) -> bytes:
        """Encode H x W uint8 class indices (the number of classes: no class) as the PNG to upload."""
        table = np.array([*self.values, *([] if self.void is None else [self.void])], np.uint8)
        picture = Image.fromarray(table[label], self.mode)
        if self.mode == "P":
            picture.putpalette(COLOUR_MAP)
        file = io.BytesIO()
        picture.save(file, "png")
        return file.getvalue()

    def check_png(self, data: bytes, where: str, size: tuple[int, int]) -> None:
        """Raise UserError unless `data` is a whole PNG of height and width `size` that the server can score."""
        if len(data) < 26 or data[:8] != b"\x89PNG\r\n\x1a\n" or data[12:16] != b"IHDR":
            raise UserError(f"{where}: not a PNG")
        width, height, bits, kind = struct.unpack(">IIBB", data[16:26])
        # The header first: an image that claims to be huge is not decoded.
        if (height, width) != size:
            raise UserError(f"{where}: {width} x {height} pixels, expected {size[1]} x {size[0]} as its image")
        if (bits, kind) != (8, _COLOUR_TYPES[self.mode]):
            raise UserError(f"{where}: {bits}-bit PNG of colour type {kind}, expected 8-bit {self._kind}")
        label = decode.index_png(data, where, (self.mode,))
        allowed = {*self.values, *([] if self.void is None else [self.void])}
        if wrong := sorted(set(np.flatnonzero(np.bincount(label.ravel())).tolist()) - allowed):
            raise UserError(f"{where}: value {wrong[0]}, expected {self._described}")
        if self.mode == "P":
            palette = bytes(Image.open(io.BytesIO(data)).getpalette() or ())[: 3 * len(self.values)]
            if palette != COLOUR_MAP[: 3 * len(self.values)]:
                raise UserError(f"{where}: another palette, expected the colour map of VOC (VOClabelcolormap.m)")

    @property
    def _kind(self) -> str:
        return "with a palette (type 3)" if self.mode == "P" else "grey (type 0)"

    @property
    def _described(self) -> str:
        if self.values == tuple(range(len(self.values))):
            return f"0 to {self.values[-1]}"
        none = "" if self.void is None else f", or {self.void} for none"
        return f"the label ids (not train ids) {', '.join(map(str, self.values))}{none}"

    def contents(self, split: str, competition: str) -> str:
        """Describe the content of the archive for people."""
        name = self.member.format(image="<image>", split=split, competition=competition)
        kind = "palette PNGs, values 0 to 20" if self.mode == "P" else "grey PNGs of label ids"
        return f"{name}, {kind}"

    def write(self, path: Path, split: str, competition: str, files: Iterable[tuple[str, bytes]]) -> None:
        """Write an archive; the same files give the same bytes.

        Args:
            path: its suffix decides the format.
            split: of the images, part of the names.
            competition: VOC's, part of the names.
            files: (image, PNG) each, in the order of the archive.
        """
        members = ((self.member.format(image=i, split=split, competition=competition), data) for i, data in files)
        (write_zip if path.suffix == ".zip" else write_tar)(path, members)

    def check(self, path: Path, images: Split, split: str, partial: bool = False) -> int:
        """Check an archive and return its number of images.

        Args:
            path: the archive.
            images: the prepared split.
            split: its name on the server.
            partial: `images` need not be all of the official split.

        Raises:
            UserError: it is not one PNG for each image, of its size, with the server's mode, values and palette, and
                no other file.
        """
        sizes = self.sizes(images, split, partial)
        if not path.is_file():
            raise UserError(f"{path}: no such file")
        if not path.name.endswith((*self.suffixes, ".zip")):
            raise UserError(f"{path}: expected a name that ends in {', '.join(self.suffixes)}")
        with Archive(path) as archive:
            found: dict[str, str] = {}
            competitions = set()
            for member in archive:
                match = self._match(member, split)
                if match is None:
                    expected = self.member.format(image="<image>", split=split, competition="<competition>")
                    raise UserError(f"{archive.where(member)}: expected no file but {expected}")
                image = match["image"]
                if image not in sizes:
                    raise UserError(f"{archive.where(member)}: {images.path} has no image {image}")
                if image in found:
                    raise UserError(f"{archive.where(member)}: a second file for {image}, besides {found[image]}")
                found[image] = member
                competitions.add(match.groupdict().get("competition", ""))
            if missing := [image for image in sizes if image not in found]:
                raise UserError(f"{path}: {len(found)} of {len(sizes)} images, {missing[0]} is the first not there")
            if len(competitions) > 1:
                raise UserError(f"{path}: {' and '.join(sorted(competitions))}, expected one competition")
            for image, member in progress.bar(f"check {path.name}", "image", found.items()):
                self.check_png(*archive.read_named(member), sizes[image])
        return len(found)

    def sizes(self, images: Split, split: str, partial: bool) -> dict[str, tuple[int, int]]:
        """Return image -> (height, width) of the prepared split. Raises UserError where they are not the server's."""
        official = datasets.load(self.data).COUNTS[split]
        if len(images) != official and not partial:
            raise UserError(
                f"{images.path}: {len(images)} images, {split} of {self.title} has {official}; --partial for a trial"
            )
        sizes: dict[str, tuple[int, int]] = {}
        for sample in images:
            name, size = sample.name, (sample.image.shape[0], sample.image.shape[1])
            match = self._match(self.member.format(image=name, split=split, competition="comp6"), split)
            if match is None or match["image"] != name:
                raise UserError(f"{images.path}: image {name!r}, expected a name as {self.title} has them")
            if name in sizes:
                raise UserError(f"{images.path}: image {name} is there twice")
            if self.size and size != self.size and not partial:
                raise UserError(
                    f"{images.path}: {name} is {size[1]} x {size[0]}, expected {self.size[1]} x {self.size[0]}"
                )
            sizes[name] = size
        return sizes

    def _match(self, member: str, split: str) -> re.Match[str] | None:
        return re.fullmatch(self.pattern.format(split=split), member)


SERVERS = {
    "voc": Server(
        data="voc",
        suffixes=(".tgz", ".tar.gz", ".tar"),
        upload="http://host.robots.ox.ac.uk:8080/ (account; asks for 500 characters on the method)",
        missing="VOC2012test.tar (http://host.robots.ox.ac.uk:8080/, registration) was not in data/raw/voc",
        member="results/VOC2012/Segmentation/{competition}_{split}_cls/{image}.png",
        pattern=r"results/VOC2012/Segmentation/(?P<competition>comp[56])_{split}_cls/(?P<image>\w+)\.png",
        mode="P",
        values=tuple(range(len(voc.CLASSES))),
    ),
    "cityscapes": Server(
        data="cityscapes",
        suffixes=(".zip",),
        upload="https://www.cityscapes-dataset.com/submit/ (account)",
        missing="leftImg8bit_trainvaltest.zip has them (https://www.cityscapes-dataset.com, account)",
        member="{image}_labelIds.png",
        pattern=r"(?:.*/)?(?P<image>[^/_]+_\d+_\d+)(?:[^/\d][^/]*)?\.png",
        mode="L",
        values=cityscapes.LABEL_IDS,
        void=0,  # "unlabeled": a false negative there as in refinenet/metrics.py
        size=(1024, 2048),
    ),
}
