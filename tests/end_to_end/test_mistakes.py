"""What a user gets wrong, seen from the command line: one line that says what, exit code 1, nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import fake_run
import pytest
import tiny_archives
import yaml

from pipeline import download, prepare, tabulate, weights

ROOT = Path(__file__).resolve().parents[2]
EXPERIMENT, DATA, BACKBONE = "person-res50", "person", "resnet50"
VOC, SBD = "VOCtrainval_11-May-2012.tar", "benchmark.tgz"
TINY: dict[str, Any] = {
    "base": "mini",
    "rendered": {"train": 4, "val": 2, "height": 64, "width": 80},
    "train": {"steps": 4, "batch_size": 2, "crop": 48},
}
# The shell of whoever runs the tests decides none of these; no GPU is seen even where there is one.
UNSET = ("DVC_STAGE", "PIPELINE_ENGINE", "RANK", "MLFLOW_TRACKING_URI", "VOC", "CITYSCAPES")
ENVIRONMENT = {key: value for key, value in os.environ.items() if key not in UNSET}
ENVIRONMENT |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "-1", "OMP_NUM_THREADS": "1"}


# Seconds, of a machine that has other jobs as well, for what takes a few on an idle one: no test waits for it in vain.
PATIENCE = 300


def command(*words: str) -> list[str]:
    return [sys.executable, "-m", f"pipeline.{words[0]}", *words[1:]]


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """Run `python -m pipeline.<words>` in the working folder."""
    return subprocess.run(command(*words), env=ENVIRONMENT, capture_output=True, text=True, timeout=PATIENCE)


def files() -> dict[str, bytes]:
    """Every file below the working folder but locks, with its content, and folders under a name for unfinished ones."""
    paths = [path for path in Path().rglob("*") if path.suffix != ".lock"]
    unfinished = {str(path): b"" for path in paths if path.is_dir() and path.suffix == ".part"}
    return unfinished | {str(path): path.read_bytes() for path in paths if path.is_file()}


def refused(message: str, *words: str) -> None:
    """The command ends with 1 and one line, in which `message` is found, and leaves every file as it was."""
    before = files()
    try:
        done = run(*words)
    except subprocess.TimeoutExpired:
        pytest.fail(f"`{' '.join(words)}` does not end")
    lines = done.stderr.splitlines()
    assert (done.returncode, len(lines), done.stdout) == (1, 1, ""), f"exit code {done.returncode}\n{done.stderr}"
    assert re.search(f"^error: {message}", lines[0]), lines[0]
    assert files() == before


def copy_project(folder: Path) -> None:
    shutil.copy(ROOT / "params.yaml", folder)
    shutil.copytree(ROOT / "profiles", folder / "profiles")


def use(profile: str, content: str | dict[str, Any] | None = None) -> None:
    """Name `profile` in params.yaml; with `content`, write it."""
    params = Path("params.yaml").read_text()
    Path("params.yaml").write_text(re.sub(r"(?m)^profile: .*$", f"profile: {profile}", params))
    if content is not None:
        text = content if isinstance(content, str) else yaml.safe_dump(content)
        Path(f"profiles/{profile}.yaml").write_text(text)


def cut(path: Path) -> None:
    """Leave the first 60 % of a file."""
    os.truncate(path, path.stat().st_size * 6 // 10)


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: params.yaml and profiles/, as cloned."""
    copy_project(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose person data and backbone are there; the tests take copies."""
    folder = tmp_path_factory.mktemp("prepared")
    copy_project(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        use("tiny", TINY)
        download.run(DATA)
        prepare.run(DATA)
        weights.run(BACKBONE)
    return folder


@pytest.fixture
def trainable(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder: a copy of `prepared`."""
    folder = tmp_path / "project"
    shutil.copytree(prepared, folder)
    monkeypatch.chdir(folder)
    return folder


# What is changed in params.yaml -> what the line says.
PARAMS = {
    "key": ("profile: mini", "profil: mini", r"params\.yaml: (unknown key profil|key profile is missing)"),
    "key of an experiment": ("pools: 4}", "pool: 4}", r"params\.yaml: unknown key experiments\.[\w-]+\.pool"),
    "profile": (
        "profile: mini",
        "profile: maxi",
        r"params\.yaml: profile is 'maxi', .* "
        r"there are evening, evening-ablation, fit, learning, mini, modern, own, paper",
    ),
    "data set": ("  - voc\n", "  - vok\n", r"profiles/mini\.yaml: sources\.vok is missing"),
    "YAML": ("datasets:", "datasets: [", r"params\.yaml: not YAML: "),
}


@pytest.mark.parametrize("mistake", PARAMS)
def test_params(project: Path, mistake: str) -> None:
    right, wrong, message = PARAMS[mistake]
    text = Path("params.yaml").read_text()
    assert right in text
    Path("params.yaml").write_text(text.replace(right, wrong))
    refused(message, "settings")


# What a profile `lab` says beside `base: mini` -> what the line says.
PROFILES: dict[str, tuple[str, str]] = {
    "key": ("thread: 4", r"profiles/lab\.yaml: unknown key thread"),
    "key of train": ("train: {stepz: 3}", r"profiles/lab\.yaml: .*unknown key .*stepz"),
    "key of network": ("network: {widht: 4}", r"profiles/lab\.yaml: .*unknown key .*widht"),
    "key of rendered": ("rendered: {trian: 4}", r"profiles/lab\.yaml: unknown key rendered\.trian"),
    "key of a source": (
        "sources: {voc: {a.tar: {ulr: 'file:///a.tar'}}}",
        r"profiles/lab\.yaml: .*sources\.voc\.\S*a\.tar.*(ulr|url is missing)",
    ),
    "key of a data set": ("datasets: {voc: {trian: {steps: 3}}}", r"profiles/lab\.yaml: .*datasets\.voc\.trian"),
    "data set in datasets": ("datasets: {vok: {train: {steps: 3}}}", r"profiles/lab\.yaml: .*datasets\.vok"),
    "data set in sources": ("sources: {vok: rendered}", r"profiles/lab\.yaml: .*sources\.vok"),
    "backbone in weights": ("weights: {resnet18: seeded}", r"profiles/lab\.yaml: .*weights\.resnet18"),
    "no sources": ("sources:", r"profiles/lab\.yaml: .*sources"),
    "base": ("base: maxi", r".*profiles/maxi\.yaml.*no such file"),
    "its own base": ("base: lab", r"profiles/lab\.yaml: .*base"),
    "number of steps": ("train: {steps: 0}", r"profiles/lab\.yaml: .*steps is 0, expected 1 or more"),
    "device": ("device: gpu", r"profiles/lab\.yaml: .*device is '?gpu'?.*cpu"),
    "threads": ("threads: 0", r"profiles/lab\.yaml: .*threads is 0.*1"),
    "seed": ("seed: -1", r"profiles/lab\.yaml: .*seed is -1.*0"),
    "no scale to test at": (
        "evaluate: {protocols: {single: {scales: []}}}",
        r"profiles/lab\.yaml: .*scales.*expected",
    ),
    "scale 0 to test at": (
        "evaluate: {protocols: {single: {scales: [0]}}}",
        r"profiles/lab\.yaml: .*scales.*expected",
    ),
}


@pytest.mark.parametrize("mistake", PROFILES)
def test_profile(project: Path, mistake: str) -> None:
    wrong, message = PROFILES[mistake]
    use("lab", wrong if wrong.startswith("base:") else f"base: mini\n{wrong}\n")
    refused(message, "settings")


def test_a_wrong_key_stops_a_stage_that_is_started_alone(project: Path) -> None:
    use("lab", {"base": "mini", "train": {"stepz": 3}})
    refused(r"profiles/lab\.yaml: .*unknown key .*stepz", "prepare", DATA)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        ("download", "voc, context, person"),
        ("prepare", "voc, context, person"),
        ("weights", "resnet50, resnet101, resnet152"),
        ("train", "`refinenet trace` lists them"),
        ("evaluate", "`refinenet trace` lists them"),
        ("tabulate", "person, ablation, nyud"),
    ],
)
def test_unknown_name(project: Path, stage: str, expected: str) -> None:
    refused(f".*'vok'.* {expected}", stage, "vok")


