"""The definition in fp64 for sampled rows of a finished call, however many ranks hold its keys; and fingerprints of tensors.

Nothing here calls the library's kernels, so it judges them: centroids, scores, top-k, softmax and dq are plain torch in fp64.
No rank gathers keys or values: each adds what its own tokens give, so that ten million tokens can be checked too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moba_cp import MoBAConfig, SequenceLayout

FINGERPRINT_NUMBERS = 1 << 24
"""Numbers that `fingerprint` widens to 64 bits at once."""
SUMMED_NUMBERS = 1 << 26
"""Numbers that `centroids` widens to fp64 at once."""


@dataclass(frozen=True)
class Ranks:
    """The group whose ranks hold the tokens, for sums over it. None: this rank holds all of them."""

    group: dist.ProcessGroup | None

    def sum(self, x: Tensor) -> Tensor:
        """The sum of every rank's `x`, in place."""
        if self.group is not None:
            dist.all_reduce(x, group=self.group)
        return x

    def max(self, x: Tensor) -> Tensor:
        """The largest of every rank's `x`, by number, in place."""
        if self.group is not None:
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x


@torch.no_grad()
def check_rows(
    q: Tensor, k: Tensor, v: Tensor, dout: Tensor, out: Tensor, dq: Tensor | None, selection: Tensor | None, config: MoBAConfig,
    layout: SequenceLayout, rank: int, ranks: Ranks, rows_per_rank: int = 4,
) -> dict[str, float | int]:  # fmt: skip
    """Errors of output and dq for sampled rows of every rank and all heads, against the definition in fp64.

    Args:
        q, dout, out, dq: `[T, Hq, D]` of this rank's tokens; `dq` None where there was no backward pass.
        k, v: `[T, Hkv, D]`.
        selection: `[Hq, T, topk]` where the caller chose blocks (numbers within the document, -1 for none); None where
            scores choose them, which is for one document.
        layout, rank: which tokens these are.
        ranks: who holds the others.

    Returns:
        output_error, dq_error (if `dq` is given): norm of the difference over the norm of the fp64 value, over all sampled rows.
        dq_rounding_error (if `dq` is given): difference of dq from the fp64 value that follows from the given `out`, over the
            norm of what is rounded on the way (`Attended`). Unlike dq_error, cancellation does not make it grow.
        worst_row_error: the largest ratio as in output_error of one row and head.
        checked_rows: rows times heads compared.
        unclear_rows: rows times heads left out, since a selected and a rejected block score within fp32 rounding of each other.

    Raises:
        ValueError: several documents without `selection`.
    """
    rows = SampledRows.of(layout, rank, q.device, rows_per_rank)
    taken = [None if x is None else rows.take(x) for x in (q, out, dout, dq)]
    assert taken[0] is not None
    assert taken[1] is not None
    chosen = None if selection is None else rows.take(selection.transpose(0, 1), -1).transpose(0, 1)
    return check_sampled(rows, taken[0], k, v, taken[1], taken[2], taken[3], chosen, config, layout, rank, ranks)


@dataclass(frozen=True)
class SampledRows:
    """Rows of a call that are checked, and where this rank holds them.

    Attributes:
        number: int64 `[n]`, their token numbers, equal on every rank.
        here: int64 `[n]`, their rows on this rank; -1 where another rank holds them.
    """

    number: Tensor
    here: Tensor

    @classmethod
    def of(cls, layout: SequenceLayout, rank: int, device: torch.device, rows_per_rank: int = 4) -> SampledRows:
        """The first row, the last one, and random ones."""
        number = _sampled(layout.total_tokens, rows_per_rank * layout.cp_size, device)
        held = layout.local_indices(rank).to(device)
        local = torch.full((layout.total_tokens,), -1, device=device)
        local[held] = torch.arange(len(held), device=device)
        return cls(number, local[number])

    def take(self, x: Tensor, other: float = 0) -> Tensor:
        """`[n, ...]` of this rank's `x` `[T, ...]`; `other` where the row is another rank's."""
        if not len(x):
            return x.new_full((len(self.here), *x.shape[1:]), other)
        mine = (self.here >= 0).view(-1, *[1] * (x.dim() - 1))
        return torch.where(mine, x[self.here.clamp(min=0)], other)


