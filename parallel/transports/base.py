"""What every transport gives the pipeline: parts of the keys and values, and the way home for their gradients."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..comm import CommGroup
from ..home import HomeBlocks


@dataclass(frozen=True)
class Part:
    """Keys and values of some (kv head, block) pairs, as `kernels.KVPart` describes them.

    Attributes:
        k, v: `[N, H or 1, D]`, `[N, H or 1, Dv]`.
        start: int32 `[H, n_blocks]`, row of the block's first key; -1 where the part lacks the pair.
        name: "local", or where it came from.
    """

    k: Tensor
    v: Tensor
    start: Tensor
    name: str


@dataclass(frozen=True)
class PartGradient:
    """A part and room for its gradients, which the caller writes (every row of every pair in the part).

    Attributes:
        part: the part.
        dk, dv: of the shapes of `part.k` and `part.v`, in the accumulation dtype; uninitialised.
        packed: what `dk` and `dv` are views of, `[N, H or 1, D + Dv]`; None for the local part.
    """

    part: Part
    dk: Tensor
    dv: Tensor
    packed: Tensor | None = None


class Transport(ABC):
    """Brings the other ranks' blocks over, for one range of kv heads at a time.

    Attributes:
        resident: whether parts stay valid after the next one is taken, so that several chunks of query rows can visit
            them in turn. A transport that is not resident is walked once for each chunk of rows.
    """

    resident = True
    name: str

    def __init__(self, home: HomeBlocks, comm: CommGroup) -> None:
        self.home, self.comm = home, comm

    def local_part(self, heads: slice) -> Part:
        """This rank's home blocks, where they lie."""
        n_heads = heads.stop - heads.start
        start = self.home.start.expand(n_heads, -1)
        return Part(of_heads(self.home.k, heads), of_heads(self.home.v, heads), start, "local")

    def prefetch(self, heads: slice) -> None:  # noqa: B027  # a transport may have nothing to start
        """Start to bring over what `forward` or `backward` of these heads will wait for first. Every rank calls alike."""

    @abstractmethod
    def forward(self, heads: slice) -> Iterator[Part]:
        """Parts that together hold every pair that a local query selected: local first, remote ones as they arrive."""

    @abstractmethod
    def backward(self, heads: slice, dk: Tensor, dv: Tensor) -> Iterator[PartGradient]:
        """The same parts with room for gradients. A transport that is not resident sends a part's gradients on when
        the next one is taken.

        Args:
            heads: the range of kv heads.
            dk, dv: `[home tokens, H, D]`, `[home tokens, H, Dv]`: the local part's room.
        """

    @abstractmethod
    def return_gradients(self, gradients: list[PartGradient], dk: Tensor, dv: Tensor) -> Callable[[], list[Tensor]]:
        """Start to send the gradients of remote parts home; the function returned waits for what arrives for this rank's
        home blocks and returns what is still to be added to `dk` and `dv`, in this order: `[home tokens, H, D + Dv]` each.
        `fetch`, to which not all rows come, adds what comes itself and returns nothing.

        Args:
            gradients: what `backward` gave, of a resident transport.
            dk, dv: as given to `backward`.
        """


class LocalOnly(Transport):
    """A group of one rank: nothing moves."""

    name = "local"

    def forward(self, heads: slice) -> Iterator[Part]:
        yield self.local_part(heads)

    def backward(self, heads: slice, dk: Tensor, dv: Tensor) -> Iterator[PartGradient]:
        yield PartGradient(self.local_part(heads), dk, dv)

    def return_gradients(self, gradients: list[PartGradient], dk: Tensor, dv: Tensor) -> Callable[[], list[Tensor]]:
        return list


def of_heads(x: Tensor, heads: slice) -> Tensor:
    """`x[:, heads]`; `x` itself where that is all of it, which spares the host a view."""
    return x if heads.stop - heads.start == x.shape[1] else x[:, heads]


def unpack(packed: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Views of what `rows.pack` put side by side; `width` is D."""
    return packed[..., :width], packed[..., width:]


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """What gradients of keys and values of `dtype` are summed in: fp64 for fp64, fp32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def gradient_of(part: Part, packed: Tensor) -> PartGradient:
    """Uninitialised gradients of a part whose keys and values are `packed`."""
    room = torch.empty(packed.shape, dtype=gradient_dtype(packed.dtype), device=packed.device)
    return PartGradient(part, *unpack(room, part.k.shape[-1]), room)
