"""Which module of the project imports which, read from the sources: also inside functions and under TYPE_CHECKING."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("pipeline", "refinenet")


def modules() -> dict[str, Path]:
    """Return every module of the two packages: dotted name -> file."""
    files = (file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py")))
    names = {".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file for file in files}
    assert len(names) > 100
    return names


def _imported(file: Path, typed: bool) -> Iterator[str]:
    """Yield what a file imports, as "module" or "module.name". Not `typed`: but for what only a type checker sees."""
    only_types = set()
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            only_types |= {inner for part in node.body for inner in ast.walk(part)}
    for node in ast.walk(tree):
        if node in only_types and not typed:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: a relative import"
            yield from (f"{node.module}.{name.name}" for name in node.names)
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func)
            if called.endswith("import_module"):
                yield str(node.args[0].value)


def imports(typed: bool = False) -> dict[str, set[str]]:
    """Return for each module the modules of the project that it imports; a name of a package is not the package."""
    known = modules()
    graph: dict[str, set[str]] = {}
    for name, file in known.items():
        found = set()
        for one in _imported(file, typed):
            while one and one not in known:
                one = one.rpartition(".")[0]
            found.add(one)
        graph[name] = found - {"", name}
    return graph


def reached(start: str, graph: Mapping[str, set[str]], leaves: frozenset[str] = frozenset()) -> set[str]:
    """Return all that `start` imports, directly or not; `leaves` and what lies in them are not followed."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        if not any(name == leaf or name.startswith(f"{leaf}.") for leaf in leaves):
            waiting += graph[name]
    return seen - {start}


def circles(graph: Mapping[str, set[str]]) -> list[set[str]]:
    """Return the sets of modules that import each other in a circle."""
    groups = [{name} | {other for other in reached(name, graph) if name in reached(other, graph)} for name in graph]
    return [group for index, group in enumerate(groups) if len(group) > 1 and group not in groups[:index]]
