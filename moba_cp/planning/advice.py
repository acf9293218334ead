"""What to set: every split of a cluster by predicted time, tables over cluster sizes, and where one way overtakes another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from ..config import DEFAULT_EXCHANGE_BYTES, DEFAULT_WORKSPACE_BYTES
from ..parallel.cost import choose_head_parallel
from ..parallel.exchanges.registry import EXCHANGES
from ..parallel.topology import Topology
from .calibration import Calibration
from .memory import Memory, memory
from .prediction import Bytes, Prediction, call_sizes, kept_bytes, predict, walks
from .sizes import Cluster, Layer, Split, ranges

SHARE_FOR_ATTENTION = 0.5
"""Of a GPU's memory, what attention and what it keeps for backward may take; the model takes the rest."""
ALIKE = 0.03
"""Times that differ by less are alike: predictions are no better."""
GIB = 1 << 30
WORKSPACE_STEP = 4
"""Factor between values of `workspace_bytes` that are looked at."""
DEFAULT_BUDGETS = {"exchange_bytes": DEFAULT_EXCHANGE_BYTES, "workspace_bytes": DEFAULT_WORKSPACE_BYTES}
BLOCK_SETTINGS = ((128, 8), (256, 8), (512, 8), (1024, 8), (2048, 12), (4096, 12))
"""What the block-size trade-off shows."""


@dataclass(frozen=True)
class Option:
    """One way to split a layer, with what it takes.

    Attributes:
        split, prediction, memory: the way, its time and bytes, its memory.
        fits: whether attention's peak fits the memory of a GPU.
    """

    split: Split
    prediction: Prediction
    memory: Memory
    fits: bool

    @property
    def milliseconds(self) -> float:
        """Predicted, forward and backward of one layer."""
        return self.prediction.forward_backward_ms


def options(
    layer: Layer, cluster: Cluster, calibration: Calibration, layouts: Sequence[str] = ("zigzag",)
) -> list[Option]:
    """All ways to split the layer over the cluster, those that fit first, then the fastest.

    The first is the one of least memory among those that are `ALIKE`.

    Heads are split inside a node, over a number of ranks that divides q heads and ranks.
    """
    found = []
    for split in splits(layer, cluster, layouts):
        needed = memory(layer, split)
        found.append(Option(split, predict(layer, split, cluster, calibration), needed, needed.peak <= cluster.memory))
    found.sort(key=lambda option: (not option.fits, option.milliseconds))
    alike = [x for x in found if x.fits == found[0].fits and x.milliseconds <= (1 + ALIKE) * found[0].milliseconds]
    best = min(alike, key=lambda option: option.memory.peak)
    return [best, *(option for option in found if option is not best)]


def splits(layer: Layer, cluster: Cluster, layouts: Iterable[str]) -> list[Split]:
    """All ways to split the layer over the cluster."""
    found = []
    for size in range(1, min(cluster.node, layer.q_heads) + 1):
        if layer.q_heads % size or cluster.gpus % size or cluster.node % size:
            continue
        sequence = cluster.gpus // size
        exchanges = ["local"]
        if sequence > 1:
            one_host = cluster.gpus <= cluster.gpus_per_node
            exchanges = [name for name, kind in EXCHANGES.items() if one_host or not kind.same_host]
        for exchange in exchanges:
            # Where heads are split over all ranks, one layout is as good as another.
            for layout in layouts if sequence > 1 else list(layouts)[:1]:
                found += with_budgets(layer, Split(cluster.gpus, size, exchange, layout))
    return found


