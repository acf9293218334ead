"""Packages whose text the corpus is made of: downloaded, unpacked and read."""

from __future__ import annotations

import html
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

CODE = {".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".cuh", ".py", ".pyi", ".pyx", ".el"}
PROSE = {".rst", ".txt", ".md", ".html"}
SUFFIXES = CODE | PROSE
"""Of files that are read."""
LARGEST_FILE = 1_500_000
"""Bytes; larger files are left out."""


def fetch(config: dict[str, Any], folder: Path) -> None:
    """Download the packages by name and version: wheels into `folder/wheels`, Debian packages into `folder/debs`."""
    for kind, name, equals, command in (
        ("wheel", "wheels", "==", [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]),
        ("deb", "debs", "=", ["apt-get", "download"]),
    ):
        packages = [
            equals.join([s[kind], s["version"]]) if "version" in s else s[kind] for s in config["sources"] if kind in s
        ]
        (folder / name).mkdir(parents=True, exist_ok=True)
        if packages:
            subprocess.run([*command, *packages], cwd=folder / name, check=True)


def source_name(source: dict[str, Any]) -> str:
    """Of a package, or the path of a folder."""
    return source.get("deb") or source.get("wheel") or source["folder"]


def read_source(source: dict[str, Any], downloads: Path) -> Iterator[tuple[str, str]]:
    """(path, text) of the source's files in order of path.

    Raises:
        FileNotFoundError: its package was not fetched.
    """
    name = source_name(source)
    with tempfile.TemporaryDirectory() as scratch:
        if "folder" in source:
            root = Path(name)
        elif "wheel" in source:
            archive = fetched(downloads / "wheels", f"{name.replace('-', '_')}-{source.get('version', '*')}-*.whl")
            zipfile.ZipFile(archive).extractall(scratch)
            root = Path(scratch)
        else:
            version = source.get("version", "*").replace(":", "%3a")  # as apt-get names the file
            archive = fetched(downloads / "debs", f"{name}_{version}_*.deb")
            subprocess.run(["dpkg", "-x", str(archive), scratch], check=True)
            root = Path(scratch)
            for inner in root.rglob("linux-source-*.tar.xz"):
                extract_text(inner, root)
        for path in sorted(root.rglob("*")):
            relative = f"/{path.relative_to(root)}"
            packed = path.name.endswith(".gz")
            suffix = Path(path.name[:-3]).suffix if packed else path.suffix
            if suffix not in SUFFIXES or not path.is_file() or path.is_symlink() or path.stat().st_size > LARGEST_FILE:
                continue
            if source["paths"] and not any(part in relative for part in source["paths"]):
                continue
            data = (
                subprocess.run(["gzip", "-dc", str(path)], capture_output=True, check=True).stdout
                if packed
                else path.read_bytes()
            )
            try:
                text = data.decode()
            except UnicodeDecodeError:
                continue
            yield relative, strip_html(text) if suffix == ".html" else text


def fetched(folder: Path, pattern: str) -> Path:
    """The one file of this name in a folder of downloads.

    Raises:
        FileNotFoundError: there is none, or several.
    """
    found = sorted(folder.glob(pattern))
    if len(found) != 1:
        raise FileNotFoundError(f"{folder} must hold one {pattern}, has {len(found)}: run the command `fetch` first")
    return found[0]


def extract_text(archive: Path, to: Path) -> None:
    """Unpack only the text files of a tar archive."""
    with tarfile.open(archive) as tar:
        wanted = (m for m in tar if m.isfile() and Path(m.name).suffix in SUFFIXES and m.size <= LARGEST_FILE)
        tar.extractall(to, members=wanted, filter="data")


def strip_html(text: str) -> str:
    """The text without tags, scripts and styles."""
    text = re.sub(r"(?s)<(script|style|head).*?</\1>", "", text)
    text = html.unescape(re.sub(r"<[^>]*>", "", text))
    return re.sub(r"\n\s*\n+", "\n\n", text)
