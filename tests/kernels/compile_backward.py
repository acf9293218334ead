"""Build the backward kernels and those that move gradients between ranks; see `compiling.py`. Run as a program."""

from __future__ import annotations

import triton
from triton.compiler import ASTSource

from moba_cp.kernels import configs, sizes
from moba_cp.kernels.backward import deltas, portable_kernels, segments
from moba_cp.kernels.gpu import gpu_of_capability
from moba_cp.kernels.sizes import padded
from tests.kernels import compiling

INT32 = {
    "position", "pointer", "entry", "start", "length", "segment_bin", "item_bin", "item_start", "item_end", "own_tiles",
    "place", "progress",
}  # fmt: skip
INT64 = {"at", "begin"}
FP32 = {"lse", "delta", "sums", "own_dk", "own_dv", "arrived"}
HALF = {"q", "dout", "out", "k", "v", "dq", "ds", "packed", "source", "values", "x"}
GRADIENTS = {"dk", "dv", "target"}


def descriptor(constants: dict, dtype: str) -> str:
    """Type of a Gluon kernel's descriptor for tiles of keys or values."""
    from moba_cp.kernels.descriptors import tile_layout

    layout = tile_layout(constants["KEYS"], constants["D"], compiling.DTYPES[dtype])
    return f"tensordesc<{dtype}[1, {constants['KEYS']}, {constants['D']}],{layout!r}>"


ONES = ("group", "lse_token", "delta_token")
"""Integers that are 1 where kv heads are as many as q heads and rows of scalars are contiguous: Triton compiles constants."""
LAUNCHES = ((4, 1, ()), (4, 8, ()), (1, 1, ONES), (1, 8, ONES))
"""Of Hopper kernels that take kv heads in turns: q heads per kv head, kv heads at once, and integers that are 1."""


def signature_of(kernel, constants: dict, dtype: str, gradient: str, ones=()) -> tuple[dict, dict, dict]:
    """Types, constants and alignment attributes of a call with contiguous tensors, whose integers `ones` are 1."""
    constants = constants | dict.fromkeys(ones, 1)
    types, aligned = {}, []
    names = {p.name for p in kernel.params}
    for p in kernel.params:
        if p.name in constants:
            types[p.name] = "constexpr"
        elif p.name in ("k_tiles", "v_tiles"):
            types[p.name] = descriptor(constants, dtype)
        elif p.name in INT32:
            types[p.name] = "*i64" if "at" in names else "*i32"
        elif p.name in INT64:
            types[p.name] = "*i64"
        elif p.name == "wanted":
            types[p.name] = "*u8"
        elif p.name in FP32 or (p.name == "delta" and "out" in types) or (p.name == "dq" and "place_head" in names):
            types[p.name] = "*fp32"
        elif p.name in GRADIENTS:
            types[p.name] = f"*{gradient}"
        elif p.name in HALF:
            types[p.name] = f"*{dtype}"
        else:
            types[p.name] = "fp32" if p.name == "scale" else "i32"
        specialised = not (p.do_not_specialize or p.do_not_specialize_on_alignment)
        if (
            specialised
            and p.name not in ("group", "lse_token", "delta_token")
            and types[p.name].startswith(("*", "i32"))
        ):
            aligned.append(p.num)
    values = {(p.num,): constants[p.name] for p in kernel.params if p.name in constants}
    return types, values, {(i,): compiling.ALIGNED for i in aligned}


def build(
    kernel, constants: dict, dtype: str, capability: tuple[int, int], warps: int, gradient="fp32", ones=()
) -> dict:
    constants = {p.name: constants[p.name] for p in kernel.params if p.name in constants}
    types, values, attributes = signature_of(kernel, constants, dtype, gradient, ones)
    gluon = getattr(kernel, "is_gluon", lambda: False)()
    if gluon:
        from triton.experimental.gluon._runtime import GluonASTSource

        source = GluonASTSource(kernel, types, values, attributes)
    else:
        source = ASTSource(kernel, types, values, attributes)
    return compiling.build(source, capability, products=gluon, num_warps=warps)


