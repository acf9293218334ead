"""Wheel, sdist, editable install and plain checkout: all import `moba_cp` from elsewhere, and none brings `kernels`."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

pytest.importorskip("setuptools", minversion="70.1", reason="older ones need more packages to build a wheel")
pytestmark = pytest.mark.xdist_group("packaging")  # one wheel, not one per worker

REPO = Path(__file__).resolve().parents[1]

# Only looks: importing torch in each of these processes would take most of the test's time.
LOOK = """
import importlib.util
assert importlib.util.find_spec("kernels") is None, importlib.util.find_spec("kernels")
assert importlib.util.find_spec("parallel") is None, importlib.util.find_spec("parallel")
print(importlib.util.find_spec("moba_cp").origin)
"""
IMPORT = LOOK + "import moba_cp, moba_cp.kernels, moba_cp.parallel, pkgutil\n"


def _build(source: Path, command: str, out: Path) -> Path:
    """Run `build_wheel`, `build_sdist` or `build_editable` of the build backend, with no isolation or network."""
    out.mkdir()
    code = f"import setuptools.build_meta as b; b.{command}({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True, text=True)
    (built,) = out.iterdir()
    return built


def _python(code: str, cwd: Path, path: Path | None = None) -> str:
    """What `code` prints, run in `cwd` with only `path` in front of the installed packages."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    if path is not None:
        environment["PYTHONPATH"] = str(path)
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def _python_files(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this working tree without what git ignores, so that no earlier build can lend it files."""
    copy = tmp_path_factory.mktemp("checkout")
    names = ["moba_cp", "kernels", "parallel", "examples", "scripts", "configs", "tests"]
    names += ["pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"]
    present = [name for name in names if (REPO / name).exists()]
    tar = ["tar", "--exclude=__pycache__", "-cf", "-", *present]
    archive = subprocess.run(tar, cwd=REPO, check=True, capture_output=True).stdout
    subprocess.run(["tar", "-xf", "-"], cwd=copy, input=archive, check=True)
    return copy


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unpacked wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    zipfile.ZipFile(_build(checkout, "build_wheel", folder / "dist")).extractall(folder / "site")
    return folder / "site"


def test_wheel_imports_elsewhere_and_holds_no_other_top_level_package(wheel: Path, tmp_path: Path) -> None:
    assert Path(_python(IMPORT, tmp_path, wheel)) == wheel / "moba_cp" / "__init__.py"
    assert {path.name for path in wheel.iterdir() if not path.name.endswith(".dist-info")} == {"moba_cp"}


def test_wheel_holds_every_module_of_the_tree(wheel: Path) -> None:
    expected = {f"moba_cp/{name}" for name in _python_files(REPO / "moba_cp")}
    for half in ("kernels", "parallel"):  # the links; rglob does not follow them
        expected |= {f"moba_cp/{half}/{name}" for name in _python_files(REPO / half)}
    assert _python_files(wheel) == expected


def test_wheel_holds_no_trainer_and_no_examples(wheel: Path) -> None:
    names = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*")}
    assert [n for n in names if "examples" in n or "megatron/training" in n or n.endswith("/train.py")] == []


def test_wheel_of_the_sdist_is_the_wheel_of_the_checkout(checkout: Path, wheel: Path, tmp_path: Path) -> None:
    sdist = _build(checkout, "build_sdist", tmp_path / "sdist")
    subprocess.run(["tar", "-xzf", sdist], cwd=tmp_path, check=True)
    source = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert not (source / "kernels").exists()  # each file once: under moba_cp/
    assert not (source / "parallel").exists()

    zipfile.ZipFile(_build(source, "build_wheel", tmp_path / "dist")).extractall(tmp_path / "site")
    assert _python_files(tmp_path / "site") == _python_files(wheel)
    for name in _python_files(wheel):
        assert (tmp_path / "site" / name).read_bytes() == (wheel / name).read_bytes(), name


def test_editable_install_points_at_the_checkout(checkout: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    zipfile.ZipFile(_build(checkout, "build_editable", tmp_path / "dist")).extractall(site)
    code = f"import site, sys; site.addsitedir({str(site)!r})\n"
    assert Path(_python(code + IMPORT, tmp_path, site)) == checkout / "moba_cp" / "__init__.py"


def test_checkout_on_pythonpath(checkout: Path, tmp_path: Path) -> None:
    code = "import moba_cp, moba_cp.kernels, moba_cp.parallel; print(moba_cp.kernels.__file__)"
    assert Path(_python(code, tmp_path, checkout)) == checkout / "moba_cp" / "kernels" / "__init__.py"


def test_every_folder_with_modules_is_a_package() -> None:
    """A folder without `__init__.py` would import from a checkout and be missing from the wheel."""
    folders = {path.parent for half in ("moba_cp", "kernels", "parallel") for path in (REPO / half).rglob("*.py")}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").exists()] == []
