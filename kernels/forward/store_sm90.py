"""How the Gluon forward kernels store partial outputs."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.constexpr_function
def store_layout(rows: int, dim: int) -> gl.DistributedLinearLayout:
    """For stores of a warpgroup's product `[rows, dim]`, 64 or 128 rows: its layout, with eight adjacent columns per thread.

    The conversion exchanges columns inside a quad of lanes, without a barrier or other warps, and stores are 16 bytes wide.
    """
    columns = [[0, 1 << bit] for bit in range(dim.bit_length() - 1)]
    registers = [*columns[:3], [8, 0], *columns[5:], *([[64, 0]] if rows == 128 else [])]
    lanes = [*columns[3:5], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, [[16, 0], [32, 0]], [], [rows, dim])
