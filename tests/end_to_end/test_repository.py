"""What the repository holds: small files, a README that shows the results it has, paths that exist."""

from __future__ import annotations

import dataclasses
import os
import re
import runpy
import subprocess
import sys
import textwrap
import tomllib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from pipeline.__main__ import COMMANDS as COMMANDS_OF_REFINENET
from pipeline.config.schema import Evaluate
from refinenet.config import Config, Recipe

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_nothing_large_but_the_starter_remote(tracked: list[Path]) -> None:
    sizes = {path.relative_to(ROOT): path.stat().st_size for path in tracked}
    assert sum(size for path, size in sizes.items() if path.parts[0] == "starter") < 40e6
    assert [path for path, size in sizes.items() if size > 1e6 and path.parts[0] != "starter"] == []


def test_dvc_lock_has_no_aliases() -> None:
    """As DVC writes it stage by stage: else a run of one table changes the text of others."""
    assert re.findall(r": [&*]\w+$", (ROOT / "dvc.lock").read_text(), re.M) == []


@pytest.mark.parametrize(
    "name",
    ["README.md", "CONTRIBUTING.md", *sorted(str(p.relative_to(ROOT)) for p in (ROOT / "docs").rglob("*.md"))],
)
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", (ROOT / name).read_text())
    assert [link for link in links if not ((ROOT / name).parent / link).exists()] == []
    # Pages that a command writes, and one that is a table, have none.
    assert links or name.startswith("docs/records/") or name in ("CONTRIBUTING.md", "docs/explanation/differences.md")


def test_make_targets_and_modules_named_in_the_docs_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text()
        for target in set(re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.MULTILINE)):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{name}: make {target}"
        for module in set(re.findall(r"python -m (pipeline\.\w+)", text)):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), f"{name}: {module}"
        for command in set(re.findall(r"(?:`|^    )refinenet ([a-z]+)", text, re.MULTILINE)):
            assert command in COMMANDS_OF_REFINENET, f"{name}: refinenet {command}"


def test_every_setting_of_the_network_is_documented_with_its_default() -> None:
    rows = re.findall(
        r"^\| `(\w+)` \|.*?\|.*?\| `([^`]+)` \|[^|]*\|$", (ROOT / "docs/reference/settings.md").read_text(), re.M
    )
    fields = {field.name: field.default for field in dataclasses.fields(Config) if field.name != "classes"}
    assert {name: str(value) for name, value in fields.items()} == dict(rows)


