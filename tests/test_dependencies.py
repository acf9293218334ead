"""Dependency ranges that pip can satisfy, and metadata of the package."""

from __future__ import annotations

import ast
import sys
import tomllib
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

import pytest

from moba_cp.__main__ import main

Requirement = pytest.importorskip("packaging.requirements").Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DECLARED = {Requirement(text).name: Requirement(text).specifier for text in PROJECT["dependencies"]}
TRITON_OF_TORCH = {"2.10.0": "3.6.0", "2.11.0": "3.6.0", "2.12.0": "3.7.0", "2.13.0": "3.7.1", "2.14.0": "3.8.0"}
"""What each torch for CUDA pins, by its metadata on PyPI."""


@pytest.mark.parametrize(("torch", "triton"), TRITON_OF_TORCH.items())
def test_every_torch_that_is_allowed_finds_its_triton(torch: str, triton: str) -> None:
    assert torch in DECLARED["torch"]
    assert triton in DECLARED["triton"]


def test_older_ones_are_not_allowed() -> None:
    """torch 2.9 pins triton 3.5, so a range that holds both cannot be satisfied."""
    assert "2.9.1" not in DECLARED["torch"]
    assert "3.5.1" not in DECLARED["triton"]


def test_the_installed_torch_and_triton_fit_each_other() -> None:
    assert version("torch").partition("+")[0] in DECLARED["torch"]
    for text in requires("torch") or []:
        requirement = Requirement(text)
        if requirement.name == "triton" and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            assert any(triton in requirement.specifier for triton in TRITON_OF_TORCH.values()), text


def test_users_may_have_any_numpy() -> None:
    """Only the tests interpret kernels, which fails with numpy 2.3 and later."""
    assert str(DECLARED["numpy"]) == ""
    assert any(Requirement(text).name == "numpy" for text in PROJECT["optional-dependencies"]["test"])


def test_learning_declares_what_its_programs_import() -> None:
    """Not what some other package happens to bring."""
    names, extras = set(), ["learning"]
    for extra in extras:  # grows
        for requirement in map(Requirement, PROJECT["optional-dependencies"][extra]):
            if requirement.name == "moba_cp":
                extras += requirement.extras
            else:
                names.add({"pyyaml": "yaml"}.get(requirement.name, requirement.name))
    imported = set()
    for path in (ROOT / "examples" / "learning").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(str(node.module).partition(".")[0])
    assert imported - names - set(DECLARED) - sys.stdlib_module_names == {"moba_cp", "examples"} & imported


def test_the_package_says_what_it_is() -> None:
    assert PROJECT["readme"] == "README.md"
    assert "Typing :: Typed" in PROJECT["classifiers"]
    assert (ROOT / "moba_cp" / "py.typed").exists()


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    """`moba-cp --version`, also `python -m moba_cp --version`."""
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    try:
        expected = version("moba_cp")
    except PackageNotFoundError:
        expected = "0.1.0+checkout"
    assert capsys.readouterr().out.strip() == f"moba_cp {expected}"
    assert PROJECT["scripts"] == {"moba-cp": "moba_cp.__main__:main"}