def constants_of(dim: int, value_dim: int, block_size: int) -> dict:
    return {
        "D": dim, "DV": value_dim, "D_PADDED": padded(dim), "DV_PADDED": padded(value_dim), "HEAD_BITS": 2,
        "SLOT_BITS": 3, "TOPK": 8, "SEGMENT": segments.segment_rows(block_size), "ACCUMULATE": False, "SIZE": 128,
    }  # fmt: skip


def build_portable(dim, value_dim, block_size, dtype, capability, accumulate=False) -> dict[str, dict]:
    """What `backward.portable.launch` runs for these sizes."""
    config = configs.backward(dim, value_dim, block_size, gpu_of_capability(capability))
    common = constants_of(dim, value_dim, block_size) | {"ACCUMULATE": accumulate, "FUSED": config.dq is None}
    dkdv, dq = config.dkdv, config.dq
    constants = common | tile_constants(dkdv) | {"TILES": triton.cdiv(block_size, dkdv.keys)}
    built = {
        "dkdv": build(portable_kernels.dkdv_kernel, constants, dtype, capability, dkdv.num_warps),
        "sum_segments": build(segments.sum_segments_kernel, constants, dtype, capability, 8),
    }
    no_group = {"HEAD_BITS": 0}
    built["dkdv, group 1"] = build(
        portable_kernels.dkdv_kernel, constants | no_group, dtype, capability, dkdv.num_warps, ones=ONES
    )
    if dq is not None:
        constants = common | tile_constants(dq)
        built["dq"] = build(portable_kernels.dq_kernel, constants, dtype, capability, dq.num_warps)
        built["dq, group 1"] = build(
            portable_kernels.dq_kernel, constants | no_group, dtype, capability, dq.num_warps, ones=ONES
        )
    return built


def tile_constants(config) -> dict:
    """Constants of a `TileConfig` or `GluonConfig`."""
    constants = {"ROWS": config.rows, "KEYS": config.keys}
    if isinstance(config, configs.TileConfig):
        return constants | {"STAGES": config.num_stages}
    return constants | {"AHEAD": config.ahead, "LAST": config.last, "WARPS": config.num_warps}


def build_small(dim, dtype, capability) -> dict[str, dict]:
    constants = constants_of(dim, dim, 128) | {"ROWS": configs.DELTA.rows}
    return {
        "delta": build(deltas.delta_kernel, constants, dtype, capability, configs.DELTA.num_warps),
        "find_segments": build(segments.find_segments_kernel, constants, dtype, capability, 4),
    }


def build_moving(dim, value_dim, dtype, capability) -> dict[str, dict]:
    """Kernels around the exchange: packing, also of heads; wanted rows of keys, values and gradients; the sum of dK and dV."""
    from moba_cp.kernels import gradients
    from moba_cp.parallel import head_rows_kernel, rows_kernel

    heads = head_rows_kernel.constants(dim) | {"COUNT": 2}
    wanted, width = rows_kernel._wanted_kernel, dim + value_dim
    keys = rows_kernel.wanted_constants(width, 2, 128) | {"ADDS": False, "FIRST": False}
    sums = rows_kernel.wanted_constants(width, 4, 128) | {"ADDS": True}
    packing = rows_kernel.pack_constants(dim, value_dim)
    copied, added = (rows_kernel.pair_constants(dim, value_dim, 128, adds=adds) for adds in (False, True))
    config = configs.sum_gradients(dim, value_dim)
    last = gradients.constants(dim, value_dim, config)
    return {
        "pack": build(rows_kernel._pack_kernel, packing, dtype, capability, rows_kernel.PACK_WARPS),
        "pack pairs": build(rows_kernel._pack_pairs_kernel, copied, dtype, capability, rows_kernel.PACK_WARPS),
        "add pairs": build(rows_kernel._add_pairs_kernel, added, "fp32", capability, rows_kernel.PACK_WARPS),
        "take heads": build_heads(heads | {"COPIES": 3, "PUTS": False}, dtype, capability),
        "take deltas": build_heads(
            head_rows_kernel.constants(1) | {"COUNT": 2, "COPIES": 1, "PUTS": False}, "fp32", capability
        ),
        "put heads": build_heads(heads | {"COPIES": 1, "PUTS": True}, dtype, capability),
        "copy": build(wanted, keys, dtype, capability, rows_kernel.WANTED_WARPS, dtype),
        "first": build(wanted, sums | {"FIRST": True}, "fp32", capability, rows_kernel.WANTED_WARPS),
        "add": build(wanted, sums | {"FIRST": False}, "fp32", capability, rows_kernel.WANTED_WARPS),
        "sum": build(gradients.add_gradients_kernel, last, dtype, capability, config.num_warps, dtype),
    }


