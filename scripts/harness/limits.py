"""Limits of the errors and differences that a benchmark records. Beyond them it fails, and says by how much.

bf16 has 8 significant bits: rounding moves a number by at most 2^-8 of its size, by about 2^-9 on average. Limits are a few such
steps. Errors measured on H100 and H200 stand beside them, so that a limit neither fails by noise nor passes a wrong block.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

OUTPUT = 2.0**-7
"""Of outputs of attention, norm against norm. Softmax weights and outputs are rounded once each; measured: up to 0.0029. One
wrong block in one of 24 sampled rows gives more than 0.05."""
GRADIENT = 2.0**-6
"""Of dq, dk and dv: scores' gradients, weights, the output that `delta` is made from and the gradient itself are rounded;
measured: up to 0.0036. For keys and values that are drawn independently, whose terms do not cancel."""
ROUNDED = 5 * 2.0**-10
"""Of dq, given the layer's output, against the norm of what is rounded on the way (`definition.Attended`). For any inputs.

dq of one row is `scale * sum_j P_j (dP_j - delta) k_j` with `dP_j = <v_j, dout>` and `delta = <out, dout>`. As in every fused
attention, delta is made from the output in bf16. So delta is off by about `2^-9 |out * dout|`, and dq by `scale` times that times
the mean key `sum_j P_j k_j`. Where values are nearly alike, as in the first steps of training, `dP_j - delta` is far smaller than
delta but its error is not: dq_error of the tiny model was 0.077 on the CPU, 0.0765 of it from delta, and 0.145 on an H200.

Therefore dq is compared with what follows from the layer's own output, which `output_error` judges. What remains are roundings of
numbers that count in the norm. Their root mean square is 0.0016 of it for any inputs; 2^-8 / sqrt(3) = 0.0023 if all mantissas
are the worst possible. The limit, 0.0049, is three times the former. A factor of 1.02 on dq gives 0.005 to 0.012
(tests/test_dq_rounding.py)."""
ERRORS: dict[str, float] = {
    "output_error": OUTPUT, "out_error": OUTPUT, "worst_row_error": 4 * OUTPUT, "dq_rounding_error": ROUNDED,
} | {f"d{x}_error": GRADIENT for x in "qkv"}  # fmt: skip
"""Limits of fields that benchmarks of attention record, whose inputs are drawn. A single row may be off by more than the norm
over many."""
TRAINED = {name: limit for name, limit in ERRORS.items() if name not in {f"d{x}_error" for x in "qkv"}}
"""Those that also hold for the inputs of a model."""
TRUE = ("same_bits_again", "bitwise_equal_to_first", "bitwise_equal_to_other_rank_counts")
"""Fields that must not be False: results do not depend on the run, the exchange or the number of ranks."""
ZERO = ("wrong_rows",)
"""Fields that must be 0."""


def broken(
    entries: Iterable[Mapping[str, Any]], limits: Mapping[str, float] = ERRORS, true: Iterable[str] = TRUE
) -> list[str]:
    """One line per recorded value that is beyond its limit or is not a number.

    Args:
        entries: of a results file; a field that an entry lacks, or that is None, is not judged. `checks` may hold fields as well.
        limits: the largest value by name of the field.
        true: fields that must not be False.
    """
    lines = []
    for entry in entries:
        found = {**entry, **(entry.get("checks") or {})}
        why = [
            f"{name} is {found[name]:.3g}, the limit {limit:.3g}"
            for name, limit in limits.items()
            if found.get(name) is not None and not (math.isfinite(found[name]) and found[name] <= limit)
        ]
        why += [f"{name} is False" for name in true if found.get(name) is False]
        why += [f"{name} is {found[name]}, must be 0" for name in ZERO if found.get(name)]
        if why:
            lines.append(f"{'; '.join(why)}: {_named(entry)}")
    return lines


def end(lines: list[str]) -> None:
    """Leave the program with exit status 1 if there are `lines` of `broken`, which go to stderr.

    Raises:
        SystemExit: there are some.
    """
    if lines:
        raise SystemExit("\n".join(["results are wrong, do not use these times:", *lines]))


def _named(entry: Mapping[str, Any]) -> str:
    """What tells an entry apart: its short fields."""
    kept = {
        name: value
        for name, value in entry.items()
        if isinstance(value, int | str) and not isinstance(value, bool) and not name.endswith(("_bytes", "fingerprint"))
    }
    return ", ".join(f"{name} {value}" for name, value in list(kept.items())[:10])
