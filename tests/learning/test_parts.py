"""Parts of the learning experiment: attention of the arms, prompts, routing figures, order of data, checkpoints."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from examples.learning import measure, report
from examples.learning.attention import Attention, check, phases, sliding_window
from examples.learning.corpus import Corpus, counting_losses, is_prose_or_code, join_files
from examples.learning.train import Run, Task, learning_rate_share
from examples.learning.windows import data_order, lengths_of_steps

yaml = pytest.importorskip("yaml")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("length", "window", "chunk"), [(24, 8, 4), (24, 24, 8), (16, 4, 4), (12, 16, 4)])
def test_sliding_window_attends_to_the_last_keys_exactly(length: int, window: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, length, 8, dtype=torch.float64, generator=generator) for h in (4, 2, 2))
    at = torch.arange(length)
    behind = at[:, None] - at[None, :]
    mask = (behind >= 0) & (behind < window)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    found = sliding_window(q, k, v, window, chunk)
    assert torch.allclose(found, expected, rtol=0, atol=1e-12)  # fp64, sums in another order


@pytest.mark.parametrize(
    "spec", [Attention("full"), Attention("moba", block_size=16, topk=3), Attention("window", window=64, chunk=32)]
)
def test_each_kind_of_attention_passes_its_own_check(spec: Attention) -> None:
    assert check(spec, torch.device("cpu"), torch.float32, heads=4, kv_heads=2, dim=16) < 1e-4  # fp32


def test_check_refuses_attention_that_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    def shifted(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int, chunk: int) -> torch.Tensor:
        return sliding_window(q, k, v, window - chunk, chunk)

    monkeypatch.setattr("examples.learning.attention.sliding_window", shifted)
    with pytest.raises(RuntimeError, match="window=64"):
        check(Attention("window", window=64, chunk=32), torch.device("cpu"), torch.float32, 4, 2, 16)


@pytest.mark.parametrize(
    ("spec", "named"),
    [({"kind": "ring"}, "ring"), ({"kind": "moba", "block_size": 0, "topk": 1}, "0"),
     ({"kind": "window", "window": 10, "chunk": 4}, "10 and 4")],
)  # fmt: skip
def test_attention_names_what_it_refuses(spec: dict, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Attention(**spec)


def test_phases_of_an_arm() -> None:
    arm = {
        "attention": {"kind": "moba", "block_size": 8, "topk": 2},
        "full_layers": 1,
        "switch": {"at": 0.9, "attention": {"kind": "full"}},
    }
    first, second = phases(arm, 3)
    assert [spec.kind for spec in first.layers] == ["moba", "moba", "full"]
    assert (second.start, [spec.kind for spec in second.layers]) == (0.9, ["full"] * 3)
    with pytest.raises(ValueError, match="layers_full"):
        phases({"attention": {"kind": "full"}, "layers_full": 1}, 3)


@pytest.mark.parametrize("hidden", [0, 1, 4])
def test_needle_prompt_has_its_length_its_needles_and_its_question(hidden: int) -> None:
    facts = [{"question": [100 + i, 50], "answer": [200 + i, 201 + i], "end": [9]} for i in range(8)]
    prompt, answer = measure.needle_prompt(facts, np.zeros(500, dtype=np.uint16), 64, hidden, trial=1, trials=4)
    assert len(prompt) == 64
    assert prompt[-2:].tolist() == answer
    text = prompt[:-4].tolist()
    assert sum(t == 9 for t in text) == hidden
    assert (answer[0] in text) == (hidden > 0)


def test_selection_facts_of_a_selection_made_by_hand() -> None:
    # Four blocks of two tokens, two q heads of one kv head, topk 2: head 0 always adds block 0, head 1 its neighbour.
    selected = np.array(
        [[[-1, 0], [-1, 0], [0, 1], [0, 1], [0, 2], [0, 2], [0, 3], [0, 3]],
         [[-1, 0], [-1, 0], [0, 1], [0, 1], [1, 2], [1, 2], [2, 3], [2, 3]]], dtype=np.int16
    )  # fmt: skip
    facts = measure.selection_facts(selected, block_size=2, kv_heads=1, ranks=2)
    assert facts["wanted_share"] == 1.0  # the second half wants blocks 0 and 1
    assert facts["sink_share"] == 0.5  # rows with more than one earlier block: head 0 always, head 1 never
    assert facts["agreement_in_group"] == 0.0
    assert facts["agreement_across"] is None


def test_windows_lie_in_one_document_and_train_and_eval_do_not_meet(corpus_folder: Path) -> None:
    corpus = Corpus(corpus_folder)
    ends = np.cumsum([d["tokens"] for d in corpus.facts["documents"]])
    document = lambda at: np.searchsorted(ends, at, side="right")  # noqa: E731
    train, held = corpus.windows(256, evaluation=False), corpus.windows(256, evaluation=True)
    for starts in (train, held):
        assert (document(starts) == document(starts + 256)).all()
    assert not set(document(train)) & set(document(held))
    first, other = data_order(corpus, 256, len(train) + 3, 0), data_order(corpus, 256, len(train) + 3, 1)
    assert sorted(first[: len(train)]) == sorted(train)
    assert not (first == other).all()


def test_training_can_begin_with_short_windows() -> None:
    data = {"length": 1024, "batch": 2, "begin_with": {"length": 256, "share": 0.5}}
    assert lengths_of_steps(data, 5) == [(0, 2, 256), (2, 3, 1024)]
    assert lengths_of_steps({"length": 1024, "batch": 2}, 5) == [(0, 5, 1024)]
    for key, value in (("length", 300), ("share", 1.0)):
        with pytest.raises(ValueError, match=f"{key}.*got {value}"):
            lengths_of_steps(data | {"begin_with": data["begin_with"] | {key: value}}, 5)


def test_corpus_refuses_tokens_of_another_build(corpus_folder: Path, tmp_path: Path) -> None:
    corpus = Corpus(corpus_folder)
    corpus.facts["fingerprint"] = "0" * 64
    with pytest.raises(ValueError, match="0000"):
        corpus.unpack(tmp_path)


def test_files_become_documents_of_neighbours_and_tables_are_left_out() -> None:
    made = join_files("p", [(f"/{i}", "x" * 40) for i in range(5)], 100)
    assert [d[2].count("==>") for d in made] == [2, 2, 1]
    assert not is_prose_or_code("0x12345678, 0x12345678\n" * 100)
    assert is_prose_or_code("def f(x):\n    return x\n" * 100)


def test_learning_rate_warms_up_and_falls_to_its_share() -> None:
    optimizer = {"lr": 1.0, "warmup": 4, "steps": 104, "min_lr_share": 0.1}
    rates = [learning_rate_share(optimizer, step) for step in range(105)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[104] == pytest.approx(0.1)
    assert all(a >= b for a, b in zip(rates[3:], rates[4:]))


def test_a_run_resumed_from_a_checkpoint_gives_the_same_curve(corpus_folder: Path, tmp_path: Path) -> None:
    plan = yaml.safe_load((ROOT / "configs/learning/tiny.yaml").read_text())
    plan["optimizer"]["steps"] = 4
    plan["data"]["begin_with"] = {"length": 64, "share": 0.75}
    plan["measures"]["routing_at"] = []
    task = Task("full_s0", "full", plan["arms"]["full"], 0, plan, str(corpus_folder), str(tmp_path), deadline=1e12)
    whole = Run(task)
    assert whole.train()
    first = Run(task)
    for step in range(2):
        first._train_step(step)
        first.step += 1
    first._save(first.checkpoint)
    second = Run(task)
    assert second.train()
    assert torch.equal(second.curve, whole.curve)
    assert second.result(True)["hashes"] == whole.result(True)["hashes"]
    other = Run(Task(**{**vars(task), "seed": 1}))
    with pytest.raises(ValueError, match="other data or weights"):
        other._load()


def test_arms_share_what_they_train_alike(corpus_folder: Path, tmp_path: Path) -> None:
    plan = yaml.safe_load((ROOT / "configs/learning/tiny.yaml").read_text())
    plan["optimizer"]["steps"] = 4
    plan["data"]["begin_with"] = {"length": 64, "share": 0.5}
    plan["measures"]["routing_at"] = []

    def task(arm: str, work: Path) -> Task:
        return Task(f"{arm}_s0", arm, plan["arms"][arm], 0, plan, str(corpus_folder), str(work), deadline=1e12)

    alone, full, later = (
        Run(task(*each))
        for each in (("moba_32_3", tmp_path / "alone"), ("full", tmp_path / "both"), ("moba_32_3", tmp_path / "both"))
    )
    assert all(run.train() for run in (alone, full, later))
    assert [run.began_from for run in (alone, full, later)] == [None, None, "short_windows_s0"]
    assert torch.equal(later.curve[:2], full.curve[:2])
    # Windows of 64 are full attention to blocks of 32 with topk 3 as well: fp32 rounding of 2 steps lies between the two.
    torch.testing.assert_close(later.curve, alone.curve, rtol=1e-4, atol=1e-4)
    assert not torch.equal(later.curve[2:], full.curve[2:])
    narrow = Run(task("moba_32_3", tmp_path / "both"))
    narrow.phases = phases({"attention": {"kind": "moba", "block_size": 16, "topk": 3}}, 2)
    assert narrow.common_start is None


def test_gap_is_paired_by_seed() -> None:
    full = {s: {"eval_loss": 2.0 + s} for s in range(3)}
    moba = {s: {"eval_loss": 2.1 + s} for s in (0, 2)}
    assert report.gaps(moba, full) == pytest.approx([0.1, 0.1])
    assert report.mean_and_error([1.0, 3.0]) == (2.0, 1.0)


def test_counting_losses_by_hand(corpus_folder: Path) -> None:
    corpus, length = Corpus(corpus_folder), 256
    single, pairs = Counter[int](), Counter[tuple[int, int]]()
    train = [int(t) for s in corpus.windows(length, False) for t in corpus.tokens[s : s + length]]
    held = [int(t) for s in corpus.windows(length, True) for t in corpus.tokens[s : s + length]]
    single.update(train)
    pairs.update(zip(train, train[1:]))
    seen, kinds = Counter(a for a, _ in zip(train, train[1:])), Counter(a for a, _ in pairs)
    total = len(train) + corpus.facts["vocabulary"] / 2
    alone = lambda t: (single[t] + 0.5) / total  # noqa: E731
    of_pairs = [
        (pairs[a, b] + kinds[a] * alone(b)) / (seen[a] + kinds[a]) if seen[a] else alone(b)
        for a, b in zip(held, held[1:])
    ]
    found = counting_losses(corpus, length)
    # Sums are exact here: added one by one, the logarithms of a long text would be off by more than this.
    assert found["unigram"] == pytest.approx(-math.fsum(math.log(alone(t)) for t in held) / len(held), rel=1e-12)
    assert found["bigram"] == pytest.approx(-math.fsum(map(math.log, of_pairs)) / len(of_pairs), rel=1e-12)
