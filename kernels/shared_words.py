"""Single words of a program's shared memory, at computed places.

Gluon stores and loads whole tensors there. With these functions each thread reads and writes 32-bit words of its own choice,
numbered from the beginning of the program's shared memory. So a kernel that uses them allocates one buffer and nothing else: then
the buffer begins at word 0. `tests/kernels/test_compile_lists.py` checks that the compiler adds none.

The compiler sees neither reads nor writes. The kernel puts a barrier between accesses of different threads to a word; only
`add_to_words` and `set_bits` change words of several threads in any order. Where a tensor has fewer elements than there are
threads, several hold one element, and each does what is asked: `add_to_words` then adds several times.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

_ADDRESS = "{ .reg .pred p; .reg .b32 a; mov.b32 a, global_smem; mad.lo.s32 a, $1, 4, a;"
_LOAD = gl.constexpr(f"{_ADDRESS} setp.ne.b32 p, $2, 0; mov.b32 $0, 0; @p ld.shared.b32 $0, [a]; }}")
_STORE = gl.constexpr(f"{_ADDRESS} setp.ne.b32 p, $3, 0; @p st.shared.b32 [a], $2; mov.b32 $0, 0; }}")
_ADD = gl.constexpr(f"{_ADDRESS} setp.ne.b32 p, $3, 0; @p red.shared.add.u32 [a], $2; mov.b32 $0, 0; }}")
_OR = gl.constexpr(f"{_ADDRESS} setp.ne.b32 p, $3, 0; @p red.shared.or.b32 [a], $2; mov.b32 $0, 0; }}")


@gluon.jit
def load_words(word, mask):
    """The words at the indices `word`, as int32; 0 where `mask` is false."""
    return gl.inline_asm_elementwise(_LOAD, "=&r,r,r", [word, mask.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def store_words(word, value, mask):
    """The words at the indices `word` become `value` where `mask` is true. Words of several threads need equal values."""
    _change(_STORE, word, value, mask)


@gluon.jit
def add_to_words(word, value, mask):
    """Add `value` to the words at the indices `word` where `mask` is true."""
    _change(_ADD, word, value, mask)


@gluon.jit
def set_bits(word, bits, mask):
    """Set `bits` in the words at the indices `word` where `mask` is true."""
    _change(_OR, word, bits, mask)


@gluon.jit
def count_bits(x):
    """How many bits of `x` are set."""
    return gl.inline_asm_elementwise("popc.b32 $0, $1;", "=r,r", [x], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def _change(ASM: gl.constexpr, word, value, mask):
    gl.inline_asm_elementwise(ASM, "=r,r,r,r", [word, value, mask.to(gl.int32)], dtype=gl.int32, is_pure=False, pack=1)
