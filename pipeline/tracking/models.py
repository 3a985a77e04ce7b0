"""The trained models in MLflow: logged with a signature, registered by experiment, with the score as alias.

A model's folder in MLflow holds no code and no pickle: the signature, the requirements, and the weights, as a hard link
to models/<experiment>.safetensors where both lie on one disk. So it costs nothing (RefineNet-152 has half a GB, and a
project logs dozens), yet outlives that file, which the next training replaces by another one and never writes into.
On another disk or a server it is a copy, one for each md5.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.models import ModelSignature

BEST = "best"
SCORE = re.compile(r"miou-\d+_\d\d")

# What a machine that serves a model needs beside this project; given, because MLflow would find it out by loading the
# model in processes of its own.
REQUIREMENTS = ("numpy>=2", "pillow>=11", "pyarrow>=19", "safetensors>=0.5", "torch>=2.11", "tqdm>=4.67")


def signature() -> ModelSignature:
    """Bytes of an image file in, those of a palette PNG and the names of its classes out; over HTTP all are base64."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema

    scales, flip = ParamSpec("scales", DataType.double, [1.0], (-1,)), ParamSpec("flip", DataType.boolean, False)
    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema([ColSpec(DataType.binary, "label"), ColSpec(Array(DataType.string), "classes")]),
        params=ParamSchema([scales, flip]),
    )


def log_model(
    client: MlflowClient, experiment: str, name: str, weights: Path, md5: str, run: str, params: Mapping[str, str]
) -> LoggedModel:
    """Return the model of these bytes in MLflow, logged now unless it is there already.

    Args:
        client: of the database.
        experiment: id of MLflow's.
        name: of the model, "voc-res101".
        weights: its file.
        md5: of `weights`.
        run: id of the run that brought the model forth.
        params: what it was trained with.
    """
    import mlflow.pyfunc
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model
    from mlflow.utils.file_utils import local_file_uri_to_path

    found = client.search_logged_models([experiment], f"name = '{name}' AND tags.`weights.md5` = '{md5}'")
    model = found[0] if found else None
    if model is None:
        model = client.create_logged_model(experiment, name, run, {"weights.md5": md5}, dict(params), "RefineNet")
    if str(model.status) != "READY":
        with TemporaryDirectory() as folder:
            mlflow.pyfunc.save_model(
                path=f"{folder}/model",
                loader_module="pipeline.tracking.serving",
                data_path=str(weights),
                mlflow_model=Model(run_id=model.source_run_id, model_uuid=model.model_id, model_id=model.model_id),
                signature=signature(),
                pip_requirements=list(REQUIREMENTS),
                model_config={"md5": md5, "device": ""},
            )
            client.log_model_artifacts(model.model_id, f"{folder}/model")
        if model.artifact_location.startswith("file:"):
            _link(weights, Path(local_file_uri_to_path(model.artifact_location), "data", weights.name))  # type: ignore[no-untyped-call]
        client.finalize_logged_model(model.model_id, "READY")
    outputs = client.get_run(run).outputs
    if not any(known.model_id == model.model_id for known in (outputs.model_outputs if outputs else ())):
        client.log_outputs(run, [LoggedModelOutput(model.model_id, step=0)])
    return model


def _link(weights: Path, copy: Path) -> None:
    """Have a hard link to `weights` in the place of their copy, where the disks allow it."""
    part = copy.with_name(f"{copy.name}.part")
    with contextlib.suppress(OSError):
        os.link(weights.resolve(), part)  # resolved: a link into DVC's cache may go
        part.replace(copy)


def register(client: MlflowClient, model: LoggedModel, tags: Mapping[str, str]) -> None:
    """Have `model` as a version of the registered model of its experiment, one for each md5, and say what it scores.

    A further seed (voc-res101-seed1) is a version of voc-res101, too. `tags`: of the version; "weights.md5", "mean_iou"
    (a fraction) and "protocol" among them. Aliases: mean IoU in percent with two digits, "miou-43_75" (MLflow takes no
    dot in an alias); and "best" on whichever version has the highest on the same evaluation data ("data.md5") under the
    same protocol, the first of equals.
    """
    import mlflow

    name = re.sub(r"-seed\d+$", "", model.name)
    same = client.search_model_versions(f"name = '{name}' and tags.`weights.md5` = '{tags['weights.md5']}'")
    if same:
        version = str(min(int(found.version) for found in same))
    else:
        version = str(mlflow.register_model(f"models:/{model.model_id}", name).version)
    for key, value in tags.items():
        client.set_model_version_tag(name, version, key, value)
    percent = f"{100 * float(tags['mean_iou']):.2f}"
    where = [tags[key] for key in ("protocol", "dataset", "profile") if key in tags]
    client.update_model_version(name, version, ", ".join([f"{percent} % mean IoU", *where]))

    mine = f"miou-{percent}".replace(".", "_")
    for alias, of in client.get_registered_model(name).aliases.items():
        if str(of) == version and SCORE.fullmatch(alias) and alias != mine:
            client.delete_registered_model_alias(name, alias)
    client.set_registered_model_alias(name, mine, version)
    rivals = [
        found
        for found in client.search_model_versions(f"name = '{name}'")
        if str(found.version) == version or all(found.tags.get(k) == tags.get(k) for k in ("data.md5", "protocol"))
    ]
    best = max(rivals, key=lambda found: (float(found.tags["mean_iou"]), -int(found.version)))
    client.set_registered_model_alias(name, BEST, str(best.version))
