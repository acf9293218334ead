"""Build the kernels that make routing lists in shared memory; see `compiling.py`. Run as a program."""

from __future__ import annotations

from triton.experimental.gluon._runtime import GluonASTSource

from moba_cp.kernels import list_configs, lists_sm90
from moba_cp.kernels.gpu import gpu_of_capability
from tests.kernels import compiling


def build_shared(n_blocks: int, slots: int, selection: str, entry: str, capability: tuple[int, int]) -> dict[str, dict]:
    """Both kernels for these sizes, with the largest share; besides what `compiling.build` says, the bytes of their words."""
    config = list_configs.shared_lists(n_blocks, slots, gpu_of_capability(capability))
    constants = {"SLOTS": slots, "WIDTH": config.width, "BINS": config.bins}
    count = constants | {"TOKENS": config.count_tokens, "WARPS": config.count_warps}
    scatter = constants | {
        "TILES": config.tiles, "PLACE_BITS": config.entries.bit_length() - 1, "WARPS": config.warps
    }  # fmt: skip
    words = {"count": config.bins, "scatter": (2 * config.tiles + 1) * config.bins + config.entries}
    built = {}
    for name, kernel, launched in (
        ("count", lists_sm90.count_kernel, count),
        ("scatter", lists_sm90.scatter_kernel, scatter),
    ):
        types, values = {}, {}
        pointers = {"selected": selection, "count": "*i32", "begin_of": "*i32", "entry": entry}
        for p in kernel.params:
            types[p.name] = "constexpr" if p.name in launched else pointers.get(p.name, "i32")
            if p.name in launched:
                values[(p.num,)] = launched[p.name]
        source = GluonASTSource(kernel, types, values, {})
        built[name] = compiling.build(source, capability, num_warps=launched["WARPS"]) | {"words": 4 * words[name]}
    return built


if __name__ == "__main__":
    compiling.main({"shared": build_shared})