def lacks(message: str) -> None:
    """`preflight` says that this is missing, ends with 1, and leaves every file as it was."""
    before = files()
    done = run("preflight")
    assert done.returncode == 1
    assert re.search(f"(?m)^  MISSING  {message}", done.stdout), done.stdout
    assert re.fullmatch(r"error: profiles/\w+\.yaml: \d+ missing, see above\n", done.stderr)
    assert files() == before


def test_the_paper_without_a_gpu(project: Path) -> None:
    use("paper")
    lacks(r"device +device is cuda, but this machine has no GPU")


def test_archives_from_the_network_without_a_network(project: Path) -> None:
    # .invalid is a domain that never resolves (RFC 2606).
    use("lab", {"base": "mini", "sources": {"voc": {VOC: {"url": "https://archives.invalid/voc.tar"}}}})
    lacks(rf"hosts +voc: {VOC}: no host answers: archives\.invalid \(.*\)$")


def test_checksum(project: Path) -> None:
    tiny_archives.pack(tiny_archives.voc()[0], Path("lab"))
    use("lab", {"base": "mini", "sources": {"voc": {VOC: {"url": f"file://lab/{VOC}", "md5": "0" * 32}}}})
    refused(rf"{VOC}: .*md5 [0-9a-f]{{32}} found, 0{{32}} expected", "download", "voc")


