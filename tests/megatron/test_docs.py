"""What README and docs/megatron.md say of Megatron: commands that its parser takes, and refusals that are made."""

from __future__ import annotations

import argparse
import importlib
import re
import typing
from pathlib import Path

import pytest
import typing_extensions

pytest.importorskip("megatron.core")

from moba_cp.megatron.pretrain import split
from moba_cp.megatron.unsupported import _REFUSED_FLAGS, _REFUSED_OPTIONS

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "megatron.md").read_text()
README = (ROOT / "README.md").read_text()


def commands(text: str) -> str:
    found = re.search(r"<!-- commands -->\n```bash\n(.*?)```\n<!-- /commands -->", text, re.DOTALL)
    assert found
    return found[1]


def flags(text: str) -> list[str]:
    found = re.search(r'FLAGS="(.*?)"', commands(text), re.DOTALL)
    assert found
    return found[1].split()


def test_readme_and_docs_have_the_same_commands_and_leave_nothing_out() -> None:
    assert commands(README).startswith(commands(DOCS))
    assert "..." not in commands(README)
    assert commands(README).count("$FLAGS\n") == 2


def test_commands_are_flags_that_megatron_and_moba_know(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typing, "override", typing_extensions.override, raising=False)
    parse_args = pytest.importorskip("megatron.training.arguments").parse_args
    (moba,) = re.findall(r"-m moba_cp\.megatron\.pretrain \$MEGATRON/(.*?)\$FLAGS", commands(DOCS), re.DOTALL)
    chosen, script, rest = split([*moba.replace("\\\n", " ").split(), *flags(DOCS)])
    assert (script, chosen.moba_topk, chosen.moba_full_attention_last_n_layers) == ("pretrain_gpt.py", 3, 1)
    for line in (rest, ["--spec", "moba_cp.megatron", "moba_spec", *flags(DOCS)]):
        monkeypatch.setattr("sys.argv", ["pretrain_gpt.py", *line])
        parsed = parse_args()  # exits where a flag is unknown
        assert (parsed.context_parallel_size, parsed.attention_dropout) == (2, 0.0)
    importlib.import_module(parsed.spec[0])


def rows() -> list[tuple[str, str, str]]:
    """Flag, verdict and remark of the tables of flags."""
    tables = DOCS[DOCS.index("## Megatron's flags") :]
    found = re.findall(r"^\| (.*?) \| (.*?) \|(.*)\|$", tables, re.MULTILINE)
    return [(flag, verdict, remark.strip()) for flag, verdict, remark in found]


OF_OTHERS = {
    "--allgather-cp": "slime's",
    "--enable-mhc-connections": "0.20",
    "--fp8-dot-product-attention": "an option without a flag",
    "--fp8-multi-head-attention": "an option without a flag",
    "--moba-partition": "ours",
    "--use-legacy-models": "0.16",
}


def test_every_flag_of_the_tables_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(typing, "override", typing_extensions.override, raising=False)
    arguments = pytest.importorskip("megatron.training.arguments")
    parser = arguments.add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    known = {option for action in parser._actions for option in action.option_strings} | set(OF_OTHERS)
    named = {flag for first, *_ in rows() for flag in re.findall(r"--[a-z0-9-]*[a-z0-9]", first)}
    assert len(named) > 90
    assert named <= known, named - known


def test_every_refused_option_is_in_the_table() -> None:
    refused = {
        flag for first, verdict, _ in rows() if "refused" in verdict for flag in re.findall(r"--[a-z0-9-]+", first)
    }
    options = {"--" + name.replace("_", "-") for name, *_ in _REFUSED_OPTIONS}
    assert options | {flag for _, flag, *_ in _REFUSED_FLAGS} <= refused


def test_messages_in_the_table_are_those_of_the_code() -> None:
    sources = (path.read_text() for path in sorted((ROOT / "moba_cp" / "megatron").glob("*.py")))
    code = re.sub(r'"\n\s*f?"', "", "\n".join(sources))
    quotes = [
        quote for _, verdict, remark in rows() if "refused" in verdict for quote in re.findall(r'"(.*?)"', remark)
    ]
    assert len(quotes) > 20
    for quote in quotes:
        for part in re.split(
            r" ?\.\.\. ?| with 2 ranks; |=\.\.\.|='cross'", quote.replace("&lt;", "<").replace("&gt;", ">")
        ):
            assert part in code, part
