"""What is measured of a trained model: held-out loss, loss by position, retrieval, routing."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moba_cp import MoBAReport, SequenceLayout

from .attention import Attention
from .corpus import Corpus
from .model import GPT, logits

TRAILING = 2048
POSITION_BINS = 32


def packed(count: int, length: int) -> SequenceLayout:
    """`count` sequences of `length` tokens on one rank."""
    return SequenceLayout.contiguous([i * length for i in range(count + 1)], 1)


@torch.no_grad()
def held_out(
    model: GPT, attention: tuple[Attention, ...], tokens: Tensor, corpus: Corpus, length: int, batch: int, most: int
) -> dict[str, Any]:
    """Loss on windows of held-out documents.

    Args:
        model, attention: what to measure.
        tokens: int32 `[n]`, the corpus on the device.
        corpus: its documents.
        length, batch: tokens a window and windows per forward pass.
        most: most windows; they are taken evenly over all of them.

    Returns:
        `eval_loss`: nats per token, mean over documents of their means; `documents`: those means; `by_position`: mean
        loss in `POSITION_BINS` equal bins of the window; `trailing_2k`: mean over the last 2,048 positions.
    """
    starts = corpus.windows(length, evaluation=True)
    if len(starts) < batch:
        raise ValueError(f"the corpus has {len(starts)} held-out windows of {length} tokens, needs {batch}")
    count = min(len(starts), most) // batch * batch
    starts = starts[np.linspace(0, len(starts) - 1, count).astype(int)]
    ends = np.cumsum([d["tokens"] for d in corpus.facts["documents"]])
    document = np.searchsorted(ends, starts, side="right")
    rows = []
    for first in range(0, count, batch):
        inputs, targets = window_batch(tokens, starts[first : first + batch], length)
        x = model.hidden(inputs, attention, packed(batch, length), length)
        rows.append(model.losses(x, targets).view(batch, length))
    losses = torch.cat(rows).double().cpu().numpy()
    per_window = losses.mean(1)
    per_document = [float(per_window[document == d].mean()) for d in np.unique(document)]
    bins = losses.mean(0)[: length // POSITION_BINS * POSITION_BINS].reshape(POSITION_BINS, -1).mean(1)
    return {
        "eval_loss": float(np.mean(per_document)),
        "eval_windows": count,
        "documents": [round(x, 5) for x in per_document],
        "by_position": [round(float(x), 5) for x in bins],
        "trailing_2k": float(losses[:, -min(TRAILING, length) :].mean()),
    }


def window_batch(tokens: Tensor, starts: np.ndarray, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets `[len(starts) * length]` of the windows that begin at `starts`."""
    at = torch.from_numpy(np.asarray(starts)).to(tokens.device)[:, None]
    span = torch.arange(length + 1, device=tokens.device)
    rows = tokens[at + span].long()
    return rows[:, :-1].flatten(), rows[:, 1:].flatten()


