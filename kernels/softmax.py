"""A softmax in parts: what weights are relative to, and what outputs are multiplied by at the end. Scores are in base 2."""

import triton
import triton.language as tl

MOST_RISE = tl.constexpr(8.0)
"""A row's weights are relative to the largest score of its first tile of keys, until a score is more than this many powers of two
above it: then to that score. So its output is seldom rescaled, and no weight is above 2^8."""
LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Weights are relative to no less, so that they are 0, and not NaN, where all scores so far are -inf."""
MOST_INVERSE = tl.constexpr(8.507059173023462e37)
"""Largest factor of an output, 2^126: without weight the output is 0 * 2^126 = 0, where 0 * inf would be NaN. Its log-sum-exp is
-inf."""


@triton.jit
def inverse(norm):
    """What an output is multiplied by, of a row's sum of weights."""
    return tl.minimum(1.0 / norm, MOST_INVERSE)