def with_budgets(layer: Layer, split: Split) -> list[Split]:
    """The split with the default budgets, and others where rows are worked on in several chunks. More `workspace_bytes` make
    fewer chunks. More `exchange_bytes`, in whole GiB, bring keys and values once in forward, or in backward too, where they would
    come once per chunk."""
    found = []
    while True:
        found.append(split)
        for backward in (False, True):
            if walks(layer, split, backward) > 1:
                kept = -(-kept_bytes(layer, split, backward) // GIB) * GIB
                found.append(replace(split, exchange_bytes=kept))
        if ranges(layer, split).chunks == 1:
            return found
        split = replace(split, workspace_bytes=WORKSPACE_STEP * split.workspace_bytes)


def changed_budgets(split: Split) -> dict[str, int]:
    """Arguments of `moba_attention` by which a split's budgets differ from the defaults."""
    return {name: getattr(split, name) for name, value in DEFAULT_BUDGETS.items() if getattr(split, name) != value}


def with_default_budgets(split: Split) -> Split:
    """The same split with the budgets that a call has by default."""
    return replace(split, exchange_bytes=DEFAULT_EXCHANGE_BYTES, workspace_bytes=DEFAULT_WORKSPACE_BYTES)


def automatic(layer: Layer, cluster: Cluster) -> tuple[int, str]:
    """Over how many ranks `comm="auto"` splits heads there, and why, by the rules of `parallel.cost`."""
    topology = Topology(tuple(rank // cluster.node for rank in range(cluster.gpus)))
    return choose_head_parallel(call_sizes(layer, cluster.gpus), topology, None)


def visiting_pays_from(layer: Layer) -> float:
    """Sequence ranks from which sending query rows to blocks moves fewer bytes than sending blocks to rows.

    With uniform routing a row visits topk - 1 earlier blocks: its query there and its partial result back, 2 D numbers each, for
    every q head; keys and values of everybody take 2 D numbers per kv head and token of the other ranks.
    """
    return 2 * layer.q_heads / layer.kv_heads * max(1, layer.slots - 1)


def recomputation(option: Option, layers: int, cluster: Cluster) -> str:
    """What to recompute, so that what attention keeps of all layers fits `SHARE_FOR_ATTENTION` of a GPU."""
    kept = option.memory.saved * layers
    free = SHARE_FOR_ATTENTION * cluster.memory - (option.memory.peak - option.memory.saved)
    keep = "layers keep" if layers > 1 else "layer keeps"
    text = f"{layers} {keep} {kept:.1f} GiB for backward; {max(0.0, free):.1f} GiB are free for it"
    if kept <= free:
        return f"none: {text}"
    return f"every layer: {text}, and attention's forward runs again ({option.prediction.forward_ms:.1f} ms per layer)"


def block_sizes(layer: Layer, cluster: Cluster, calibration: Calibration) -> list[tuple[int, int, Option]]:
    """The fastest option by block setting; the layer's own setting among them."""
    settings = sorted({*BLOCK_SETTINGS, (layer.block_size, layer.topk)})
    found = []
    for block_size, topk in settings:
        if block_size * 2 <= layer.length or block_size == layer.block_size:
            changed = replace(layer, block_size=block_size, topk=topk)
            found.append((block_size, topk, options(changed, cluster, calibration)[0]))
    return found


def fastest(layer: Layer, cluster: Cluster, calibration: Calibration, gpus: Sequence[int]) -> dict[int, Option]:
    """By numbers of GPUs: the recommended option, where one fits."""
    found = {count: options(layer, replace(cluster, gpus=count), calibration)[0] for count in gpus}
    return {count: option for count, option in found.items() if option.fits}


def crossings(best: Mapping[int, Option]) -> list[tuple[str, str, int]]:
    """Where the fastest way changes over cluster sizes: (what was best before, what is best from there on, GPUs)."""
    names = [(label(option.split), count) for count, option in best.items()]
    return [(before, name, count) for (before, _), (name, count) in pairwise(names) if name != before]


@dataclass(frozen=True)
class Slower:
    """More GPUs that take longer.

    Attributes:
        few, many: the two recommendations.
        reason: what grew; empty where nothing that the model knows did.
    """

    few: Option
    many: Option
    reason: str


def slower(best: Mapping[int, Option]) -> list[Slower]:
    """Where more GPUs take longer than fewer, by more than is `ALIKE`, and why.

    Each GPU computes less. It receives more where a group crosses a node for the first time, and where it grows: all keys and
    values but its own share. What attention does not hide of that is the time that is left.
    """
    found = []
    for few, many in pairwise(best.values()):
        if many.milliseconds > (1 + ALIKE) * few.milliseconds:
            before, after = (sum(x.between for x in passes_of(option)) / GIB for option in (few, many))
            reason = f"{after:.1f} GiB from other nodes, {before:.1f} before" if after > before else ""
            found.append(Slower(few, many, reason))
    return found


def slower_than_half(best: Option, layer: Layer, cluster: Cluster, calibration: Calibration) -> Slower | None:
    """What `slower` says of the cluster and half of its GPUs; None where these are not faster, or do not fill their nodes."""
    half = cluster.gpus // 2
    if cluster.gpus % 2 or (half > cluster.gpus_per_node and half % cluster.gpus_per_node) or not best.fits:
        return None
    found = fastest(layer, cluster, calibration, [half]) | {cluster.gpus: best}
    return next(iter(slower(found)), None)


def passes_of(option: Option) -> tuple[Bytes, Bytes]:
    """What a GPU receives forward, and backward."""
    return option.prediction.forward_bytes, option.prediction.backward_bytes


def label(split: Split) -> str:
    """The split in a few words: `a2a+ring, U = 8`."""
    return split.comm + (f", U = {split.head_parallel}" if split.head_parallel > 1 else "")
