"""Gluon kernels of the counting sort that makes routing lists, on Hopper; `lists.py` describes the passes.

As in `lists_kernels.py`, a *share* is some rows of one q head's selection, and one program handles it in each pass. Here a
program keeps a count, a cursor and bits for every block in shared memory, one word each, and sorts its whole share there.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_rows import barrier, line_layout
from .shared_words import add_to_words, count_bits, load_words, set_bits, store_words

_VARYING = ["tokens", "n_blocks", "group", "shares_per_head", "share_tokens", "selected_head", "selected_token"]
_FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
_ROWS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def _share(selected, share, kv_head, tokens, group, shares_per_head, share_tokens, selected_head):
    """A share's q head in the group, that head's selection, and the share's first token and end."""
    in_group = share // shares_per_head
    first = share % shares_per_head * share_tokens
    head_selected = selected + (kv_head * group + in_group).to(gl.int64) * selected_head
    return in_group, head_selected, first, gl.minimum(first + share_tokens, tokens)


@gluon.jit
def _blocks(head_selected, token, slot, end, selected_token, selected_slot, SLOTS: gl.constexpr):
    """Selected blocks as int32; -1 for none, in slots from SLOTS on and tokens from `end` on."""
    at = head_selected + token.to(gl.int64) * selected_token + slot.to(gl.int64) * selected_slot
    return gl.load(at, mask=(token < end) & (slot < SLOTS), other=-1).to(gl.int32)


@gluon.jit
def _plus(a, b):
    return a + b


