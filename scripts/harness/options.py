"""What command lines of several programs share: lists such as "8192,32768" and "16/16,32/8", a device, a commit."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Annotated

import torch
import typer

Commit = Annotated[str, typer.Option(help="git commit to note, where the checkout has no .git")]


def integers(text: str) -> list[int]:
    """ "8192,32768" -> [8192, 32768]."""
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected integers separated by commas, got {text!r}") from None
    if min(found) < 1:
        raise typer.BadParameter(f"expected numbers of at least 1, got {text!r}")
    return found


def pairs(text: str, separator: str) -> list[tuple[int, int]]:
    """ "16/16,32/8" -> [(16, 16), (32, 8)]."""
    try:
        return [(int(first), int(second)) for first, second in (part.split(separator) for part in text.split(","))]
    except ValueError:
        raise typer.BadParameter(f"expected pairs like 16{separator}8 separated by commas, got {text!r}") from None


def heads(text: str) -> list[tuple[int, int]]:
    """Query and key-value heads: "16/16,32/8"."""
    found = pairs(text, "/")
    for q_heads, kv_heads in found:
        if min(q_heads, kv_heads) < 1 or q_heads % kv_heads:
            raise typer.BadParameter(f"kv heads must divide q heads, got {q_heads}/{kv_heads}")
    return found


def configs(text: str) -> list[tuple[int, int]]:
    """Block sizes and topk: "128:8,512:8"."""
    found = pairs(text, ":")
    for block_size, topk in found:
        if min(block_size, topk) < 1:
            raise typer.BadParameter(f"block size and topk must be at least 1, got {block_size}:{topk}")
    return found


def single(read: Callable[[str], list[tuple[int, int]]], text: str) -> tuple[int, int]:
    """The one pair that `read` (`heads` or `configs`) finds: `single(heads, "32/8")` is (32, 8)."""
    found = read(text)
    if len(found) != 1:
        raise typer.BadParameter(f"expected one pair, got {text!r}")
    return found[0]


def choices(text: str, known: Iterable[str]) -> list[str]:
    """Names separated by commas, each of `known`."""
    names, allowed = text.split(","), list(known)
    if unknown := [name for name in names if name not in allowed]:
        raise typer.BadParameter(f"expected some of {', '.join(allowed)}, got {', '.join(unknown)}")
    return names


def gpu() -> None:
    """There is a GPU, for programs that run nowhere else."""
    if not torch.cuda.is_available():
        raise typer.BadParameter("no GPU is visible")


def device(name: str) -> torch.device:
    """ "cuda" or "cpu", if this machine has it."""
    if name not in ("cuda", "cpu"):
        raise typer.BadParameter(f"expected cuda or cpu, got {name!r}")
    if name == "cuda" and not torch.cuda.is_available():
        raise typer.BadParameter("no GPU is visible; --device cpu runs on the CPU, to try the program")
    return torch.device(name)