def test_no_archive_where_the_profile_says(project: Path) -> None:
    use("lab", {"base": "mini", "sources": {"voc": {VOC: {"url": f"file://lab/{VOC}"}}}})
    refused(rf"{VOC}: lab/{VOC}: no such file", "download", "voc")


def test_prepare_before_download(project: Path) -> None:
    refused(r"data/raw/voc: no such folder; `python -m pipeline\.download voc` makes it", "prepare", "voc")


@pytest.mark.parametrize(
    ("name", "archive", "message"),
    [
        ("voc", VOC, ".*truncated"),
        ("voc", SBD, ": not a whole gzip stream"),
        ("ade20k", "ADEChallengeData2016.zip", ": not a whole zip archive"),
        ("nyud", "nyu_depth_v2_labeled.mat", ".*truncated"),
    ],
)
def test_truncated_archive(project: Path, name: str, archive: str, message: str) -> None:
    raw = Path("data/raw") / name
    tiny_archives.pack(tiny_archives.BUILD[name]()[0], raw)
    cut(raw / archive)
    refused(f"{raw / archive}{message}", "prepare", name)


def test_label_outside_the_classes(project: Path) -> None:
    archives, truth = tiny_archives.voc()
    label = truth["val"]["c"][1].copy()
    label[0, 0] = 21
    # The last image of the last split: all others have been written by then.
    member = "VOCdevkit/VOC2012/SegmentationClass/c.png"
    archives[VOC][member] = tiny_archives.png(label, palette=True)
    tiny_archives.pack(archives, Path("data/raw/voc"))
    refused(rf"data/raw/voc/{VOC}!{member}: .*21 is outside the 21 classes of voc \(0 to 20, or 255", "prepare", "voc")


def test_train_and_evaluate_before_prepare(project: Path) -> None:
    refused(rf"data/{DATA}/train\.arrow: no such file; .*prepare", "train", EXPERIMENT)
    refused(rf"data/{DATA}/val\.arrow: no such file; .*prepare", "evaluate", EXPERIMENT)


def test_train_before_weights(trainable: Path) -> None:
    start = trainable / "weights" / f"{BACKBONE}.safetensors"
    start.unlink()
    refused(rf"weights/{BACKBONE}\.safetensors: no such file; .*weights", "train", EXPERIMENT)


def test_train_from_weights_that_were_cut_short(trainable: Path) -> None:
    cut(trainable / "weights" / f"{BACKBONE}.safetensors")
    refused(rf"weights/{BACKBONE}\.safetensors: .*cut short", "train", EXPERIMENT)


def test_train_on_a_split_that_was_cut_short(trainable: Path) -> None:
    cut(trainable / "data" / DATA / "train.arrow")
    refused(rf"data/{DATA}/train\.arrow: .*cut short", "train", EXPERIMENT)


def test_train_on_a_gpu_that_is_missing(trainable: Path) -> None:
    use("tiny", {**TINY, "device": "cuda"})
    refused(
        rf"{EXPERIMENT}: device is cuda, but this machine has no GPU; `profile: mini` needs none", "train", EXPERIMENT
    )


def test_evaluate_before_train(trainable: Path) -> None:
    refused(rf"models/{EXPERIMENT}\.safetensors: no such file; .*train", "evaluate", EXPERIMENT)


def test_evaluate_a_model_that_was_cut_short(trainable: Path) -> None:
    from refinenet.model.network import RefineNet, save

    model = Path("models") / f"{EXPERIMENT}.safetensors"
    save(RefineNet(7, backbone=BACKBONE, stem=3, width=8), model, {"classes": ["a"] * 7, "dataset": DATA})
    cut(model)
    refused(rf"{model}: .*cut short", "evaluate", EXPERIMENT)


# What is wrong in metrics/voc/voc-res152.json -> what the line says.
METRICS: dict[str, tuple[Any, str]] = {
    "above 1": (74.3, r"74\.3: Input should be less than or equal to 1"),
    "not a number": (float("nan"), r"nan: Input should be less than or equal to 1"),
    "text": ("0.7", r"'0\.7': Input should be a valid number"),
    "missing": (None, r"None: Input should be a valid number"),
}


@pytest.mark.parametrize("mistake", METRICS)
def test_broken_number_in_the_metrics(project: Path, mistake: str) -> None:
    number, message = METRICS[mistake]
    fake_run.write_metrics(project, tabulate.experiments("voc"))
    path = Path("metrics/voc/voc-res152.json")
    metrics = json.loads(path.read_text())
    for protocol in metrics["protocols"].values():
        protocol["mean_iou"] = number
    path.write_text(json.dumps(metrics))
    refused(
        rf"{path}: not the metrics of voc-res152 .*: protocols\.(multi|single)\.mean_iou is {message}",
        "tabulate",
        "voc",
    )


