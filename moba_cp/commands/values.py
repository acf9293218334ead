"""Values that commands read: "32/8", "10M", the sizes of a model in a YAML file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

SUFFIXES = {"K": 1 << 10, "M": 1 << 20}


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
    if not number.isdigit() or not int(number):
        raise ValueError(f"tokens must be a positive number such as 131072, 128K or 10M, got {text!r}")
    return int(number) * factor


def read_heads(text: str) -> tuple[int, int]:
    """Query and kv heads: "32/8" -> (32, 8).

    Raises:
        ValueError: it is no such pair, or kv heads do not divide q heads.
    """
    given = text.split("/")
    if len(given) != 2 or not all(part.isdigit() and int(part) for part in given):
        raise ValueError(f"heads must be two positive numbers such as 32/8, got {text!r}")
    q_heads, kv_heads = map(int, given)
    if q_heads % kv_heads:
        raise ValueError(f"kv heads must divide q heads, got {kv_heads} and {q_heads}")
    return q_heads, kv_heads


def read_model(text: str) -> Model:
    """Sizes of a YAML file with `model` (num_attention_heads, num_query_groups, hidden_size, num_layers, kv_channels) and `moba`
    (block_size, topk), or of heads such as "32/8".

    Raises:
        ValueError: it is neither, or a size is no positive integer.
    """
    path = Path(text)
    if not path.is_file():
        if "/" in text and text.replace("/", "").isdigit():
            return Model(*read_heads(text))
        raise ValueError(f"model must be a YAML file or heads such as 32/8, got {text!r}")
    content = _yaml(path)
    sections = [content.get(name) or {} for name in ("model", "moba")] if isinstance(content, dict) else [{}]
    if not all(isinstance(section, dict) for section in sections) or not sections[0]:
        raise ValueError(f"{path} must have a section `model`, as configs/gpt_1b_1m.yaml has")
    model, moba = sections
    q_heads = _size(path, model, "num_attention_heads")
    head_dim = _size(path, model, "kv_channels", 0) or _size(path, model, "hidden_size") // q_heads
    return Model(
        q_heads,
        _size(path, model, "num_query_groups", q_heads),
        head_dim,
        _size(path, model, "num_layers", 1),
        _size(path, moba, "block_size", 0) or None,
        _size(path, moba, "topk", 0) or None,
    )


def _yaml(path: Path) -> Any:
    import yaml

    try:
        return yaml.safe_load(path.read_text())
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
