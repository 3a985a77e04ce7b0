"""Names that params.yaml gives: they become stages, files and folders; both engines and any disk have to take them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from pipeline.config.schema import Params
from refinenet.errors import UserError

# YAML 1.1 (Snakemake's, and ours) or 1.2 (DVC's) reads them as something else than a word; so do both with 1e5 or 0o7,
# which begin with a digit.
_NO_WORDS = {"y", "n", "yes", "no", "on", "off", "true", "false", "null", "nan", "inf"}
# Folders of the project where a data set's would lie: data/, metrics/, predictions/. And the paper's tables, which
# results/ has whether params.yaml names them or not.
_FOLDERS = {"raw", "archives", "incoming", "splits", "seeds", "servers", "photos", "train", "val", "test"}
_TABLES = {"person", "ablation", "nyud", "voc", "cityscapes", "context", "sunrgbd", "ade20k", "variants"}
_LIKE = "letters, digits, - and _, beginning with a letter"


def check_names(params: Params, where: str) -> None:
    """Raise UserError, naming `where` and the key, for a name that an engine, YAML or a disk would stumble over."""
    known: dict[str, str] = {}
    for key, stage, name in _stages(params):
        shown = f"{where}: {key}: {name!r}"
        plain = name.removeprefix("timm:") if key == "backbones" else name
        if not re.fullmatch(r"[A-Za-z][\w-]*", plain, re.ASCII) or len(name) > 100:
            raise UserError(f"{shown} names stages and files, expected {_LIKE}, 100 at most")
        if name.lower() in _NO_WORDS:
            raise UserError(f"{shown} is no word to YAML, expected another name")
        if key in ("datasets", "own", "further") and name.lower() in _FOLDERS:
            raise UserError(f"{shown} is a folder of the project, expected another name")
        if key == "own" and name.lower() in _TABLES:
            raise UserError(f"{shown} is a table of the paper, expected another name")
        # Snakemake's rules have only letters, digits and _; some disks do not tell A from a.
        rule = re.sub(r"\W", "_", f"{stage}@{name}").lower()
        if (other := known.setdefault(rule, name)) != name:
            raise UserError(f"{shown} and {other!r} differ in signs or capitals only, expected two names")


def _stages(params: Params) -> Iterator[tuple[str, str, str]]:
    """Yield key of params.yaml, stage of dvc.yaml and name of each row that the graph's file loops over."""
    loops = {
        "datasets": ("download", "prepare"),
        "own": ("download-own", "prepare-own", "table-own", "report-own"),
        "further": ("table-further", "report-further"),
        "backbones": ("weights",),
        # Their weights lie in one folder, and so do those that trainings of any kind write.
        "pretrainings": ("pretrain", "train", "weights"),
        "experiments": ("train", "evaluate"),
        "seeds": ("train-seeds", "evaluate-seeds", "train"),
    }
    for key, stages in loops.items():
        for stage in stages:
            for name in getattr(params, key):
                yield key, stage, name
