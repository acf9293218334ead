"""What `scripts.scaling` measures: a YAML file of sweeps, checked and expanded into cases, most valuable first.

    layout: zigzag               # contiguous, zigzag or balanced
    iterations: 5                # timed calls per figure, and the seconds after which fewer are
    seconds: 4
    sweeps:                      # in order of worth: a time limit cuts the end off
      - name: weak scaling, 128K tokens per GPU
        ranks: all               # 1, 2, 4, ... up to the ranks present; or a list
        tokens_per_rank: [131072]           # weak scaling; or `tokens: [...]`, in all
        heads: [[16, 16], [32, 8]]   # query, key-value heads
        blocks: [[128, 8], [512, 8]] # block size, topk
        comm: [pull, a2a]        # the first one's bits are what others are compared with; one rank alone runs once
        routing: [uniform]       # uniform, correlated, trained
        baselines: [equal_work]  # equal_work, dense_ring, dense_heads

Optional: `head_parallel: [2]` (tried beside the default), `passes: [forward]` (default: both), `selections:` (trained routing),
`exchange_bytes: 17179869184` (of `moba_attention`; default: the library's).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from moba_cp import MoBAConfig, SequenceLayout
from moba_cp.config import DEFAULT_EXCHANGE_BYTES
from moba_cp.parallel.heads import head_split
from moba_cp.parallel.splits import COMMS

from .records import REPOSITORY

ROUTINGS = ("uniform", "correlated", "trained")
BASELINES = ("equal_work", "dense_ring", "dense_heads")
LAYOUTS = ("contiguous", "zigzag", "balanced")
PASSES = ("forward", "forward_backward")
NUMBERS = ("ranks", "tokens", "tokens_per_rank", "head_parallel")
LISTS = (*NUMBERS, "heads", "blocks", "comm", "routing", "baselines", "passes")
"""Keys of a sweep that hold lists; those of `NUMBERS` hold positive integers. `ranks` may also be "all"."""
PROBLEM = ("tokens", "q_heads", "kv_heads", "block_size", "topk", "routing", "document", "selections")
"""Fields of an entry that say which tensors are computed. Equal entries have equal bits, however they are computed."""
KEY = ("ranks", *PROBLEM, "layout", "comm", "head_parallel", "exchange_bytes", "baseline", "passes")
"""Fields that tell entries apart."""


@dataclass(frozen=True)
class Case:
    """One configuration to be timed.

    Attributes:
        sweep: name of its sweep.
        ranks, tokens: ranks of each group, and tokens over all of them.
        q_heads, kv_heads, config: of the layer.
        routing: one of `ROUTINGS`.
        layout_name: one of `LAYOUTS`.
        comm, head_parallel, exchange_bytes: arguments of `moba_attention`.
        baseline: one of `BASELINES`, or "" for the layer itself. `comm`, `layout_name` and (of dense ones) `config` mean nothing.
        backward: also time forward with backward.
        document: tokens of each packed document; all tokens are one document where it is `tokens`.
        selections: file and layer of recorded selections, for trained routing.
    """

    sweep: str
    ranks: int
    tokens: int
    q_heads: int
    kv_heads: int
    config: MoBAConfig
    routing: str
    layout_name: str
    comm: str
    head_parallel: int | None = None
    baseline: str = ""
    backward: bool = True
    document: int = 0
    selections: tuple[str, str] | None = None
    exchange_bytes: int = DEFAULT_EXCHANGE_BYTES

    @property
    def dense(self) -> bool:
        return self.baseline.startswith("dense")

    @property
    def layout(self) -> SequenceLayout:
        """Of the group. Baselines hold the sequence in order."""
        ends = list(range(0, self.tokens + 1, self.document or self.tokens))
        if self.baseline:
            return SequenceLayout.contiguous(ends, 1 if self.baseline == "equal_work" else self.ranks)
        if self.layout_name == "balanced":
            return SequenceLayout.balanced(ends, self.ranks, self.config.block_size, self.config.topk)
        make = SequenceLayout.zigzag if self.layout_name == "zigzag" else SequenceLayout.contiguous
        return make(ends, self.ranks)

    def entry(self) -> dict[str, Any]:
        """What identifies it in the results."""
        entry: dict[str, Any] = {
            "sweep": self.sweep, "ranks": self.ranks, "tokens": self.tokens, "q_heads": self.q_heads, "kv_heads": self.kv_heads,
        }  # fmt: skip
        if not self.dense:
            entry |= {"block_size": self.config.block_size, "topk": self.config.topk, "routing": self.routing}
        if self.document:
            entry["document"] = self.document
        if self.selections and not self.dense:
            entry["selections"] = f"{Path(self.selections[0]).name}: {self.selections[1]}"
        if not self.backward:
            entry["passes"] = "forward"
        if self.baseline:
            return entry | {"baseline": self.baseline}
        entry |= {"layout": self.layout_name, "comm": self.comm, "exchange_bytes": self.exchange_bytes}
        return entry if self.head_parallel is None else entry | {"head_parallel": self.head_parallel}

    @property
    def key(self) -> tuple[Any, ...]:
        return key_of(self.entry())

    def flops(self) -> float:
        """Floating-point operations of one forward pass on one rank: a measure of how long a case takes beside others."""
        pairs = self.tokens * self.q_heads * 128 / self.ranks
        length = self.document or self.tokens
        if self.dense:
            return pairs * 2 * length
        keys = min(self.config.topk * self.config.block_size, length / 2)
        return pairs * (4 * keys + length / self.config.block_size) + pairs * 2048  # lists, merge: by bytes


def key_of(entry: dict[str, Any]) -> tuple[Any, ...]:
    """What tells an entry of a results file apart; equal for the case that it was made from."""
    entry = {"exchange_bytes": DEFAULT_EXCHANGE_BYTES} | entry
    if "forward_ms" in entry and "forward_backward_ms" not in entry:
        entry["passes"] = "forward"  # files of old commits do not say so
    return tuple(map(entry.get, KEY))


@dataclass(frozen=True)
class Plan:
    """A checked configuration file.

    Attributes:
        cases: in order of worth.
        iterations, seconds: timed calls per figure, and the time after which fewer are.
        left_out: sweeps' rank counts that this run has too few ranks for.
    """

    cases: tuple[Case, ...]
    iterations: int
    seconds: float
    left_out: list[str] = field(default_factory=list)


def load_plan(path: Path, world: int) -> Plan:
    """Cases of a YAML file for `world` ranks.

    Raises:
        ValueError: an unknown key or value; the message names it and what is allowed.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict) or not isinstance(content.get("sweeps"), list):
        raise ValueError(f"{path} must be a mapping with a list `sweeps`")
    _known(f"{path}", content, {"layout", "iterations", "seconds", "sweeps"})
    layout = content.get("layout", "zigzag")
    _one_of("layout", layout, LAYOUTS)
    cases: dict[tuple[Any, ...], Case] = {}
    left_out: list[str] = []
    for name in ("iterations", "seconds"):
        value = content.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise ValueError(f"{path}: {name} must be a positive number, got {value!r}")
    for sweep in content["sweeps"]:
        if not isinstance(sweep, dict):
            raise ValueError(f"{path}: every sweep must be a mapping, got {sweep!r}")
        for case in _cases(sweep, layout, world, left_out):
            cases.setdefault(case.key, case)
    return Plan(tuple(cases.values()), int(content.get("iterations", 5)), float(content.get("seconds", 4)), left_out)


