"""Arithmetic on sizes where kernels are launched.

`triton.cdiv` and `triton.next_power_of_2` serve kernels as well: they unwrap and wrap their arguments, some microseconds a
call on the host, and one forward and backward pass makes about twenty. These are for the host alone.
"""

from __future__ import annotations


def cdiv(a: int, b: int) -> int:
    """`a / b`, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`; 0 for 0, as Triton has it."""
    return 1 << (n - 1).bit_length() if n > 0 else 0
