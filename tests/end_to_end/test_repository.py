"""What the repository holds: small files, a README that shows the results it has, paths that exist."""

from __future__ import annotations

import dataclasses
import re
import runpy
import subprocess
import textwrap
from pathlib import Path

import pytest
import yaml

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
    assert sum(size for path, size in sizes.items() if path.parts[0] == "starter") < 20e6
    assert [path for path, size in sizes.items() if size > 1e6 and path.parts[0] != "starter"] == []


@pytest.mark.parametrize(
    "name",
    ["README.md", "CONTRIBUTING.md", "benchmarks/README.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))],
)
def test_links_lead_somewhere(name: str) -> None:
    links = re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", (ROOT / name).read_text())
    assert links or name in ("CONTRIBUTING.md", "docs/differences.md")
    assert [link for link in links if not ((ROOT / name).parent / link).exists()] == []


def test_make_targets_and_modules_named_in_the_docs_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / name).read_text()
        for target in set(re.findall(r"(?:`|^    )make ([a-z-]+)", text, re.MULTILINE)):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{name}: make {target}"
        for module in set(re.findall(r"python -m (pipeline\.\w+)", text)):
            assert (ROOT / f"{module.replace('.', '/')}.py").is_file(), f"{name}: {module}"


def test_every_setting_of_the_network_is_documented_with_its_default() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*?\|.*?\| `([^`]+)` \|[^|]*\|$", (ROOT / "docs/settings.md").read_text(), re.M)
    fields = {field.name: field.default for field in dataclasses.fields(Config) if field.name != "classes"}
    assert {name: str(value) for name, value in fields.items()} == dict(rows)


def test_settings_that_pages_name_exist() -> None:
    """`train.x`, `evaluate.x`, `train: {x: ...}` on any page, and all that docs/settings.md says is off by default."""
    fields = {
        kind: {field.name for field in dataclasses.fields(of)}
        for kind, of in (("train", Recipe), ("evaluate", Evaluate))
    }
    fields["train"].add("epochs")  # a word of profiles, which settings.json has as steps
    pages = {
        page: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
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
    listed = re.search(r"Settings without a counterpart(.*?)\n\n", pages[ROOT / "docs/settings.md"], re.S)
    assert listed is not None
    words = set(re.findall(r"`(?:train\.|evaluate\.)?(\w+)(?:: \w+)?`", listed[1]))
    values = {"adamw", "bfloat16", "scaled", "variance_matched", "float32"}
    assert words - values <= fields["train"] | fields["evaluate"]
    assert {"num_processes", "activation_checkpointing", "grad_clip"} <= words


def test_the_profile_shown_in_the_readme_is_the_file() -> None:
    shown = re.search(r"^    base: mini\n(?:    .*\n)+", (ROOT / "README.md").read_text(), re.M)
    assert shown is not None
    assert yaml.safe_load(textwrap.dedent(shown[0])) == yaml.safe_load((ROOT / "profiles/voc-files.yaml").read_text())


@pytest.mark.parametrize("name", ["data", "reproducing"])
def test_generated_tables_are_those_of_the_code_and_the_paper_profile(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    made = runpy.run_path("docs/generated.py")["page"](name)
    assert made == (ROOT / f"docs/{name}.md").read_text(encoding="utf-8"), "python docs/generated.py renews them"
