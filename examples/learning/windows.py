"""Which windows of the corpus each step of training takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from moba_cp import SequenceLayout

from .corpus import Corpus
from .needles import ASKED, TOLD, Pairs


@dataclass(frozen=True)
class Batches:
    """The training windows of a range of steps: all of one length, packed.

    Attributes:
        first: step that they begin with.
        length: tokens per window.
        starts: int64 `[steps, windows per step]`: where each window begins in the corpus.
        layout: of a step's windows over the context-parallel group.
        share: positions of this rank's tokens among those of a step, int64.
        pairs: sentences that the windows hold, if any.
    """

    first: int
    length: int
    starts: np.ndarray
    layout: SequenceLayout
    share: Tensor
    pairs: Pairs | None = None

    def digest(self, corpus: Corpus) -> bytes:
        """What tells these windows from others: starts, then the pairs' places and their text."""
        parts = [self.starts.astype("<i8").tobytes()]
        if self.pairs is not None:
            parts += [self.pairs.digest(), corpus.sentences.fingerprint.encode()]
        return b"".join(parts)

    def with_pairs(self, corpus: Corpus, step: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens, uint16, and what each is, uint8, of the step's windows, `[windows, length + 1]` each."""
        first, rows = (step - self.first) * self.starts.shape[1], []
        for i, start in enumerate(self.starts[step - self.first]):
            text = np.asarray(corpus.tokens[start : start + self.length + 1])
            rows.append(self.pairs.insert(first + i, text, corpus.sentences))
        tokens, kinds = zip(*rows)
        return np.stack(tokens), np.stack(kinds)


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


def pairs_of(data: dict[str, Any], corpus: Corpus, length: int, windows: int, seed: int) -> Pairs | None:
    """The pairs of `windows` training windows of `length` tokens: `data["pairs"]` has the number `per_window`, and
    `per_short_window` where training begins with short ones. None without the key.

    Raises:
        ValueError: the corpus has no training sentences, or a key is unknown.
    """
    if "pairs" not in data:
        return None
    if unknown := sorted(set(data["pairs"]) - {"per_window", "per_short_window", "answer_weight"}):
        raise ValueError(f"unknown keys of pairs: {unknown}")
    count = data["pairs"]["per_window" if length == data["length"] else "per_short_window"]
    return Pairs.draw(corpus.sentences, windows, count, length + 1, seed) if count else None


def weights_of(data: dict[str, Any]) -> list[float]:
    """Weight of a token's loss by what the token is: 1, but 0 for first answers, which nothing tells, and `answer_weight` for
    second ones."""
    weights = [1.0] * 4
    weights[TOLD], weights[ASKED] = 0.0, float(data["pairs"]["answer_weight"])
    return weights
