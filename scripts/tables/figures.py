"""Figures that stand in sentences. A page writes `<!--=file.name-->1.7 s<!--/-->`, and the generator fills what is between.

`file` is the stem of a result file in `docs/results/`, or a trial of `trials.json`.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moba_cp.planning.calibration import Calibration
from moba_cp.planning.measured import calibrate, compare, read

from .learning import learning_figures
from .speed import dq_ms
from .text import Entry
from .trials import trial_figures
from .versions import MODES

Figures = dict[str, str]
GIB = 1 << 30


def figures(results: Path) -> Figures:
    """Text of every figure, by `file.name`.

    Args:
        results: the folder of the result files.

    Raises:
        ValueError: no entry of a file, or several, fit what a figure describes.
    """

    def content(name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((results / f"{name}.json").read_text())
        return found

    of_file: dict[str, Callable[[], Figures]] = {
        "kernels": lambda: _kernels(content("kernels")),
        "kernels_h200": lambda: _host_times(content("kernels_h200")),
        "kernels_h200_short": lambda: _host_times(content("kernels_h200_short")),
        "kernels_h200_whole": lambda: _quartiles(content("kernels_h200_whole")),
        "kernels_h200_long": lambda: _kept_peak(content("kernels_h200"), content("kernels_h200_long")),
        "versions_kept_ds": lambda: _ratios(content("versions_kept_ds"), 512),
        "versions_rows": lambda: _ratios(content("versions_rows"), 512, 4096),
        "versions_fetch": lambda: _messages(content("versions_fetch")),
        "scaling": lambda: _scaling(content("scaling")),
        "scaling_longest": lambda: _longest(content("scaling_longest")),
        "two_nodes": lambda: _two_nodes(content("two_nodes")),
        "scaling_two": lambda: _foreseen(results, "scaling_two.json"),
        "training_speed": lambda: _micro_batches(content("training_speed")),
        "training_scaling": lambda: _two_gpus(content("training_scaling")),
        "training_exchanges": lambda: _dq_of_held(content("training_exchanges")),
        "decode": lambda: _decode(content("decode")),
        "learning": lambda: learning_figures(content("learning")),
    }
    found = {f"{file}.{name}": text for file, make in of_file.items() for name, text in make().items()}
    return found | trial_figures(content("trials"))


def one(entries: Sequence[Entry], **wanted: object) -> Entry:
    """The entry whose fields have these values.

    Raises:
        ValueError: there is not exactly one.
    """
    found = [entry for entry in entries if all(entry.get(name) == value for name, value in wanted.items())]
    if len(found) != 1:
        raise ValueError(f"{len(found)} entries with {wanted}, expected one")
    return found[0]


def _host_times(content: dict[str, Any]) -> Figures:
    entry = one(content["results"], tokens=8192, q_heads=16, kv_heads=16, block_size=128)
    found = {
        name: [entry[f"{mode}_ms"][key] for mode in ("forward", "forward_backward")]
        for name, key in (("host_8k", "host_ms"), ("time_8k", "median"))
    }
    return {name: f"{forward:.2f} / {both:.2f} ms" for name, (forward, both) in found.items()}


def _quartiles(content: dict[str, Any]) -> Figures:
    times = one(content["results"], tokens=1 << 17, q_heads=16, block_size=512)["forward_ms"]
    return {"quartiles_512": f"{times['quartile_1']:.1f} and {times['quartile_3']:.1f} ms"}


def _kept_peak(before: dict[str, Any], after: dict[str, Any]) -> Figures:
    sizes = {"tokens": 1 << 17, "q_heads": 16, "block_size": 512}
    peaks = [one(x["results"], **sizes)["forward_backward_peak_gib"] for x in (after, before)]
    return {"peak_512": f"{peaks[0]:.2f} GiB in place of {peaks[1]:.2f}"}


def _ratios(content: dict[str, Any], *block_sizes: int) -> Figures:
    found = {}
    for block_size in block_sizes:
        times = one(content["results"], block_size=block_size)["times"]
        before, after = (times[name]["forward_backward"] for name in ("before", "after"))
        host = [_whole(x["host_ms"]["median"]) for x in (after, before)]
        found[f"ratio_{block_size}"] = f"{after['ms']['ratio']['median']:.3f}"
        found[f"host_{block_size}"] = f"{host[0]} ms in place of {host[1]}"
    return found


def _messages(content: dict[str, Any]) -> Figures:
    times = one(content["results"], tokens=1 << 18, block_size=128)["times"]
    before, after = ([times[name][mode]["ms"]["median"] for mode in MODES] for name in ("before", "after"))
    return {"both_128": f"{after[0]:.1f} / {after[1]:.1f} ms in place of {before[0]:.1f} / {before[1]:.1f}"}


def _foreseen(results: Path, later: str) -> Figures:
    """How far the model was from the file `later` when it was fitted to the other files of that device."""
    others = [results / name for name in Calibration.of("h200").sources if name != later]
    calibration = calibrate(*read(others))
    errors = np.abs([one.errors for one in compare(read([results / later])[1], calibration)])
    return {"rows": str(len(errors)), "foreseen": f"{_percent(np.median(errors))}, at worst {_percent(errors.max())}"}


def _whole(value: float) -> str:
    """Rounded, a half upwards."""
    return f"{int(value + 0.5)}"


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _kernels(content: dict[str, Any]) -> Figures:
    by_size = {entry["block_size"]: entry for entry in content["results"]}

    def of_floor(block_size: int) -> str:
        entry = by_size[block_size]
        return _percent(entry["floors_ms"]["forward_attention"] / entry["forward_stages_ms"]["attend local"])

    return {
        "forward_of_floor_4096": of_floor(4096),
        "forward_of_floor_512": of_floor(512),
        "forward_128": f"{by_size[128]['forward_ms']['median']:.1f}",
        "centroids": f"{by_size[128]['forward_stages_ms']['centroids']:.2f} ms",
    }


def _scaling(content: dict[str, Any]) -> Figures:
    sizes = {"ranks": 2, "tokens": 1 << 18, "q_heads": 16, "kv_heads": 16, "block_size": 128, "topk": 8}
    a2a = one(content["results"], comm="a2a", routing="uniform", **sizes)
    share = sizes | {"q_heads": 8, "kv_heads": 8}  # of one GPU
    pull = one(content["results"], comm="pull", routing="uniform", **sizes | {"block_size": 512})
    return {
        "a2a_128": _both(a2a),
        "equal_work_128": _both(one(content["baselines"], baseline="equal_work", **share)),
        "pull_512": _both(pull),
    }


def _two_nodes(content: dict[str, Any]) -> Figures:
    ring = one(content["results"], comm="ring", tokens=1 << 18, block_size=512)
    return {
        "bytes": f"{ring['between_bytes'] / 2**30:.1f} GiB",
        "exposed": f"{ring['exposed_ms']:.0f} ms",
        "call": _both(ring),
    }


def _both(entry: Entry) -> str:
    return f"{entry['forward_ms']:.1f} / {entry['forward_backward_ms']:.1f} ms"


def _longest(content: dict[str, Any]) -> Figures:
    of_sizes = [r for r in content["results"] if r["tokens"] == 10 << 20 and r["block_size"] == 512]
    default = one(of_sizes, exchange_bytes=None)
    (more,) = (r for r in of_sizes if r is not default)
    peaks = (r["peak_gib_forward_backward"] for r in (default, more))
    return {
        "walks": f"{max(default['walks'])} times",
        "waits": f"{default['exposed_ms'] / 1e3:.1f} of {default['forward_backward_ms'] / 1e3:.1f} s",
        "budget": f"{more['exchange_bytes'] / GIB:g} GiB",
        "once": f"{more['forward_backward_ms'] / 1e3:.1f} s",
        "less_memory": f"{next(peaks) - next(peaks):.0f} GiB",
    }


def _micro_batches(content: dict[str, Any]) -> Figures:
    label = "long layers, micro-batches of 16K"
    eager, graphs = (one(content["runs"], label=x) for x in (label, f"{label}, CUDA graphs"))
    work = sum(ms for name, ms in eager["profile"]["by_category"].items() if name != "idle")
    return {
        "kernels_16k": f"{work:.0f} ms",
        "step_16k": f"{1e3 * eager['step_seconds']:.0f} ms",
        "share_16k": _percent(work / 1e3 / eager["step_seconds"]),
        "graphs_16k": f"{1e3 * graphs['step_seconds']:.0f} ms",
    }


def _two_gpus(content: dict[str, Any]) -> Figures:
    run = {"label": "long layers", "attention": "moba:512:8"}
    two, single = (one(content["runs"], **run, gpus=gpus)["profile"] for gpus in (2, 1))
    long = one(content["runs"], label="pull, inputs in host memory")
    full = one(content["runs"], label="inputs in host memory")
    names = {"gate": "gate", "forward": "forward", "backward": "backward", "merge": "merges"}
    stages = [f"{name} {_whole(two['by_stage'][x])} for {_whole(single['by_stage'][x])}" for x, name in names.items()]
    before, after = (x["by_category"] for x in (single, two))
    attention, matrices, elementwise = (
        f"{_whole(after[x])} ms in place of {_whole(before[x])} ms" for x in ("attention", "matrices", "elementwise")
    )
    return {
        "attention": attention,
        "matrices": matrices,
        "elementwise": elementwise,
        "stages": ", ".join(stages),
        "communication": f"{after['communication']:.0f} ms",
        "dq_alone": _dq(single),
        "host": f"{long['peak_memory_by_part']['host']:.0f} GiB",
        "kept": f"{long['peak_memory_by_part']['kept']:.0f} GiB",
        "first_step": f"{long['seconds'][0]:.0f} s",
        "faster_1m": f"{full['step_seconds'] / long['step_seconds']:.1f} times",
    }


def _dq_of_held(content: dict[str, Any]) -> Figures:
    """`dq_kernel` with `pull`, before 09481d2 and there: then it computed items of blocks that the other rank holds."""
    of_commit = {
        run["about"]["commit"][:7]: _dq(run["profile"])
        for run in content["runs"]
        if "profile" in run and run["attention"] == "moba:512:8" and "moba.comm=pull" in run["overrides"]
    }
    before, after = of_commit["9f768be"], of_commit["09481d2"]
    return {"dq_held": f"{after} ms in place of {before}"}


def _dq(profile: dict[str, Any]) -> str:
    """GPU time of dq alone in a profiled step."""
    found = dq_ms(profile)
    if found is None:
        raise ValueError(f"no kernel of dq alone is among the longest: {[name for name, *_ in profile['top']]}")
    return _whole(found)


def _decode(content: dict[str, Any]) -> Figures:
    results = content["results"]
    step, step_128, step_4096 = (
        one(results, what="step", shipped=True, block_size=size)["us"]["median"] for size in (512, 128, 4096)
    )
    larger = one(results, what="step", block_size=512, split=512)["us"]["median"]
    first = one(results, what="sdpa", block_size=512)
    sdpa = first["us"]["median"]
    read = 4 * first["tokens"] * first["kv_heads"] * first["head_dim"]  # keys and values, bf16
    return {
        "faster_512": f"{sdpa / step:.1f} times",
        "sdpa": f"{sdpa:.1f} us",
        "sdpa_rate": f"{read / sdpa / 1e6:.1f} TB/s",
        "step_512": f"{step:.1f}",
        "step_128": f"{step_128:.1f}",
        "step_4096": f"{step_4096:.1f}",
        "larger_split": _percent(1 - larger / step),
    }
