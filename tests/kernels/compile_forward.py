"""Build the forward kernels and merges; see `compiling.py`. Run as a program."""

from __future__ import annotations

from moba_cp.kernels import configs, merge
from moba_cp.kernels.forward import portable_kernels
from moba_cp.kernels.gpu import gpu_of_capability
from moba_cp.kernels.sizes import KEPT_DIM, padded
from tests.kernels import compile_backward, compiling

INTEGERS = {"tokens", "n_tiles", "n_blocks", "q_heads", "offset", "start_head"}
INT32_POINTERS = {
    "start", "length", "position", "entry", "pointer", "item_bin", "item_start", "item_end", "own_tiles", "selected",
}  # fmt: skip
FP32_POINTERS = {"lse", "merged_lse"}


def build(kernel, constants: dict, dtype: str, capability: tuple[int, int], num_warps: int, descriptors=()) -> dict:
    """Build `kernel`. A parameter that is neither constant nor known by name is a tensor of `dtype` or a stride."""

    def type_of(p) -> str:
        if p.name == "place":
            return "*i32"
        if p.name == "partial" and constants.get("SUMS"):
            return "*fp32"
        if p.name in descriptors:
            tile = (1, constants["KEYS"], constants["D_PADDED" if p.name[0] == "k" else "DV_PADDED"])
            return f"tensordesc<{dtype}{list(tile)}>"
        if p.name in INT32_POINTERS:
            return "*i32"
        if p.name in FP32_POINTERS:
            return "*fp32"
        if p.name == "scale":
            return "fp32"
        if p.name in INTEGERS or ("_" in p.name and not p.name.endswith("_tiles")):
            return "i32"
        return f"*{dtype}"

    def is_aligned(p, kind: str) -> bool:
        return not (p.do_not_specialize or p.do_not_specialize_on_alignment) and kind in ("i32", f"*{dtype}")

    source = compiling.source_of(kernel, constants, type_of, is_aligned)
    return compiling.build(source, capability, num_warps=num_warps)


def forward_constants(dim, dim_v, block_size, config, **more) -> dict:
    return {
        "GROUP": 4, "TOPK": 8, "HEAD_BITS": 2, "SLOT_BITS": 3, "ITEM": 2048 if block_size <= 128 else 128,
        "BLOCK": block_size, "D": dim, "D_PADDED": padded(dim), "DV": dim_v, "DV_PADDED": padded(dim_v),
        "NEGATIVE": False, "ROWS": config.rows, "KEYS": config.keys, "STAGES": config.num_stages, "STORE": config.store,
    } | more  # fmt: skip


def build_attend(dim, dim_v, block_size, dtype, capability) -> dict[str, dict]:
    """What `forward.portable` and `forward.sm90` launch for these sizes."""
    gpu = gpu_of_capability(capability)
    with_own = block_size <= configs.SMALL_BLOCK
    hold = configs.hold_rows(dim, dim_v, block_size, gpu)
    stream = configs.stream_rows(dim, dim_v, block_size, gpu) if with_own else None
    hopper = {}
    if gpu.is_hopper and dim == dim_v and dim in (64, 128) and block_size % 64 == 0 and block_size >= dim:
        hopper = build_hopper(dim, block_size, dtype)
    if stream:
        constants = forward_constants(dim, dim_v, block_size, stream)
        built = {"stream": build(portable_kernels.stream_rows_kernel, constants, dtype, capability, stream.num_warps)}
        return built | hopper
    tma = gpu.is_hopper and not with_own and block_size % hold.keys == 0
    constants = forward_constants(dim, dim_v, block_size, hold, WITH_OWN=with_own, TMA=tma)
    built = hopper | {
        "hold": build(
            portable_kernels.hold_rows_kernel, constants, dtype, capability, hold.num_warps, ("k", "v") if tma else ()
        )
    }
    if not with_own:
        own = configs.own_blocks(dim, dim_v, gpu)
        tma = gpu.is_hopper
        constants = forward_constants(dim, dim_v, block_size, own, TILE=128, TMA=tma)
        constants = {
            p.name: constants[p.name] for p in portable_kernels.own_blocks_kernel.params if p.name in constants
        }
        tiles = ("k_tiles", "v_tiles") if tma else ()
        built["own"] = build(portable_kernels.own_blocks_kernel, constants, dtype, capability, own.num_warps, tiles)
    return built


def build_launched(dim, block_size, dtype, _capability) -> dict[str, dict]:
    """`build_hopper` with as many q heads as kv heads, with kv heads in turns, and with both."""
    launches = [launch[:2] for launch in compile_backward.LAUNCHES[1:] if block_size <= configs.SMALL_BLOCK] or [(1, 1)]
    return {
        f"{name}, group {group}, {heads} at once": usage
        for group, heads in launches
        for name, usage in build_hopper(dim, block_size, dtype, group, heads).items()
    }


def build_hopper(dim, block_size, dtype, group=4, heads=1) -> dict[str, dict]:
    """What `forward.sm90` launches for these sizes, `group` q heads per kv head, and `heads` kv heads in turns."""
    from moba_cp.kernels.descriptors import gluon_dtype
    from moba_cp.kernels.forward import sm90

    small = block_size <= configs.SMALL_BLOCK
    config = configs.SM90_STREAM_ROWS if small else configs.SM90_HOLD_ROWS
    constants = {
        "D": dim, "HEAD_BITS": (group - 1).bit_length(), "SLOT_BITS": 3, "TOPK": 8, "ROWS": config.rows,
        "WARPS": config.num_warps, "DTYPE": gluon_dtype(compiling.DTYPES[dtype]), "NEGATIVE": False,
    }  # fmt: skip
    if small:
        kernels = {"hopper stream": sm90.stream_rows_kernel}
        constants |= {"KEYS": block_size, "HEADS": heads, "ITEM": 2048}
    else:
        kernels = {"hopper hold": sm90.hold_rows_kernel, "hopper own": sm90.own_blocks_kernel}
        constants |= {"KEYS": config.keys, "TILES": block_size // config.keys}
    # `hold_rows_kernel` takes steps from one head to the next, other kernels strides.
    ones = {name: ("group", "k_head", "v_head") if name == "hopper hold" else ("group",) for name in kernels}
    return {
        name: compile_backward.build(
            kernel, constants, dtype, (9, 0), config.num_warps, ones=ones[name] if group == 1 else ()
        )
        for name, kernel in kernels.items()
    }


def build_merge(dim, topk, dtype, capability) -> dict[str, dict]:
    sizes = {"D": dim, "D_PADDED": padded(dim), "PLACED": False, "SUMS": False}
    kernels = {
        "merge": (merge.merge_kernel, configs.merge(dim), {"DV": dim, "DV_PADDED": padded(dim)}),
        "merge_dq": (merge.merge_dq_kernel, configs.merge_dq(dim), sizes),
        "merge_dq at places": (merge.merge_dq_kernel, configs.merge_dq(dim), sizes | {"PLACED": True}),
    }
    if dim == KEPT_DIM:
        kernels["merge_dq of sums"] = (
            merge.merge_dq_kernel,
            configs.merge_dq(dim),
            sizes | {"PLACED": True, "SUMS": True},
        )
    built = {}
    for name, (kernel, config, sizes) in kernels.items():
        sizes |= {"TOPK": topk, "ROWS": config.rows, "STAGES": config.num_stages}
        built[name] = build(kernel, sizes, dtype, capability, config.num_warps)
    return built


BUILDERS = {"attend": build_attend, "launched": build_launched, "merge": build_merge}

if __name__ == "__main__":
    compiling.main(BUILDERS)
