"""Sentences to retrieve: those that measure a model, those that teach it the form, and where training windows hold the latter.

A sentence is `question answer end`: "\\n# The access code of amber_basil is " "12345" ".\\n". A pair is the same sentence twice:
the first tells the answer, the second asks for it, and the digits of the second can be copied from the first alone.

Names of training and of evaluation share words, never both words. Answers of evaluation do not occur in training.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

Encode = Callable[[str], list[int]]
WORDS = ("amber", "basil", "cedar", "delta", "ember", "flint", "grove", "haven", "ivory", "jade", "karst", "lunar")
"""Of the evaluation's names."""
MORE_WORDS = """
acorn bison birch cobalt coral crane dune eagle falcon fern garnet glacier harbor hazel indigo iris jasper juniper kelp
kiwi lagoon lark lemon lotus maple meadow mint nectar nova oasis ocean olive onyx opal orchid otter pearl pine plum quail
quartz raven reef river robin saffron sage slate sparrow
"""
TEXT, SENTENCE, TOLD, ASKED = range(4)
"""What a token is: text of the corpus, a word of a sentence, a first answer (cannot be known), a second answer."""


def needles(encode: Encode, count: int = 96) -> list[dict[str, list[int]]]:
    """Facts that the evaluation hides in text: tokens of question, answer and end of each sentence."""
    rng = random.Random(1)
    names = sorted(f"{a}_{b}" for a in WORDS for b in WORDS if a != b)
    return [
        {"question": encode(question(name)), "answer": encode(str(rng.randrange(10000, 100000))), "end": encode(".\n")}
        for name in names[:: max(1, len(names) // count)][:count]
    ]


def question(name: str) -> str:
    return f"\n# The access code of {name} is "


def training_facts(encode: Encode, count: int = 2048) -> dict[str, Any]:
    """What training sentences consist of: `questions` and `answers`, `count` of each, and the `end`, all as tokens.

    No name and no answer is one of `needles`; each training name has at least one word that no name of the evaluation has.
    """
    words, rng = [*WORDS, *MORE_WORDS.split()], random.Random(2)
    names = sorted(f"{a}_{b}" for a in words for b in words if a != b and not (a in WORDS and b in WORDS))
    known = {tuple(fact["answer"]) for fact in needles(encode)}
    answers = [encode(str(n)) for n in rng.sample(range(10000, 100000), count + len(known))]
    return {
        "questions": [encode(question(name)) for name in rng.sample(names, count)],
        "answers": [a for a in answers if tuple(a) not in known][:count],
        "end": encode(".\n"),
    }


class Sentences:
    """The training facts of a corpus as arrays.

    Attributes:
        questions, answers: lists of uint16 arrays.
        end: uint16 array.
        fingerprint: SHA-256 of the facts.
    """

    def __init__(self, facts: dict[str, Any]) -> None:
        make = lambda tokens: np.array(tokens, dtype=np.uint16)  # noqa: E731
        self.questions, self.answers = ([make(x) for x in facts[key]] for key in ("questions", "answers"))
        self.end = make(facts["end"])
        self.fingerprint = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class Pairs:
    """The pairs of a range of training windows.

    Attributes:
        questions, answers: int32 `[windows, pairs]`: entries of the training facts.
        cuts: int32 `[windows, 2, pairs]`: tokens of text before the first and before the second sentence of each pair.
    """

    questions: np.ndarray
    answers: np.ndarray
    cuts: np.ndarray

    @classmethod
    def draw(cls, sentences: Sentences, windows: int, count: int, size: int, seed: int) -> Pairs:
        """`count` pairs for each of `windows` windows of `size` tokens, all names of a window different.

        Both cuts of a pair are uniform over the window's text: the mean distance is a third of it.

        Raises:
            ValueError: the sentences take more than half of a window, or there are too few names.
        """
        lengths = [np.array([len(x) for x in known]) for known in (sentences.questions, sentences.answers)]
        if not 1 <= count <= min(map(len, lengths)):
            raise ValueError(f"pairs of a window must be in [1, {min(map(len, lengths))}], got {count}")
        rng = np.random.default_rng([seed, size])
        questions, answers = (_without_repeats(rng, len(x), windows, count) for x in lengths)
        taken = lengths[0][questions] + lengths[1][answers] + len(sentences.end)
        room = size - 2 * taken.sum(1)
        if room.min() < size / 2:
            raise ValueError(f"{count} pairs take {size - room.min()} of {size} tokens, more than half")
        drawn = np.sort(rng.random((windows, 2, count)), axis=1)
        cuts = (drawn * (room[:, None, None] + 1)).astype(np.int32)
        return cls(questions.astype(np.int32), answers.astype(np.int32), cuts)

    def digest(self) -> bytes:
        """SHA-256 of everything."""
        parts = (self.questions, self.answers, self.cuts)
        return hashlib.sha256(b"".join(x.astype("<i4").tobytes() for x in parts)).digest()

    def insert(self, window: int, text: np.ndarray, sentences: Sentences) -> tuple[np.ndarray, np.ndarray]:
        """Tokens `[n]` of `text [n]` with the window's sentences in it, the end of the text cut off, and what each token is."""
        pairs, end = self.questions.shape[1], sentences.end
        cuts = self.cuts[
            window
        ].ravel()  # first sentences, then second ones: the sort keeps that order where cuts are equal
        tokens, kinds, lengths, at = [], [], [], 0
        for i in np.argsort(cuts, kind="stable").tolist():
            cut = int(cuts[i])
            words = sentences.questions[self.questions[window, i % pairs]]
            answer = sentences.answers[self.answers[window, i % pairs]]
            tokens += [text[at:cut], words, answer, end]
            kinds += [TEXT, SENTENCE, TOLD if i < pairs else ASKED, SENTENCE]
            lengths += [cut - at, len(words), len(answer), len(end)]
            at = cut
        rest = len(text) - sum(lengths)
        tokens.append(text[at : at + rest])
        return np.concatenate(tokens), np.repeat(np.array([*kinds, TEXT], dtype=np.uint8), [*lengths, rest])


def _without_repeats(rng: np.random.Generator, entries: int, windows: int, count: int) -> np.ndarray:
    """int `[windows, count]` in [0, entries): equally often, and no entry twice in a row."""
    whole = entries // count * count
    epochs = [rng.permutation(entries)[:whole] for _ in range(-(-windows * count // whole))]
    return np.concatenate(epochs)[: windows * count].reshape(windows, count)
