"""Values that commands read: "32/8", "10M", the sizes of a model in a YAML file."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = {"K": 1 << 10, "M": 1 << 20}
DIGITS = frozenset("0123456789")
MODEL_KEYS = ("num_attention_heads", "num_query_groups", "hidden_size", "kv_channels", "num_layers")
"""What is read of `model`. Its other keys say nothing about attention."""
MOBA_KEYS = (
    "block_size",
    "topk",
    "comm",
    "head_parallel",
    "workspace_gib",
    "full_last_layers",
    "layer_pattern",
    "fraction",
)
"""What `moba` may hold. The first two are read; the others choose what the plan recommends, or layers."""
OTHER_NAMES = {"num_key_value_heads": "num_query_groups", "num_hidden_layers": "num_layers", "head_dim": "kv_channels"}
"""What Hugging Face calls keys of `model`."""
SECTIONS = ("model", "moba")
SECTIONS_ALIKE = 0.7
"""The same for names of sections, which are short."""
ALIKE = 0.9
"""Names that are so alike are one name misspelt: `difflib`'s ratio."""


@dataclass(frozen=True)
class Model:
    """Sizes of a model; block size and topk are None where it does not say."""

    q_heads: int
    kv_heads: int
    head_dim: int = 128
    layers: int = 1
    block_size: int | None = None
    topk: int | None = None


def read_tokens(text: str) -> int:
    """ "10M" -> 10485760.

    Raises:
        ValueError: it is no number of tokens.
    """
    number, factor = (text[:-1], SUFFIXES[text[-1]]) if text[-1:] in SUFFIXES else (text, 1)
    if not _is_positive(number):
        raise ValueError(f"tokens must be a whole positive number such as 131072, 128K or 10M, got {text!r}")
    return int(number) * factor


def _is_positive(text: str) -> bool:
    """Whether a text is a positive number in ASCII digits."""
    return bool(text) and DIGITS.issuperset(text) and int(text) > 0


def read_heads(text: str) -> tuple[int, int]:
    """Query and kv heads: "32/8" -> (32, 8).

    Raises:
        ValueError: it is no such pair, or kv heads do not divide q heads.
    """
    given = text.split("/")
    if len(given) != 2 or not all(map(_is_positive, given)):
        raise ValueError(f"heads must be two positive numbers such as 32/8, got {text!r}")
    q_heads, kv_heads = map(int, given)
    if q_heads % kv_heads:
        raise ValueError(f"kv heads must divide q heads, got {kv_heads} and {q_heads}")
    return q_heads, kv_heads


def read_model(text: str) -> Model:
    """Sizes of a YAML file with `model` (num_attention_heads, num_query_groups, hidden_size, num_layers, kv_channels) and `moba`
    (block_size, topk), or of heads such as "32/8".

    Raises:
        ValueError: it is neither, a size is no positive integer, heads do not divide `hidden_size`, `moba` has an unknown key, or
            one of `model`, or one of these sections, is misspelt.
    """
    path = Path(text)
    if not path.is_file():
        if "/" in text and DIGITS.issuperset(text.replace("/", "")):
            return Model(*read_heads(text))
        why = " is a folder" if text and path.is_dir() else ", no such file" if path.suffix in (".yaml", ".yml") else ""
        raise ValueError(f"model must be a YAML file or heads such as 32/8, got {text!r}{why}")
    content = _yaml(path)
    content = content if isinstance(content, dict) else {}
    _check_sections(path, content)
    sections = [content.get(name) or {} for name in SECTIONS]
    for name, section in zip(SECTIONS, sections, strict=True):
        if not isinstance(section, dict):
            raise ValueError(f"{path}: section `{name}` must be a mapping, got {section!r}")
    if not sections[0]:
        raise ValueError(f"{path} must have a section `model`, as configs/gpt_1b_1m.yaml has")
    model, moba = sections
    _check_keys(path, model, moba)
    q_heads = _size(path, model, "num_attention_heads")
    head_dim = _size(path, model, "kv_channels", 0)
    if not head_dim:
        head_dim, rest = divmod(_size(path, model, "hidden_size"), q_heads)
        if rest or not head_dim:
            raise ValueError(
                f"{path}: hidden_size={model['hidden_size']} must be a multiple of num_attention_heads={q_heads}, or kv_channels "
                "be given"
            )
    return Model(
        q_heads,
        _size(path, model, "num_query_groups", q_heads),
        head_dim,
        _size(path, model, "num_layers", 1),
        _size(path, moba, "block_size", 0) or None,
        _size(path, moba, "topk", 0) or None,
    )


def _check_sections(path: Path, content: dict[str, Any]) -> None:
    for name in content:
        meant = difflib.get_close_matches(str(name), SECTIONS, 1, SECTIONS_ALIKE)
        if meant and name not in SECTIONS:
            raise ValueError(f"{path} has a section {name!r}, did you mean {meant[0]!r}?")


def _check_keys(path: Path, model: dict[str, Any], moba: dict[str, Any]) -> None:
    for key in moba:
        if key not in MOBA_KEYS:
            raise ValueError(f"{path}: moba has no key {key!r}, it has {', '.join(MOBA_KEYS)}")
    for key in model:
        meant = [OTHER_NAMES[key]] if key in OTHER_NAMES else difflib.get_close_matches(str(key), MODEL_KEYS, 1, ALIKE)
        if meant and key not in MODEL_KEYS:
            raise ValueError(f"{path}: model has no key {key!r}, did you mean {meant[0]!r}?")


def _yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text())
    except OSError as error:
        raise ValueError(f"model: {error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None


def _size(path: Path, section: dict[str, Any], name: str, default: int | None = None) -> int:
    """A positive integer of a section; `default` where the key is missing or null."""
    value = section.get(name)
    if value is None and default is not None:
        return default
    if type(value) is not int or value < 1:
        raise ValueError(f"{path}: {name} must be a positive integer, got {value!r}")
    return value