def build_heads(constants: dict, dtype: str, capability: tuple[int, int]) -> dict:
    """The kernel that packs heads, or puts them in place."""
    from moba_cp.parallel import head_rows_kernel

    return build(head_rows_kernel._heads_kernel, constants, dtype, capability, head_rows_kernel.WARPS)


def build_hopper(dim, block_size, dtype, capability, accumulate=False) -> dict[str, dict]:
    """What `backward.sm90.launch` runs for these sizes."""
    from moba_cp.kernels.backward import sm90
    from moba_cp.kernels.descriptors import gluon_dtype

    element = gluon_dtype(compiling.DTYPES[dtype])
    common = constants_of(dim, dim, block_size) | {"DTYPE": element, "ACCUMULATE": accumulate}
    dkdv, dq = configs.sm90_dkdv(dim, block_size), configs.SM90_DQ
    constants = common | tile_constants(dkdv) | {"TILES": block_size // dkdv.keys, "KEEPS": False}
    name, kernel = ("dkdv_dq", sm90.dkdv_dq_kernel) if dkdv.keys == block_size else ("dkdv", sm90.dkdv_kernel)
    built = {}
    for group, heads, ones in LAUNCHES:
        more = {"HEAD_BITS": (group - 1).bit_length(), "HEADS": heads}
        launched = constants | more
        built[f"{name}, group {group}, {heads} at once"] = build(
            kernel, launched, dtype, capability, dkdv.num_warps, ones=ones
        )
        if name == "dkdv" and heads == 1:
            launched = common | more | tile_constants(dq)
            built[f"dq, group {group}"] = build(sm90.dq_kernel, launched, dtype, capability, dq.num_warps, ones=ones)
        if name == "dkdv" and heads == 1 and sizes.can_keep_ds(block_size) and not accumulate:
            built |= build_keeping(constants | more, group, dtype, capability, ones)
    if sizes.sums_dq(block_size, dim, 1):  # with very many blocks, the others
        built |= build_summing(common, dtype, capability)
    return built


def build_keeping(constants: dict, group: int, dtype: str, capability: tuple[int, int], ones: tuple) -> dict[str, dict]:
    """The kernels that keep gradients of scores, and read them; `constants` are those of `dkdv_kernel` without."""
    from moba_cp.kernels.backward import sm90

    config, block_size = configs.SM90_DQ_OF_DS, constants["TILES"] * constants["KEYS"]
    reading = constants | tile_constants(config) | {"BLOCK": block_size, "STAGES": config.ahead + 1}
    keeping, warps = constants | {"KEEPS": True, "LAST": False}, constants["WARPS"]
    return {
        f"dkdv that keeps dS, group {group}": build(sm90.dkdv_kernel, keeping, dtype, capability, warps, ones=ones),
        f"dq of dS, group {group}": build(
            sm90.dq_of_ds_kernel, reading, dtype, capability, config.num_warps, ones=ones
        ),
    }


def build_summing(common: dict, dtype: str, capability: tuple[int, int]) -> dict[str, dict]:
    """The kernel for dK, dV and sums of dq."""
    from moba_cp.kernels.backward import sm90

    config = configs.SM90_DKDV_DQ_TILES
    constants = common | tile_constants(config) | {"TILES": 32}
    return {
        f"dkdv_dq_tiles, group {group}, {heads} at once": build(
            sm90.dkdv_dq_tiles_kernel, constants | {"HEAD_BITS": (group - 1).bit_length(), "HEADS": heads}, dtype,
            capability, config.num_warps, ones=ones,
        )
        for group, heads, ones in LAUNCHES
    }  # fmt: skip


BUILDERS = {"portable": build_portable, "small": build_small, "moving": build_moving, "hopper": build_hopper}


if __name__ == "__main__":
    compiling.main(BUILDERS)