@gluon.jit(do_not_specialize=_VARYING, do_not_specialize_on_alignment=["selected"])
def count_kernel(
    selected, count, tokens, n_blocks, group, shares_per_head, share_tokens, selected_head, selected_token, selected_slot,
    SLOTS: gl.constexpr, WIDTH: gl.constexpr, BINS: gl.constexpr, TOKENS: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """One program: how often each block occurs in one share of a kv head's selection.

    Reads the share once, 2 or 4 bytes per slot; writes 4 bytes per block, to `count[1 + (kv head, block, share)]`. `count[0]`
    is 0.
    """
    share = gl.program_id(0)
    kv_head = gl.program_id(1)
    LINE: gl.constexpr = line_layout(WARPS)
    counts = gl.allocate_shared_memory(gl.int32, [BINS], _FLAT)
    counts.store(gl.zeros([BINS], gl.int32, LINE))
    _, head_selected, first, end = _share(
        selected, share, kv_head, tokens, group, shares_per_head, share_tokens, selected_head
    )
    gl.static_assert(TOKENS * WIDTH >= 32 * WARPS)  # else several threads would count one entry
    place = gl.arange(0, TOKENS * WIDTH, layout=LINE)
    barrier()
    for at in range(first, end, TOKENS):
        block = _blocks(
            head_selected, at + place // WIDTH, place % WIDTH, end, selected_token, selected_slot, SLOTS
        )  # fmt: skip
        add_to_words(block, gl.full_like(block, 1), block >= 0)
    barrier()
    bin_ = gl.arange(0, BINS, layout=LINE)
    cell = count + 1 + (kv_head.to(gl.int64) * n_blocks + bin_) * gl.num_programs(0) + share
    gl.store(cell, counts.load(LINE), mask=bin_ < n_blocks)
    if share + kv_head == 0:
        gl.store(count, 0)


@gluon.jit
def _sums_before(x_s, spare_s, BINS: gl.constexpr, WARPS: gl.constexpr):
    """Replace BINS numbers in shared memory by the sums of those before each; return the sum of all. `spare_s` is overwritten.

    Rows of 32 numbers are added up in one warp each, and then the rows' sums in every warp: no step exchanges data between warps
    but by `x_s` and `spare_s`.
    """
    ROWS: gl.constexpr = BINS // 32
    SQUARE: gl.constexpr = gl.BlockedLayout([1, 1], [1, 32], [WARPS, 1], [1, 0])
    EVERY_WARP: gl.constexpr = gl.BlockedLayout([max(ROWS // 32, 1)], [32], [WARPS], [0])
    square_s = x_s._reinterpret(gl.int32, [ROWS, 32], _ROWS)
    row_s = spare_s.slice(0, ROWS)
    x = square_s.load(SQUARE)
    row_s.store(gl.sum(x, 1))
    barrier()
    row = row_s.load(EVERY_WARP)
    before = gl.associative_scan(row, 0, _plus) - row
    barrier()
    row_s.store(before)
    barrier()
    square_s.store(gl.associative_scan(x, 1, _plus) - x + row_s.load(gl.SliceLayout(1, SQUARE))[:, None])
    barrier()
    return gl.sum(row, 0)


@gluon.jit(do_not_specialize=[*_VARYING, "head_bits", "slot_bits"], do_not_specialize_on_alignment=["selected"])
def scatter_kernel(
    selected, begin_of, entry, tokens, n_blocks, group, shares_per_head, share_tokens, selected_head, selected_token,
    selected_slot, head_bits, slot_bits,
    SLOTS: gl.constexpr, WIDTH: gl.constexpr, BINS: gl.constexpr, TILES: gl.constexpr, PLACE_BITS: gl.constexpr,
    WARPS: gl.constexpr,
):  # fmt: skip
    """One program: the entries of one share, sorted in shared memory, then written to their positions in the lists.

    `begin_of[kv head, block, share]` is the position of the share's first entry of a block. Reads the share once, 2 or 4 bytes
    per slot, and 8 bytes per block; writes 4 or 8 bytes per entry, those of a block side by side: whole sectors but at both ends.

    32 * TILES tokens at a time, every entry sets its token's bit in its block's words, one word per tile of 32 tokens. The bits
    do not depend on the order in which they are set. As a token lists a block once, the bits below its own count the entries
    before it. The block's last entry (any would do) moves its cursor on and empties its words, while the next tokens set bits in
    other words. A sorted entry is its block, and its place in the share in PLACE_BITS bits.
    """
    share = gl.program_id(0)
    kv_head = gl.program_id(1)
    LINE: gl.constexpr = line_layout(WARPS)
    TOKENS: gl.constexpr = 32 * TILES
    CURSORS: gl.constexpr = 2 * TILES * BINS
    SORTED: gl.constexpr = CURSORS + BINS
    words_s = gl.allocate_shared_memory(gl.int32, [2 * TILES + 1 + (1 << PLACE_BITS) // BINS, BINS], _FLAT)
    cursor_s = words_s.index(2 * TILES)
    in_group, head_selected, first, end = _share(
        selected, share, kv_head, tokens, group, shares_per_head, share_tokens, selected_head
    )
    bin_ = gl.arange(0, BINS, layout=LINE)
    cell = begin_of + (kv_head.to(gl.int64) * n_blocks + bin_) * gl.num_programs(0) + share
    begin = gl.load(cell, mask=bin_ < n_blocks, other=0)
    cursor_s.store(gl.load(cell + 1, mask=bin_ < n_blocks, other=0) - begin)
    barrier()
    n_entries = _sums_before(cursor_s, words_s.index(0), BINS, WARPS)
    moved = begin - cursor_s.load(LINE)  # how far a block's entries move from shared memory to the lists
    for words in gl.static_range(2 * TILES):
        words_s.index(words).store(gl.zeros([BINS], gl.int32, LINE))
    barrier()

    place = gl.arange(0, TOKENS * WIDTH, layout=LINE)
    slot = place % WIDTH
    tile = place // WIDTH // 32
    bit = gl.full_like(place, 1) << (place // WIDTH % 32)
    block = _blocks(head_selected, first + place // WIDTH, slot, end, selected_token, selected_slot, SLOTS)
    # Not `block`: Triton would not see that the loop sets it to the last turn's `block`.
    last_block = gl.full_like(block, 0)
    last_cursor = gl.full_like(block, 0)
    was_last = block < -1
    for step in range((end - first + TOKENS - 1) // TOKENS):
        # Computed from `step`, not exchanged: ptxas of CUDA 12.8 confuses uniform registers that two loops' turns exchange.
        bits = step % 2 * (TILES * BINS)
        last_bits = TILES * BINS - bits
        listed = block >= 0
        set_bits(bits + tile * BINS + block, bit, listed)
        store_words(CURSORS + last_block, last_cursor, was_last)
        for t in gl.static_range(TILES):
            store_words(last_bits + t * BINS + last_block, gl.full_like(block, 0), was_last)
        token = first + (step + 1) * TOKENS + place // WIDTH
        next_block = _blocks(head_selected, token, slot, end, selected_token, selected_slot, SLOTS)
        barrier()
        cursor = load_words(CURSORS + block, listed)
        before = gl.full_like(block, 0)
        in_all = gl.full_like(block, 0)
        behind = gl.full_like(block, 0)
        for t in gl.static_range(TILES):
            tokens_of = load_words(bits + t * BINS + block, listed)
            in_all += count_bits(tokens_of)
            before += count_bits(gl.where(t < tile, tokens_of, gl.where(t == tile, tokens_of & (bit - 1), 0)))
            behind |= gl.where(t > tile, tokens_of, gl.where(t == tile, tokens_of & ~(bit | (bit - 1)), 0))
        store_words(SORTED + cursor + before, (block << PLACE_BITS) | (step * (TOKENS * WIDTH) + place), listed)
        last_cursor = cursor + in_all
        was_last = listed & (behind == 0)
        last_block = block
        block = next_block
        barrier()

    words_s.index(0).store(moved)
    barrier()
    STEP: gl.constexpr = 128 * WARPS
    for at in range(0, n_entries, STEP):
        source = at + gl.arange(0, STEP, layout=LINE)
        held = source < n_entries
        word = load_words(SORTED + source, held)
        position = source + load_words(word >> PLACE_BITS, held)
        origin = word & ((1 << PLACE_BITS) - 1)
        wide = (first + origin // WIDTH).to(entry.dtype.element_ty)
        gl.store(
            entry + position, (wide << (head_bits + slot_bits)) | (in_group << slot_bits) | (origin % WIDTH), mask=held
        )
    words_s._keep_alive()
