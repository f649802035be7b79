"""Imports inside the package point downward, in the order that docs/design.md states."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "squeezeheads"
TOP = "__init__"
"""The public names, ``squeezeheads/__init__.py``."""


def stated_layers() -> dict[str, int]:
    """Each module or package directly under the package → its line of the list in docs/design.md, the top one 0."""
    page = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    (listed,) = re.findall(r"<!-- layers -->\n\n```text\n(.*?)```", page, flags=re.DOTALL)
    lines = [line.split("#")[0].replace(",", " ").split() for line in listed.splitlines()]
    names = [name for line in lines for name in line]
    assert len(names) == len(set(names)), "a name stands on two lines"
    return {name: number for number, line in enumerate(lines) for name in line}


def modules() -> dict[str, str]:
    """Dotted name below the package → source; a package is named as its ``__init__.py``."""
    folder = ROOT / "src" / PACKAGE
    found = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(folder).with_suffix("").parts
        found[".".join(parts if len(parts) == 1 or parts[-1] != "__init__" else parts[:-1])] = path.read_text("utf-8")
    return found


def imported(source: str, known: set[str], types: bool = True) -> Iterator[str]:
    """The modules of the package that a source imports, wherever in it.

    Args:
        known: all modules, to tell a module from a name in one.
        types: also those that are imported under ``if TYPE_CHECKING`` alone.
    """
    tree = ast.parse(source)
    hidden = set()
    if not types:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and getattr(node.test, "id", None) == "TYPE_CHECKING":
                hidden |= {id(inner) for statement in node.body for inner in ast.walk(statement)}
    for node in ast.walk(tree):
        paths: list[str] = []
        if isinstance(node, ast.Import):
            paths = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports name the package in full"
            named = [f"{node.module}.{alias.name}" for alias in node.names]
            paths = [path if path.removeprefix(f"{PACKAGE}.") in known else str(node.module) for path in named]
        for path in paths:
            if (path == PACKAGE or path.startswith(f"{PACKAGE}.")) and id(node) not in hidden:
                yield path.removeprefix(PACKAGE).removeprefix(".") or TOP


def not_downward(sources: dict[str, str], layers: dict[str, int]) -> list[str]:
    """Imports from one part of the package into another on the same line or on one above."""
    amiss = set()
    for name, source in sources.items():
        mine = name.split(".")[0]
        for other in imported(source, set(sources)):
            theirs = other.split(".")[0]
            if theirs != mine and layers[theirs] <= layers[mine]:
                amiss.add(f"{name} imports {other}")
    return sorted(amiss)


def test_every_part_of_the_package_has_its_line():
    assert {name.split(".")[0] for name in modules()} == set(stated_layers())


def test_imports_point_downward():
    assert not_downward(modules(), stated_layers()) == []


def test_modules_import_each_other_in_no_circle():
    """Inside a package too; imports for type checkers aside, which Python never makes."""
    sources = modules()
    graph = {
        name: {o for o in imported(text, set(sources), types=False) if o != name} for name, text in sources.items()
    }
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert not graph, f"they, or what they import, stand in a circle: {sorted(graph)}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("from squeezeheads.high import thing", ["low imports high"]),
        ("from squeezeheads import high", ["low imports high"]),
        ("import squeezeheads.high.inner", ["low imports high.inner"]),
        ("def later():\n    from squeezeheads.high.inner import thing", ["low imports high.inner"]),
        ("from squeezeheads.beside import thing", ["low imports beside"]),
        ("from squeezeheads import __version__", ["low imports __init__"]),
        ("import torch\nfrom squeezeheads_other import high", []),
    ],
)
def test_an_upward_import_is_seen(source, found):
    sources = {"low": source, "high": "from squeezeheads.low import x", "high.inner": "", "beside": "", TOP: ""}
    assert not_downward(sources, {TOP: 0, "high": 1, "low": 2, "beside": 2}) == found
