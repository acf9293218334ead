"""Text as training data: files read as bytes, packed into sequences, shuffled by a seed.

Tokens are the 256 bytes plus one separator that ends every document, so any file can be trained on and nothing has to be
prepared. Documents are joined in an order drawn for each epoch, and the stream is cut into sequences::

    stream:    d o c u m e n t 7 | d o c 2 | l o n g d o c u m e n t 4 | ...
    sequences: [----- 0 -----][----- 1 -----][----- 2 -----] ...

Everything follows from the list of files, the seed and the number of samples consumed so far, which is therefore all
that a checkpoint has to remember.
"""

from __future__ import annotations

import glob
import hashlib
import os
import sysconfig
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

SEPARATOR = 256
PADDED_VOCAB_SIZE = 384  # of 257; divides by every usual tensor-parallel size, so losses do not depend on that size


@dataclass(frozen=True)
class Corpus:
    """Documents by path, with their sizes in bytes when they were found. An empty file is not a document."""

    paths: tuple[Path, ...]
    sizes: tuple[int, ...]

    @classmethod
    def find(cls, patterns: list[str]) -> Corpus:
        """Collect files from paths, folders (read recursively) and globs, sorted, each once; no pattern means the Python standard
        library's own sources.

        Raises:
            FileNotFoundError: a pattern that matches no file with text in it.
            ValueError: an empty pattern.
        """
        found: dict[Path, Path] = {}
        for pattern in patterns or [_standard_library()]:
            if not pattern:
                raise ValueError("an empty path: give '.' for the current folder")
            given = Path(pattern).expanduser()
            paths = [given] if given.exists() else [Path(p) for p in glob.glob(str(given), recursive=True)]
            files = [f for p in paths for f in (sorted(p.rglob("*")) if p.is_dir() else [p])]
            texts = [f for f in files if f.is_file() and f.stat().st_size and _is_text_path(f, given)]
            if not texts:
                raise FileNotFoundError(f"no text found at {pattern!r}")
            for text in texts:
                found.setdefault(text.resolve(), text)
        paths = sorted(found.values())
        return cls(tuple(paths), tuple(p.stat().st_size for p in paths))

    def split(self, eval_fraction: float, seed: int) -> tuple[Corpus, Corpus]:
        """Training and evaluation documents; which is which depends on the seed and the number of documents only.

        Raises:
            ValueError: a share of fewer than two documents.
        """
        if eval_fraction == 0:
            return self, self._subset(np.zeros(0, dtype=np.int64))
        if len(self.paths) < 2:
            raise ValueError(
                f"{len(self.paths)} document cannot be split into training and evaluation: give more files in data.paths, or "
                "set data.eval_fraction=0"
            )
        count = min(max(1, round(eval_fraction * len(self.paths))), len(self.paths) - 1)
        order = _permutation(len(self.paths), seed, 0)
        return self._subset(order[count:]), self._subset(order[:count])

    def _subset(self, indices: np.ndarray) -> Corpus:
        chosen = sorted(indices.tolist())
        return Corpus(tuple(self.paths[i] for i in chosen), tuple(self.sizes[i] for i in chosen))

    def __str__(self) -> str:
        return f"{len(self.paths):,} documents of {sum(self.sizes):,} bytes ({self.fingerprint[:8]})"

    @property
    def total_tokens(self) -> int:
        """Bytes of all documents plus one separator each."""
        return sum(self.sizes) + len(self.sizes)

    @property
    def fingerprint(self) -> str:
        """Changes whenever a document is added, removed, renamed or resized: a resumed run must see the same text."""
        text = "\n".join(f"{path.name} {size}" for path, size in zip(self.paths, self.sizes, strict=True))
        return hashlib.blake2b(os.fsencode(text), digest_size=16).hexdigest()  # names may be of any bytes


def _standard_library() -> str:
    return sysconfig.get_path("stdlib") + "/**/*.py"


def _is_text_path(path: Path, given: Path) -> bool:
    """Installed packages and compiled files are left out, unless what was given names their folder."""
    return not ({"site-packages", "dist-packages", "__pycache__"} - set(given.parts)) & set(path.parts)


def _permutation(length: int, *seeds: int) -> np.ndarray:
    # RandomState's stream is frozen by numpy's compatibility policy; newer generators may change between versions.
    digest = hashlib.blake2b(repr(seeds).encode(), digest_size=4).digest()
    return np.random.RandomState(int.from_bytes(digest, "little")).permutation(length)


class PackedText:
    """Sequences of ``seq_length`` tokens from a corpus, without end: sample ``n`` is the same on every machine.

    Args:
        corpus: the documents.
        seq_length: tokens of a sequence.
        seed: decides the order of documents and of sequences, anew for each epoch.

    Raises:
        ValueError: the corpus does not fill one sequence.
    """

    def __init__(self, corpus: Corpus, seq_length: int, seed: int) -> None:
        self.corpus, self.seq_length, self.seed = corpus, seq_length, seed
        self.sequences_per_epoch = (corpus.total_tokens - 1) // seq_length
        if self.sequences_per_epoch < 1:
            raise ValueError(f"{corpus.total_tokens} tokens of text do not fill a sequence of {seq_length} + 1")
        self._epoch = lru_cache(maxsize=2)(self._draw_epoch)

    def sample(self, index: int) -> torch.Tensor:
        """Tokens of sample ``index``, ``int64 [seq_length + 1]``: inputs are ``[:-1]``, labels ``[1:]``."""
        epoch, position = divmod(index, self.sequences_per_epoch)
        documents, ends, sequences = self._epoch(epoch)
        start = int(sequences[position]) * self.seq_length
        stop = start + self.seq_length + 1
        pieces = []
        document = int(np.searchsorted(ends, start, side="right"))
        while start < stop:
            begin = int(ends[document - 1]) if document else 0
            upto = min(stop, int(ends[document]))
            pieces.append(self._read(int(documents[document]), start - begin, upto - begin))
            start, document = upto, document + 1
        return torch.from_numpy(np.concatenate(pieces))

    def _draw_epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Order of documents, where each ends in the stream, order of sequences."""
        documents = _permutation(len(self.corpus.paths), self.seed, epoch, 1)
        ends = np.cumsum(np.asarray(self.corpus.sizes, dtype=np.int64)[documents] + 1)
        return documents, ends, _permutation(self.sequences_per_epoch, self.seed, epoch, 2)

    def _read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Tokens ``start`` to ``stop`` of a document, whose last token is the separator."""
        path, size = self.corpus.paths[document], self.corpus.sizes[document]
        with path.open("rb") as file:
            file.seek(start)
            text = file.read(min(stop, size) - start)
        if len(text) != min(stop, size) - start:
            raise OSError(f"{str(path)!r} is shorter than the {size} bytes it had when the run started")
        tokens = np.frombuffer(text, dtype=np.uint8).astype(np.int64)
        return np.append(tokens, SEPARATOR) if stop > size else tokens
