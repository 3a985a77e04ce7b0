"""A browser finds in MLflow's pages what `track` recorded."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from thin_network import network

from pipeline.runtime.dvc_md5 import dvc_md5
from pipeline.tracking import track

if TYPE_CHECKING:
    from selenium.webdriver import Chrome

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
LONG = 300  # seconds; no test waits for them in vain
QUIET = ["disable-quic", "no-first-run", "disable-background-networking", "disable-component-update", "disable-sync"]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="no chromium and chromedriver on this machine"),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project folder with two trainings and their evaluations in mlflow.db."""
    from PIL import Image

    root = tmp_path_factory.mktemp("project")
    (root / "data").mkdir()
    (root / "data" / "train.arrow").write_bytes(b"images")
    network(root / "model.safetensors", 0)
    network(root / "other.safetensors", 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        with track("train", "voc-res101", "voc", {"crop": 96}, {"training data": root / "data"}) as run:
            for step in range(50):
                run.log(step, loss=3 / (step + 1))
            run.wrote(root / "model.safetensors")
        with track(
            "evaluate", "voc-res101", "voc", {}, {}, weights=root / "model.safetensors", headline="single"
        ) as run:
            run.scores({"single/mean_iou": 0.4375, "single/iou/dining table": 0.625})
            Image.linear_gradient("L").save(root / "0.png")
            run.artifact(root / "0.png", "predictions")
        with track("train", "voc-res152", "voc", {"crop": 128}, {"training data": root / "data"}) as run:
            run.wrote(root / "other.safetensors")
        with track(
            "evaluate", "voc-res152", "voc", {}, {}, weights=root / "other.safetensors", headline="single"
        ) as run:
            run.scores({"single/mean_iou": 0.5625})
    return root


@pytest.fixture(scope="module")
def server(project: Path) -> Iterator[str]:
    """The address of `python -m pipeline.tracking ui` over that database."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    command = [sys.executable, "-m", "pipeline.tracking", "ui", "--port", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "MLFLOW_TRACKING_URI"}
    with (project / "ui.log").open("w") as log:
        process = subprocess.Popen(
            command, cwd=project, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment
        )
    try:
        deadline = time.monotonic() + LONG
        while True:
            with suppress(OSError), urllib.request.urlopen(f"{address}/health", timeout=5) as answer:
                if answer.status == 200:
                    break
            assert process.poll() is None, (project / "ui.log").read_text()
            assert time.monotonic() < deadline, (project / "ui.log").read_text()
            time.sleep(0.2)
        yield address
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(LONG)


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chrome]:
    from selenium.webdriver import Chrome, ChromeOptions
    from selenium.webdriver.chrome.service import Service

    options = ChromeOptions()
    options.binary_location = str(CHROMIUM)
    profile = tmp_path_factory.mktemp("chromium")
    switches = ["headless=new", "no-sandbox", "disable-gpu", "window-size=1500,1000", f"user-data-dir={profile}"]
    for switch in switches + QUIET:
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = Chrome(options=options, service=Service(DRIVER))
    chrome.set_page_load_timeout(LONG)
    try:
        yield chrome
    finally:
        chrome.quit()


def wait_until(browser: Chrome, true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + LONG
    while not true():
        assert time.monotonic() < deadline, browser.find_element("tag name", "body").text
        time.sleep(0.2)


def text_of(browser: Chrome, address: str | None, *wanted: str) -> str:
    """What the page at `address` (None: the open one) shows, once it shows all of `wanted`."""
    if address:
        browser.get(address)
    shown = ""

    def complete() -> bool:
        nonlocal shown
        shown = browser.find_element("tag name", "body").text
        return all(text in shown for text in wanted)

    wait_until(browser, complete)
    return shown


def test_the_pages_show_what_was_recorded(project: Path, server: str, browser: Chrome, tmp_path: Path) -> None:
    from mlflow import MlflowClient
    from selenium.webdriver.common.by import By

    client = MlflowClient(tracking_uri=f"sqlite:///{project}/mlflow.db")
    experiment = client.get_experiment_by_name("voc")
    assert experiment
    recorded = {run.info.run_name: run.info.run_id for run in client.search_runs([experiment.experiment_id])}
    pages = f"{server}/#/experiments/{experiment.experiment_id}/runs"

    shown = text_of(browser, pages, "voc-res101", "voc-res152", "4 matching runs")
    assert "evaluate voc-res101" not in shown  # folded under its training
    # The upper one is the later training.
    browser.find_elements(By.CSS_SELECTOR, ".ag-row button[data-component-id*='runnamecellrenderer']")[-1].click()
    text_of(browser, None, "evaluate voc-res101")
    browser.save_screenshot(str(tmp_path / "runs.png"))

    training = f"{pages}/{recorded['voc-res101']}"
    text_of(browser, training, "crop", "96", "loss", "0.06", dvc_md5(project / "data"), "evaluate voc-res101")
    browser.save_screenshot(str(tmp_path / "training.png"))
    text_of(browser, f"{training}/model-metrics", "loss")
    wait_until(browser, lambda: bool(browser.find_elements(By.CSS_SELECTOR, ".js-plotly-plot path.js-line")))
    browser.save_screenshot(str(tmp_path / "curve.png"))

    evaluation = f"{pages}/{recorded['evaluate voc-res101']}"
    md5 = dvc_md5(project / "model.safetensors")
    text_of(browser, evaluation, "Parent run", "single/mean_iou", "0.4375", "single/iou/dining table", md5)
    browser.save_screenshot(str(tmp_path / "evaluation.png"))
    text_of(browser, f"{evaluation}/artifacts/predictions/0.png", "0.png")
    picture = "return [...document.images].some(image => image.naturalWidth == 256 && image.naturalHeight == 256)"
    wait_until(browser, lambda: bool(browser.execute_script(picture)))
    browser.save_screenshot(str(tmp_path / "artifact.png"))

    # Two are MLflow's own: it asks who is signed in, also where nobody can be, and its tables resize while they draw.
    log = browser.get_log("browser")  # type: ignore[no-untyped-call]
    errors = [entry["message"] for entry in log if entry["level"] == "SEVERE"]
    assert [message for message in errors if not re.search(r"/users/current|ResizeObserver loop", message)] == []


def test_trainings_and_models_can_be_compared(project: Path, server: str, browser: Chrome, tmp_path: Path) -> None:
    from urllib.parse import quote

    from mlflow import MlflowClient

    client = MlflowClient(tracking_uri=f"sqlite:///{project}/mlflow.db")
    experiment = client.get_experiment_by_name("voc")
    assert experiment
    runs = {run.info.run_name: run.info.run_id for run in client.search_runs([experiment.experiment_id])}
    chosen = quote(json.dumps([runs["voc-res101"], runs["voc-res152"]]))
    address = f"{server}/#/compare-runs?runs={chosen}&experiments={quote(json.dumps([experiment.experiment_id]))}"
    text_of(browser, address, "crop", "96", "128", "mean_iou", "0.438", "0.563")
    browser.save_screenshot(str(tmp_path / "compare.png"))

    page = f"{server}/#/experiments/{experiment.experiment_id}"
    text_of(browser, f"{page}/models", "voc-res101", "voc-res152", "Ready")
    browser.save_screenshot(str(tmp_path / "models.png"))

    text_of(browser, f"{server}/#/models/voc-res101", "Version 1", "best", "miou-43_75")
    browser.save_screenshot(str(tmp_path / "registered.png"))
    version = f"{server}/#/models/voc-res101/versions/1"
    text_of(browser, version, "43.75 % mean IoU, single, voc", "weights.md5", "Inputs (1)", "Outputs (2)")
    browser.save_screenshot(str(tmp_path / "version.png"))