def test_missing_and_half_metrics(project: Path) -> None:
    fake_run.write_metrics(project, tabulate.experiments("voc"))
    path = Path("metrics/voc/voc-res152.json")
    cut(path)
    refused(rf"{path}: not the metrics of voc-res152", "tabulate", "voc")
    path.unlink()
    refused(rf"{path}: no such file; `evaluate voc-res152` makes it", "tabulate", "voc")


def test_a_file_where_the_output_folder_belongs(project: Path) -> None:
    fake_run.write_metrics(project, tabulate.experiments("voc"))
    Path("results").write_text("")
    refused(".*results.*", "tabulate", "voc")


def test_read_only_output_folder(project: Path) -> None:
    fake_run.write_metrics(project, tabulate.experiments("voc"))
    tiny_archives.pack(tiny_archives.voc()[0], Path("data/raw/voc"))
    Path("results").mkdir()
    for path, words in (("results", ("tabulate", "voc")), ("data", ("prepare", "voc")), (".", ("settings",))):
        Path(path).chmod(0o555)
        try:
            if os.access(path, os.W_OK):
                pytest.skip("this user may write everywhere")
            refused(rf".*{re.escape(path)}.*(Permission denied|written)", *words)
        finally:
            Path(path).chmod(0o755)


def train_until_a_checkpoint(checkpoints: Path) -> subprocess.Popen[str]:
    """Start a training that takes longer than anybody waits; it has written its first checkpoint."""
    train = {**TINY["train"], "steps": 100_000, "log_every": 1}
    use("tiny", {**TINY, "train": train, "running": {"checkpoint_minutes": 0}})
    # A caught signal is the default one again in a new program, an ignored one (pytest in the background) is not.
    before = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        training = subprocess.Popen(
            command("train", EXPERIMENT), env=ENVIRONMENT, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    end = time.monotonic() + PATIENCE
    while not list(checkpoints.glob("step-*.pt")):
        assert training.poll() is None, training.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.1)
    return training


def told(training: subprocess.Popen[str]) -> list[str]:
    """What the training, which has been sent a signal, says until its end but for its progress."""
    try:
        lines = training.communicate(timeout=PATIENCE)[1].splitlines()
    except subprocess.TimeoutExpired as error:
        threads = sorted(Path(f"/proc/{training.pid}/task").glob("*/status"))
        masks = [line for thread in threads for line in thread.read_text().splitlines() if line.startswith("Sig")]
        pytest.fail(f"the signal had no effect: {error.stderr!r} {masks}")
    finally:
        training.kill()
    # MLflow's database may still be on its way: nobody waits for its writer.
    assert not [path for path in Path().rglob("*.part") if not path.name.startswith(".mlflow.db.")]
    assert not [path for folder in ("models", "curves") for path in Path(folder).rglob("*")]
    return [line for line in lines if line.strip() and not line.startswith(f"{EXPERIMENT}: ")]


def test_ctrl_c_in_the_middle_of_a_training(trainable: Path) -> None:
    checkpoints = Path("checkpoints") / EXPERIMENT
    training = train_until_a_checkpoint(checkpoints)
    os.killpg(training.pid, signal.SIGINT)  # as a terminal does
    assert (told(training), training.returncode) == (["interrupted"], 130)
    assert list(checkpoints.glob("step-*.pt"))


def test_sigterm_in_the_middle_of_a_training(trainable: Path) -> None:
    checkpoints = Path("checkpoints") / EXPERIMENT
    training = train_until_a_checkpoint(checkpoints)
    training.terminate()
    (line,) = told(training)
    assert training.returncode == 75
    found = re.fullmatch(r"terminated: after step (\d+); the same command goes on from (\S+)", line)
    assert found, line
    assert Path(found[2]) == max(checkpoints.glob("step-*.pt"))
    assert int(found[1]) == int(found[2].removesuffix(".pt")[-9:])


@pytest.mark.parametrize(("stage", "metavar"), [("train", "EXPERIMENT"), ("tabulate", "TABLE")])
def test_usage(project: Path, stage: str, metavar: str) -> None:
    before = files()
    without, unknown, helped = run(stage), run(stage, "--fast", "voc"), run(stage, "--help")
    assert (without.returncode, unknown.returncode, helped.returncode) == (2, 2, 0)
    for wrong, message in ((without, metavar), (unknown, "--fast")):
        usage, *_, error = wrong.stderr.splitlines()
        assert usage.startswith("usage: ")
        assert re.search(f"error: .*{message}", error)
        assert wrong.stdout == ""
    assert helped.stdout.startswith("usage: ")
    assert metavar in helped.stdout
    assert helped.stderr == ""
    assert files() == before
