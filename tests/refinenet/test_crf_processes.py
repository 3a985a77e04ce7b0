"""Dense CRFs in processes beside the network: the same labels in the same order, bounded, and nothing left behind.

By a stand-in for the package where it is not built (tests/helpers/made_up_crf), and to be slow where a test needs time.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from families import family, wait_for
from stand_in import FOLDER, made_up_crf
from thin_network import network

from refinenet.atomic import alive
from refinenet.config import Protocol
from refinenet.data.split import Array
from refinenet.errors import UserError
from refinenet.inference.crf_processes import AHEAD, CRFProcesses
from refinenet.inference.predictor import Predictor

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers"
PROTOCOLS = {"plain": Protocol((1.0,)), "crf": Protocol((1.0,), crf=True), "other": Protocol((0.5, 1.0), crf=True)}
ONLY_CRF = {"it": Protocol((1.0,), crf=True)}


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # two that share a busy core with these processes wait for each other


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("crf") / "thin.safetensors"
    network(path, 0)
    return path


@pytest.fixture
def made_up(tmp_path: Path) -> Iterator[Path]:
    """The stand-in as the package; returns the folder where it notes who did what."""
    with made_up_crf(tmp_path / "notes"):
        yield tmp_path / "notes"


def pictures(count: int) -> list[Array]:
    """Noise of several sizes; the first value is the image's number."""
    rng = np.random.default_rng(0)
    found = [rng.integers(0, 256, (40 + 3 * (i % 3), 60 - 7 * (i % 2), 3), dtype=np.uint8) for i in range(count)]
    for index, image in enumerate(found):
        image[0, 0, 0] = index
        image.setflags(write=False)  # as an image of a split
    return found


def labelled(predictor: Predictor, batches: list[list[Array]], count: int) -> list[dict[str, Array]]:
    with CRFProcesses(count) as crf:
        found = [labels for answers in predictor.stream(batches, PROTOCOLS, crf) for labels in answers]
    assert multiprocessing.active_children() == []
    return [{name: label.numpy() for name, label in labels.items()} for labels in found]


@pytest.mark.parametrize("library", ["made up", "real"])
def test_the_same_labels_for_any_number_of_processes(library: str, model: Path, request: pytest.FixtureRequest) -> None:
    """As `many` gives them in one process, whatever the batch; each image by another process than this one."""
    if library == "made up":
        notes: Path | None = request.getfixturevalue("made_up")
    else:
        pytest.importorskip("pydensecrf.densecrf", reason="pydensecrf2 is not built here")
        notes = None
    images = pictures(7)
    for average, counts in (("probability", (1, 2, 3)), ("log", (2,))):
        predictor = Predictor(model, "cpu", average=average)  # type: ignore[arg-type]
        wanted = [predictor.under_protocols(image, PROTOCOLS) for image in images]
        assert any(not np.array_equal(labels["plain"], labels["crf"]) for labels in wanted)
        for count in counts:
            if notes:
                for note in notes.iterdir():
                    note.unlink()
            found = labelled(predictor, [[image] for image in images], count)
            for ours, theirs in zip(found, wanted, strict=True):
                for name in PROTOCOLS:
                    np.testing.assert_array_equal(ours[name], theirs[name], strict=True)
            if notes:
                names = [note.name.split(".") for note in notes.iterdir()]
                assert {int(index) for index, _ in names} == set(range(7))
                processes = {int(process) for _, process in names}
                assert os.getpid() not in processes
                assert len(processes) <= count
    # More of one size in a batch than there are slots: a batch waits for itself.
    same = [images[0]] * 3
    alone = predictor.many(same, PROTOCOLS)
    found = labelled(predictor, [same], 1)
    assert all(np.array_equal(a[name], b[name]) for a, b in zip(found, alone, strict=True) for name in PROTOCOLS)


