"""Block attention, forward: gathered query rows times one block of keys and values.

Each (q head, row, slot) gets one normalised partial output and its log-sum-exp in base 2. Small blocks (at most 128 keys) stay
on chip while up to 2048 rows stream past them; of larger blocks 128 rows stay and the keys stream. Files: `portable.py` and
`sm90.py` launch, `*_kernels.py` and `*_sm90.py` hold the kernels; `..dispatch` chooses.
"""

from __future__ import annotations

from torch import Tensor

from ..dispatch import SM90, choose_variant
from ..types import KVPart, Partials, QueryRows, RoutingLists
from . import portable


def attend(
    q: Tensor,
    part: KVPart,
    lists: RoutingLists,
    rows: QueryRows,
    scale: float,
    partials: Partials,
    *,
    variant: str | None = None,
) -> None:
    """Attention of every listed row to every block of the part; see `backend.Backend.attend`.

    Args:
        variant: "portable", or "sm90" where it serves; by default the fastest. The bits are the same.

    Raises:
        ValueError: see `dispatch.choose_variant`.
    """
    if q.shape[0] == 0 or lists.shape.n_blocks == 0 or part.k.shape[0] == 0:
        return
    if choose_variant(q, part, lists, requested=variant) == SM90:
        from . import sm90  # Gluon is experimental: imported only where it runs

        sm90.attend(q, part, lists, rows, scale, partials)
    else:
        portable.attend(q, part, lists, rows, scale, partials)
