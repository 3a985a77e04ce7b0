"""A prepared data set in Croissant (ML Commons, 1.0): files, fields, licence, citation, as JSON-LD.

The files of the splits (Arrow) are named with their sha256; no Croissant reader reads that format yet. What readers
can load lies beside the description: the list of all images (images.parquet), and of drawn scenes, which are anybody's
to hand on, the first images of each split with their labels (samples.parquet).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import yaml
from pyarrow import parquet

from pipeline.deposit.finished import Prepared, Run
from pipeline.formats import encode
from refinenet.data.split import Split

SAMPLES = 4  # images of each split in samples.parquet
DESCRIPTION = "croissant.json"
_ARROW, _PARQUET = "application/vnd.apache.arrow.file", "application/x-parquet"
_TERMS = Path(__file__).with_name("terms.yaml")
_NOT_STATED = "not stated by the publishers"


@dataclass(frozen=True)
class Terms:
    """Whose a data set is. `licence`: an address or words; `terms`: in words; `cite`: what to cite."""

    url: str | None
    licence: str
    terms: str
    cite: str | None


def terms_of(data: Prepared) -> Terms:
    """Return whose a data set is: of drawn scenes the project's own, of a user's folders not recorded."""
    if data.drawn:
        return Terms(None, "https://spdx.org/licenses/Apache-2.0", f"{data.drawn}; no real image is in it", None)
    known = yaml.safe_load(_TERMS.read_text(encoding="utf-8"))["data"]
    if data.name not in known:
        return Terms(None, "not recorded", "its licence is not recorded", None)
    of = known[data.name]
    return Terms(of["url"], of["licence"] or f"{_NOT_STATED}: {of['terms']}", of["terms"], of["cite"])


def terms_of_weights(source: Mapping[str, Any]) -> str:
    """Return what is known of the licence of a backbone's weights, by its `source` in settings.json, in words."""
    known = yaml.safe_load(_TERMS.read_text(encoding="utf-8"))["weights"]
    name = "torchvision" if "torchvision" in source else source.get("package", "")
    return str(known[name]["terms"]) if name in known else "their licence is not recorded"


def write(data: Prepared, run: Run, folder: Path) -> None:
    """Write croissant.json of a prepared data set, and what readers can load, into `folder`."""
    import mlcroissant as mlc

    folder.mkdir(parents=True, exist_ok=True)
    terms = terms_of(data)
    files, records = _splits(data, mlc), [_classes(data, mlc)] if data.classes else []
    if data.parts:
        splits = {Path(part.name).stem: Split(data.folder / part.name) for part in data.parts}
        tables = {"images": _images(splits)} | ({"samples": _samples(splits)} if data.drawn else {})
        for name, table in tables.items():
            # Without compression: the bytes do not depend on a codec's version.
            parquet.write_table(table, folder / f"{name}.parquet", compression="none")
            files.append(_file(mlc, f"{name}.parquet", _PARQUET, folder / f"{name}.parquet"))
            records.append(_record_set(mlc, name, f"{name}.parquet", _FIELDS[name], _ABOUT[name]))
        for part in data.parts:
            about = f"{len(splits[Path(part.name).stem])} images with their labels, in the file {part.name} (Arrow)"
            records.append(_record_set(mlc, Path(part.name).stem, part.name, _FIELDS["split"], about))
    made_from = "; ".join(_archive(one) for one in data.archives) or data.drawn or "folders of a user"
    metadata = mlc.Metadata(
        name=f"{data.name}-prepared",
        description=(
            f"{data.title}, prepared for training and evaluation: decoded RGB images (height x width x 3, uint8) and "
            f"labels (height x width, uint8: class index, 255 is void). Made from: {made_from}. "
            f"md5 of the folder as DVC computes it: {data.md5}. Terms: {terms.terms}."
        ),
        license=[terms.licence],
        url=terms.url or "https://arxiv.org/abs/1611.06612",
        cite_as=terms.cite or ("The scenes are drawn by refinenet-repro." if data.drawn else "not recorded"),
        creators=[mlc.Organization(name="The refinenet-repro maintainers")],
        date_published=datetime.fromisoformat(run.date),
        version="1.0.0",
        distribution=files,
        record_sets=records,
    )
    text = json.dumps(metadata.to_json(), indent=1, ensure_ascii=False, default=str)
    (folder / DESCRIPTION).write_text(f"{text}\n", encoding="utf-8")


