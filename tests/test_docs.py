"""Pages of the repository: links lead somewhere, names in the code exist, tables are what the generator makes."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
every_page = pytest.mark.parametrize("page", [page for page in PAGES if page.exists()], ids=lambda page: page.name)


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", without_code(page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@cache
def names_of(path: Path) -> set[str]:
    """What a file defines: functions, classes, constants, and `Class.member` for what its classes define."""

    def defined(body: list[ast.stmt], prefix: str = "") -> set[str]:
        found: set[str] = set()
        for node in body:
            match node:
                case ast.FunctionDef(name=name):
                    found.add(prefix + name)
                case ast.ClassDef(name=name):
                    found |= {prefix + name} | defined(node.body, f"{name}.")
                case ast.Assign(targets=targets):
                    found |= {prefix + target.id for target in targets if isinstance(target, ast.Name)}
                case ast.AnnAssign(target=ast.Name(id=name)):
                    found.add(prefix + name)
        return found

    return defined(ast.parse(path.read_text()).body)


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors(file), target


@every_page
def test_names_in_the_code_exist(page: Path) -> None:
    """`path.py:name` counts from the root of the repository."""
    for path, name in re.findall(r"`([\w/]+\.py):([\w.]+)`", page.read_text()):
        assert (ROOT / path).exists(), path
        assert name in names_of(ROOT / path), f"{path}:{name}"


@every_page
def test_programs_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    for path in re.findall(r"\b(?:scripts|examples|configs)/[\w/]+\.(?:py|sh|yaml)\b", text):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"-m ((?:scripts|examples)\.[\w.]+)", text):
        assert (ROOT / module.replace(".", "/")).with_suffix(".py").exists(), module
    assert not re.findall(r"(?:python3?|per-node \d+) scripts/\w+\.py", text), "scripts run as modules"


def test_tables_are_what_the_generator_makes() -> None:
    pytest.importorskip("typer")
    from scripts.make_tables import blocks

    made = blocks()
    found = {}
    for page in PAGES:
        if page.exists():
            found |= dict(re.findall(r"<!-- (results:\w+) -->\n(.*?)\n<!-- /\1 -->", page.read_text(), re.DOTALL))
    assert found == made


def test_the_page_on_learning_is_what_its_report_makes() -> None:
    pytest.importorskip("typer")
    from examples.learning.report import load, page

    assert (ROOT / "docs" / "learning.md").read_text() == page(load(ROOT / "docs" / "results" / "learning.json"))


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