@torch.no_grad()
def retrieval(
    model: GPT,
    attention: tuple[Attention, ...],
    tokens: Tensor,
    corpus: Corpus,
    *,
    trained_length: int,
    lengths: list[int],
    trials: list[int],
    most_tokens: int,
    needles: tuple[int, ...] = (0, 1, 4),
) -> list[dict[str, Any]]:
    """Needles in held-out text: a statement hidden at evenly spread depths, its question at the end.

    Beyond `trained_length`, RoPE's base is multiplied by `(length / trained_length) ** (D / (D - 2))`, without training, unless
    training windows hold a full turn of every rotated pair.

    Args:
        lengths: tokens of the whole prompt, each divisible by what the attention needs.
        trials: prompts of each length, per number of needles.
        most_tokens: most tokens per forward pass.
        needles: sentences hidden in a prompt, the one asked for counted; 0 hides none.

    Returns:
        One entry per length and number of needles: `exact` is the share of prompts whose answer is right token by token,
        `log_prob` the mean log-probability of the answer in nats, `by_depth` and `exact_by_depth` those in four quarters of
        depth (first: farthest from the question).
    """
    facts, text, results = corpus.facts["needles"], held_out_text(corpus), []
    dim = model.sizes.head_dim
    for (length, count), hidden in itertools.product(zip(lengths, trials, strict=True), needles):
        further = max(1.0, length / trained_length) if model.sizes.rope_period() > trained_length else 1.0
        theta = model.sizes.rope_theta * further ** (dim / (dim - 2))
        prompts, answers = [], []
        for trial in range(count):
            prompt, answer = needle_prompt(facts, text, length, hidden, trial, count)
            prompts.append(prompt)
            answers.append(answer)
        per_forward = max(1, min(count, most_tokens // length))
        exact, log_probs = [], []
        for first in range(0, count, per_forward):
            some = prompts[first : first + per_forward]
            flat = torch.from_numpy(np.concatenate(some).astype(np.int64)).to(tokens.device)
            layout = packed(len(some), length)
            x = model.hidden(flat, attention, layout, length, theta=theta, compiled=False).view(len(some), length, -1)
            for row, answer in zip(x, answers[first : first + per_forward]):
                n = len(answer)
                scores = logits(row[-n - 1 : -1], model.norm, model.embedding).float().log_softmax(-1)
                wanted = torch.tensor(answer, device=tokens.device)
                exact.append(bool((scores.argmax(-1) == wanted).all()))
                log_probs.append(float(scores.gather(1, wanted[:, None]).sum()))
        quarters, exact_quarters = (
            [round(float(np.mean(part)), 4) for part in np.array_split(found, min(4, count))]
            for found in (log_probs, exact)
        )
        results.append(
            {
                "length": length,
                "needles": hidden,
                "trials": count,
                "exact": float(np.mean(exact)),
                "log_prob": float(np.mean(log_probs)),
                "by_depth": quarters,
                "exact_by_depth": exact_quarters,
                "rope_theta": round(theta),
            }
        )
    return results


def held_out_text(corpus: Corpus) -> np.ndarray:
    """Tokens of all held-out documents behind each other."""
    parts, offset = [], 0
    for document in corpus.facts["documents"]:
        if document["eval"] and not document["skip"]:
            parts.append(corpus.tokens[offset : offset + document["tokens"]])
        offset += document["tokens"]
    return np.concatenate(parts)


def needle_prompt(
    facts: list[dict[str, list[int]]], text: np.ndarray, length: int, hidden: int, trial: int, trials: int
) -> tuple[np.ndarray, list[int]]:
    """Prompt of exactly `length` tokens that ends with question and answer, and the answer."""
    rng = np.random.default_rng([length, trial])
    chosen = rng.choice(len(facts), max(4, hidden), replace=False)
    asked = facts[chosen[0]]
    tail = asked["question"] + asked["answer"]
    statements = [facts[i]["question"] + facts[i]["answer"] + facts[i]["end"] for i in chosen[:hidden]]
    room = length - len(tail) - sum(map(len, statements))
    if room < 0:
        raise ValueError(f"{length} tokens do not hold {hidden} needles and the question")
    start = int(rng.integers(0, max(1, len(text) - room)))
    filler = np.resize(text[start : start + room], room)
    depths = [trial / trials * 0.95, *rng.uniform(0, 0.95, max(4, hidden) - 1)][:hidden]
    order = np.argsort(depths)
    parts, at = [], 0
    for i in order:
        cut = int(depths[i] * room)
        parts += [filler[at:cut], np.array(statements[i])]
        at = cut
    return np.concatenate([*parts, filler[at:], np.array(tail)]), asked["answer"]


@torch.no_grad()
def routing(
    model: GPT, attention: tuple[Attention, ...], inputs: Tensor, length: int, ranks: int = 4
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """Routing of one batch by layer, and the selections `[Hq, length, topk]` int16 of its first sequence.

    Both lists have an entry per MoBA layer, in order; the facts name the layer.
    """
    reports: list[MoBAReport] = []
    count = inputs.numel() // length
    model.hidden(inputs, attention, packed(count, length), length, reports=reports)
    layers = [i for i, spec in enumerate(attention) if spec.kind == "moba"]
    facts, selections = [], []
    for layer, report in zip(layers, reports, strict=True):
        selected = report.selected[:, :length].cpu().numpy().astype(np.int16)
        histogram = report.distance_histogram[: int(np.flatnonzero(report.distance_histogram).max()) + 1]
        facts.append(
            {
                "layer": layer,
                "entropy": round(report.entropy, 4),
                "distance_histogram": [int(n) for n in histogram],
                **selection_facts(selected, attention[layer].block_size, model.sizes.kv_heads, ranks),
            }
        )
        selections.append(selected)
    return facts, selections


def selection_facts(selected: np.ndarray, block_size: int, kv_heads: int, ranks: int) -> dict[str, Any]:
    """Shares of one sequence's selections.

    Args:
        selected: `[Hq, T, topk]`, ascending, -1 for none, blocks numbered from 0.
        block_size: tokens per block.
        kv_heads: kv heads; neighbouring q heads share one.
        ranks: the `wanted_share` of a contiguous split over so many ranks.

    Returns:
        `wanted_share`: (rank, kv head, earlier block of another rank) that some query of the rank selected, over all that
        lie before the rank's last row. `sink_share`: selections of block 0 among those of earlier blocks.
        `agreement_in_group`, `agreement_across`: mean Jaccard similarity of the earlier blocks that two q heads select
        for the same row, over pairs that share a kv head and pairs that do not; rows with a choice alone count.
    """
    q_heads, tokens, topk = selected.shape
    own = np.arange(tokens) // block_size
    chosen = earlier_blocks(selected, block_size)
    blocks = chosen.shape[2]
    share = wanted_share(chosen.reshape(kv_heads, q_heads // kv_heads, tokens, blocks).any(1), block_size, ranks)
    rows = np.flatnonzero(own >= topk)  # more earlier blocks than a query may select
    same, across = [], []
    for a, b in itertools.combinations(range(q_heads), 2):
        if not rows.size:
            break
        both = (chosen[a, rows] & chosen[b, rows]).sum(1)
        either = (chosen[a, rows] | chosen[b, rows]).sum(1)
        pair = float((both / np.maximum(either, 1)).mean())
        (same if a * kv_heads // q_heads == b * kv_heads // q_heads else across).append(pair)
    mean = lambda values: round(float(np.mean(values)), 4) if values else None  # noqa: E731
    return {
        "wanted_share": None if share is None else round(share, 4),
        "wanted_share_ranks": ranks,
        "sink_share": round(float(chosen[:, rows, 0].sum() / max(1, chosen[:, rows].sum())), 4),
        "agreement_in_group": mean(same),
        "agreement_across": mean(across),
    }


def earlier_blocks(selected: np.ndarray, block_size: int) -> np.ndarray:
    """bool `[Hq, T, blocks]`: whether a row selects a block before its own; `selected` as in `selection_facts`."""
    q_heads, tokens, _ = selected.shape
    blocks = math.ceil(tokens / block_size)
    chosen = np.zeros((q_heads, tokens, blocks + 1), dtype=bool)
    np.put_along_axis(chosen, np.where(selected < 0, blocks, selected).astype(np.int64), True, axis=2)
    chosen = chosen[:, :, :blocks]
    chosen[:, np.arange(tokens), np.arange(tokens) // block_size] = False
    return chosen


def wanted_share(per_group: np.ndarray, block_size: int, ranks: int) -> float | None:
    """Share of (rank, kv head, earlier block of another rank) that some row of the rank selects; None where there are none.

    Args:
        per_group: bool `[Hkv, T, blocks]`: per kv head and row, whether some q head of the group selects the block.
        block_size: tokens per block.
        ranks: of a contiguous split. A rank holds at least one block, else its own block's begin would count as another rank's.
    """
    kv_heads, tokens, blocks = per_group.shape
    wanted = visible = 0
    cuts = [tokens * r // ranks for r in range(ranks + 1)]
    first_token = np.arange(blocks) * block_size
    for begin, end in itertools.pairwise(cuts):
        remote = first_token < begin
        wanted += int(per_group[:, begin:end].any(1)[:, remote].sum())
        visible += int(remote.sum()) * kv_heads
    return wanted / visible if visible else None