@torch.no_grad()
def check_sampled(
    rows: SampledRows, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor | None, dq: Tensor | None,
    selection: Tensor | None, config: MoBAConfig, layout: SequenceLayout, rank: int, ranks: Ranks,
) -> dict[str, float | int]:  # fmt: skip
    """`check_rows` where only the sampled rows of q, out and their gradients were kept.

    Args:
        rows: which they are.
        q, out, dout, dq: `[n, Hq, D]`, as `rows.take` gives them; `dout` and `dq` None where there was no backward pass.
        k, v: `[T, Hkv, D]` of this rank's tokens.
        selection: `[Hq, n, topk]`, -1 where another rank holds the row; or None.
        config, layout, rank, ranks: as for `check_rows`, as are the result and what is raised.
    """
    tokens, documents = layout.total_tokens, layout.cu_seqlens_array
    if selection is None and len(documents) > 2:
        raise ValueError(
            f"scores of {len(documents) - 1} documents are not checked here; pass selection or one document"
        )
    number = layout.local_indices(rank).to(q.device)
    local = torch.full((tokens,), -1, dtype=torch.int32, device=q.device)
    local[number] = torch.arange(len(number), dtype=torch.int32, device=q.device)
    sampled = rows.number
    starts = torch.from_numpy(documents.copy()).to(q.device)
    first = starts[torch.searchsorted(starts, sampled, right=True) - 1]

    def of_owner(x: Tensor) -> Tensor:
        """What the ranks that hold the rows took of one head, on every rank: fp64 `[n, D]`."""
        return ranks.sum(x.to(torch.float64, copy=True, memory_format=torch.contiguous_format))

    difference, reference = torch.zeros(2, 3, dtype=torch.float64, device=q.device)
    worst, unclear = torch.zeros((), dtype=torch.float64, device=q.device), 0
    group, scale = q.shape[1] // k.shape[1], config.scale(q.shape[2])
    for kv_head in range(k.shape[1]):
        keys, values = k[:, kv_head], v[:, kv_head]
        means = centroids(keys, number, tokens, config.block_size, ranks) if selection is None else None
        for head in range(kv_head * group, (kv_head + 1) * group):
            query = of_owner(q[:, head])
            gradient = (
                torch.zeros_like(query[:, :1]).expand(-1, v.shape[2]) if dout is None else of_owner(dout[:, head])
            )
            clear = torch.ones(len(sampled), dtype=torch.bool, device=q.device)
            if selection is None:
                assert means is not None
                blocks, clear = select(query, means, sampled // config.block_size, config.topk)
            else:
                blocks = ranks.max(selection[head].long())
            output = of_owner(out[:, head])
            row = attend(
                query, gradient, output, keys, values, blocks, sampled, first, local, config.block_size, scale, ranks
            )
            compared = [(output, row.out, row.out.norm(dim=1))]
            if dq is not None:
                dquery = of_owner(dq[:, head])
                compared += [(dquery, row.dq, row.dq.norm(dim=1)), (dquery, row.dq_of_output, row.rounded)]
            for index, (found, wanted, size) in enumerate(compared):
                away = (found - wanted)[clear].norm(dim=1)
                difference[index] += away.square().sum()
                reference[index] += size[clear].square().sum()
                if index == 0 and len(away):
                    worst = torch.maximum(worst, (away / size[clear]).max())
            unclear += int((~clear).sum())
    errors = (difference / reference).sqrt().tolist()
    return {
        "output_error": errors[0],
        **({} if dq is None else {"dq_error": errors[1], "dq_rounding_error": errors[2]}),
        "worst_row_error": worst.item(),
        "checked_rows": len(sampled) * q.shape[1] - unclear,
        "unclear_rows": unclear,
    }


def _sampled(tokens: int, count: int, device: torch.device) -> Tensor:
    """Rows to check: the first, the last, and random ones; equal on every rank."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(0, tokens, (max(0, count - 2),), generator=generator)
    return torch.unique(torch.cat([torch.tensor([0, tokens - 1]), drawn])).to(device)


def centroids(keys: Tensor, number: Tensor, tokens: int, block_size: int, ranks: Ranks) -> Tensor:
    """Means of the whole blocks of one document, summed in fp64 and rounded once to the keys' dtype: fp64 `[blocks, D]`.

    Args:
        keys: `[T, D]` of this rank's tokens.
        number: their token numbers.
    """
    whole = tokens // block_size
    total = torch.zeros(
        whole + 1, keys.shape[1], dtype=torch.float64, device=keys.device
    )  # the last one takes the rest
    step = max(1, SUMMED_NUMBERS // keys.shape[1])
    for some, at in zip(keys.split(step), (number // block_size).clamp(max=whole).split(step), strict=True):
        total.index_add_(0, at, some.double())
    return (ranks.sum(total)[:whole] / block_size).to(keys.dtype).double()


def select(query: Tensor, means: Tensor, own: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Blocks of some rows of one head by fp64 scores: `[n, topk]`, -1 for none, the own block last; and which rows are clear.

    A row is clear where its last selected block scores more than fp32 rounding above the best rejected one.
    """
    score = query @ means.T
    earlier = torch.arange(len(means), device=own.device) < own[:, None]
    score.masked_fill_(~earlier, float("-inf"))
    best = score.topk(min(topk, len(means)), dim=1)
    blocks = torch.full((len(own), topk), -1, dtype=torch.int64, device=own.device)
    kept = min(topk - 1, len(means))
    blocks[:, :kept] = torch.where(best.values[:, :kept] > float("-inf"), best.indices[:, :kept], -1)
    blocks[:, -1] = own
    clear = torch.ones(len(own), dtype=torch.bool, device=own.device)
    if 0 < kept < best.values.shape[1]:
        rounding = query.shape[1] ** 0.5 * 2.0**-23 * query.norm(dim=1) * means.norm(dim=1).amax()
        rejected = best.values[:, kept]
        clear = (rejected == float("-inf")) | (best.values[:, kept - 1] - rejected > rounding)
    return blocks, clear


@dataclass(frozen=True)
class Attended:
    """What the definition gives for some rows of one head, in fp64.

    With softmax weights `P`, `dP_j = <v_j, dout>` and `delta = <out, dout>`, dq of one row is the sum over its selected blocks of
    `dq_b = scale * sum_j P_j (dP_j - delta) k_j`, j in block b. Kernels round the terms `P_j (dP_j - delta)`, each `dq_b`, and
    dq. `rounded` is the size of these: the root of the summed squares of `scale * P_j (dP_j - delta) |k_j|`, `|dq_b|` and `|dq|`.

    Attributes:
        out: `[n, Dv]`.
        dq: `[n, D]`.
        dq_of_output: `[n, D]`, dq with `delta` from the output that the layer gave, rounded as it is.
        rounded: `[n]`, of `dq_of_output`.
    """

    out: Tensor
    dq: Tensor
    dq_of_output: Tensor
    rounded: Tensor


def attend(
    query: Tensor, gradient: Tensor, output: Tensor, keys: Tensor, values: Tensor, blocks: Tensor, row: Tensor, first: Tensor,
    local: Tensor, block_size: int, scale: float, ranks: Ranks,
) -> Attended:  # fmt: skip
    """Output and dq of some rows of one head; every rank adds what its own keys give.

    Args:
        query: fp64 `[n, D]`.
        gradient, output: fp64 `[n, Dv]`, the gradient of the output, and the output that the layer gave.
        keys, values: `[T, D]`, `[T, Dv]` of this rank's tokens.
        blocks: `[n, topk]`, numbers within the row's document; -1 for none.
        row, first: `[n]`, token numbers of the rows and of the first tokens of their documents.
        local: `[tokens]`, where this rank holds a token; -1 where it does not.
    """
    n, topk = blocks.shape
    peak = torch.full((n,), float("-inf"), dtype=torch.float64, device=row.device)
    pieces = []
    for i in range(n):  # one row at a time: its keys in fp64 take 50 MB at (4096, 12)
        token = blocks[i][:, None] * block_size + torch.arange(block_size, device=row.device)
        slot, within = torch.nonzero((blocks[i] >= 0)[:, None] & (token + first[i] <= row[i]), as_tuple=True)
        at = local[token[slot, within] + first[i]]
        slot, at = slot[at >= 0], at[at >= 0].long()
        score = keys[at].double() @ query[i] * scale
        if len(at):
            peak[i] = score.max()
        pieces.append((at, torch.bincount(slot, minlength=topk).tolist(), score))
    peak = ranks.max(peak)
    sums = torch.zeros(n, 1 + values.shape[1], dtype=torch.float64, device=row.device)
    for i, (at, _, score) in enumerate(pieces):
        weight = torch.exp(score - peak[i])
        sums[i, 0], sums[i, 1:] = weight.sum(), weight @ values[at].double()
    sums = ranks.sum(sums)
    result = sums[:, 1:] / sums[:, :1]
    delta, of_output = (result * gradient).sum(1), (output * gradient).sum(1)
    partial = query.new_zeros(n, topk, query.shape[1])
    mean_key, terms = torch.zeros_like(query), torch.zeros_like(delta)
    for i, (at, counts, score) in enumerate(pieces):
        weight, held = torch.exp(score - peak[i]) / sums[i, 0], keys[at].double()
        dscore = weight * (values[at].double() @ gradient[i] - of_output[i]) * scale
        for number, (some, of_block) in enumerate(zip(dscore.split(counts), held.split(counts), strict=True)):
            partial[i, number] = some @ of_block
        mean_key[i] = weight @ held
        terms[i] = dscore.square() @ torch.linalg.vector_norm(held, dim=1).square()  # no copy of the keys
    partial, mean_key, terms = (ranks.sum(x) for x in (partial, mean_key, terms))
    dq_of_output = partial.sum(1)
    rounded = (terms + partial.square().sum((1, 2)) + dq_of_output.square().sum(1)).sqrt()
    return Attended(result, dq_of_output + scale * (of_output - delta)[:, None] * mean_key, dq_of_output, rounded)


@torch.no_grad()
def fingerprint(tensors: Sequence[Tensor], layout: SequenceLayout, rank: int, ranks: Ranks) -> str:
    """16 hex digits of the bits of tensors `[T, ...]` of 16-bit numbers over all ranks.

    Equal for equal global tensors, however the layout spreads them; different, but for a chance of about 2^-60, where any bit is.
    """
    number = layout.local_indices(rank).to(tensors[0].device)
    total = torch.zeros(1, dtype=torch.int64, device=number.device)
    for index, x in enumerate(tensors):
        flat = x.reshape(len(number), -1).view(torch.int16)
        column = _mixed(torch.arange(flat.shape[1], device=number.device) + (index << 40))
        for some, at in zip(
            *(y.split(max(1, FINGERPRINT_NUMBERS // flat.shape[1])) for y in (flat, number)), strict=True
        ):
            total += (_mixed((some.long() * column).sum(1) + at) * _mixed(at + (index << 40))).sum()
    return f"{int(ranks.sum(total).item()) & (1 << 64) - 1:016x}"


def _mixed(x: Tensor) -> Tensor:
    """An odd 64-bit number from each, without a pattern."""
    x = (x + 1) * -7046029254386353131
    x = (x ^ (x >> 29)) * -4658895280553007687
    return (x ^ (x >> 32)) | 1
