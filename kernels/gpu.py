"""What kernels need to know about a GPU. The only file that says which GPU is a Hopper."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch

_SHARED_KIB = {(8, 0): 163, (8, 7): 163, (9, 0): 227, (10, 0): 227, (10, 3): 227}
LEAST_SHARED = 99 << 10
"""Bytes of shared memory per program on consumer GPUs: compute capabilities 8.6, 8.9 and 12.0."""


class Gpu(NamedTuple):
    """One kind of GPU. Launch configurations depend on it, and on sizes that no layout changes.

    Attributes:
        capability: compute capability.
        shared_memory: most bytes of shared memory per program.
        multiprocessors: number of multiprocessors.
    """

    capability: tuple[int, int]
    shared_memory: int
    multiprocessors: int = 1

    @property
    def is_hopper(self) -> bool:
        """Compute capability 9.0: the Gluon kernels run on it, and TMA pays off."""
        return self.capability == (9, 0)

    @property
    def is_hopper_or_newer(self) -> bool:
        """Compute capability 9.0 or higher: tile sizes were chosen on a Hopper and assume its tensor cores."""
        return self.capability >= (9, 0)


def gpu_of_capability(capability: tuple[int, int]) -> Gpu:
    """The GPU that compiled kernels target, where there is no device to ask."""
    return Gpu(capability, _SHARED_KIB.get(capability, LEAST_SHARED >> 10) << 10)


@lru_cache(maxsize=64)
def gpu_of(device: torch.device) -> Gpu:
    """The GPU of tensors on `device`. CPU tensors, which only Triton's interpreter sees, count as on a Hopper."""
    if device.type != "cuda":
        return gpu_of_capability((9, 0))
    properties = torch.cuda.get_device_properties(device)
    return gpu_of_capability((properties.major, properties.minor))._replace(
        multiprocessors=properties.multi_processor_count,
    )