def _cases(sweep: dict[str, Any], layout: str, world: int, left_out: list[str]) -> list[Case]:
    name = sweep.get("name", "")
    _known(f"sweep {name!r}", sweep, {"name", "layout", "selections", "exchange_bytes", *LISTS})
    for needed in ("name", "heads", "blocks", "comm"):
        if needed not in sweep:
            raise ValueError(f"sweep {name!r} lacks {needed!r}")
    if ("tokens" in sweep) == ("tokens_per_rank" in sweep):
        raise ValueError(f"sweep {name!r} must have tokens (in all) or tokens_per_rank, and not both")
    for key in set(LISTS) & set(sweep):
        if key == "ranks" and sweep[key] == "all":
            continue
        if not isinstance(sweep[key], list):
            raise ValueError(f"sweep {name!r}: {key} must be a list, got {sweep[key]!r}")
        if not sweep[key] and key not in ("baselines", "head_parallel"):
            raise ValueError(f"sweep {name!r}: {key} must not be empty")
        if key in NUMBERS and not all(type(value) is int and value > 0 for value in sweep[key]):
            raise ValueError(f"sweep {name!r}: {key} must hold positive integers, got {sweep[key]!r}")
    layout = sweep.get("layout", layout)
    _one_of("layout", layout, LAYOUTS)
    passes = sweep.get("passes", ["forward_backward"])
    for value in passes:
        _one_of("passes", value, PASSES)
    if unknown := [comm for comm in sweep["comm"] if comm not in COMMS]:
        raise ValueError(f"sweep {name!r}: comm must be one of {', '.join(COMMS)}, got {', '.join(unknown)}")
    exchange_bytes = sweep.get("exchange_bytes", DEFAULT_EXCHANGE_BYTES)
    if type(exchange_bytes) is not int or exchange_bytes < 0:
        raise ValueError(f"sweep {name!r}: exchange_bytes must be an integer of at least 0, got {exchange_bytes!r}")
    head_parallel = [None, *sweep.get("head_parallel", [])]
    cases = []
    ranks = sweep.get("ranks", "all")
    counts = [1 << i for i in range(world.bit_length())] if ranks == "all" else ranks
    for count in counts:
        if count > world:
            left_out.append(f"{name}: {count} ranks")
            continue
        for tokens in sweep.get("tokens") or [n * count for n in sweep["tokens_per_rank"]]:
            for q_heads, kv_heads in (_heads(x) for x in sweep["heads"]):
                for block_size, topk in (_pair(x, "blocks") for x in sweep["blocks"]):
                    for routing in sweep.get("routing", ["uniform"]):
                        _one_of("routing", routing, ROUTINGS)
                        first = Case(
                            name, count, tokens, q_heads, kv_heads, MoBAConfig(block_size, topk), routing, layout, "auto",
                            backward="forward_backward" in passes, exchange_bytes=exchange_bytes,
                        )  # fmt: skip
                        if routing == "trained":
                            first = _recorded(first, sweep)
                        cases += _variants(first, sweep, head_parallel)
    return cases


