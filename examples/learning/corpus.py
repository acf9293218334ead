"""The corpus: long documents of code and technical prose, deduplicated, split by document and tokenised.

    pip install -e ".[learning]"
    python -m examples.learning.corpus fetch --config configs/learning/corpus.yaml --out .cache/learning
    python -m examples.learning.corpus build --config configs/learning/corpus.yaml --out .cache/learning

`fetch` downloads the packages (pip, apt-get); `build` writes `corpus.json` (facts, document offsets, sentences to retrieve) and
`corpus.xz` (uint16 tokens, LZMA). The text is not kept. A machine that trains needs these two files alone.
`pairs` adds what training with retrieval needs to a corpus that was built without it.

1. Files: text files of the packages in order of path; tables of numbers and files of over-long lines are left out.
2. Near-duplicates: MinHash over three-line shingles (64 permutations, Jaccard similarity of 0.7 and more) drops a file.
3. Documents: neighbouring files of one package, each after a line with its path, until `document_bytes` are full.
4. Split by document; BPE trained on training documents only; documents under `min_tokens` are dropped. Packages under
   `no_eval` hold a manual in two formats: what would be held out of them is not used at all.
"""

from __future__ import annotations

import hashlib
import io
import json
import lzma
import random
import subprocess
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from .duplicates import Duplicates
from .needles import Sentences, needles, training_facts
from .reading import PACKAGES, read_yaml
from .sources import fetch, read_source, source_name

DETAILS = ("documents", "needles", "pairs")
"""Entries of `corpus.json` that results do not repeat."""
FILTERS = [{"id": lzma.FILTER_LZMA2, "preset": 6, "lc": 0, "lp": 1, "pb": 1}]
Document = tuple[str, str, str]  # source, name, text


PLAN = Annotated[Path, typer.Option(help="YAML file of the packages", exists=True, dir_okay=False)]
OUT = Annotated[Path, typer.Option(help="folder of the corpus")]
app = typer.Typer(add_completion=False, help=__doc__)


@app.command("fetch")
def fetch_command(config: PLAN, out: OUT) -> None:
    """Download the packages."""
    packages = _packages(config)
    try:
        fetch(packages, out / "downloads")
    except FileNotFoundError as error:
        sys.exit(f"packages are downloaded by pip and apt-get: {error}")
    except subprocess.CalledProcessError as error:
        sys.exit(f"exit status {error.returncode} of {' '.join(map(str, error.cmd))}")


@app.command("build")
def build_command(config: PLAN, out: OUT) -> None:
    """Make the corpus out of them, and show what it holds."""
    packages = _packages(config)
    try:
        facts = build(packages, out)
    except FileNotFoundError as error:
        raise typer.BadParameter(str(error)) from None
    print(json.dumps({k: v for k, v in facts.items() if k not in DETAILS}, indent=1))
    wanted = packages.get("fingerprint", facts["fingerprint"])
    if facts["fingerprint"] != wanted:
        sys.exit(
            f"the tokens' fingerprint is {facts['fingerprint']}, {config} says {wanted}: results over these tokens cannot be "
            f"compared with results over those. What was built stays in {out}"
        )


def _packages(config: Path) -> dict[str, Any]:
    """The entries of a file of packages.

    Raises:
        BadParameter: it is of another kind.
    """
    try:
        return read_yaml(config, PACKAGES, "configs/learning/corpus_tiny.yaml")
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


@app.command("pairs")
def pairs_command(
    corpus: Annotated[Path, typer.Option(help="folder of corpus.json and tokenizer.json", exists=True)],
) -> None:
    """Add training sentences to the `corpus.json` of a build that had none; tokens and fingerprint stay."""
    path = corpus / "corpus.json"
    if not path.exists():
        raise typer.BadParameter(f"{corpus} holds no corpus.json: the command `build` makes one")
    facts = json.loads(path.read_text())
    encode = load_tokenizer(facts["vocabulary"], corpus)
    if needles(encode) != facts["needles"]:
        raise typer.BadParameter(f"{corpus / 'tokenizer.json'} is not the tokenizer of {path}")
    facts["pairs"] = training_facts(encode)
    path.write_text(json.dumps(facts, separators=(",", ":")))


