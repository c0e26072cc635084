"""Imports run downwards only: from a folder to those before it in the list, and in no circle."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: From the ground floor up. A name is a folder of mod_fused/ or a module there.
LAYERS = [
    {"divergence", "world", "reference"},
    {"call"},
    {"torch_kernels", "triton_kernels"},
    {"dispatch"},
    {"explained_draw"},
    {"ops", "recipes", "explain"},
    {"plans", "warmup"},
    {"decoding"},
    {"guidance"},
    {"training"},
    {"serving"},
    {"app"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def modules() -> dict[str, Path]:
    """Dotted names below mod_fused, "" for the package itself, and their files."""
    found = {}
    for folder, prefix in (
        (ROOT / "mod_fused", ()),
        (ROOT / "triton_kernels", ("triton_kernels",)),
    ):
        for path in folder.rglob("*.py"):
            parts = (*prefix, *path.relative_to(folder).with_suffix("").parts)
            found[".".join(part for part in parts if part != "__init__" or parts[-1] != part)] = (
                path
            )
    return found


MODULES = modules()


def imports(name: str, path: Path) -> set[str]:
    """The modules of this package that a module imports, at its top or in a function."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        base = [x for x in package if x][: len([x for x in package if x]) - node.level + 1]
        source = ".".join([*base, *([node.module] if node.module else [])])
        for alias in node.names:
            inner = f"{source}.{alias.name}".lstrip(".")
            found.add(inner if inner in MODULES else source)
    return found - {name, ""}  # "", the package's own face: its version, the public functions


IMPORTS = {name: imports(name, path) for name, path in MODULES.items()}


def test_imports_run_downwards() -> None:
    assert {name.split(".")[0] for name in MODULES} - {""} == set(LEVEL)
    for name, imported in IMPORTS.items():
        for other in imported - {
            ""
        }:  # the package's own face: its version and the public functions
            folder, below = name.split(".")[0], other.split(".")[0]
            if name and folder != below:
                assert LEVEL[below] < LEVEL[folder], f"{name} imports {other}"


def test_there_is_no_circle() -> None:
    order = list(TopologicalSorter(IMPORTS).static_order())
    assert len(order) >= len(MODULES) > 80
