"""Models in MLflow: registered by experiment with the score as alias, served over HTTP, found by an md5."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from PIL import Image
from thin_network import CLASSES, network

from pipeline import predict
from pipeline.runtime.dvc_md5 import dvc_md5
from pipeline.tracking import track
from pipeline.tracking.__main__ import find, main
from refinenet.errors import UserError

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow asks for an example image in every model's folder; the signature says it as well.
pytestmark = pytest.mark.filterwarnings("ignore:.*An input example was not provided:UserWarning")

BIN = Path(sys.executable).parent
LONG = 300  # seconds, of a machine that has other jobs as well


def train(weights: Path, name: str = "voc-res101") -> None:
    inputs = {"training data, coco": Path("data/coco"), "training data, voc": Path("data/voc")}
    with track("train", name, "voc", {"profile": "mini", "pools": 2}, inputs) as run:
        run.log(1, loss=1.0)
        run.wrote(weights)


def evaluate(weights: Path, mean_iou: float, name: str = "voc-res101") -> None:
    """Scores as `evaluate` gives them; "multi" stands for the model."""
    params, inputs = {"profile": "mini", "images": 12}, {"evaluation data": Path("data/voc")}
    with track("evaluate", name, "voc", params, inputs, weights=weights, headline="multi") as run:
        run.scores({"images_per_second": 3.0})
        for protocol, change in (("single", -0.01), ("multi", 0.0), ("crf", 0.3)):
            run.scores({f"{protocol}/mean_iou": mean_iou + change, f"{protocol}/official/mean_iou": 0.1})
            run.scores({f"{protocol}/iou/sky": 0.7, f"{protocol}/iou/tree": None})


@pytest.fixture(autouse=True)
def _here(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(request.getfixturevalue("project"))


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder with a training of two data sets and its evaluation in mlflow.db."""
    root = tmp_path_factory.mktemp("project")
    for data in ("voc", "coco", "other"):
        (root / "data" / data).mkdir(parents=True)
        (root / "data" / data / "train.arrow").write_bytes(data.encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        network(Path("models/voc-res101.safetensors"), 0)
        train(Path("models/voc-res101.safetensors"))
        evaluate(Path("models/voc-res101.safetensors"), 0.4375)
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (90, 130, 3), dtype=np.uint8)).save(root / "photo.png")
    return root


def client() -> MlflowClient:
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=f"sqlite:///{Path('mlflow.db').absolute()}")


def runs(query: str = "") -> dict[str, Any]:
    """Name -> run, the latest of a name; `query` as people type it."""
    import mlflow

    mlflow.set_tracking_uri(f"sqlite:///{Path('mlflow.db').absolute()}")
    found = mlflow.search_runs(filter_string=query, search_all_experiments=True, output_format="list")
    return {run.info.run_name: run for run in reversed(found)}


