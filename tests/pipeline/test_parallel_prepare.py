"""Prepare in several processes: the same bytes, the same errors, bounded memory, and nothing left behind."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import made_up_reader
import numpy as np
import pytest
from families import family, wait_for
from made_up_reader import Reader

from pipeline import datasets, graph, prepare, synthetic
from pipeline.config.schema import Rendered
from pipeline.datasets import pool
from pipeline.runtime import cli, machine
from refinenet.atomic import alive
from refinenet.data.split import Schema, Split
from refinenet.data.writer import SplitWriter, write_split
from refinenet.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
HELPERS = ROOT / "tests" / "helpers"
SCHEMA = Schema("made", "train", made_up_reader.CLASSES, tuple((i, i, i) for i in range(4)))


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """`made(cores, **options)`: prepare the made-up data set with so many processes."""
    (tmp_path / "settings.json").write_text('{"prepare": {"ade20k": {}}}')
    (tmp_path / "data/raw/ade20k").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "SMALL", 0)

    def run(cores: int, **options: Any) -> None:
        monkeypatch.setattr(datasets, "load", lambda name: made_up_reader.dataset(**options))
        monkeypatch.setenv("PIPELINE_CORES", str(cores))
        prepare.run("ade20k")

    return run


def written(folder: Path = Path("data/ade20k")) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_same_bytes_whoever_reads(made: Callable[..., None]) -> None:
    made(1, count=70)
    alone = written()
    assert list(alone) == ["test.arrow", "train.arrow", "val.arrow"]
    made(2, count=70)
    assert written() == alone
    made(3, count=70)
    assert written() == alone
    reader = Reader(Path("raw"))
    for part in ("train", "val", "test"):
        split = Split(Path(f"data/ade20k/{part}.arrow"))
        assert [sample.name for sample in split] == [f"{part}{i:04}" for i in range(70)]
        for sample in split:
            image, label = reader.read(part, sample.name)
            np.testing.assert_array_equal(sample.image, image)
            np.testing.assert_array_equal(sample.label, label)


def test_the_first_error_of_the_list_wins(made: Callable[..., None]) -> None:
    """Whichever process meets which error first, it is the one that a single process stops at."""
    wrong = {"train0009": "late", "train0011": "at once", "train0010": "label", "train0030": "label"}
    for cores in (1, 2, 3):
        with pytest.raises(UserError, match=r"^data/raw/ade20k!train0009: late$"):
            made(cores, count=60, wrong=wrong)
    for cores in (1, 2):
        with pytest.raises(UserError, match=r"^data/raw/ade20k!train0010: train0010: label 4 is outside the 4 classes"):
            made(cores, count=60, wrong={"train0010": "label", "train0011": "at once"})
    assert not Path("data/ade20k").exists()
    assert os.listdir("data") == ["raw"]  # noqa: PTH208


def test_other_errors_of_a_worker(made: Callable[..., None]) -> None:
    with pytest.raises(KeyError, match="a mistake in the code") as error:
        made(2, count=20, wrong={"train0003": "bug"})
    assert "made_up_reader.py" in str(error.value.__cause__), "the worker's own traceback"
    with pytest.raises(UserError, match=r"^data/raw/ade20k: a process that read train00\d\d or one soon after was "):
        made(2, count=20, wrong={"train0003": "exit"})
    assert os.listdir("data") == ["raw"]  # noqa: PTH208


def test_a_worker_is_killed(tmp_path: Path) -> None:
    """As the system does where memory runs out."""
    reader = Reader(tmp_path, 2000, seconds=0.001)

    def kill_one(read: pool.Read) -> None:
        with write_split(tmp_path / "train.arrow", SCHEMA) as writer:
            for done, example in enumerate(read(SCHEMA, reader.names("train"))):
                writer.put(*example[:3])
                if done == 20:
                    multiprocessing.active_children()[-1].kill()

    message = rf"^{tmp_path}: a process that read train.* was killed or crashed; .* PIPELINE_CORES=1 needs the least$"
    with pool.reading(reader, 2) as read, pytest.raises(UserError, match=message):
        kill_one(read)
    assert os.listdir(tmp_path) == []  # noqa: PTH208
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("name", ["voc", "nyud", "sunrgbd", "coco"])
def test_processes_do_not_move_files_under_each_other(name: str, tmp_path: Path) -> None:
    """Forked, they share the position in each file that was open before: a .tar, unpacked bytes, HDF5, objects."""
    synthetic.render(name, Rendered(train=6, val=1, height=120, width=160), tmp_path)
    dataset = datasets.load(name)
    schema = Schema(name, "train", dataset.CLASSES, dataset.PALETTE)
    with dataset.Reader(tmp_path) as reader, pool.reading(reader, 4) as read:
        expected = {image: reader.read("train", image) for image in reader.names("train")}
        images = list(expected) * 60
        for image, example in zip(images, read(schema, images), strict=True):
            np.testing.assert_array_equal(example.image, expected[image][0])
            np.testing.assert_array_equal(example.label, expected[image][1])


def test_a_full_disk(capsys: pytest.CaptureFixture[str]) -> None:
    reader = Reader(Path("raw"), 20, side=100)

    def write() -> None:
        writer = SplitWriter(Path("/dev/full"), SCHEMA)
        with pool.reading(reader, 2) as read:
            for example in read(SCHEMA, reader.names("train")):
                writer.put(*example[:3])

    assert cli.run_cli(write) == 1
    assert capsys.readouterr().err == "error: disk: No space left on device\n"
    assert multiprocessing.active_children() == []


def begin(folder: Path, count: int) -> subprocess.Popen[str]:
    """A process that prepares slowly, with two workers, in a process group of its own."""
    code = f"import made_up_reader; made_up_reader.prepare(count={count}, seconds=0.01)"
    path = os.pathsep.join([str(HELPERS), str(ROOT)])
    environment = {**os.environ, "PIPELINE_CORES": "2", "PYTHONPATH": path}
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=folder, env=environment, text=True, stderr=subprocess.PIPE, process_group=0
    )


@pytest.mark.parametrize(
    ("how", "moment"),
    [(signal.SIGKILL, "working"), (signal.SIGTERM, "working"), (signal.SIGINT, "working"), (signal.SIGINT, "starting")],
)
def test_ended_from_outside(how: signal.Signals, moment: str, tmp_path: Path) -> None:
    """No process stays and nothing is under the final name. Ctrl-C reaches every process and is one line."""
    process = begin(tmp_path, 10_000)
    wait_for(lambda: len(list(family(process.pid))) >= (2 if moment == "working" else 1))
    if moment == "working":
        wait_for(lambda: any(path.stat().st_size for path in tmp_path.glob("data/.ade20k.*.part/.train*")))
    members = list(family(process.pid))
    if how == signal.SIGINT:
        os.killpg(process.pid, how)
    else:
        process.send_signal(how)
    _, errors = process.communicate(timeout=300)
    wait_for(lambda: not any(map(alive, members)))
    assert (process.returncode, errors) == ((130, "interrupted\n") if how == signal.SIGINT else (-how, ""))
    assert not (tmp_path / "data/ade20k").exists()
    if how == signal.SIGINT:
        assert os.listdir(tmp_path / "data") == ["raw"]  # noqa: PTH208


def peaks(folder: Path, count: int) -> tuple[int, int]:
    """Peak memory in MB of a process that prepares `count` images with two workers, and of its largest worker."""
    code = (
        "import atexit, resource, made_up_reader\n"
        "peak = lambda who: resource.getrusage(who).ru_maxrss // 1024\n"
        "atexit.register(lambda: print([peak(resource.RUSAGE_SELF), peak(resource.RUSAGE_CHILDREN)]))\n"
        f"made_up_reader.prepare(count={count}, side=180)"
    )
    path = os.pathsep.join([str(HELPERS), str(ROOT)])
    environment = {**os.environ, "PIPELINE_CORES": "2", "PYTHONPATH": path}
    folder.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, check=True, capture_output=True, text=True
    )
    _, numbers = done.stdout.splitlines()  # the stage's own line, ours
    own, worker = json.loads(numbers)
    return own, worker


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    """The 1,900 images more are 250 MB."""
    few, many = peaks(tmp_path / "few", 34), peaks(tmp_path / "many", 667)  # of each of three splits
    assert abs(many[0] - few[0]) < 8
    assert abs(many[1] - few[1]) < 16


def test_how_many_processes(
    made: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("PIPELINE_CORES", raising=False)
    assert machine.cores() == len(os.sched_getaffinity(0))
    for wrong in ("0", "all", "-1", ""):
        monkeypatch.setenv("PIPELINE_CORES", wrong)
        with pytest.raises(UserError, match=f"^PIPELINE_CORES is '{wrong}', expected a whole number from 1$"):
            machine.cores()
    started: list[int] = []
    real = pool.reading
    monkeypatch.setattr(
        prepare, "reading", lambda reader, count, broken: (started.append(count), real(reader, count))[1]
    )
    monkeypatch.setattr(prepare, "SMALL", 100)
    made(2, count=33)  # of each of three splits
    made(2, count=34)
    assert started == [1, 2]


def test_all_cores_under_snakemake(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for archives that are drawn: with one core each, seven small data sets are prepared side by side."""
    from dvc.repo import Repo

    monkeypatch.chdir(ROOT)
    stages = [stage for stage in graph.stages(Repo(".")) if stage.command.startswith("python -m pipeline.prepare ")]
    assert stages
    assert {(stage.drawn, stage.cores(8)) for stage in stages} <= {(True, 1), (False, 8)}
    assert {dataclasses.replace(stage, drawn=False).cores(8) for stage in stages} == {8}
