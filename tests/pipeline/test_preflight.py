"""What this machine lacks, said for the stages that will run and for no others."""

from __future__ import annotations

import shutil
import socket
from pathlib import Path

import pytest
import small_project
import yaml

from pipeline import cost, preflight, settings, train
from pipeline.config import resolve
from pipeline.runtime import cli
from refinenet.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CRF = "a dense CRF is asked for, but pydensecrf2 is missing"


@pytest.fixture
def paper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with profile paper chosen, on a CPU; no host answers, and no package is there."""
    for name in ("params.yaml", "dvc.yaml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    monkeypatch.chdir(tmp_path)
    edit("params.yaml", profile="paper")
    edit("profiles/paper.yaml", device="cpu")

    def nobody(address: tuple[str, int], timeout: float) -> None:
        raise OSError(f"no route to {address[0]}")

    monkeypatch.setattr("socket.create_connection", nobody)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for variable in ("http_proxy", "https_proxy", "CITYSCAPES_USERNAME", "CITYSCAPES_PASSWORD", "ARCHIVES"):
        monkeypatch.delenv(variable, raising=False)
        monkeypatch.delenv(variable.upper(), raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "none"))
    return tmp_path


def edit(path: str, **changes: object) -> None:
    values = yaml.safe_load(Path(path).read_text())
    Path(path).write_text(yaml.safe_dump(values | changes))


def missing(*wanted: str) -> list[tuple[str, str]]:
    found = preflight.findings(resolve.resolve(), set(wanted) or None)
    return [(finding.what, finding.text) for finding in found if finding.level == "MISSING"]


def test_for_one_table_only_what_leads_to_it(paper: Path) -> None:
    assert [what for what, _ in missing("weights@resnet50", "train@nyud-res50", "evaluate@nyud-res50")] == []
    ((what, text),) = missing("evaluate@voc-res101")
    assert (what, text) == ("packages", "pydensecrf2 is missing, for the dense CRF of voc-res101; `make crf`")
    assert {what for what, _ in missing()} >= {"packages", "hosts", "account"}


def test_an_archive_is_missing_only_where_nobody_answers_for_it(paper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [text for what, text in missing("download@nyud") if what == "hosts"]
    assert len(texts) == 3
    where = "horatio.cs.nyu.edu (no route to horatio.cs.nyu.edu)"
    assert f"nyud: splits.mat: no host answers: {where}; by hand: data/incoming/nyud/" in texts
    here = Path("data/incoming/nyud/splits.mat")
    here.parent.mkdir(parents=True)
    here.touch()
    assert len(missing("download@nyud")) == 2
    # A mirror that answers is enough.
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        monkeypatch.undo()
        monkeypatch.chdir(paper)
        profile = yaml.safe_load(Path("profiles/paper.yaml").read_text())
        mirror = f"http://127.0.0.1:{server.getsockname()[1]}/a"
        for source in profile["sources"]["nyud"].values():
            source |= {"url": "http://127.0.0.1:1/a", "mirrors": [mirror]}
        Path("profiles/paper.yaml").write_text(yaml.safe_dump(profile))
        assert [text for what, text in missing("download@nyud") if what == "hosts"] == []


def test_an_account_without_a_password(paper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = dict(missing("download@cityscapes"))
    assert found["account"].endswith("set CITYSCAPES_USERNAME and CITYSCAPES_PASSWORD")
    monkeypatch.setenv("CITYSCAPES_USERNAME", "me")
    monkeypatch.setenv("CITYSCAPES_PASSWORD", "secret")
    assert "account" not in dict(missing("download@cityscapes"))


def test_a_disk_that_is_too_small(paper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(".")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=10**9))
    assert dict(missing("prepare@cityscapes"))["disk"].startswith(
        "1 GB are free, archives and prepared data still need"
    )


def test_a_training_says_at_its_start_what_its_evaluation_will_lack(paper: Path) -> None:
    with pytest.raises(UserError, match=f"^voc-res101: {CRF}; `make crf`$"):
        train.run("voc-res101")
    with pytest.raises(UserError, match=r"^data/nyud/train\.arrow"):  # it went on to its data
        train.run("nyud-res50")
    edit("profiles/paper.yaml", device="cuda")
    with pytest.raises(UserError, match=r"^nyud-res50: device is cuda, but this machine has no GPU"):
        train.run("nyud-res50")


def test_dvc_repro_of_everything_stops_before_anything_is_written(paper: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "dvc_targets", list)
    with pytest.raises(
        UserError, match=r"^profiles/paper\.yaml: pydensecrf2 is missing.* \(and \d+ more: `refinenet preflight"
    ):
        settings.run()
    assert not Path("settings.json").exists()
    monkeypatch.setattr(cli, "dvc_targets", lambda: ["table-nyud"])
    settings.run()
    assert Path("settings.json").exists()


def test_what_dvc_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for line, expected in (
        ("python3 /usr/bin/dvc repro", []),
        ("python3 /usr/bin/dvc repro -f --quiet", []),
        ("python3 /usr/bin/dvc repro table-nyud train@voc-res101", ["table-nyud", "train@voc-res101"]),
        ("python3 /usr/bin/snakemake --cores 8", None),
    ):
        monkeypatch.setattr(cli, "_engine", lambda: 1)
        monkeypatch.setattr(cli, "_of_process", lambda process, what, line=line: line.replace(" ", "\0") + "\0")
        assert cli.dvc_targets() == expected
    monkeypatch.setattr(cli, "_engine", lambda: 0)
    assert cli.dvc_targets() is None


@pytest.mark.slow
def test_snakemake_checks_for_its_target(tmp_path: Path) -> None:
    project = small_project.make(tmp_path / "p", small_project.TINY.replace("base: mini", "base: mini\ndevice: cuda"))
    done = small_project.call(project, "snakemake", "--cores", "2", "models/voc-res101.safetensors", check=False)
    assert done.returncode
    assert "error: profiles/test.yaml: device is cuda, but this machine has no GPU" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (project / "data").exists()
    small_project.call(project, "snakemake", "--cores", "2", "data/voc")  # needs no GPU


def test_what_a_table_costs(paper: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The same hours as `refinenet cost` has for its training, for the GPU that is asked for; of the CPU nothing."""
    monkeypatch.setattr(preflight, "needed", lambda targets: {"train@nyud-res152", "evaluate@nyud-res152"})
    assert preflight.main(["table-nyud"]) == 0
    assert " cost " not in capsys.readouterr().out
    edit("profiles/paper.yaml", device="cuda")
    preflight.main(["table-nyud", "--gpu", "rtx4090"])
    (line,) = (line for line in capsys.readouterr().out.splitlines() if " cost " in line)
    found = {work.name: work for work in cost.works(*cost.read("paper"))}["nyud-res152"]
    hours = sum(found.hours(cost.rate_of("rtx4090", found.precision, found.batch)))
    assert f"1 training: about {hours:.1f} hours of GeForce RTX 4090 (assumed, not measured)" in line
    with pytest.raises(SystemExit):
        preflight.main(["table-nyud", "--gpu", "rtx4900"])
    assert "rtx4900: did you mean rtx4090?" in capsys.readouterr().err