def _variants(first: Case, sweep: dict[str, Any], head_parallel: list[int | None]) -> list[Case]:
    """One set of inputs through every exchange, then its baselines."""
    if first.ranks == 1:
        found = [first]
    else:
        found = [replace(first, comm=comm) for comm in sweep["comm"]]
        found += [replace(case, head_parallel=n) for case in found for n in head_parallel if n and "a2a" in case.comm]
    for baseline in sweep.get("baselines", []):
        _one_of("baselines", baseline, BASELINES)
        if first.ranks == 1 and baseline != "dense_heads":  # alone, a rank is its own equal work, and a ring is no ring
            continue
        if baseline.startswith("dense") and first.document not in (0, first.tokens):
            continue
        if baseline == "equal_work":
            if first.q_heads % first.ranks:
                continue
            share = head_split(first.q_heads, first.kv_heads, first.ranks)
            found.append(replace(first, q_heads=share.q_heads, kv_heads=share.kv_heads, baseline=baseline))
        elif baseline != "dense_heads" or first.q_heads % first.ranks == 0:
            found.append(replace(first, baseline=baseline))
    return found


def _recorded(case: Case, sweep: dict[str, Any]) -> Case:
    """The case with its recorded selections: documents are as long as what was recorded."""
    given = sweep.get("selections")
    if not isinstance(given, dict) or {"file", "layer"} - set(given):
        raise ValueError(
            f"sweep {case.sweep!r}: trained routing needs selections: {{file: ..., layer: ...}}, got {given!r}"
        )
    path, layer = REPOSITORY / given["file"], str(given["layer"])
    with np.load(path) as content:
        if layer not in content:
            raise ValueError(f"{path} has no {layer!r}, only {', '.join(content)}")
        size, (_, document, topk) = int(content["block_size"]), content[layer].shape
    if (size, topk) != (case.config.block_size, case.config.topk):
        raise ValueError(
            f"{path} was recorded at ({size}, {topk}), sweep {case.sweep!r} has ({case.config.block_size}, {case.config.topk})"
        )
    if case.tokens % document:
        raise ValueError(
            f"sweep {case.sweep!r}: {case.tokens} tokens are no multiple of recorded documents of {document}"
        )
    return replace(case, document=document, selections=(str(path), layer))


def _known(where: str, given: dict[str, Any], allowed: set[str]) -> None:
    if unknown := sorted(set(given) - allowed):
        raise ValueError(f"{where}: unknown {', '.join(unknown)}; allowed are {', '.join(sorted(allowed))}")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


def _heads(given: Any) -> tuple[int, int]:
    """A pair of query and kv heads, of which the second divides the first."""
    q_heads, kv_heads = _pair(given, "heads")
    if min(q_heads, kv_heads) < 1 or q_heads % kv_heads:
        raise ValueError(f"heads must be positive, and kv heads divide query heads, got {given!r}")
    return q_heads, kv_heads


def _pair(given: Any, name: str) -> tuple[int, int]:
    """[16, 16] -> (16, 16)."""
    if not (isinstance(given, list) and len(given) == 2 and all(type(x) is int for x in given)):
        raise ValueError(f"{name} must be pairs like [16, 8], got {given!r}")
    return given[0], given[1]
