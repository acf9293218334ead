"""What several tests of the learning study need: the tiny corpus, made of this repository's text."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def corpus_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    yaml = pytest.importorskip("yaml")
    from examples.learning.corpus import build

    folder = tmp_path_factory.mktemp("corpus")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        build(yaml.safe_load((ROOT / "configs/learning/corpus_tiny.yaml").read_text()), folder)
    return folder
