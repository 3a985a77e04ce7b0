"""What a user's folders were taken for, in one table, before anything is written."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

from pipeline.config.schema import Folder
from pipeline.datasets import custom
from pipeline.own_data.classes import Classes, shown
from pipeline.own_data.layout import Groups, groups
from pipeline.own_data.survey import Survey
from refinenet.errors import UserError


def describe(
    name: str, about: Folder, found: Survey, classes: Classes, lists: Mapping[str, list[str]]
) -> tuple[str, list[str]]:
    """Return what things were taken for, as text, and warnings.

    Args:
        name: of the data set.
        about: its settings.
        found: what its files hold.
        classes: what that was taken for.
        lists: names of train, of val or of both, where there are lists.

    Raises:
        UserError: a split without a labelled pixel.
    """
    colours, seen = found.kind == "colours", {one.name: one for one in found.seen}
    parts = custom.split_lists(name, about, seen, lists)
    sizes = sorted((one.width * one.height, one.width, one.height) for one in found.seen)
    size = [f"{width} x {height}" for _, width, height in (sizes[0], sizes[len(sizes) // 2], sizes[-1])]
    suffix = [f"; names end in {text}" if text else "" for text in (about.image_suffix, about.mask_suffix)]
    bits = sorted({one.bits for one in found.seen})
    kind = {"colours": "RGB colours", "1 bit": "black and white, 1 bit", "values": "grey values"}[found.kind]
    if found.palette is not None:
        kind = "palette values"
    rows = [
        (
            "images",
            f"{len(seen)} in {about.images}: {_formats(found, 0)}" + suffix[0],
        ),
        ("", f"{size[0]} pixels" if size[0] == size[2] else f"{size[0]} to {size[2]} pixels, median {size[1]}"),
        ("masks", f"{len(seen)} in {about.masks}: {_formats(found, 1)}{suffix[1]}"),
        ("kind", f"{kind}, {' and '.join(map(str, bits))} bits" if found.kind == "values" else kind),
    ]
    total = sum(found.pixels.values())
    for index, (value, one) in enumerate(classes.names.items()):
        in_images, share = found.images[value], found.pixels[value] / total
        text = f"{shown(value, colours):>7}  {one:<20} {in_images:>6} images {share:>8.2%} of the pixels"
        rows.append(("" if index else "classes", text))
    if classes.void is not None:
        share = found.pixels[classes.void] / total
        because = f" ({classes.because})" if classes.because else ""
        text = f"{shown(classes.void, colours):>7}  {'':<20} {found.images[classes.void]:>6} images {share:>8.2%}"
        rows.append(("void", f"{text} of the pixels{because}"))
    how = (
        "by lists or folders"
        if lists
        else f"{about.val_share:.0%} is val, drawn by {'group' if about.group is not None else 'name'}"
    )
    rows.append(("split", f"train {len(parts['train'])}, val {len(parts['val'])}; {how}"))
    warnings = []
    suggested = None if about.group is not None or lists else groups(seen)
    rows += _group_rows(about, parts, suggested)
    for part, names in parts.items():
        counts: Counter[int] = Counter()
        for one in names:
            counts.update(seen[one].counts)
        labelled = [value for value in classes.names if counts[value]]
        if not labelled:
            raise UserError(
                f"no labelled pixel in {part}, {len(names)} images, expected a class in one of them or more"
            )
        if missing := [classes.names[value] for value in classes.names if value not in labelled]:
            warnings.append(
                f"{len(missing)} of {len(classes.names)} classes without a pixel in {part}: {_few(missing)}"
            )
    prints = [[(one, seen[one].fingerprint) for one in parts[part]] for part in ("train", "val")]
    warnings += custom.checks(about, prints[0], prints[1], False)[1]
    width = max(len(key) for key, _ in rows)
    return "\n".join(f"  {key:<{width}}  {text}".rstrip() for key, text in rows), warnings


def _group_rows(about: Folder, parts: Mapping[str, list[str]], suggested: Groups | None) -> list[tuple[str, str]]:
    if about.group is not None:
        of = {part: {about.group_of(one) for one in names} for part, names in parts.items()}
        return [("groups", f"by {about.group!r}: train {len(of['train'])}, val {len(of['val'])}")]
    if suggested is None:
        return []
    what = "folders" if suggested.setting == 1 else "names with numbers, as frames of videos"
    names = _few([f"{one} {count}" for one, count in suggested.sizes.items()])
    option = suggested.setting if suggested.setting == 1 else f"'{suggested.setting}'"
    return [
        ("groups", f"none; {len(suggested.sizes)} of {what}: {names}"),
        ("", f"if each is one recording, --group {option} keeps it in one split"),
    ]


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _formats(found: Survey, which: int) -> str:
    counts = Counter(one.formats[which] for one in found.seen)
    return (
        counts.most_common(1)[0][0] if len(counts) == 1 else ", ".join(f"{n} {one}" for one, n in counts.most_common())
    )
