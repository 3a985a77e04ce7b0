"""A model served from its file alone: label maps as `predict` makes them, and one line for everything else."""

from __future__ import annotations

import io
import json
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from thin_network import CLASSES, network

from pipeline import predict

ROOT = Path(__file__).resolve().parents[2]
LONG = 300  # seconds; no test waits for them in vain


def photo(height: int, width: int, kind: str = "png") -> bytes:
    pixels = np.random.default_rng(height).integers(0, 255, (height, width, 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind)
    return data.getvalue()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """Folder with the model's file, and address; in another folder than the project's."""
    folder = tmp_path_factory.mktemp("served")
    network(folder / "m.safetensors", 0)
    command = [sys.executable, "-m", "pipeline.serve", "m.safetensors", "--port", "0", "--device", "cpu"]
    limits = ["--megabytes", "0.2", "--megapixels", "0.1"]
    process = subprocess.Popen(
        [*command, *limits], cwd=folder, env={"PYTHONPATH": str(ROOT), "PATH": ""}, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    address = re.search(r"http://[\d.]+:\d+", process.stdout.readline())
    assert address is not None
    yield folder, address[0]
    process.send_signal(signal.SIGTERM)
    process.wait(LONG)


def ask(address: str, data: bytes | Iterator[bytes]) -> tuple[int, bytes]:
    request = urllib.request.Request(address, data)  # an iterator is sent in chunks, without a length
    try:
        with urllib.request.urlopen(request, timeout=LONG) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


@pytest.mark.parametrize(("query", "options"), [("", []), ("?scales=0.8,1&flip=true", ["--scales", "0.8,1", "--flip"])])
def test_the_label_map_is_that_of_predict(server: tuple[Path, str], query: str, options: list[str]) -> None:
    folder, address = server
    (folder / "a.jpg").write_bytes(photo(70, 90, "jpeg"))
    command = [str(folder / "a.jpg"), "--model", str(folder / "m.safetensors"), "--output", str(folder / "out")]
    assert predict.main([*command, "--device", "cpu", *options]) == 0
    status, png = ask(f"{address}/label{query}", (folder / "a.jpg").read_bytes())
    assert status == 200
    with Image.open(io.BytesIO(png)) as found, Image.open(folder / "out/labels/a.png") as wanted:
        assert found.mode == "P"
        assert found.getpalette() == wanted.getpalette()
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted))


def test_it_tells_its_classes(server: tuple[Path, str]) -> None:
    with urllib.request.urlopen(server[1], timeout=LONG) as answer:
        about = json.load(answer)
    assert [entry["name"] for entry in about["classes"]] == CLASSES
    assert (about["void"], about["most_pixels"]) == (255, 100_000)


@pytest.mark.parametrize(
    ("query", "data", "status", "told"),
    [
        ("", b"no image", 400, "image: not an image of a kind that Pillow reads"),
        ("", b"", 400, "image: not an image of a kind that Pillow reads"),
        ("", photo(70, 90)[:-400], 400, "image: cannot be read"),
        ("", photo(400, 300), 413, "image: more than 200000 bytes"),
        ("", photo(400, 300)[:1000], 413, "image: 300 x 400 pixels, expected 100000 at most"),
        ("?scales=0", photo(40, 40), 400, "scales: '0', expected numbers above 0"),
        ("?scales=1,1,1,1,1,1,1,1,1", photo(40, 40), 400, "scales: 9 of them, expected 8 at most"),
        ("?flip=perhaps", photo(40, 40), 400, "flip: 'perhaps', expected true or false"),
        ("?scale=2", photo(40, 40), 400, "scale: not known here"),
    ],
)
def test_bad_input_is_one_line(server: tuple[Path, str], query: str, data: bytes, status: int, told: str) -> None:
    found, answer = ask(f"{server[1]}/label{query}", data)
    error = json.loads(answer)["error"]
    assert (found, error[: len(told)]) == (status, told)
    assert "\n" not in error


def test_a_body_without_a_length_is_cut_off(server: tuple[Path, str]) -> None:
    """It would fill the memory; the server stops reading at its limit."""
    endless = (b"x" * 65536 for _ in range(10_000))
    try:
        status, answer = ask(f"{server[1]}/label", endless)
        assert (status, json.loads(answer)["error"]) == (413, "image: more than 200000 bytes")
    except (urllib.error.URLError, ConnectionError):  # it may hang up while we still write
        assert sum(1 for _ in endless) > 9_000


def test_several_at_once_get_their_own(server: tuple[Path, str]) -> None:
    sizes = [(40 + 4 * n, 50) for n in range(8)]
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda size: ask(f"{server[1]}/label", photo(*size)), sizes))
    for (height, width), (status, png) in zip(sizes, answers, strict=True):
        assert status == 200
        with Image.open(io.BytesIO(png)) as found:
            assert found.size == (width, height)


def test_a_port_that_is_taken_is_one_line(tmp_path: Path) -> None:
    network(tmp_path / "m.safetensors", 0)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        command = [sys.executable, "-m", "pipeline.serve", str(tmp_path / "m.safetensors"), "--port", str(port)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=LONG)
    assert done.returncode == 1
    assert done.stderr == f"error: 127.0.0.1:{port}: Address already in use, expected a free port; set --port\n"
