"""Milliseconds by stage and bytes by link of one layer, from the work it counts and the coefficients of a calibration.

Computing is a sum of stages, each linear in what it does (keys attended to, partial results, candidates scored). An exchange adds

    exposed     max(0, time on the wire - time of attention, beside which it runs)
    overhead    a cost per partial result (parts are attended to one after the other), per byte that travels beside attention,
                and per call

Routing lists are made beside attention: they are shown, and not added.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from ..parallel.cost import CallSizes
from .calibration import Calibration
from .sizes import Cluster, Layer, Split, Work, busiest, ranges

FORWARD = ("centroids", "gate", "attend", "merge")
BACKWARD = ("delta", "attend backward", "merge dq")
BESIDE = ("lists",)
"""Stages that run beside others."""
CALIBRATED_DIM = 128
FIXED = {"gate": 0.5, "attend": 0.35, "attend backward": 0.45}
"""Shares of these stages' time with `CALIBRATED_DIM` that heads of a smaller size take too: minima and maxima of scores,
exponentials. From models with heads of 64, one H200 (docs/results/training_scaling.json, training_speed.json)."""
REVISITED = 2
"""Position of `Work.revisited` among what the backward of attention is linear in."""
RING_STEP_MS = 0.1
"""Latency of a step of a ring; see `parallel.cost.GATHER_BYTES`."""
STREAMING = ("ring", "pull")
"""Exchanges that bring one part after another, and again for every chunk of query rows if parts are not kept."""
GRADIENT_ITEMSIZE = 4
"""Gradients of keys and values travel between sequence ranks in fp32."""


@dataclass(frozen=True)
class Bytes:
    """What a GPU receives in one pass.

    Attributes:
        heads: of the all-to-all among ranks that split heads.
        sequence: of keys, values and their gradients from other sequence ranks.
        inside, between: of both, from GPUs of its node and from other nodes.
    """

    heads: float
    sequence: float
    inside: float
    between: float


NOTHING = Bytes(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Prediction:
    """One forward pass, and one backward pass where it was asked for.

    Attributes:
        forward, backward: ms by stage that add up to the pass.
        beside: ms of stages that run beside these.
        forward_bytes, backward_bytes: what a GPU receives.
        assumed: exchanges that no result file measured, so that their overhead is a guess.
    """

    forward: dict[str, float]
    backward: dict[str, float]
    beside: dict[str, float]
    forward_bytes: Bytes
    backward_bytes: Bytes
    assumed: tuple[str, ...] = field(default=())

    @property
    def forward_ms(self) -> float:
        """Milliseconds of one layer."""
        return sum(self.forward.values())

    @property
    def forward_backward_ms(self) -> float:
        """Milliseconds of one layer, both passes."""
        return self.forward_ms + sum(self.backward.values())


def features(work: Work, head_dim: int) -> dict[str, list[float]]:
    """What each stage's time is linear in: bytes shrink with the heads' size, the rest as `FIXED` says."""
    wide = head_dim / CALIBRATED_DIM
    partly = {name: share + (1 - share) * wide if wide < 1 else wide for name, share in FIXED.items()}
    pairs, rows, revisited = (x * wide for x in (work.pairs, work.rows, work.revisited))
    return {
        "centroids": [work.kv_rows * wide, 1.0],
        "gate": [work.scored * partly["gate"], work.rows * partly["gate"], 1.0],
        "lists": [work.pairs, 1.0],
        "attend": [work.keys * partly["attend"], pairs, 1.0],
        "merge": [pairs, 1.0],
        "delta": [rows, 1.0],
        "attend backward": [work.keys * partly["attend backward"], pairs, revisited, 1.0],
        "merge dq": [pairs, 1.0],
    }


def call_sizes(layer: Layer, ranks: int) -> CallSizes:
    """The layer as the cost model of `auto` sees it."""
    heads = layer.q_heads, layer.kv_heads, layer.head_dim, layer.head_dim
    return CallSizes(ranks, -(-layer.tokens // ranks), *heads, layer.itemsize, GRADIENT_ITEMSIZE, True)


def received(layer: Layer, split: Split, cluster: Cluster, backward: bool) -> Bytes:
    """Bytes that a GPU receives in one pass, by where they come from: as `parallel.cost` counts them for `auto`.

    Heads: q, k, v in and the output out; backward its gradient in, with deltas, and dq, dk, dv out. Sequence: keys and values of
    all other sequence ranks that are wanted; backward these again, and their gradients in fp32. What does not fit
    `exchange_bytes` comes once per chunk of query rows: see `walks`.
    """
    size, sequence = split.head_parallel, split.sequence_ranks
    sizes = call_sizes(layer, split.ranks)
    heads = replace(sizes, gradients=False).head_bytes(size)
    remote = sizes.sequence_bytes(size, gradients=False)
    if backward:
        heads = sizes.head_bytes(size) - heads
        remote = sizes.sequence_bytes(size, gradients=True) - remote
    if split.exchange in ("fetch", "pull"):
        remote *= layer.wanted_share
    remote *= walks(layer, split, backward)
    neighbours = max(1, cluster.node // size)  # sequence ranks of equal head index in one node
    near = (min(neighbours, sequence) - 1) / max(1, sequence - 1)
    heads_near = 1.0 if size <= cluster.node else (cluster.node - 1) / (size - 1)
    if split.exchange == "ring" and sequence > neighbours:
        near = 0.0  # each step is as slow as the slowest link of the ring
    inside = heads * heads_near + remote * near
    return Bytes(heads, remote, inside, heads + remote - inside)


def walks(layer: Layer, split: Split, backward: bool) -> int:
    """How often `ring` and `pull` bring keys and values in one pass: once, or once per chunk of query rows where they are too
    large to be kept; as `parallel.exchanges.base.Streaming.walks` counts."""
    if split.exchange not in STREAMING or kept_bytes(layer, split, backward) <= split.exchange_bytes:
        return 1
    return ranges(layer, split).chunks


def keeps_parts(layer: Layer, split: Split) -> bool:
    """Whether remote parts stay for several chunks of query rows in backward."""
    return (
        split.exchange in STREAMING
        and ranges(layer, split).chunks > 1
        and kept_bytes(layer, split, True) <= split.exchange_bytes
    )


def kept_bytes(layer: Layer, split: Split, backward: bool) -> int:
    """The least `exchange_bytes` with which `ring` and `pull` bring keys and values once in a pass, whatever its chunks: those of
    all sequence ranks of one range of kv heads; backward also their gradients."""
    itemsize = layer.itemsize + (GRADIENT_ITEMSIZE if backward else 0)
    return layer.tokens * ranges(layer, split).most_heads * 2 * layer.head_dim * itemsize


def predict(layer: Layer, split: Split, cluster: Cluster, calibration: Calibration) -> Prediction:
    """Times and bytes of one layer on the busiest rank.

    Raises:
        ValueError: `split` is over another number of ranks than the cluster has.
    """
    if split.ranks != cluster.gpus:
        raise ValueError(f"a split over {split.ranks} ranks does not fit a cluster of {cluster.gpus} GPUs")
    work = busiest(layer, split)
    of_stage = {name: calibration.stage_ms(name, x) for name, x in features(work, layer.head_dim).items()}
    passes, sent = [], []
    for backward, names in ((False, FORWARD), (True, BACKWARD)):
        stages = {name: of_stage[name] for name in names}
        bytes_ = received(layer, split, cluster, backward)
        attention = stages["attend backward" if backward else "attend"] + stages["merge dq" if backward else "merge"]
        wire = max(bytes_.inside / cluster.link, bytes_.between / cluster.fabric) / 1e6
        if split.exchange == "ring":
            wire += RING_STEP_MS * (split.sequence_ranks - 1)
        if split.ranks > 1:
            stages["exchange (exposed)"] = max(0.0, wire - attention)
            stages["exchange (overhead)"] = sum(
                calibration.exchange_ms(name, backward, [work.pairs * layer.head_dim / CALIBRATED_DIM, moved, 1.0])
                for name, moved in moved_by(split, bytes_)
            )
        passes.append(stages)
        sent.append(bytes_)
    assumed = tuple(name for name, _ in moved_by(split, sent[0]) if name in calibration.assumed)
    return Prediction(passes[0], passes[1], {name: of_stage[name] for name in BESIDE}, sent[0], sent[1], assumed)


def moved_by(split: Split, bytes_: Bytes) -> list[tuple[str, float]]:
    """The exchanges of a split, each with the bytes it brings a GPU."""
    found = [("a2a", bytes_.heads)] if split.head_parallel > 1 else []
    return found + ([(split.exchange, bytes_.sequence)] if split.sequence_ranks > 1 else [])