def test_settings_that_pages_name_exist() -> None:
    """`train.x`, `evaluate.x`, `train: {x: ...}` on any page, and all that settings.md says is off by default."""
    fields = {
        kind: {field.name for field in dataclasses.fields(of)}
        for kind, of in (("train", Recipe), ("evaluate", Evaluate))
    }
    fields["train"].add("epochs")  # a word of profiles, which settings.json has as steps
    pages = {
        page: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*/*.md")))
    }
    found = 0
    for page, text in pages.items():
        for kind, known in fields.items():
            names = set(re.findall(rf"`{kind}\.(\w+)`", text))
            for block in re.findall(rf"\b{kind}: (\{{[^{{}}]*\}})", text):
                names |= set(re.findall(r"(\w+):", block))
            assert names <= known, f"{page.name}: {kind}: {names - known}"
            found += len(names)
    assert found > 20
    listed = re.search(r"Settings without a counterpart(.*?)\n\n", pages[ROOT / "docs/reference/settings.md"], re.S)
    assert listed is not None
    words = set(re.findall(r"`(?:train\.|evaluate\.)?(\w+)(?:: \w+)?`", listed[1]))
    values = {"adamw", "auto", "bfloat16", "scaled", "variance_matched", "float32"}
    assert words - values <= fields["train"] | fields["evaluate"]
    assert {"num_processes", "activation_checkpointing", "grad_clip"} <= words


def test_the_profile_shown_in_the_docs_is_the_file() -> None:
    page = (ROOT / "docs/how-to/local-archives.md").read_text()
    shown = re.search(r"^    base: mini\n(?:    .*\n)+", page, re.M)
    assert shown is not None
    assert yaml.safe_load(textwrap.dedent(shown[0])) == yaml.safe_load((ROOT / "profiles/voc-files.yaml").read_text())


@pytest.mark.parametrize("name", ["docs/reference/data-sets.md", "docs/reference/rows.md", "README.md"])
def test_generated_tables_are_those_of_the_code_and_the_paper_profile(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    made = runpy.run_path("docs/generated.py")["page"](name)
    assert made == (ROOT / name).read_text(encoding="utf-8"), "python docs/generated.py renews them"


def test_the_page_of_commands_is_what_they_say_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for line breaks: argparse of each Python breaks a long usage in its own way."""
    monkeypatch.chdir(ROOT)
    made = runpy.run_path("docs/generated.py")["commands"]()
    page = (ROOT / "docs/reference/commands.md").read_text(encoding="utf-8")
    assert made.split() == page.split(), "python docs/generated.py renews it"


def test_images_are_made_from_the_lock_files() -> None:
    """Containerfile and apptainer.def: the same steps, on a Debian whose Python will do; no other file is sent."""
    python = {"bookworm": (3, 11), "trixie": (3, 13)}
    wanted = re.search(r'requires-python = ">=(\d+)\.(\d+)"', (ROOT / "pyproject.toml").read_text())
    assert wanted is not None
    steps = []
    for name, base in (
        ("Containerfile", r"ARG BASE=docker\.io/library/debian:(\w+)-slim"),
        ("apptainer.def", r"From: debian:(\w+)-slim"),
    ):
        text = (ROOT / name).read_text()
        release = re.search(rf"^{base}$", text, re.M)
        assert release is not None, name
        assert python[release[1]] >= (int(wanted[1]), int(wanted[2])), name
        commands = re.sub(r"\\\n\s*", "", text)
        steps.append([re.sub(r"^RUN ", "", line.strip()) for line in commands.splitlines() if " && " in line])
        for lock in ("bootstrap.lock", "requirements.lock"):
            assert re.search(rf"--require-hashes .*-r {lock}\b", commands), f"{name}: {lock}"
    assert steps[0] == steps[1]
    kept = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    copied = re.findall(r"^COPY (.*) \S+$", (ROOT / "Containerfile").read_text(), re.M)
    assert kept == ["*", *(f"!{name}" for line in copied for name in line.split())]


def test_the_command_in_an_image_is_the_installed_one(tmp_path: Path) -> None:
    """Containerfile's own line, run here: a script that finds the mounted project, which is not installed there."""
    text = re.sub(r"\\\n\s*", "", (ROOT / "Containerfile").read_text())
    (line,) = (step for step in text.split(" && ") if step.startswith("printf"))
    (tmp_path / "bin").mkdir()
    subprocess.run(["sh", "-ec", line], cwd=tmp_path, check=True)
    script = tmp_path / "bin/refinenet"
    entry = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]["refinenet"]
    module, _, function = entry.partition(":")
    first, *rest = script.read_text().splitlines()
    assert first == "#!/opt/refinenet/bin/python"
    assert rest == ["import sys", f"from {module} import {function}", f"sys.exit({function}())"]
    # Without site-packages (-S): the project is in no environment, only its folder is there.
    command = [sys.executable, "-S", str(script), "--version"]
    found = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=found, capture_output=True, text=True, check=False)
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (done.returncode, done.stdout) == (0, f"refinenet-repro {version}\n"), done.stderr


COMMANDS = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__main__")
    for path in (ROOT / "pipeline").rglob("*.py")
    if '__name__ == "__main__"' in path.read_text() and path.stem != "writer"  # `track` starts that one
)


def test_every_command_helps_and_writes_nothing(tmp_path: Path) -> None:
    """--help is an answer, a word too many one line and exit code 2, and neither touches the folder."""
    assert {"pipeline.settings", "pipeline.tracking", "pipeline.train"} <= set(COMMANDS)

    def ask(module: str) -> None:
        command = [sys.executable, "-m", module]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        helped, refused = (
            subprocess.run([*command, word], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
            for word in ("--help", "--no-such-option")
        )
        assert helped.returncode == 0, (module, helped.stderr)
        assert helped.stdout.startswith(f"usage: python -m {module}"), (module, helped.stdout)
        assert refused.returncode == 2, (module, refused.stderr)
        assert refused.stderr.splitlines()[-1].startswith(f"python -m {module}: error: "), (module, refused.stderr)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(ask, COMMANDS))
    assert list(tmp_path.iterdir()) == []