def test_the_network_goes_on_but_not_far(
    model: Path, made_up: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While CRFs wait, the next images are computed, up to the slots; without a CRF none is."""
    monkeypatch.setenv("MADE_UP_CRF_SECONDS", "600")
    monkeypatch.setenv("MADE_UP_CRF_GATE", str(tmp_path / "gate"))
    predictor = Predictor(model, "cpu")
    most = AHEAD * 2 + 1  # the last one waits for the slot of the first
    begun = 0

    def each() -> Iterator[list[Array]]:
        nonlocal begun
        for image in pictures(12):
            begun += 1
            if begun == most:
                (tmp_path / "gate").touch()
            yield [image]

    with CRFProcesses(2) as crf:
        ahead = [begun - done for done, _ in enumerate(predictor.stream(each(), ONLY_CRF, crf))]
    assert ahead[0] == max(ahead) == most
    begun = 0
    with CRFProcesses(2) as crf:
        plain = predictor.stream(each(), {"it": Protocol((1.0,))}, crf)
        assert {begun - done for done, _ in enumerate(plain)} == {1}
        assert multiprocessing.active_children() == []  # none was started


def test_a_process_is_killed(model: Path, made_up: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the system does where memory runs out. What was labelled before stays labelled."""
    monkeypatch.setenv("MADE_UP_CRF_SECONDS", "0.05")
    done = 0

    def label() -> None:
        nonlocal done
        with CRFProcesses(2) as crf:
            for _ in Predictor(model, "cpu").stream(([image] for image in pictures(200)), ONLY_CRF, crf):
                done += 1
                if done == 3:
                    multiprocessing.active_children()[-1].kill()

    with pytest.raises(UserError, match=r"^a process of the dense CRF was killed or crashed; .* needs the least$"):
        label()
    assert 3 <= done < 200
    assert multiprocessing.active_children() == []


def test_an_error_in_a_process(made_up: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes with the process's own traceback; and an error of this one does not wait for images in flight."""
    image = pictures(1)[0]
    probabilities = np.full((3, *image.shape[:2]), 1 / 3, np.float32)
    monkeypatch.setenv("MADE_UP_CRF_SECONDS", "a word")
    with CRFProcesses(1) as crf:
        refinement = crf.submit(image, probabilities)
        with pytest.raises(ValueError, match="could not convert string to float: 'a word'") as error:
            refinement.labels()
    assert "densecrf.py" in str(error.value.__cause__)
    monkeypatch.setenv("MADE_UP_CRF_SECONDS", "600")
    begin = time.monotonic()

    def fail() -> None:
        with CRFProcesses(1) as crf:
            crf.submit(image, probabilities)
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert time.monotonic() - begin < 120
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize(
    ("how", "moment"),
    [(signal.SIGKILL, "working"), (signal.SIGTERM, "working"), (signal.SIGINT, "working"), (signal.SIGINT, "starting")],
)
def test_ended_from_outside(how: signal.Signals, moment: str, model: Path, tmp_path: Path) -> None:
    """No process stays, though each is in the middle of a second; Ctrl-C reaches every process and is one line."""
    path = os.pathsep.join([str(FOLDER), str(HELPERS), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path, "MADE_UP_CRF_SECONDS": "1", "MADE_UP_CRF_NOTES": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, str(HELPERS / "slow_crf.py"), str(model)],
        env=environment,
        text=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        process_group=0,
    )
    # The resource tracker of multiprocessing is the first of its children, and ends with the last of them.
    wait_for(lambda: len(list(family(process.pid))) >= (3 if moment == "working" else 2))
    if moment == "working":
        wait_for(lambda: len(list(tmp_path.iterdir())) >= 2)
    members = list(family(process.pid))
    if how == signal.SIGINT:
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    _, errors = process.communicate(timeout=300)
    wait_for(lambda: not any(map(alive, members)))
    assert process.returncode == (130 if how == signal.SIGINT else -how)
    if how == signal.SIGINT:
        assert errors == "interrupted\n"
