"""A packed sample of four documents; apart from `models`, which takes long to import, so that ranks can import it."""

from __future__ import annotations

from itertools import accumulate

import torch

LENGTHS = (11, 1, 17, 7)
TOKENS = sum(LENGTHS)
ENDS = list(accumulate(LENGTHS, initial=0))
POSITIONS = torch.cat([torch.arange(n) for n in LENGTHS])[None]
"""`[1, TOKENS]`: of each token in its document."""