def test_a_training_is_logged_as_a_model_without_code_and_without_a_copy(
    project: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights = Path("models/voc-res101.safetensors")
    training = client().get_run(runs()["voc-res101"].info.run_id)
    (output,) = training.outputs.model_outputs
    model = client().get_logged_model(output.model_id)
    assert (model.name, str(model.status), model.source_run_id) == ("voc-res101", "READY", training.info.run_id)
    assert model.params == training.data.params
    folder = Path(model.artifact_location.removeprefix("file://"))
    assert weights.samefile(folder / "data" / weights.name)
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    described = {"MLmodel", "conda.yaml", "python_env.yaml", "requirements.txt"}
    assert files == described | {f"data/{weights.name}"}
    assert not list(folder.parent.glob("*.part"))
    assert capfd.readouterr().err == ""


def test_the_page_of_models_and_a_chart_of_runs_can_compare(project: Path) -> None:
    training, evaluation = runs()["voc-res101"], client().get_run(runs()["evaluate voc-res101"].info.run_id)
    assert evaluation.data.params == {"profile": "mini", "pools": "2", "images": "12"}
    assert training.data.metrics["mean_iou"] == evaluation.data.metrics["mean_iou"] == 0.4375
    (given,) = evaluation.inputs.model_inputs
    model = client().get_logged_model(given.model_id)
    scores = {metric.key: metric for metric in model.metrics}
    assert set(scores) == {"single/mean_iou", "multi/mean_iou", "crf/mean_iou", "mean_iou"}
    assert scores["mean_iou"].value == 0.4375
    assert scores["mean_iou"].dataset_name == "data/voc"
    assert scores["mean_iou"].dataset_digest == dvc_md5(Path("data/voc"))


def test_a_search_by_md5_finds_the_runs(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    voc, coco, weights = (dvc_md5(Path(path)) for path in ("data/voc", "data/coco", "models/voc-res101.safetensors"))
    both = {"voc-res101", "evaluate voc-res101"}
    assert set(runs(f"tags.`data.md5` = '{voc}'")) == set(runs(f"dataset.digest = '{voc}'")) == both
    assert set(runs(f"dataset.digest = '{coco}'")) == set(runs(f"tags.`data.md5.coco` = '{coco}'")) == {"voc-res101"}
    for what in ("data/voc", voc, voc.removesuffix(".dir"), weights, "models/voc-res101.safetensors"):
        assert {(where, run.info.run_name) for where, run in find(what)} == {("voc", name) for name in both}
    main(["find", "data/voc"])
    lines = capsys.readouterr().out.splitlines()
    commit = "no commit: fatal: not a git repository (or any of the parent directories): .git"
    assert [line.split("  ", 1)[1] for line in lines] == [
        f"voc  voc-res101  FINISHED  {commit}  43.8 % mean IoU",
        f"voc  evaluate voc-res101  FINISHED  {commit}  43.8 % mean IoU",
    ]
    with pytest.raises(UserError, match=r"^data/other: no run in sqlite:.* has seen it$"):
        main(["find", "data/other"])
    with pytest.raises(UserError, match="no file or folder, expected one or an md5 of 32 hexadecimal digits"):
        find("data/vok")


def versions() -> dict[str, tuple[float, str]]:
    """Version -> score and what was trained, of voc-res101."""
    found = client().search_model_versions("name = 'voc-res101'")
    return {str(v.version): (float(v.tags["mean_iou"]), v.tags["trained as"]) for v in found}


def aliases() -> dict[str, str]:
    return {alias: str(version) for alias, version in client().get_registered_model("voc-res101").aliases.items()}


def test_the_registry_has_one_version_for_each_md5_and_best_is_the_best(
    project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(project, tmp_path / "copy")  # not to disturb the others
    monkeypatch.chdir(tmp_path / "copy")
    first, second = Path("models/voc-res101.safetensors"), Path("models/voc-res101-seed1.safetensors")
    assert versions() == {"1": (0.4375, "voc-res101")}
    assert aliases() == {"best": "1", "miou-43_75": "1"}
    (version,) = client().search_model_versions("name = 'voc-res101'")
    assert version.tags["protocol"] == "multi"
    assert version.tags["weights.md5"] == dvc_md5(first)
    assert version.tags["data.md5"] == dvc_md5(Path("data/voc"))

    network(second, 5)  # pulled: no training in this database wrote it
    evaluate(second, 0.5, "voc-res101-seed1")
    assert versions() == {"1": (0.4375, "voc-res101"), "2": (0.5, "voc-res101-seed1")}
    assert aliases() == {"best": "2", "miou-43_75": "1", "miou-50_00": "2"}

    evaluate(second, 0.42, "voc-res101-seed1")  # the same bytes, evaluated anew
    assert versions() == {"1": (0.4375, "voc-res101"), "2": (0.42, "voc-res101-seed1")}
    assert aliases() == {"best": "1", "miou-43_75": "1", "miou-42_00": "2"}

    # Of scores on other data the higher one says nothing.
    Path("data/voc/val.arrow").write_bytes(b"more")
    evaluate(second, 0.1, "voc-res101-seed1")
    assert aliases() == {"best": "2", "miou-43_75": "1", "miou-10_00": "2"}
    assert len(client().search_logged_models(["1"])) == 2


def loaded(folder: Path) -> Any:
    import mlflow.pyfunc

    return mlflow.pyfunc.load_model(str(folder))


def logged_folder() -> Path:
    (model,) = client().search_logged_models(["1"])
    return Path(model.artifact_location.removeprefix("file://"))


def labelled(image: Path, *options: str) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """What `pipeline.predict` makes of it."""
    out = Path("predicted", "-".join(options) or "plain")
    line = [str(image), "--model", "models/voc-res101.safetensors", "--output", str(out), "--device", "cpu", *options]
    assert predict.main(line) == 0
    with Image.open(out / "labels" / f"{image.stem}.png") as picture:
        return np.asarray(picture)


def test_the_loaded_model_labels_as_predict_does_and_refuses_changed_weights(project: Path, tmp_path: Path) -> None:
    import pandas as pd

    model = loaded(logged_folder())
    table = pd.DataFrame({"image": [Path("photo.png").read_bytes()]})
    for params, options in (({}, []), ({"scales": [0.5, 1.0], "flip": True}, ["--scales", "0.5,1.0", "--flip"])):
        answer = model.predict(table, params=params)
        with Image.open(io.BytesIO(answer["label"][0])) as picture:
            label = np.asarray(picture)
        assert answer["classes"][0] == CLASSES
        assert len(np.unique(label)) > 1
        np.testing.assert_array_equal(label, labelled(Path("photo.png"), *options))

    shutil.copytree(logged_folder(), tmp_path / "model")
    with (tmp_path / "model" / "data" / "voc-res101.safetensors").open("r+b") as file:
        file.seek(-1, io.SEEK_END)
        file.write(b"x")
    with pytest.raises(UserError, match="of the weights that were logged"):
        loaded(tmp_path / "model")


@contextmanager
def running(folder: Path, *command: str) -> Iterator[str]:
    """The address of a server of MLflow's, started in `folder` as `mlflow <command> --port ...`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PATH": f"{BIN}:{os.environ['PATH']}", "CUDA_VISIBLE_DEVICES": ""}
    environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    line, log = [str(BIN / "mlflow"), *command, "--port", str(port)], folder / "server.log"
    with log.open("w") as file:
        process = subprocess.Popen(line, stdout=file, stderr=file, env=environment, cwd=folder, start_new_session=True)
    try:
        deadline = time.monotonic() + LONG
        while True:
            with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                break
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, log.read_text()
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait(LONG)


@pytest.fixture
def server(project: Path) -> Iterator[str]:
    """Where the best version of voc-res101 answers, served as the README says."""
    command = ["models", "serve", "-m", "models:/voc-res101@best", "--env-manager", "local"]
    with running(project, *command) as address:
        yield f"{address}/invocations"


def ask(address: str, image: bytes, **params: object) -> Any:
    body: dict[str, object] = {"dataframe_records": [{"image": base64.b64encode(image).decode()}], "params": params}
    request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=LONG) as answer:
        return json.load(answer)


@pytest.mark.slow
@pytest.mark.services
def test_mlflow_models_serve_answers_an_image_with_its_label_map(server: str) -> None:
    wanted: list[tuple[dict[str, object], list[str]]] = [({}, []), ({"scales": [0.5]}, ["--scales", "0.5"])]
    for params, options in wanted:
        (answer,) = ask(server, Path("photo.png").read_bytes(), **params)["predictions"]
        with Image.open(io.BytesIO(base64.b64decode(answer["label"]))) as picture:
            assert picture.mode == "P"
            np.testing.assert_array_equal(np.asarray(picture), labelled(Path("photo.png"), *options))
        assert answer["classes"] == CLASSES

    for image, params, said in (
        (b"no image", {}, "image 0: not an image of a kind that Pillow reads"),
        (Path("photo.png").read_bytes()[:-400], {}, "image 0: cannot be read"),
        (Path("photo.png").read_bytes(), {"scales": [0.0]}, "expected numbers above 0"),
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            ask(server, image, **params)
        assert refused.value.code == 400
        assert said in json.load(refused.value)["message"]


@pytest.mark.slow
@pytest.mark.services
@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("jq")), reason="no curl and jq on this machine")
def test_the_documented_command_line(server: str) -> None:
    command = (
        """printf '{"dataframe_records": [{"image": "%s"}]}' "$(base64 -w0 photo.png)" |"""
        f" curl -s {server} -H 'Content-Type: application/json' -d @- |"
        " jq -r '.predictions[0].label' | base64 -d > label.png"
    )
    subprocess.run(["bash", "-c", command], check=True)
    with Image.open("label.png") as picture:
        np.testing.assert_array_equal(np.asarray(picture), labelled(Path("photo.png")))


@pytest.mark.slow
@pytest.mark.services
def test_a_server_is_sent_the_weights_once(project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    weights = Path("models/voc-res101.safetensors")
    # The server of a cluster, as docs/how-to/cluster.md starts it; jobs call it by a name that it was told.
    page = (Path(__file__).resolve().parents[2] / "docs/how-to/cluster.md").read_text()
    command = shlex.split(re.findall(r"^ +mlflow (server .*)$", page, re.M)[0])
    with running(tmp_path, *command, "--workers", "1") as address:
        address = address.replace("127.0.0.1", "localhost")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
        train(weights)
        evaluate(weights, 0.4375)
        evaluate(weights, 0.5)
        registered = MlflowClient(tracking_uri=address).get_registered_model("voc-res101")
    assert {alias: str(version) for alias, version in registered.aliases.items()} == {"best": "1", "miou-50_00": "1"}
    (sent,) = tmp_path.rglob("*.safetensors")
    assert sent.read_bytes() == weights.read_bytes()
    assert (sent.parent.parent / "MLmodel").is_file()
