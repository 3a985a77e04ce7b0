"""Where images and masks lie: two folders, or a folder in one of the usual layouts; and how their names differ."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import product

from pipeline.config.schema import SPLIT
from pipeline.fetch import own_folders
from refinenet.errors import UserError

IMAGE_FOLDERS = ("images", "image", "imgs", "img", "photos", "rgb", "JPEGImages", "img_dir")
MASK_FOLDERS = (
    *("masks", "mask", "labels", "label", "annotations", "annotation", "annots", "annot", "gt"),
    *("SegmentationClass", "ann_dir"),
)
SPLITS = (("train", "val"), ("train", "valid"), ("train", "validation"), ("training", "validation"), ("train", "test"))
_LISTS = "ImageSets/Segmentation"  # of VOC
_LIKE = "images/ and masks/, train/images/ ..., train/ and trainannot/ ..., or JPEGImages/ and SegmentationClass/"


@dataclass(frozen=True)
class Layout:
    """What a profile says of the folders (see `pipeline.config.schema.Folder`)."""

    images: str
    masks: str
    train: str | None = None
    val: str | None = None
    split_folders: tuple[str, str] = ("train", "val")


def usual(text: str) -> Layout:
    """Return the layout of the data set in the folder `text`. Raises UserError for one of no usual layout."""
    top = own_folders.place(text)
    if not top.is_dir():
        raise UserError(f"{text}: no such folder")

    def there(*parts: str) -> bool:
        return all((top / part).is_dir() for part in parts)

    for splits in SPLITS:
        between = [(f"{SPLIT}/{one}", f"{SPLIT}/{other}") for one, other in product(IMAGE_FOLDERS, MASK_FOLDERS)]
        between += [(f"{one}/{SPLIT}", f"{other}/{SPLIT}") for one, other in product(IMAGE_FOLDERS, MASK_FOLDERS)]
        between += [(SPLIT, f"{SPLIT}{gap}{other}") for gap, other in product(("", "_", "-"), MASK_FOLDERS)]
        for images, masks in between:
            if there(*(one.replace(SPLIT, split) for one in (images, masks) for split in splits)):
                return Layout(f"{text}/{images}", f"{text}/{masks}", split_folders=splits)
    for images, masks in product(IMAGE_FOLDERS, MASK_FOLDERS):
        if there(images, masks):
            train, val = (f"{text}/{_LISTS}/{split}.txt" for split in ("train", "val"))
            if all(own_folders.place(one).is_file() for one in (train, val)):
                return Layout(f"{text}/{images}", f"{text}/{masks}", train, val)
            return Layout(f"{text}/{images}", f"{text}/{masks}")
    found = ", ".join(sorted(f"{path.name}/" for path in top.iterdir() if path.is_dir())[:8]) or "no folder"
    raise UserError(f"{text}: {found}; expected {_LIKE}; or name the folders: --images DIR --masks DIR")


def suffixes(layout: Layout) -> tuple[str, str]:
    """Return image_suffix and mask_suffix, by which most names of images and masks become the same.

    Raises UserError where no image has a mask by any suffix.
    """
    images, masks = _names(layout)
    of_masks = own_folders.common_suffix(images, masks)
    of_images = own_folders.common_suffix(masks, images)
    candidates = [("", ""), ("", of_masks or ""), (of_images or "", "")]
    # Both have one: what follows the beginning that an image shares with the mask most like it.
    for image in sorted(images)[:3]:
        for mask in sorted(masks, key=lambda mask: (-_same(image, mask), len(mask), mask))[:8]:
            same = _same(image, mask)
            # "a_left" and "a_label" differ from their "_" on.
            word = max((at for at in range(same) if not image[at].isalnum()), default=0)
            candidates += [(image[at:], mask[at:]) for at in (same, word) if at]

    def pairs(candidate: tuple[str, str]) -> int:
        bare = [
            {name.removesuffix(suffix) for name in names if name.endswith(suffix)}
            for names, suffix in zip((images, masks), candidate, strict=True)
        ]
        return sum(bool(name) and not name.endswith("/") for name in bare[0] & bare[1])

    # The same names first; then what says "label" (Cityscapes has colours and instances beside them), then whole words,
    # then the shorter.
    def rank(one: tuple[str, str]) -> tuple[int, bool, bool, int]:
        words = all(not suffix[:1].isalnum() for suffix in one)
        return pairs(one), "label" in one[1].lower(), words, -len(one[0] + one[1])

    best = max(candidates, key=rank)
    if 2 * pairs(best) < min(len(images), len(masks)):
        best = ("", "")  # who has few pairs is told of each name that has none
    if not pairs(best):
        examples = " and ".join(min(names) for names in (images, masks))
        raise UserError(f"{layout.images} and {layout.masks}: no image has a mask of its name, as {examples}")
    return best


def _same(one: str, other: str) -> int:
    """How many letters the two have in common from the beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def _names(layout: Layout) -> tuple[set[str], set[str]]:
    """The names of all images and of all masks, their folder of a split in front."""
    images: set[str] = set()
    masks: set[str] = set()
    for split in layout.split_folders if SPLIT in layout.images else ("",):
        tops = [own_folders.place(one.replace(SPLIT, split)) for one in (layout.images, layout.masks)]
        part = f"{split}/" if split else ""
        images |= {f"{part}{name}" for name in own_folders.below(tops[0], own_folders.IMAGES, "", tops[1]).found}
        masks |= {f"{part}{name}" for name in own_folders.below(tops[1], own_folders.MASKS, "", tops[0]).found}
    return images, masks


@dataclass(frozen=True)
class Groups:
    """Recordings as names suggest them. `setting`: what `group` would be; `sizes`: images of each."""

    setting: int | str
    sizes: dict[str, int]


BEFORE_NUMBER = r"^(.*?)[_-]?\d+$"  # of a frame: what stands in front of its number
_FRAMES = 5  # images of a group on average, from which names look like frames


def groups(names: Iterable[str]) -> Groups | None:
    """Return how images group by their folders or, if those do not, by what stands in front of a number in the name.

    None where there are less than two groups, or fewer than _FRAMES images in one on average.
    """
    names = list(names)
    folders = Counter(name.rpartition("/")[0].partition("/")[0] for name in names)
    if len(folders) > 1 and len(names) >= _FRAMES * len(folders):
        return Groups(1, dict(folders))
    found = [re.match(BEFORE_NUMBER, name) for name in names]
    prefixes = Counter(one[1] for one in found if one is not None)
    if len(prefixes) > 1 and all(found) and len(names) >= _FRAMES * len(prefixes):
        return Groups(BEFORE_NUMBER, dict(prefixes))
    return None
