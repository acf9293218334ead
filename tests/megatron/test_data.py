"""Text as training data: what every sample is, and which part of it a rank reads."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
import torch

pytest.importorskip("megatron.core")

from examples.megatron_gpt.batches import Sharding, micro_batches, read_ahead
from examples.megatron_gpt.data import SEPARATOR, Corpus, PackedText
from moba_cp.megatron.layout import packed_layout


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    for number in range(12):
        (tmp_path / f"{number:02}.txt").write_bytes(bytes([number]) * (7 * number + 1))
    (tmp_path / "empty.txt").touch()
    return Corpus.find([str(tmp_path)])


def test_folders_globs_and_files_are_found_once_and_sorted(corpus: Corpus, tmp_path: Path) -> None:
    again = Corpus.find([str(tmp_path / "*.txt"), str(tmp_path / "03.txt"), f"{tmp_path}/../{tmp_path.name}"])
    assert again == corpus
    assert [p.name for p in corpus.paths] == [f"{n:02}.txt" for n in range(12)]


def test_the_default_is_the_standard_library() -> None:
    corpus = Corpus.find([])
    assert any(p.name == "dataclasses.py" for p in corpus.paths)
    assert corpus.total_tokens > 5_000_000


def test_nothing_found_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no text found at .*nothing\*"):
        Corpus.find([str(tmp_path / "nothing*")])


def test_a_name_may_be_of_any_bytes(tmp_path: Path) -> None:
    with open(os.fsencode(tmp_path) + b"/\xff\xfe.txt", "wb") as file:
        file.write(b"text")
    corpus = Corpus.find([str(tmp_path)])
    assert corpus.sizes == (4,)
    assert len(str(corpus).encode()) > 8
    with pytest.raises(ValueError, match=r"an empty path: give '\.'"):
        Corpus.find([""])


def test_what_is_there_is_no_glob_and_what_is_named_is_not_skipped(tmp_path: Path) -> None:
    (tmp_path / "site-packages").mkdir()
    for name in ("[a].txt", "site-packages/b.txt"):
        (tmp_path / name).write_text("text")
    (tmp_path / "link.txt").symlink_to(tmp_path / "[a].txt")
    names = lambda *found: [p.name for p in Corpus.find([str(tmp_path / name) for name in found]).paths]  # noqa: E731
    assert names("[a].txt") == ["[a].txt"]
    assert names("") == ["[a].txt"]
    assert names("site-packages") == ["b.txt"]
    assert "1 documents of 4 bytes (" in str(Corpus.find([str(tmp_path)]))


def test_documents_are_either_for_training_or_for_evaluation(corpus: Corpus) -> None:
    train, held_out = corpus.split(0.25, seed=3)
    assert len(held_out.paths) == 3
    assert sorted(train.paths + held_out.paths) == list(corpus.paths)
    assert corpus.split(0.25, seed=3) == (train, held_out)
    assert corpus.split(0.25, seed=4) != (train, held_out)


def test_all_documents_may_be_for_training(corpus: Corpus, tmp_path: Path) -> None:
    train, held_out = corpus.split(0, seed=3)
    assert (train, held_out.paths) == (corpus, ())
    one = Corpus(corpus.paths[:1], corpus.sizes[:1])
    assert one.split(0, seed=3)[0] == one
    with pytest.raises(
        ValueError, match="1 document cannot be split .*: give more files .* or set data.eval_fraction=0"
    ):
        one.split(0.25, seed=3)


def test_an_epoch_holds_every_whole_document_once_with_its_separator(corpus: Corpus) -> None:
    text = PackedText(corpus, seq_length=16, seed=0)
    for epoch in range(2):
        numbers = range(epoch * text.sequences_per_epoch, (epoch + 1) * text.sequences_per_epoch)
        samples = {int(text._epoch(epoch)[2][n % text.sequences_per_epoch]): text.sample(n) for n in numbers}
        stream = torch.cat([samples[i][:-1] for i in range(text.sequences_per_epoch)]).tolist()
        assert len(samples) == text.sequences_per_epoch
        assert corpus.total_tokens - 17 <= len(stream) < corpus.total_tokens
        documents = "".join(map(chr, stream)).split(chr(SEPARATOR))[:-1]
        assert len(set(documents)) == len(documents)
        assert all(len(d) == 7 * ord(d[0]) + 1 for d in documents)


def test_labels_are_the_next_tokens_across_samples(corpus: Corpus) -> None:
    text = PackedText(corpus, seq_length=16, seed=0)
    order = text._epoch(0)[2].tolist()
    first, second = text.sample(order.index(0)), text.sample(order.index(1))
    assert first[-1] == second[0]


def test_samples_follow_from_the_seed_and_change_with_it(corpus: Corpus) -> None:
    one, same, other = (PackedText(corpus, 16, seed) for seed in (1, 1, 2))
    assert all(torch.equal(one.sample(n), same.sample(n)) for n in range(60))
    assert not all(torch.equal(one.sample(n), other.sample(n)) for n in range(20))


def test_too_little_text_is_an_error(corpus: Corpus) -> None:
    with pytest.raises(ValueError, match=r"tokens of text do not fill a sequence of 4096 \+ 1"):
        PackedText(corpus, 4096, 0)


def test_the_fingerprint_follows_the_documents(corpus: Corpus, tmp_path: Path) -> None:
    (tmp_path / "new.txt").write_text("new")
    assert Corpus.find([str(tmp_path)]).fingerprint != corpus.fingerprint


def test_a_document_that_shrinks_while_training_is_an_error(corpus: Corpus) -> None:
    corpus.paths[-1].write_bytes(b"")
    text = PackedText(corpus, 16, 0)
    with pytest.raises(OSError, match=r"11.txt' is shorter than the 78 bytes"):
        [text.sample(n) for n in range(text.sequences_per_epoch)]


CPU = torch.device("cpu")


def test_ranks_read_each_token_of_the_global_batch_exactly_once(corpus: Corpus) -> None:
    text = PackedText(corpus, 16, 0)
    tokens, labels = torch.full((8, 16), -1), torch.full((8, 16), -1)
    for dp_rank in range(2):
        for cp_rank in range(2):
            batches = islice(micro_batches(text, 2, 0, Sharding(dp_rank, 2, cp_rank, 2, CPU)), 2)
            for number, batch in enumerate(batches):
                rows = torch.arange(2)[:, None] + 4 * number + 2 * dp_rank
                assert batch.position_ids[0].tolist() == [[0, 1, 2, 3, 12, 13, 14, 15], list(range(4, 12))][cp_rank]
                assert (tokens[rows, batch.position_ids] == -1).all()
                tokens[rows, batch.position_ids], labels[rows, batch.position_ids] = batch.tokens, batch.labels
    samples = torch.stack([text.sample(n) for n in range(8)])
    assert torch.equal(tokens, samples[:, :-1])
    assert torch.equal(labels, samples[:, 1:])


@pytest.mark.parametrize("cp_size", [1, 2, 3])
def test_separate_documents_are_packed_cut_and_padded_one_by_one(corpus: Corpus, cp_size: int) -> None:
    text = PackedText(corpus, 48, 0)
    samples = torch.stack([text.sample(n) for n in range(2)])
    parts = [next(micro_batches(text, 2, 0, Sharding(0, 1, rank, cp_size, CPU), True)) for rank in range(cp_size)]
    packed = parts[0].packed
    assert packed is not None
    true, padded = packed.cu_seqlens_q.tolist(), packed.cu_seqlens_q_padded.tolist()
    layout = packed_layout(tuple(true), tuple(padded), cp_size)
    whole = {name: layout.unshard([getattr(p, name)[0] for p in parts]) for name in ("tokens", "labels", "counts")}
    real = whole["counts"]
    assert torch.equal(whole["tokens"][real], samples[:, :-1].flatten())
    assert torch.equal(whole["labels"][real], samples[:, 1:].flatten())
    for number, start in enumerate(padded[:-1]):
        document = whole["tokens"][start : start + true[number + 1] - true[number]]
        assert SEPARATOR not in document[:-1]
    separators = int((samples[:, :-2] == SEPARATOR).sum())
    assert len(true) - 1 == 2 + separators
    assert separators > 0


def test_reading_resumes_after_any_number_of_samples(corpus: Corpus) -> None:
    text, sharding = PackedText(corpus, 16, 0), Sharding(0, 1, 0, 1, CPU)
    through = list(islice(micro_batches(text, 1, 0, sharding), 70))  # into the third epoch
    resumed = list(islice(micro_batches(text, 1, 41, sharding), 29))
    assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(through[41:], resumed, strict=True))


def test_a_thread_reads_ahead_the_same_micro_batches(corpus: Corpus) -> None:
    text = PackedText(corpus, seq_length=16, seed=0)
    sharding = Sharding(0, 1, 0, 1, torch.device("cpu"))
    plain, ahead = (islice(micro_batches(text, 2, 3, sharding, ahead=count), 9) for count in (0, 2))
    for a, b in zip(plain, ahead, strict=True):
        assert torch.equal(a.tokens, b.tokens)
        assert torch.equal(a.labels, b.labels)


def test_an_error_of_the_reading_thread_comes_in_its_turn() -> None:
    def items() -> Iterator[int]:
        yield from (1, 2)
        raise OSError("the disk is gone")

    found = read_ahead(items(), 4)
    assert [next(found), next(found)] == [1, 2]
    with pytest.raises(OSError, match="the disk is gone"):
        next(found)


def test_closing_ends_the_reading_thread() -> None:
    found = read_ahead(itertools.count(), 2)
    assert next(found) == 0
    found.close()
    # Else it may abort the end of the program.
    assert not any(thread.name == "read ahead" for thread in threading.enumerate())
    assert list(read_ahead(iter([]), 1)) == []
