"""MoBA attention of new queries against a cache of keys and values: chunked prefill and decoding, on one device.

Blocks are counted over each sample's *content*: the tokens that are no padding, in order. `CachedTokens` says which slots of the
cache hold it, `CentroidCache` keeps the centroids of complete blocks from one call to the next.

One query per sample (decoding) reads the selected blocks only, split over programs, and the host reads nothing. Several queries
per sample (a chunk of a prompt) take the gate, lists, attention and merge of a forward pass, on keys that stay where they are.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from .chunks import most_at_once, ranges_of
from .config import DEFAULT_WORKSPACE_BYTES, MoBAConfig
from .decoding import Step, decode, made, most_slots, step_facts, strides_of
from .derivatives import refuse_transforms
from .kernels import Backend, KVPart, QueryRows, backend_for, query_rows
from .kernels.sizes import block_size_of_kernels
from .kernels.types import COUNT_TILE
from .parallel.outside_graphs import outside_graphs
from .precision import as_given
from .prepare import needs_gradients
from .strides import readable, unit_stride
from .tracing import is_captured, without_numbers
from .validation import INTEGERS, check_config, check_integer, check_tensor, check_tensors


@dataclass(frozen=True, eq=False)
class CachedTokens:
    """Which slots of a cache hold content, and where the queries of a call stand in it. Made by `of`.

    The content of a sample may begin anywhere (left padding) and have gaps (right padding of a prompt, then generated tokens).

    Attributes:
        lengths: int32 `[samples]`, content tokens including the queries of this call.
        before: int32 `[samples]`, content tokens without them.
        query_position: int32 `[samples, queries]`, position of each query in the sample's content; -1 for padding.
        slots: int32 `[samples, slots]`, slot of each content token in order; undefined from `lengths` on.
        slot_position: int32 `[samples, slots]`, position of each slot in the content; -1 for padding and unused slots.
    """

    lengths: Tensor
    before: Tensor
    query_position: Tensor
    slots: Tensor
    slot_position: Tensor
    _rows: dict[tuple[int, int], QueryRows] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(
        cls,
        content: Tensor | None,
        *,
        samples: int,
        queries: int,
        slots: int,
        offset: int | Tensor,
        device: torch.device,
    ) -> CachedTokens:
        """The tokens of a cache whose slots `[offset, offset + queries)` hold the keys of this call's queries.

        Args:
            content: bool or integers `[samples, slots or fewer]`, False or 0 for padding; missing slots are padding. None: all is
                content. Slots from `offset + queries` on are not used yet, whatever it says.
            samples, queries, slots: samples, queries per sample, slots per sample.
            offset: slot of the first query; as an integer tensor of one element on a GPU it is not read on the host.
            device: where the tensors of the result are.

        Raises:
            TypeError, ValueError: an argument is not as said.
        """
        for name, count in (("samples", samples), ("queries", queries), ("slots", slots)):
            check_integer(name, count, least=0)
        if content is not None:
            check_tensor("content", content)
            if content.is_floating_point() or content.is_complex():
                raise TypeError(f"content must be bool, or integers where 0 is padding, got {content.dtype}")
            if content.dim() != 2 or content.shape[0] != samples or content.shape[1] > slots:
                raise ValueError(
                    f"content must have shape [{samples}, at most {slots}], got {tuple(content.shape)} for {samples} "
                    f"samples and {slots} slots"
                )
        if not isinstance(device, (str, torch.device)):
            raise TypeError(f"device must be a torch.device, got {device!r}")
        offset = _checked_offset(offset, queries, slots)
        slot = torch.arange(slots, device=device)
        used = (slot < offset + queries)[None, :].expand(samples, -1)
        if content is not None:
            used = used & torch.nn.functional.pad(content.to(device, torch.bool), (0, slots - content.shape[1]))
        counted = used.cumsum(1, dtype=torch.int32)
        position = torch.where(used, counted - 1, -1)
        table = torch.zeros(samples, slots + 1, dtype=torch.int32, device=device)
        table.scatter_(1, torch.where(used, position, slots).long(), slot.int().expand(samples, -1))
        at = torch.arange(queries, device=device) + offset
        query_position = position.index_select(1, at)
        lengths = used.sum(1, dtype=torch.int32)
        before = lengths - (query_position >= 0).sum(1, dtype=torch.int32)
        return cls(lengths, before, query_position, table[:, :-1], position)

    def extends(self, earlier: CachedTokens) -> bool:
        """Whether content of the cache that was there with `earlier` is where it was. Waits for the device."""
        width = min(self.slots.shape[1], earlier.slots.shape[1])
        known = torch.arange(width, device=self.slots.device) < torch.minimum(self.before, earlier.lengths)[:, None]
        return not bool((known & (self.slots[:, :width] != earlier.slots[:, :width])).any())

    @cached_property
    def host(self) -> HostTokens:
        """The facts that chunked prefill needs on the host; waits for the device once."""
        last = (self.lengths.long() - 1).clamp(min=0)[:, None]
        ends = (
            torch.cat([self.slots[:, :1], self.slots.gather(1, last).int()], 1) if self.slots.shape[1] else self.slots
        )
        return HostTokens(
            self.lengths.cpu().numpy(), self.before.cpu().numpy(), self.query_position.cpu().numpy(), ends.cpu().numpy()
        )

    @cached_property
    def position(self) -> Tensor:
        """int32 `[samples]`, position of each sample's first query; for decoding, where there is no other."""
        return self.query_position[:, 0]

    def rows(self, blocks: int, block_size: int) -> QueryRows:
        """Where the queries stand among `blocks` blocks per sample; of all samples in order, without padding."""
        key = (blocks, block_size)
        if key not in self._rows:
            sample, query = np.nonzero(self.host.query_position >= 0)
            position = self.host.query_position[sample, query]
            first = sample * blocks
            self._rows[key] = query_rows(
                first + position // block_size, first, position % block_size, self.lengths.device
            )
        return self._rows[key]