@app.command("bigram")
def bigram_command(
    corpus: Annotated[Path, typer.Option(help="folder of corpus.json and corpus.xz", exists=True)],
    length: Annotated[int, typer.Option(help="tokens of a window", min=2)],
    out: Annotated[Path, typer.Option(help="JSON file", dir_okay=False)],
) -> None:
    """Held-out loss of counting: what any model of the same windows has to beat."""
    try:
        made = Corpus(corpus)
    except (FileNotFoundError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    facts = {"fingerprint": made.facts["fingerprint"], "length": length} | counting_losses(made, length)
    out.write_text(json.dumps(facts, indent=1) + "\n")
    print(json.dumps(facts))


def counting_losses(corpus: Corpus, length: int) -> dict[str, float]:
    """Held-out nats per token of two models that count all training windows: single tokens (each count plus a half), and pairs,
    mixed with the former by Witten and Bell's rule (IEEE Trans. Inf. Theory 37(4), 1991, method C)."""
    tokens, size = corpus.tokens.astype(np.int64), corpus.facts["vocabulary"]
    train, held = (
        np.concatenate([tokens[s : s + length] for s in corpus.windows(length, evaluation)])
        for evaluation in (False, True)
    )
    single = np.bincount(train, minlength=size) + 0.5
    single /= single.sum()
    pairs, counts = np.unique(train[:-1] * size + train[1:], return_counts=True)
    seen, kinds = np.bincount(train[:-1], minlength=size), np.bincount(pairs // size, minlength=size)
    wanted = held[:-1] * size + held[1:]
    at = np.minimum(np.searchsorted(pairs, wanted), len(pairs) - 1)
    count = np.where(pairs[at] == wanted, counts[at], 0)
    first, second = held[:-1], held[1:]
    total = np.maximum(seen[first] + kinds[first], 1)
    new = np.where(seen[first] > 0, kinds[first] / total, 1.0)
    paired = count / total + new * single[second]
    return {"unigram": float(-np.log(single[held]).mean()), "bigram": float(-np.log(paired).mean())}


def build(config: dict[str, Any], out: Path) -> dict[str, Any]:
    """Write `corpus.json` and `corpus.xz` to `out`; return what `corpus.json` holds.

    Raises:
        FileNotFoundError: a package was not fetched.
    """
    out.mkdir(parents=True, exist_ok=True)
    documents, sources = [], []
    duplicates = Duplicates()
    for source in config["sources"]:
        files, kept, dropped = [], 0, 0
        for path, text in read_source(source, out / "downloads"):
            if kept >= source["megabytes"] * 1e6:
                break
            if not is_prose_or_code(text):
                continue
            if duplicates.seen(text):
                dropped += 1
                continue
            kept += len(text)
            files.append((path, text))
        name = source_name(source)
        documents += join_files(name, files, config["document_bytes"])
        sources.append(
            {
                "name": name,
                "version": source.get("version"),
                "licence": source["licence"],
                "files": len(files),
                "characters": kept,
                "near_duplicates": dropped,
            }
        )
        print(f"{name}: {len(files)} files, {kept / 1e6:.1f} MB, {dropped} near-duplicates", file=sys.stderr)
    random.Random(0).shuffle(documents)
    evaluation = [in_eval(name, config["eval_share"]) for _, name, _ in documents]
    encode, identity = tokenizer(config, [d[2] for d, held in zip(documents, evaluation) if not held], out)

    tokens, table, taken = [], [], 0
    for (source, name, text), held in zip(documents, evaluation):
        if not held and taken >= config["train_tokens"]:
            continue
        ids = np.array(encode(text), dtype=np.uint16)
        if ids.size < config["min_tokens"]:
            continue
        taken += 0 if held else ids.size
        tokens.append(ids)
        table.append(
            {
                "source": source,
                "name": name,
                "tokens": int(ids.size),
                "eval": held,
                "skip": held and source in config.get("no_eval", []),
            }
        )
    stream = np.concatenate(tokens)
    facts = {
        "vocabulary": config["vocabulary"],
        "tokenizer": identity,
        "train_tokens": sum(d["tokens"] for d in table if not d["eval"]),
        "eval_tokens": sum(d["tokens"] for d in table if d["eval"] and not d["skip"]),
        "train_documents": sum(not d["eval"] for d in table),
        "eval_documents": sum(d["eval"] and not d["skip"] for d in table),
        "characters_per_token": round(
            sum(len(d[2]) for d in documents[:50]) / sum(len(encode(d[2])) for d in documents[:50]), 3
        ),
        "fingerprint": hashlib.sha256(stream.tobytes()).hexdigest(),
        "sources": sources,
        "needles": needles(encode),
        "pairs": training_facts(encode),
        "documents": table,
    }
    (out / "corpus.json").write_text(json.dumps(facts, separators=(",", ":")))
    (out / "corpus.xz").write_bytes(lzma.compress(stream.tobytes(), format=lzma.FORMAT_XZ, filters=FILTERS))
    return facts


def is_prose_or_code(text: str) -> bool:
    """False for short files, over-long lines, and tables of numbers."""
    if len(text) < 500:
        return False
    lines = text.count("\n") + 1
    sample = text[:20000]
    digits = sum(c.isdigit() for c in sample) / len(sample)
    return len(text) / lines < 150 and digits < 0.12


def join_files(source: str, files: list[tuple[str, str]], size: int) -> list[Document]:
    """Documents of `size` characters and more: neighbouring files, each after a line with its path."""
    documents, parts, length = [], [], 0
    for path, text in files:
        parts.append(f"==> {source}{path} <==\n{text}\n")
        length += len(parts[-1])
        if length >= size:
            documents.append((source, parts[0].split("\n", 1)[0], "".join(parts)))
            parts, length = [], 0
    if parts:
        documents.append((source, parts[0].split("\n", 1)[0], "".join(parts)))
    return documents


def in_eval(name: str, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big") / 2**32 < share


def tokenizer(config: dict[str, Any], train: list[str], out: Path) -> tuple[Callable[[str], list[int]], str]:
    """The encoding function and its identity: bytes for a vocabulary of 256, else a byte-level BPE trained on `train`."""
    if config["vocabulary"] == 256:
        return load_tokenizer(256, out), "bytes"
    import tokenizers

    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=config["vocabulary"], initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet()
    )
    bpe.train_from_iterator(train[:200], trainer)
    bpe.save(str(out / "tokenizer.json"))
    return lambda text: bpe.encode(text).ids, f"byte-level BPE, tokenizers {tokenizers.__version__}"


def load_tokenizer(vocabulary: int, folder: Path) -> Callable[[str], list[int]]:
    """The encoding function of a corpus that was built: bytes for a vocabulary of 256, else `tokenizer.json`."""
    if vocabulary == 256:
        return lambda text: list(text.encode())
    import tokenizers

    bpe = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: list(bpe.encode(text).ids)


class Corpus:
    """Tokens and documents, read from the files that `build` wrote.

    Attributes:
        facts: what `corpus.json` holds.
        tokens: uint16 `[n]`, all documents behind each other.

    Raises:
        FileNotFoundError: there is no corpus in the folder.
        ValueError: its two files do not belong together.
    """

    def __init__(self, folder: Path) -> None:
        if not (folder / "corpus.json").is_file():
            raise FileNotFoundError(f"{folder} holds no corpus: python -m examples.learning.corpus build makes one")
        self.facts = json.loads((folder / "corpus.json").read_text())
        unpacked = folder / "corpus.npy"
        if unpacked.exists():
            self.tokens = np.load(unpacked, mmap_mode="r")
        else:
            with lzma.open(folder / "corpus.xz") as file:
                self.tokens = np.frombuffer(io.BytesIO(file.read()).getbuffer(), dtype=np.uint16)
        if self.tokens.size != sum(d["tokens"] for d in self.facts["documents"]):
            raise ValueError(f"{folder}: {self.tokens.size} tokens, but corpus.json says otherwise")

    @cached_property
    def sentences(self) -> Sentences:
        """Sentences of training with retrieval.

        Raises:
            ValueError: the corpus was built without them.
        """
        if "pairs" not in self.facts:
            raise ValueError("the corpus has no training sentences: python -m examples.learning.corpus pairs adds them")
        return Sentences(self.facts["pairs"])

    def unpack(self, folder: Path) -> None:
        """Check the fingerprint and write `corpus.npy`, so that processes map one copy."""
        found = hashlib.sha256(self.tokens.tobytes()).hexdigest()
        if found != self.facts["fingerprint"]:
            raise ValueError(f"the tokens' fingerprint is {found}, corpus.json says {self.facts['fingerprint']}")
        np.save(folder / "corpus.npy", self.tokens)

    def windows(self, length: int, evaluation: bool) -> np.ndarray:
        """int64 `[n]`: starts of non-overlapping windows of `length + 1` tokens, each within one document."""
        starts, offset = [], 0
        for document in self.facts["documents"]:
            if document["eval"] == evaluation and not document["skip"]:
                starts += range(offset, offset + document["tokens"] - length, length)
            offset += document["tokens"]
        return np.array(starts, dtype=np.int64)


if __name__ == "__main__":
    app()
