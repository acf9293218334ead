"""The import graph, read from the source: which parts of the tree may import which, and no circles.

Imports inside functions count, since they are how circles are hidden. Imports under `if TYPE_CHECKING` do not: they never run.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PACKAGES = {"moba_cp": REPO / "moba_cp", "moba_cp.kernels": REPO / "kernels", "moba_cp.parallel": REPO / "parallel"}


@cache
def modules() -> dict[str, Path]:
    """Files of the library by the name they are imported under."""
    found = {}
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):  # does not follow the links moba_cp/kernels and moba_cp/parallel
            parts = path.relative_to(folder).with_suffix("").parts
            found[".".join([package, *parts]).removesuffix(".__init__")] = path
    return found


def nodes_that_run(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from (node for other in child.orelse for node in [other, *nodes_that_run(other)])
        else:
            yield child
            yield from nodes_that_run(child)


def imported_names(module: str, path: Path) -> set[str]:
    """Dotted names that a file imports. `from a import b` gives `a.b`, whether b is a module or something in it."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    names: set[str] = set()
    for node in nodes_that_run(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


@cache
def graph() -> dict[str, set[str]]:
    """Modules of the library that each module imports. A package counts where something in its `__init__.py` is imported."""
    files = modules()
    edges: dict[str, set[str]] = {}
    for module, path in files.items():
        names = imported_names(module, path)
        edges[module] = {n if n in files else n.rpartition(".")[0] for n in names} & files.keys() - {module}
    return edges


def circles(edges: dict[str, set[str]]) -> list[list[str]]:
    """A circle through each module that a depth-first search meets again while it is still open."""
    found, done = [], set()

    def visit(module: str, open_: list[str]) -> None:
        if module in open_:
            found.append([*open_[open_.index(module) :], module])
        elif module not in done:
            for other in sorted(edges[module]):
                visit(other, [*open_, module])
            done.add(module)

    for module in sorted(edges):
        visit(module, [])
    return found


def inside(package: str, module: str) -> bool:
    return module == package or module.startswith(package + ".")


def test_the_graph_is_read_right() -> None:
    """Absolute, relative and lazy imports, of modules and of what is in them; a circle is found."""
    edges = graph()
    assert "moba_cp.kernels.configs" in edges["moba_cp.kernels.forward.portable"]
    assert "moba_cp.kernels.triton_backend" in edges["moba_cp.kernels"]  # inside a function
    assert "moba_cp.kernels" in edges["moba_cp.prepare"]  # a function of `__init__.py`
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == [["b", "c", "b"]]
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


def test_no_circles() -> None:
    assert circles(graph()) == []


@pytest.mark.parametrize("package", ["moba_cp.kernels", "moba_cp.parallel"])
def test_kernels_and_parallel_import_nothing_else_of_the_library(package: str) -> None:
    """In particular not each other: the pipeline joins them."""
    outside = {
        (module, other)
        for module, others in graph().items()
        for other in others
        if inside(package, module) and not inside(package, other)
    }
    assert outside == set()


def test_only_the_megatron_package_imports_megatron() -> None:
    files = {name: path for name, path in modules().items() if not inside("moba_cp.megatron", name)}
    importing = {
        module
        for module, path in files.items()
        for name in imported_names(module, path)
        if inside("megatron", name) or inside("moba_cp.megatron", name)
    }
    assert importing == set()


def test_only_its_own_package_imports_transformers() -> None:
    importing = {
        module
        for module, path in modules().items()
        if not inside("moba_cp.transformers", module)
        for name in imported_names(module, path)
        if inside("transformers", name) or inside("moba_cp.transformers", name)
    }
    assert importing == set()