def _checked_offset(offset: int | Tensor, queries: int, slots: int) -> int | Tensor:
    """`offset` as an int or a tensor of no dimension; the queries fit into the slots, as far as the host can tell."""
    if isinstance(offset, Tensor):
        if offset.numel() != 1 or offset.dtype not in INTEGERS:
            raise TypeError(f"offset must be an int or an integer tensor of one element, got {offset!r}")
        if offset.device.type == "cpu" and not (torch.compiler.is_compiling() or without_numbers(offset)):
            _checked_offset(int(offset), queries, slots)
        return offset.reshape(())
    check_integer("offset", offset, least=0)
    if offset + queries > slots:
        raise ValueError(f"{queries} queries from slot {offset} on do not fit into {slots} slots")
    return offset


@dataclass(frozen=True)
class HostTokens:
    """What `CachedTokens` holds, on the host.

    Attributes:
        lengths, before, query_position: as there.
        ends: `[samples, 2]`, slots of the first and the last content token.
    """

    lengths: np.ndarray
    before: np.ndarray
    query_position: np.ndarray
    ends: np.ndarray

    @property
    def whole(self) -> bool:
        """No sample has content before its queries: a prefill from the start."""
        return not self.before.any()

    @property
    def first_query(self) -> int:
        """Slot of the first query where the call is `whole`; 0 where no query is content."""
        samples = np.flatnonzero(self.lengths)
        if not samples.size:
            return 0
        return int(self.ends[samples[0], 0]) - int((self.query_position[samples[0]] >= 0).argmax())

    @property
    def gapless(self) -> bool:
        """The content of every sample is consecutive slots."""
        return bool(((self.lengths == 0) | (self.ends[:, 1] - self.ends[:, 0] + 1 == self.lengths)).all())