_FIELDS = {
    "images": (
        ("split", "Text", "the split that the image is in"),
        ("name", "Text", "the image's name in its data set"),
        ("height", "Integer", "pixels"),
        ("width", "Integer", "pixels"),
        ("labelled", "Integer", "pixels that have a class: neither void nor of an image without label"),
    ),
    "samples": (
        ("split", "Text", "the split that the image is in"),
        ("name", "Text", "the image's name in its data set"),
        ("image", "ImageObject", "RGB, as PNG"),
        ("label", "ImageObject", "class indices, 255 is void, as grey PNG; nothing in a test set without labels"),
    ),
    "split": (
        ("name", "Text", "the image's name in its data set"),
        ("image", "ImageObject", "height x width x 3, uint8, RGB, raw"),
        (
            "label",
            "ImageObject",
            "height x width, uint8, raw: class index, 255 is void; null where labels are withheld",
        ),
    ),
}
_ABOUT = {
    "images": "All images of all splits, without their pixels.",
    "samples": f"The first {SAMPLES} images of each split and their labels: a proxy for the splits, whose "
    "format (Arrow) Croissant's readers do not read.",
}


def _record_set(mlc: Any, name: str, file: str, fields: Sequence[tuple[str, str, str]], about: str) -> Any:
    kinds = {"Text": mlc.DataType.TEXT, "Integer": mlc.DataType.INTEGER, "ImageObject": mlc.DataType.IMAGE_OBJECT}
    return mlc.RecordSet(
        id=name,
        name=name,
        description=about,
        fields=[
            mlc.Field(
                id=f"{name}/{field}",
                name=field,
                description=description,
                data_types=kinds[kind],
                source=mlc.Source(file_object=file, extract=mlc.Extract(column=field)),
            )
            for field, kind, description in fields
        ],
    )


def _classes(data: Prepared, mlc: Any) -> Any:
    rows = [
        {"classes/index": index, "classes/name": name, "classes/colour": f"#{bytes(colour).hex()}"}
        for index, (name, colour) in enumerate(zip(data.classes, data.palette, strict=True))
    ]
    kinds = {"index": mlc.DataType.INTEGER, "name": mlc.DataType.TEXT, "colour": mlc.DataType.TEXT}
    fields = [mlc.Field(id=f"classes/{name}", name=name, data_types=kind) for name, kind in kinds.items()]
    about = "What a value of a label means, and the colour that it is shown in."
    return mlc.RecordSet(id="classes", name="classes", description=about, key="classes/index", fields=fields, data=rows)


def _splits(data: Prepared, mlc: Any) -> list[Any]:
    """Return the files of the splits; of a record, whose data is not here, DVC's list of them, which has their md5."""
    if not data.parts:
        digits = data.md5.removesuffix(".dir")
        about = f"DVC's list of the files of {data.folder}, with the md5 of each"
        at = f"files/md5/{digits[:2]}/{digits[2:]}.dir"
        return [
            mlc.FileObject(
                id="dvc-list",
                name="dvc-list",
                description=about,
                content_url=at,
                md5=digits,
                encoding_formats="application/json",
            )
        ]
    return [
        mlc.FileObject(
            id=part.name,
            name=part.name,
            description=f"{data.folder}/{part.name} of the project; not in the artifact, `dvc pull` gets it",
            content_url=part.name,
            content_size=f"{part.size} B",
            sha256=part.sha256,
            encoding_formats=_ARROW,
        )
        for part in data.parts
    ]


def _file(mlc: Any, name: str, kind: str, path: Path) -> Any:
    content = path.read_bytes()
    return mlc.FileObject(
        id=name,
        name=name,
        content_url=name,
        content_size=f"{len(content)} B",
        sha256=hashlib.sha256(content).hexdigest(),
        encoding_formats=kind,
    )


def _images(splits: dict[str, Split]) -> pa.Table:
    """All images: split, name, height, width, labelled pixels. Reads no pixel."""
    columns: dict[str, list[Any]] = {"split": [], "name": [], "height": [], "width": [], "labelled": []}
    for name, split in splits.items():
        sizes = split.sizes()
        columns["split"] += [name] * len(split)
        columns["name"] += [split[index].name for index in range(len(split))]
        columns["height"] += sizes[:, 0].tolist()
        columns["width"] += sizes[:, 1].tolist()
        columns["labelled"] += split.counts()[:, :-1].sum(axis=1).tolist()
    return pa.table(columns)


def _samples(splits: dict[str, Split]) -> pa.Table:
    rows = []
    for name, split in splits.items():
        for sample in (split[index] for index in range(min(SAMPLES, len(split)))):
            label = None if sample.label is None else encode.png(np.ascontiguousarray(sample.label))
            rows.append({"split": name, "name": sample.name, "image": encode.png(sample.image), "label": label})
    kinds = [("split", pa.string()), ("name", pa.string()), ("image", pa.binary()), ("label", pa.binary())]
    return pa.Table.from_pylist(rows, schema=pa.schema(kinds))


def _archive(of: Mapping[str, str]) -> str:
    known = [f"{kind} {of[kind]}" for kind in ("md5", "sha256") if of[kind]]
    return f"{of['file']} ({of['url']}; {', '.join(known) or 'no checksum is published'})"
