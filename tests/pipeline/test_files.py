"""dvc_md5 gives the very names that DVC gives."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from pipeline.runtime.dvc_md5 import NOT_VERSIONED, dvc_md5
from refinenet.errors import UserError

ROOT = Path(__file__).resolve().parents[2]

# Any name a Linux file can have, and the ones that need a decision more often than chance offers them.
ODD = ["__pycache__", ".snakemake_timestamp", ".val.arrow.4711.part", ".part", "..part", "a.part", ".git", ".hg"]
ODD += [".gitignore", "a", "A", "a.b", "a b", "ä", "é", "日本", "\U0001f40d", '"', "\\"]
# A line break in a name confuses DVC's own patterns.
letters = st.characters(exclude_characters="/\0\n", exclude_categories=["Cs"])
names = st.one_of(st.sampled_from(ODD), st.text(letters, min_size=1, max_size=12))
names = names.filter(lambda name: name not in {".", "..", ".dvc", ".dvcignore"})
trees = st.recursive(st.binary(max_size=40), lambda inner: st.dictionaries(names, inner, max_size=5), max_leaves=12)
Tree = bytes | dict[str, "Tree"]


def build(path: Path, tree: Tree) -> None:
    """Write `tree` (bytes: a file, dict: a folder) to `path`."""
    if isinstance(tree, bytes):
        path.write_bytes(tree)
        return
    path.mkdir()
    for name, inner in tree.items():
        build(path / name, inner)


@pytest.fixture(scope="module")
def repo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that DVC takes for a project, with the lines of our .dvcignore."""
    from dvc.repo import Repo

    root = tmp_path_factory.mktemp("dvc")
    (root / ".dvcignore").write_text("\n".join(NOT_VERSIONED) + "\n")
    Repo.init(str(root), no_scm=True).close()
    return root


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(trees)
@example({"b": b"1", "a": {"b": b"2", "c": {}}, "a.b": b"3", "a-b": b"4", "é": {"\U0001f40d": b""}})
@example({"a": {".git": b"1", "b": b""}, ".hg": b"1", "__pycache__": {"x.pyc": b"1"}, ".x.part": {"y": b""}})
@example({".x.12.part": b"", "x": b"y"})
def test_equals_dvc_on_any_tree(repo: Path, tree: Tree) -> None:
    from dvc.repo import Repo
    from dvc_data.hashfile.build import build as dvc_build

    place = Path(tempfile.mkdtemp(dir=repo))
    try:
        build(place / "out", tree)
        with Repo(str(repo)) as dvc:
            fs, ignore = dvc.dvcignore.fs, dvc.dvcignore
            _, _, built = dvc_build(dvc.cache.local, str(place / "out"), fs, "md5", ignore=ignore, dry_run=True)
        assert dvc_md5(place / "out") == built.hash_info.value
    finally:
        shutil.rmtree(place)


def test_equals_what_dvc_add_writes(repo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import yaml
    from dvc.repo import Repo

    monkeypatch.chdir(repo)
    build(repo / "data", {"train.arrow": bytes(3_000_000), "a": {"ü.txt": b"1\r\n", ".snakemake_timestamp": b""}})
    (repo / "data" / "link").symlink_to("train.arrow")
    (repo / "one").write_bytes(b"line\r\n")
    with Repo(str(repo)) as dvc:
        dvc.add(["data", "one"])
    for name in ("data", "one"):
        written = yaml.safe_load((repo / f"{name}.dvc").read_text())["outs"][0]["md5"]
        assert dvc_md5(repo / name) == written


def test_the_project_tells_dvc_to_skip_the_same_names() -> None:
    file = ROOT / ".dvcignore"
    if not file.is_file():
        pytest.skip("no .dvcignore")
    assert set(NOT_VERSIONED) <= {line.strip().rstrip("/") for line in file.read_text().splitlines()}


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone.*No such file"):
        dvc_md5(tmp_path / "gone")
    (tmp_path / "broken").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"broken.*No such file"):
        dvc_md5(tmp_path)
