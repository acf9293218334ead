"""The lengths of a packed micro-batch on the host, read from the device once per micro-batch.

Every layer needs the cumulative lengths as host integers, because layouts are planned on the host. Host tensors are
compared byte by byte in every layer: that costs microseconds. Reading a GPU tensor waits until the GPU has caught up, so it
is done once per pass over the layers, and the result is kept for the ``PackedSeqParams`` object that the layers share.

What is kept is used again only where it cannot be stale. Neither the identity nor ``_version`` of a tensor shows a write by
a collective, by ``.data`` or by a kernel, so these rules hold instead:

- Another ``PackedSeqParams`` object, another tensor in it, or a newer ``_version``: read.
- A layer whose number is not above that of the latest caller: a new pass over the layers, so read.
- Once an object was seen with new values, a layer that does not directly follow the latest caller: read. (The next chunk of
  a virtual pipeline may run after other micro-batches. In a hybrid model other layers lie between, but there an object is
  not refilled.)
- Recomputation, inside a backward pass: the values of the forward pass. If they are known to be gone, this raises.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from torch.utils.weak import WeakIdKeyDictionary

from moba_cp import SequenceLayout
from moba_cp.tracing import TRACED

from .layout import host_integers, packed_layout

Integers = tuple[int, ...]
Tensors = tuple[torch.Tensor | None, ...]


@dataclass(frozen=True)
class PackLengths:
    """Cumulative lengths of one pack; ``padded`` is None where the pack states none."""

    true: Integers
    padded: Integers | None
    _layouts: dict[tuple[int, str], SequenceLayout] = field(default_factory=dict, repr=False, compare=False)

    @property
    def total(self) -> int:
        """Tokens of the pack, padding included."""
        return (self.true if self.padded is None else self.padded)[-1]

    @property
    def sequences(self) -> int:
        """Sequences that hold tokens or padding."""
        return len(set(self.true if self.padded is None else self.padded)) - 1

    def layout(self, cp_size: int, partition: str) -> SequenceLayout:
        """As :func:`moba_cp.megatron.layout.packed_layout`; the layers of a micro-batch look it up at no cost."""
        key = (cp_size, partition)
        if key not in self._layouts:
            self._layouts[key] = packed_layout(self.true, self.padded, cp_size, partition)
        return self._layouts[key]


@dataclass
class _Forwards:
    """Forward passes of one layer that recomputation may come back to."""

    lengths: PackLengths
    count: int = 0
    mixed: bool = False  # they did not all have the same lengths


@dataclass
class _Pack:
    """What is known of one ``PackedSeqParams`` object."""

    tensors: Tensors
    state: list[Any]  # of the tensors, from _state
    lengths: PackLengths
    layer: int  # the latest that asked in a forward pass
    refilled: bool = False  # its values changed while it lived
    peeked: int | None = None  # the layer that asked ahead of its attention
    forwards: dict[int, _Forwards] = field(default_factory=dict)


_packs = WeakIdKeyDictionary()
_NAMES = ("cu_seqlens_q", "cu_seqlens_kv", "cu_seqlens_q_padded", "cu_seqlens_kv_padded")


def pack_lengths(packed: PackedSeqParams, layer_number: int, training: bool) -> PackLengths:
    """Lengths of a micro-batch, for one layer.

    Args:
        packed: the micro-batch's parameters; the keys' lengths must be the queries'.
        layer_number: of the layer that asks, 1-based.
        training: whether the layer may be asked again for the same forward pass, by recomputation.

    Raises:
        TypeError: lengths that are no tensors.
        ValueError: no lengths, or without values, keys and queries of different lengths, or recomputation after the lengths
            were overwritten.
    """
    if packed.cu_seqlens_q is None:
        raise ValueError("packed_seq_params.cu_seqlens_q is None: packed attention needs the sequence lengths")
    recomputing = torch._C._current_graph_task_id() != -1
    pack: _Pack | None = _packs.get(packed)
    tensors = (packed.cu_seqlens_q, packed.cu_seqlens_kv, packed.cu_seqlens_q_padded, packed.cu_seqlens_kv_padded)
    if pack is None or not _is_current(pack, tensors, layer_number, recomputing):
        _check_tensors(tensors)
        state = _state(tensors)
        lengths = _checked(*_read(tensors))
        if pack is None:
            pack = _packs[packed] = _Pack(tensors, state, lengths, layer_number)
        elif lengths == pack.lengths:
            pack.tensors, pack.state = tensors, state
        elif recomputing:
            raise ValueError(_OVERWRITTEN.format(layer_number, list(pack.lengths.true), list(lengths.true)))
        else:
            pack.tensors, pack.state, pack.lengths, pack.refilled = tensors, state, lengths, True
    if not recomputing:
        pack.layer = layer_number
    _count_forward(pack, layer_number, training, recomputing)
    return pack.lengths


def peek_lengths(packed: PackedSeqParams, layer_number: int) -> PackLengths:
    """The same for a layer that asks before its attention does in the same forward pass; reads lengths on a GPU no more often."""
    lengths = pack_lengths(packed, layer_number, training=False)
    _packs[packed].peeked = layer_number
    return lengths


_OVERWRITTEN = (
    "MoBA attention, layer {}: recomputation needs the lengths of the forward pass, {}, but packed_seq_params now has {}. "
    "Give every micro-batch in flight, and every forward pass in train mode that has no backward, a PackedSeqParams and tensors "
    "of its own"
)


def on_host(tensors: Tensors) -> bool:
    """Whether reading all of these waits for no device."""
    return all(tensor is None or tensor.is_cpu for tensor in tensors)


def _is_current(pack: _Pack, tensors: Tensors, layer_number: int, recomputing: bool) -> bool:
    if any(a is not b for a, b in zip(pack.tensors, tensors, strict=True)) or _state(tensors) != pack.state:
        return False
    if recomputing or on_host(tensors):
        return True
    if pack.peeked == layer_number:
        pack.peeked = None
        return True
    return layer_number == pack.layer + 1 or (layer_number > pack.layer and not pack.refilled)


def _check_tensors(tensors: Tensors) -> None:
    for name, tensor in zip(_NAMES, tensors, strict=True):
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"packed_seq_params.{name} must be a tensor, got {type(tensor).__name__}")
        if tensor.is_meta or isinstance(tensor, TRACED):
            raise ValueError(
                f"packed_seq_params.{name} has no values (a meta or fake tensor), and layouts follow from them"
            )


def _state(tensors: Tensors) -> list[Any]:
    """What tells a change of the tensors: their bytes on the host, ``_version`` on a device (where not even that is kept in
    inference mode)."""
    distinct = {id(tensor): tensor for tensor in tensors if tensor is not None}.values()
    if on_host(tensors):
        if torch._C._len_torch_dispatch_stack():
            # Under FakeTensorMode numpy() shows a copy without values, and tolist() the true ones.
            return [tensor.tolist() for tensor in distinct]
        return [tensor.detach().numpy().tobytes() for tensor in distinct]
    return [None if tensor.is_inference() else tensor._version for tensor in distinct]


def _read(tensors: Tensors) -> list[Integers | None]:
    """Values of the tensors, with one copy from the device however many different ones there are."""
    distinct = {id(tensor): tensor for tensor in tensors if tensor is not None}
    values: dict[int, Integers]
    if len(distinct) == 1 or on_host(tensors) or len({tensor.device for tensor in distinct.values()}) > 1:
        values = {key: host_integers(tensor) for key, tensor in distinct.items()}
    else:
        joined = host_integers(torch.cat([tensor.flatten() for tensor in distinct.values()]))
        values, start = {}, 0
        for key, tensor in distinct.items():
            values[key] = joined[start : start + tensor.numel()]
            start += tensor.numel()
    return [None if tensor is None else values[id(tensor)] for tensor in tensors]


def _checked(
    q: Integers | None, kv: Integers | None, q_padded: Integers | None, kv_padded: Integers | None
) -> PackLengths:
    assert q is not None
    for name, values, expected in (
        ("cu_seqlens_kv", kv, q),
        ("cu_seqlens_kv_padded", kv_padded, q if q_padded is None else q_padded),
    ):
        if values is not None and values != expected:
            raise ValueError(
                f"packed_seq_params.{name} differs from the queries': only self-attention is supported; got "
                f"{list(values)} and {list(expected)}"
            )
    return PackLengths(q, q_padded)


def _count_forward(pack: _Pack, layer_number: int, training: bool, recomputing: bool) -> None:
    """Notes a forward pass, or looks up the one that is recomputed.

    Several micro-batches may be in flight with one object that is refilled in between. Recomputation sees its newest
    lengths only, so where the forward passes had different ones this raises.
    """
    forwards, lengths = pack.forwards.get(layer_number), pack.lengths
    if not recomputing:
        if training and (forwards is None or forwards.count == 0):
            pack.forwards[layer_number] = _Forwards(lengths, 1)
        elif training and forwards is not None:
            forwards.mixed |= forwards.lengths is not lengths and forwards.lengths != lengths
            forwards.lengths = lengths
            forwards.count += 1
    elif forwards is not None and forwards.count:
        if forwards.mixed:
            raise ValueError(_OVERWRITTEN.format(layer_number, "which were several", list(lengths.true)))
        forwards.count -= 1
