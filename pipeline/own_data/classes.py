"""Which values of the masks are classes, which is void, and what the classes are called."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.formats.label_images import colour_map
from pipeline.own_data.survey import Survey, colour, key
from refinenet.data import IGNORE_INDEX
from refinenet.data.split import RGB
from refinenet.errors import UserError

VOID_COLOUR = (224, 224, 192)  # VOC's border


@dataclass(frozen=True)
class Classes:
    """`names`: by value, or by colour as a number, in the order of the classes. `void`: the one that is none."""

    names: Mapping[int, str]
    void: int | None
    because: str = ""

    def renamed(self, names: Sequence[str]) -> Classes:
        """Return them under other names."""
        return replace(self, names=dict(zip(self.names, names, strict=True)))


def number(text: str, colours: bool) -> int:
    """Return the value or, of a colour, the number that `text` means: "7", "#00ff00", "0,255,0". Raises UserError."""
    if colours and (digits := re.fullmatch(r"#?([0-9a-fA-F]{6})", text)):
        return int(digits[1], 16)
    parts = [int(part) for part in re.split(r"[ ,]+", text.strip("[]() ")) if part.isdecimal()]
    if len(parts) == (3 if colours else 1) and all(part <= 255 for part in parts):
        return key((parts[0], parts[1], parts[2])) if colours else parts[0]
    raise UserError(f"{text!r}, expected {'a colour like #00ff00' if colours else 'a value from 0 to 255'}")


def shown(value: int, colours: bool) -> str:
    """Return a value or a colour as text."""
    return f"#{value:06x}" if colours else str(value)


def propose(found: Survey, given: Sequence[str] | None, void: str | None) -> Classes:
    """Propose classes and void from what the masks have.

    Args:
        found: the masks.
        given: class names, each perhaps with its value ("leaf=3", "leaf=#00ff00"); None: to be proposed.
        void: a value, a colour, "none"; None: to be proposed.

    Raises:
        UserError: `given` or `void` do not fit the masks.
    """
    colours = found.kind == "colours"
    values = sorted(found.pixels)
    if given is not None and any("=" in one for one in given):
        return _by_value(found, given, void)
    void_value, because = _void(found, values, given, void)
    rest = [value for value in values if value != void_value]
    if colours:  # black first, as most have their background, then the largest
        rest.sort(key=lambda value: (value != 0, -found.pixels[value], value))
    if not rest:
        raise UserError(f"all pixels of the masks are void ({shown(void_value or 0, colours)}), expected a class")
    if given is None:
        names = proposed_names(rest, found)
        return Classes(dict(zip(rest, names, strict=True)), void_value, because)
    if not colours and len(given) > len(rest) and len(given) > rest[-1]:
        rest = list(range(len(given)))  # some of them in no mask
    if len(given) != len(rest):
        listed = ", ".join(shown(value, colours) for value in rest[:20]) + (", ..." if len(rest) > 20 else "")
        raise UserError(
            f"--classes has {len(given)} names, the masks have {len(rest)} {'colours' if colours else 'values'} "
            f"({listed}); expected as many; `name={shown(rest[0], colours)}` says which is which, --void what is none"
        )
    return Classes(dict(zip(rest, given, strict=True)), void_value, because)


def _void(found: Survey, values: list[int], given: Sequence[str] | None, void: str | None) -> tuple[int | None, str]:
    """The void value or colour, and why it is taken for one."""
    colours = found.kind == "colours"
    if void is not None:
        return (None, "as given") if void == "none" else (number(void, colours), "as given")
    if colours:
        border = key(VOID_COLOUR)
        return (border, "VOC's colour of borders") if border in values else (None, "")
    classes = len(values) if given is None else len(given)
    if IGNORE_INDEX in values:
        if values in ([0, 255], [255]) and classes != 1:
            return None, "0 and 255 are two classes"
        if given is None or classes != len(values):
            return IGNORE_INDEX, "255, as usual"
        return None, ""
    if given is not None and len(values) == classes + 1 and values == list(range(classes + 1)):
        return values[-1], f"there are {classes} names, and {values[-1]} comes after them"
    return None, ""


def _by_value(found: Survey, given: Sequence[str], void: str | None) -> Classes:
    colours = found.kind == "colours"
    pairs = [one.rpartition("=") for one in given]
    if any(not name for name, _, _ in pairs):
        raise UserError("--classes: some names have a value (name=3) and some have none, expected one for each or none")
    names = {number(value, colours): name for name, _, value in pairs}
    if len(names) != len(given):
        raise UserError("--classes: a value is there twice, expected one for each class")
    rest = [value for value in sorted(found.pixels) if value not in names]
    left = None if void in (None, "none") else number(str(void), colours)
    if void is None and len(rest) == 1:
        left = rest[0]
    if odd := [shown(value, colours) for value in rest if value != left]:
        raise UserError(f"--classes: no name for {', '.join(odd[:20])} in the masks, expected one, or --void")
    return Classes(names, left, "" if left is None else "what has no name")


def proposed_names(values: Sequence[int], found: Survey) -> list[str]:
    """Return a name for each value: background, object, a colour's name, or class_1."""
    if (list(values) == [0, 255] and found.kind == "values") or (list(values) == [0, 1] and found.kind == "1 bit"):
        return ["background", "object"]
    names = [_proposed(value, found) for value in values]
    times = Counter(names)
    return [
        f"{name}_{value if found.kind != 'colours' else f'{value:06x}'}" if times[name] > 1 else name
        for name, value in zip(names, values, strict=True)
    ]


def _proposed(value: int, found: Survey) -> str:
    if value == 0:
        return "background"
    if found.kind == "colours":
        return _colour_name(colour(value))
    palette = found.palette or ()
    # VOC's colours, which many programs give to any classes, say nothing.
    if value < len(palette) and len(set(palette[value])) > 1 and palette[value] != colour_map(1, value)[0]:
        return _colour_name(palette[value])
    return f"class_{value}"


def _colour_name(rgb: RGB) -> str:
    """The nearest of the colours that CSS has names for."""
    from PIL import ImageColor

    known = {name: ImageColor.getrgb(name) for name in ImageColor.colormap}
    for name in ("black", "white"):  # what is only dark or light is not called so
        if known[name] != rgb:
            del known[name]
    return min(known, key=lambda name: (sum((a - b) ** 2 for a, b in zip(known[name], rgb, strict=False)), name))
