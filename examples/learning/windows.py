"""Which windows of the corpus each step of training takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from moba_cp import SequenceLayout

from .corpus import Corpus


@dataclass(frozen=True)
class Batches:
    """The training windows of a range of steps: all of one length, packed.

    Attributes:
        first: step that they begin with.
        length: tokens per window.
        starts: int64 `[steps, windows per step]`: where each window begins in the corpus.
        layout: of a step's windows over the context-parallel group.
        share: positions of this rank's tokens among those of a step, int64.
    """

    first: int
    length: int
    starts: np.ndarray
    layout: SequenceLayout
    share: Tensor


def lengths_of_steps(data: dict[str, Any], steps: int) -> list[tuple[int, int, int]]:
    """First step, steps and length of the windows of each stage of training: those of `data["begin_with"]` (a `length` and the
    `share` of the steps) if there are any, then those of `data["length"]`. A step has as many tokens in either.

    Raises:
        ValueError: a step of long windows cannot be cut into short ones, or the share is not in (0, 1).
    """
    if "begin_with" not in data:
        return [(0, steps, data["length"])]
    length, share = data["begin_with"]["length"], data["begin_with"]["share"]
    tokens = data["batch"] * data["length"]
    if not 1 <= length <= tokens or tokens % length:
        raise ValueError(f"begin_with.length must divide the {tokens} tokens of a step, got {length}")
    if not 0 < share < 1:
        raise ValueError(f"begin_with.share must be in (0, 1), got {share}")
    first = round(share * steps)
    return [(0, first, length), (first, steps - first, data["length"])]


def data_order(corpus: Corpus, length: int, count: int, seed: int) -> np.ndarray:
    """int64 `[count]`: starts of the training windows in the order of use; every epoch is a new permutation."""
    starts, rng = corpus.windows(length, evaluation=False), np.random.default_rng(seed)
    if not len(starts):
        raise ValueError(f"the corpus has no training window of {length} tokens")
    epochs = [rng.permutation(starts) for _ in range(-(-count // len(starts)))]
    return np.concatenate(epochs)[:count]
