"""Process groups of some ranks of a context-parallel group, made by those ranks alone. Torch keeps them, as it does all groups.

`torch.distributed.new_group` does not serve here. Every rank of the world has to call it, or the name comes from a count that can
differ between ranks and is the same again in the group's next life, when its store still holds the last life's addresses; and
where the default group is bound to a device, all of the world has to take part in splitting its communicator. So the name is
made here, of the parent's life, and the communicator is a new one.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import TypeAlias

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from .agreement import life_of
from .comm import backends_of, process_group

_Groups: TypeAlias = "weakref.WeakValueDictionary[tuple[tuple[int, ...], str], dist.ProcessGroup]"
_made: weakref.WeakKeyDictionary[dist.ProcessGroup, _Groups] = weakref.WeakKeyDictionary()
_parents: list[tuple[weakref.ref[dist.ProcessGroup], weakref.ref[dist.ProcessGroup]]] = []


def sub_group(parent: dist.ProcessGroup | None, ranks: Sequence[int], device: torch.device) -> dist.ProcessGroup:
    """The group of `ranks` of `parent`, this rank among them; made at the first call, which all of `ranks` make alike. `parent`
    itself, if these are all its ranks.

    It has the parent's backend for `device` and its timeout. Its life ends with the parent's.

    Args:
        parent: a context-parallel group whose ranks have agreed on a call (`agreement.check`); None for the default group.
        ranks: ranks of `parent`, ascending.
        device: where its tensors are.
    """
    parent = process_group(parent)
    if tuple(ranks) == tuple(range(parent.size())):
        return parent
    groups = _made.setdefault(parent, weakref.WeakValueDictionary())
    key = tuple(ranks), device.type
    group = groups.get(key)
    if group is None:
        _destroy_orphans()
        group = groups[key] = _make(parent, key[0], device)
        _parents.append((weakref.ref(parent), weakref.ref(group)))
    return group


def sub_groups_of(parent: dist.ProcessGroup) -> list[dist.ProcessGroup]:
    """The groups made of ranks of `parent` so far, in that order."""
    return list(_made.get(parent, {}).values())


def _make(parent: dist.ProcessGroup, ranks: tuple[int, ...], device: torch.device) -> dist.ProcessGroup:
    world_ranks = [dist.get_global_rank(parent, rank) for rank in ranks]
    backend = _backend_name(parent, device)
    _, store = distributed_c10d._world.pg_map[distributed_c10d._get_default_group()]
    options = None
    if backend == "nccl":
        # Transfers are short and others wait for them; attention's grids would keep them from the multiprocessors.
        options = dist.ProcessGroupNCCL.Options(is_high_priority_stream=True)
    with _unbound():
        made, _ = distributed_c10d._new_process_group_helper(
            len(ranks),
            ranks.index(dist.get_rank(parent)),
            world_ranks,
            distributed_c10d.Backend(backend),
            store,
            f"moba_cp/{parent.group_name}/{life_of(parent)}/{device.type}/{'-'.join(map(str, ranks))}",  # type: ignore[arg-type]
            backend_options=options,
            timeout=timeout_of(parent, device),
            group_desc="moba_cp",
        )
    distributed_c10d._world.pg_group_ranks[made] = {rank: index for index, rank in enumerate(world_ranks)}
    return made


def timeout_of(group: dist.ProcessGroup, device: torch.device) -> timedelta:
    """The timeout of a group's collectives on `device`."""
    return group._get_backend(device).options._timeout


def _backend_name(group: dist.ProcessGroup, device: torch.device) -> str:
    """The backend that serves `device` in a group."""
    return backends_of(group).get(device.type, dist.get_backend(group))


@contextlib.contextmanager
def _unbound() -> Iterator[None]:
    """Without the default group's device, so that no communicator is split off that of all ranks."""
    default = distributed_c10d._get_default_group()
    device = default.bound_device_id
    if device is None:
        yield
        return
    default.bound_device_id = None
    try:
        yield
    finally:
        default.bound_device_id = device


def _destroy_orphans() -> None:
    """Destroy groups whose parents were destroyed: torch keeps a group until it is told."""
    kept = []
    for pair in _parents:
        parent, group = (weak() for weak in pair)
        if parent is not None and parent in distributed_c10d._world.pg_map:
            kept.append(pair)
        elif group is not None and group in distributed_c10d._world.pg_map:
            with contextlib.suppress(RuntimeError):  # its peers are gone
                dist.destroy_process_group(group)
    _parents[:] = kept
