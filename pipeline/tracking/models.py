"""The trained models in MLflow: logged with a signature, registered by experiment, with the score as alias.

A model's folder in MLflow holds no code and no pickle: the signature, the requirements, and the weights, as a hard link
to models/<experiment>.safetensors where both lie on one disk. So it costs nothing (RefineNet-152 has half a GB, and a
project logs dozens), yet outlives that file, which the next training replaces by another one and never writes into.
On another disk or a server it is a copy, one for each md5.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from pipeline.tables.paper import published
from refinenet.atomic import atomic_folder
from refinenet.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Metric
    from mlflow.models import Model, ModelSignature

BEST = "best"
SCORE = re.compile(r"miou-\d+_\d\d")

# What a machine that serves a model needs beside this project; given, because MLflow would find it out by loading the
# model in processes of its own.
REQUIREMENTS = ("numpy>=2", "pillow>=11", "pyarrow>=19", "safetensors>=0.5", "torch>=2.11", "tqdm>=4.67")


@dataclass(frozen=True)
class Score:
    """Mean IoU, a fraction, under one of the protocols of the tables."""

    protocol: str
    mean_iou: float


def experiment_of(name: str) -> str:
    """The experiment that `name` trains: a further seed (voc-res101-seed1) trains the same one."""
    return re.sub(r"-seed\d+$", "", name)


def table_score(experiment: str, mean_iou: Mapping[str, float]) -> Score | None:
    """Which of the scores (protocol -> mean IoU, as evaluated) stands for the model.

    It is the last protocol that a table prints of this experiment (paper's VOC: not the CRF that comes after it), else
    the last one.
    """
    printed = {
        source.protocol
        for table in published().values()
        for row in table.rows
        for source in row.sources
        if source.experiment == experiment
    }
    chosen = [protocol for protocol in mean_iou if protocol in printed] or list(mean_iou)
    return Score(chosen[-1], mean_iou[chosen[-1]]) if chosen else None


def signature() -> ModelSignature:
    """Bytes of an image file in, those of a palette PNG and the names of its classes out; over HTTP all are base64."""
    from mlflow.models import ModelSignature
    from mlflow.types.schema import Array, ColSpec, DataType, ParamSchema, ParamSpec, Schema

    return ModelSignature(
        inputs=Schema([ColSpec(DataType.binary, "image")]),
        outputs=Schema([ColSpec(DataType.binary, "label"), ColSpec(Array(DataType.string), "classes")]),
        params=ParamSchema(
            [ParamSpec("scales", DataType.double, [1.0], (-1,)), ParamSpec("flip", DataType.boolean, False)]
        ),
    )


def logged(client: MlflowClient, experiment_id: str, name: str, md5: str) -> LoggedModel | None:
    """The model of these bytes that this MLflow experiment has already, whole or begun."""
    query = f"name = '{name}' AND tags.`weights.md5` = '{md5}'"
    return next(iter(client.search_logged_models([experiment_id], query)), None)


def begin(
    client: MlflowClient, experiment_id: str, name: str, md5: str, run: str, params: Mapping[str, str]
) -> LoggedModel:
    """Make the entry of a model; `fill` gives it its files."""
    return client.create_logged_model(
        experiment_id, name, source_run_id=run, tags={"weights.md5": md5}, params=dict(params), model_type="RefineNet"
    )


def filled(model: LoggedModel) -> bool:
    """Whether the files of `model` are in place."""
    folder = _local(model)
    return (folder / "MLmodel").is_file() if folder else str(model.status) == "READY"


def fill(client: MlflowClient, model: LoggedModel, weights: Path, md5: str, about: Mapping[str, Any]) -> None:
    """Write the files of `model`; no turn at the database is needed for it. `about`: of `read_about`."""
    folder = _local(model)
    if folder:
        with atomic_folder(folder) as part:
            _write(part, model, weights, md5, about)
            _link(weights, part / "data" / weights.name)
        return
    with TemporaryDirectory() as temporary:
        part = Path(temporary, "model")
        _write(part, model, weights, md5, about)
        (part / "data" / weights.name).unlink()
        client.log_model_artifact(model.model_id, str(weights), "data")
        client.log_model_artifacts(model.model_id, str(part))


def _write(folder: Path, model: LoggedModel, weights: Path, md5: str, about: Mapping[str, Any]) -> None:
    """All files of MLflow's format, with an empty one in the place of the weights."""
    import mlflow.pyfunc
    from mlflow.models import Model

    described: Model = Model(
        artifact_path=model.artifact_location,
        run_id=model.source_run_id,
        model_uuid=model.model_id,
        model_id=model.model_id,
        metadata={"experiment": model.name, "dataset": about["dataset"], "classes": list(about["classes"])},
    )
    with TemporaryDirectory() as temporary:
        stand_in = Path(temporary, weights.name)
        stand_in.touch()  # MLflow would copy the weights
        mlflow.pyfunc.save_model(
            path=str(folder),
            loader_module="pipeline.tracking.serving",
            data_path=str(stand_in),
            mlflow_model=described,
            signature=signature(),
            pip_requirements=list(REQUIREMENTS),
            model_config={"md5": md5, "device": ""},
        )
    described.model_size_bytes = weights.stat().st_size
    described.save(str(folder / "MLmodel"))


def _link(weights: Path, target: Path) -> None:
    target.unlink()
    source = Path(os.path.realpath(weights))  # a link into DVC's cache may go
    try:
        os.link(source, target)
    except OSError:  # another disk, or one that has no links
        shutil.copyfile(source, target)


def read_about(weights: Path) -> dict[str, Any]:
    """Data set and class names of a model file, without reading its tensors. UserError where it is none of ours."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(weights), framework="numpy") as file:
            about: dict[str, Any] = json.loads((file.metadata() or {})["refinenet"])["about"]
            return {"dataset": about["dataset"], "classes": about["classes"]}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise UserError(f"{weights}: not logged as a model: no weights of this project ({error})") from None


def _local(model: LoggedModel) -> Path | None:
    """The folder of the model's files, where that is one of this machine."""
    from mlflow.utils.file_utils import local_file_uri_to_path

    location = model.artifact_location
    return Path(local_file_uri_to_path(location)) if location.startswith(("file:", "/")) else None  # type: ignore[no-untyped-call]


def finish(client: MlflowClient, model: LoggedModel, run_id: str | None) -> None:
    """Say that the model is whole, and that the run brought it forth, if there still is one."""
    from mlflow.entities import LoggedModelOutput

    if str(model.status) != "READY":
        client.finalize_logged_model(model.model_id, "READY")
    run = client.get_run(run_id) if run_id else None
    if not run or run.info.lifecycle_stage != "active":
        return
    if not any(known.model_id == model.model_id for known in (run.outputs.model_outputs if run.outputs else ())):
        client.log_outputs(run.info.run_id, [LoggedModelOutput(model.model_id, step=0)])


def compare(client: MlflowClient, run: str, model: LoggedModel, scores: Sequence[Metric]) -> None:
    """Have the evaluation `run` hang at the model, and its scores, so that MLflow's page of models compares them."""
    from mlflow.entities import LoggedModelInput, Metric

    inputs = client.get_run(run).inputs
    assert inputs
    if any(known.model_id == model.model_id for known in inputs.model_inputs):
        return
    data = [given.dataset for given in inputs.dataset_inputs if given.tags[0].value.endswith("data")]
    name, digest = (data[0].name, data[0].digest) if data else (None, None)
    metrics = [Metric(m.key, m.value, m.timestamp, m.step, model.model_id, name, digest) for m in scores]
    client.log_batch(run, metrics=metrics)
    client.log_inputs(run, models=[LoggedModelInput(model.model_id)])


def register(client: MlflowClient, name: str, model: LoggedModel, score: Score, tags: Mapping[str, str]) -> None:
    """Have `model` as a version of the registered model `name`, one for each md5 of weights, and say what it scores.

    Tags: `tags`, "weights.md5" and "data.md5" among them, and the score. Aliases: its mean IoU in percent with two
    digits, "miou-43_75" (MLflow takes no dot in an alias); and "best" on whichever version has the highest score on
    the same evaluation data under the same protocol, the first of equals.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import RESOURCE_ALREADY_EXISTS, ErrorCode

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != ErrorCode.Name(RESOURCE_ALREADY_EXISTS):
            raise
    told = {**tags, "protocol": score.protocol, "mean_iou": repr(score.mean_iou)}
    same = client.search_model_versions(f"name = '{name}' and tags.`weights.md5` = '{tags['weights.md5']}'")
    if same:
        version = str(min(int(found.version) for found in same))
    else:
        made = client.create_model_version(
            name, f"models:/{model.model_id}", model.source_run_id, tags=dict(told), model_id=model.model_id
        )
        version = str(made.version)
    for key, value in told.items():
        client.set_model_version_tag(name, version, key, value)
    where = [told[key] for key in ("protocol", "dataset", "profile") if key in told]
    client.update_model_version(name, version, ", ".join([f"{100 * score.mean_iou:.2f} % mean IoU", *where]))

    aliases = {alias: str(of) for alias, of in client.get_registered_model(name).aliases.items()}
    mine = f"miou-{100 * score.mean_iou:.2f}".replace(".", "_")
    for alias, of in aliases.items():
        if of == version and SCORE.fullmatch(alias) and alias != mine:
            client.delete_registered_model_alias(name, alias)
    if aliases.get(mine) != version:
        client.set_registered_model_alias(name, mine, version)

    def comparable(found: Any) -> bool:
        same = (found.tags.get(key) == told.get(key) for key in ("data.md5", "protocol"))
        return str(found.version) == version or all(same)

    rivals = [found for found in client.search_model_versions(f"name = '{name}'") if comparable(found)]
    best = str(max(rivals, key=lambda found: (float(found.tags["mean_iou"]), -int(found.version))).version)
    if aliases.get(BEST) != best:
        client.set_registered_model_alias(name, BEST, best)
