"""What the forward operator leaves for its backward outside of the graph: routing lists, and what the host decided.

A graph saves tensors of sizes that are known when it is made. The sizes of routing lists follow from the layout, so a graph
cannot hold them. They are attached to the memory of a tensor that the graph does hold, the selected blocks, and live as long:
until backward has run, or until the graph of autograd is dropped, is freed by checkpointing, or moves what it saved to the host.
Backward uses them if it is given that memory. Given a copy, it makes them again.

torch has one `untyped_storage()` object per memory, with a `__dict__`, for all tensors that view it.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from . import pipeline
from .call import Call
from .kernels import RoutingLists
from .parallel.exchanges import Route

_NAME = "_moba_cp_attached"


@dataclass(frozen=True, eq=False)
class Attached:
    """What one forward pass decided.

    Attributes:
        call: the call, as backward runs it too.
        lists: routing lists of the chunks in turn.
        route: what the exchange decided.
        mark: of this pass; also attached to the memory of its route tensor.
    """

    call: Call
    lists: tuple[RoutingLists, ...]
    route: Route
    mark: object


def attach(selected: Tensor, route: Tensor, call: Call, saved: pipeline.Saved) -> None:
    """Leave what backward needs of `call` besides the graph's tensors.

    Args:
        selected, route: the tensors that the operator returns, each the only one with its memory.
        call: with `keep_lists`.
        saved: of its forward pass.
    """
    mark = object()
    setattr(route.untyped_storage(), _NAME, mark)
    setattr(selected.untyped_storage(), _NAME, Attached(call, saved.lists, saved.route, mark))


def attached(selected: Tensor, route: Tensor) -> Attached | None:
    """What a forward pass left with these tensors; None if they do not both have the memory of the same pass."""
    found = getattr(selected.untyped_storage(), _NAME, None)
    if isinstance(found, Attached) and found.mark is getattr(route.untyped_storage(), _NAME, None):
        return found
    return None
