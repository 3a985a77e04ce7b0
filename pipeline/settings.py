"""Stage `settings`: params.yaml + profiles/<profile>.yaml -> settings.json, every value that this run uses, checked.

This is the first stage of the graph. Each later stage depends on the one key of settings.json that it reads
(`train.voc-res101`), so that a change in a profile reruns only what it affects, and a profile can be ten lines that
state only how it differs from another one (`base: mini`). JSON, because DVC reads the file once for each stage and its
YAML reader takes 0.2 s for it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline import preflight
from pipeline.config.profiles import PARAMS, PROFILES, bases, read_params, read_profile, read_yaml
from pipeline.config.resolve import SETTINGS, left_out, no_plan, resolve
from pipeline.config.schema import TorchvisionWeights
from pipeline.fetch import local, own_folders
from pipeline.runtime import cli
from refinenet.atomic import atomic_file
from refinenet.errors import UserError


def check_weights(settings: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise UserError for a name of ImageNet weights that torchvision does not know, before anything is downloaded."""
    for backbone, weights in settings["weights"].items():
        if "torchvision" in (source := weights["source"] or {}):
            try:
                TorchvisionWeights(**source).entry(backbone)
            except UserError as error:
                raise UserError(f"{PROFILES / read_params().profile}.yaml: {error}") from None


def check_mirror() -> None:
    """Warn where a mirror has been set on data sets that are drawn, for which nobody looks into it.

    Not where a profile on top of the one that sets the mirror has them drawn: it means it (profiles/released.yaml).
    """
    params = read_params()
    names = (params.profile, *bases(params.profile))
    layers = [read_yaml(PROFILES / f"{name}.yaml") for name in names]
    profile, where = read_profile(params.profile)
    if not any(local.folder(entry) is not None for entry in profile.mirror):
        return
    above = layers[: next(level for level, values in enumerate(layers) if "mirror" in values)]
    meant = {data for values in above for data in values.get("sources", {})}
    drawn = [data for data in params.datasets if profile.sources.get(data) == "rendered" and data not in meant]
    if drawn:
        cli.warn(
            f"{where}: mirror is not looked into for {', '.join(drawn)}: their archives are drawn (`rendered`); name "
            "the files under `sources`, or take `base: paper`"
        )


def run() -> None:
    """Resolve params.yaml and the profile, check them, write settings.json."""
    settings = resolve()
    check_mirror()
    for data in sorted(left_out(read_params())):
        if cli.dvc_targets() == []:
            raise UserError(f"{no_plan(data)}, or name what `dvc repro` is to make")
        cli.warn(f"{no_plan(data)}; until then {data} is left out")
    if cli.dvc_targets() == []:
        preflight.check(settings)  # of one target, its stages say what they lack when they start
    check_weights(settings)
    for name, own in read_profile(read_params().profile)[0].own.items():
        if name in settings["prepare"]:
            own_folders.check_place(name, own)
    for file in sorted(Path("metrics/seeds").glob("*/*.json")):
        if file.stem not in settings["train"]:
            raise UserError(f"{file}: {PARAMS} has no seeds.{file.stem} any more; remove the file, or tables count it")
    with atomic_file(SETTINGS) as part:
        part.write_text(json.dumps(settings, indent=1, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{SETTINGS}: profile {read_params().profile}, {len(settings['train'])} trainings")


if __name__ == "__main__":
    cli.command_parser("settings", (__doc__ or "").partition("\n\n")[0]).parse_args()
    sys.exit(cli.run_cli(run))