class CentroidCache:
    """Centroids of the complete blocks of a cache, kept from one call of `moba_attention_cached` to the next.

    A call adds the centroids of blocks that became complete, and forgets those beyond the content before its queries, so content
    may have been cropped in between. Any other change of the content (samples reordered, keys overwritten) needs a new object.

    A CUDA graph reads and writes these tensors at their addresses: capture again after `values` has grown. Make one call before
    the capture. A captured first call computes all centroids at every replay, and leaves the object undefined until the first.

    Attributes:
        values: `[samples, n, Hkv, D]`, allocated for `n` blocks per sample; None before the first call.
        count: int32 `[samples, Hkv, tiles]`, known centroids of each tile of `COUNT_TILE` blocks.
        arrived: int32 `[samples, Hkv]`, zero between calls: counts the programs of a kernel on a GPU; None elsewhere.
    """

    def __init__(self) -> None:
        self.values: Tensor | None = None
        self.count: Tensor | None = None
        self.arrived: Tensor | None = None
        self._block_size = 0
        self._step = Step()

    @property
    def nbytes(self) -> int:
        """Bytes on the device."""
        return sum(x.nbytes for x in (self.values, self.count, self.arrived, self._step.run) if x is not None)

    def fits(self, k: Tensor, block_size: int) -> bool:
        """Whether a call with the cache `k` `[samples, slots, Hkv, D]` can use this object: it is new, or of calls with the same
        samples, heads, head size, dtype and block size."""
        if self.values is None:
            return True
        shape = self.values.shape
        made_for = (self._block_size, shape[0], shape[2:], self.values.dtype)
        return made_for == (block_size, k.shape[0], k.shape[2:], k.dtype)

    def make_room(self, k: Tensor, block_size: int) -> bool:
        """Allocate for the cache `k` `[samples, slots, Hkv, D]`, as far as needed; whether nothing was there before.

        Raises:
            ValueError: the object was used with other shapes, dtype or block size.
        """
        with torch.inference_mode(False):  # calls outside of it will write to what is kept
            return self._make_room(k, block_size)

    def _make_room(self, k: Tensor, block_size: int) -> bool:
        samples, slots, heads, dim = k.shape
        blocks = blocks_per_sample(slots, block_size)
        tiles = -(-blocks // COUNT_TILE)
        if self.values is None or self.count is None:
            # Zeros: rows are scored again, at a cost, where a centroid is not finite, also one that no block has yet.
            self.values = k.new_zeros(samples, blocks, heads, dim)
            self.count = torch.zeros(samples, heads, tiles, dtype=torch.int32, device=k.device)
            self.arrived = self.count.new_zeros(samples, heads) if k.is_cuda else None
            self._block_size = block_size
            return True
        known = self.values.shape
        if not self.fits(k, block_size):
            raise ValueError(
                f"a CentroidCache made for blocks of {self._block_size} keys, {tuple(self.values[:, 0].shape)} "
                f"{self.values.dtype}, got blocks of {block_size} keys, {tuple(k[:, 0].shape)} {k.dtype}"
            )
        if known[1] < blocks:
            values, count = k.new_zeros(samples, blocks, heads, dim), self.count.new_zeros(samples, heads, tiles)
            values[:, : known[1]] = self.values
            count[:, :, : self.count.shape[2]] = self.count
            self.values, self.count = values, count
            self._step = Step()
        return False


def blocks_per_sample(slots: int, block_size: int) -> int:
    """Block numbers per sample: a power of two, so that a cache that grows by one token compiles and allocates rarely."""
    return 1 << (max(-(-slots // block_size), 1) - 1).bit_length()


def moba_attention_cached(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    config: MoBAConfig,
    *,
    tokens: CachedTokens,
    centroids: CentroidCache | None = None,
    workspace_bytes: int = DEFAULT_WORKSPACE_BYTES,
) -> Tensor:
    """MoBA attention of new queries against a cache that holds their keys already; forward only, on one device.

    Equal to the rows of `moba_attention` over the whole content: a query at position p of its sample's content attends to its own
    block up to p, and to the best-scored complete blocks before. Decoding reads a selected block once per kv head, for all q
    heads that selected it. `torch.compile` breaks the graph once, at the call.

    Args:
        q: `[samples, queries, Hq, D]`, fp64, fp32, bf16 or fp16.
        k, v: `[samples, slots, Hkv, D]`, `[samples, slots, Hkv, Dv]`, any strides of the first three dimensions (a cache
            `[samples, Hkv, slots, D]` passes `.transpose(1, 2)`).
        config: block size, top-k and scale.
        tokens: where content and queries are: `CachedTokens.of`.
        centroids: kept by the caller from call to call; None computes all centroids anew, which reads every key.
        workspace_bytes: most bytes of partial results at once, as in `moba_attention`; with several queries only.

    Returns:
        `[samples, queries, Hq, Dv]` in the dtype of `q`; zeros for queries that are padding. Tensors without numbers
        (`FakeTensorMode`, the meta device) give an output without numbers.

    Raises:
        TypeError, ValueError: an argument is not as said, or a gradient is wanted.
    """
    if torch.compiler.is_compiling():
        return _outside_the_graph(q, k, v, config, tokens=tokens, centroids=centroids, workspace_bytes=workspace_bytes)
    refuse_transforms(q=q, k=k, v=v)
    facts = step_facts(q, k, v, config, tokens, workspace_bytes) if tokens.__class__ is CachedTokens else None
    before = centroids._step if centroids.__class__ is CentroidCache else Step()
    strides = None
    if facts is None or facts != before.facts:
        check_config(config)
        check_integer("workspace_bytes", workspace_bytes, least=1)
        _check_cache(q, k, v, tokens, centroids)
        backend_for(q.device, q.dtype).check_sizes(dim=q.shape[3], dim_v=v.shape[3], block_size=config.block_size)
        if needs_gradients(q, k, v):
            raise ValueError(
                "moba_attention_cached has no gradient; use moba_attention for training, or torch.no_grad()"
            )
        if without_numbers(q, k, v) or (q.numel() == 0 and (centroids is None or k.numel() == 0)):
            return q.new_zeros(*q.shape[:3], v.shape[3])
    else:
        strides = strides_of(q, k, v, tokens)
        # A graph must take memory of its own, which outlives what a cache keeps for steps.
        if before.run is not None and strides == before.strides and not is_captured(q):
            with torch.cuda.device_of(q):
                return before.run(q, k, v, tokens.slots, tokens.before, tokens.lengths, tokens.position)
    backend = backend_for(q.device, q.dtype)
    centroids = CentroidCache() if centroids is None else centroids
    with torch.cuda.device_of(q), as_given(q):  # nothing here requires a gradient
        k, v = unit_stride(k), unit_stride(v)
        new = centroids.make_room(k, config.block_size)
        block_size = block_size_of_kernels(config.block_size, k.shape[1])
        one_each = q.shape[1] == 1
        if new or not one_each:
            means = made(centroids.values)
            most = means.shape[1] if new else -(-q.shape[1] // block_size) + 1
            backend.update_centroids(
                k, slots=tokens.slots, before=tokens.before, lengths=tokens.lengths, count=made(centroids.count),
                centroids=means, block_size=block_size, at_most=most,
            )  # fmt: skip
        config = replace(config, block_size=block_size)
        if q.numel() == 0:
            return q.new_zeros(*q.shape[:3], v.shape[3])
        if not one_each:
            return _chunk(backend, q, k, v, config, tokens, made(centroids.values), workspace_bytes)
        repeated = strides is not None and strides == centroids._step.strides
        out, run = decode(backend, q, k, v, config, tokens, centroids, bind=repeated and not is_captured(q))
        centroids._step = Step(facts, strides, run)
        return out


_outside_the_graph = outside_graphs(moba_attention_cached)


def _check_cache(q: Tensor, k: Tensor, v: Tensor, tokens: CachedTokens, centroids: CentroidCache | None) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x)
        if x.dim() != 4:
            raise ValueError(f"{name} must have shape [samples, tokens, heads, head size], got {tuple(x.shape)}")
    if not isinstance(tokens, CachedTokens):
        raise TypeError(f"tokens must be CachedTokens, got {type(tokens).__name__}")
    if centroids is not None and not isinstance(centroids, CentroidCache):
        raise TypeError(f"centroids must be a CentroidCache or None, got {type(centroids).__name__}")
    if not q.shape[0] == k.shape[0] == v.shape[0] or k.shape[1] != v.shape[1]:
        raise ValueError(
            "q, k and v must have the same samples, and k and v the same slots, got "
            f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
        )
    check_tensors(q[:, :0].flatten(0, 1), k[:, :0].flatten(0, 1), v[:, :0].flatten(0, 1))
    expected = (q.shape[:2], k.shape[:2])
    found = (tokens.query_position.shape, tokens.slots.shape)
    if found != expected:
        raise ValueError(
            f"tokens are of [samples, queries] {tuple(found[0])} and [samples, slots] {tuple(found[1])}, but q is "
            f"{tuple(q.shape)} and k {tuple(k.shape)}"
        )
    if tokens.slots.stride(1) != 1:
        raise ValueError(f"the last dimension of tokens.slots must be dense, got strides {tokens.slots.stride()}")
    if tokens.slots.device != q.device:
        raise ValueError(f"tokens must be where q is, got tokens on {tokens.slots.device}, q on {q.device}")


def _chunk(
    backend: Backend, q: Tensor, k: Tensor, v: Tensor, config: MoBAConfig, tokens: CachedTokens, means: Tensor,
    workspace_bytes: int,
) -> Tensor:  # fmt: skip
    host, shape = tokens.host, q.shape
    blocks, kv_heads = means.shape[1], k.shape[2]
    n_blocks = means.shape[0] * blocks
    q = q.flatten(0, 1)
    content = np.flatnonzero(host.query_position.ravel() >= 0)
    rows_of_q = None
    if content.size < q.shape[0]:
        rows_of_q = torch.from_numpy(content).to(q.device)
        q = q.index_select(0, rows_of_q)
    q = readable(q)
    rows = tokens.rows(blocks, config.block_size)
    topk = most_slots(config, blocks)
    selected = backend.select_blocks(q, centroids=means.flatten(0, 1), rows=rows, topk=topk)
    part = _part(k, v, tokens, blocks, config.block_size)
    out = q.new_empty(*q.shape[:2], v.shape[3])
    lse = backend.new_lse(q)
    head_bytes = topk * backend.bytes_per_slot(v.shape[3], q.dtype)
    at_once = most_at_once(len(q), q.shape[1], kv_heads, head_bytes, workspace_bytes)
    for heads, chunks in ranges_of(len(q), len(q), q.shape[1], kv_heads, *at_once):
        own_heads = part.k.shape[1] > 1 or kv_heads == 1
        here = KVPart(
            part.k[:, heads] if own_heads else part.k,
            part.v[:, heads] if own_heads else part.v,
            part.start[heads],
            part.length,
        )
        for chunk in chunks:
            chosen = chunk.of_heads(selected)
            lists = backend.route(
                chosen, n_blocks=n_blocks, kv_heads=heads.stop - heads.start, block_size=config.block_size
            )
            partials = backend.new_partials(chosen, v.shape[3], q.dtype)
            of_chunk = rows.slice(chunk.rows.start, chunk.rows.stop)
            backend.attend(chunk.of_rows(q), here, lists, of_chunk, config.scale(q.shape[2]), partials)
            backend.merge(partials, selected=chosen, out=chunk.of_rows(out), lse=chunk.of_heads(lse))
    if rows_of_q is not None:
        out = out.new_zeros(shape[0] * shape[1], *out.shape[1:]).index_copy_(0, rows_of_q, out)
    return out.unflatten(0, shape[:2])


def _part(k: Tensor, v: Tensor, tokens: CachedTokens, blocks: int, block_size: int) -> KVPart:
    """The content of a cache as one part: in place where each sample's is consecutive slots, else a copy of it."""
    host, device = tokens.host, k.device
    samples, slots, heads, _ = k.shape
    number = np.arange(blocks)
    held = number < -(-host.lengths[:, None] // block_size)  # [samples, blocks]
    length = np.where(held, np.minimum(host.lengths[:, None] - number * block_size, block_size), 0)
    by_head = [x.transpose(1, 2) for x in (k, v)]
    if host.gapless and all(x.is_contiguous() for x in by_head) and samples * heads * slots < 1 << 31:
        k_rows, v_rows = (x.reshape(samples * heads * slots, 1, x.shape[3]) for x in by_head)
        base = (np.arange(samples)[None, :] * heads + np.arange(heads)[:, None]) * slots + host.ends[:, 0]
        start = base[:, :, None] + number * block_size  # [heads, samples, blocks]
    else:
        content = torch.cat([tokens.slots[i, :n].long() + i * slots for i, n in enumerate(host.lengths.tolist())])
        k_rows, v_rows = (x.flatten(0, 1).index_select(0, content) for x in (k, v))
        first = np.cumsum(host.lengths) - host.lengths
        start = np.broadcast_to(first[:, None] + number * block_size, (heads, samples, blocks))
    start = np.where(held, start, -1).reshape(heads, samples * blocks).astype(np.int32)
    to = lambda x: torch.from_numpy(x).to(device, non_blocking=True)  # noqa: E731
    return KVPart(k_rows, v_rows, to(start), to(length.ravel().astype(np.int32)))
