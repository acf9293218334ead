"""What recorded selections say about the bytes of each exchange."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from moba_cp.planning.prediction import received
from moba_cp.planning.sizes import Cluster, Layer, Split

from .measure import earlier_blocks, wanted_share
from .summary import Run, arms, fold, table

RANKS = (2, 4, 8, 16, 32)
BYTES_OF = (2, 4, 8)
"""Ranks whose bytes are shown, where they divide the q heads."""

WHOLE = 0.995
"""The least wanted share that the page shows as 1.00."""


def recorded_shares(folder: Path, results: dict[str, Any]) -> dict[str, dict[int, float]]:
    """Wanted share by arm and number of ranks, mean over recorded layers, of the selection files beside the results.

    A file is `selections_<arm>.npz` as a run writes it, or `selections_<plan>_<arm>.npz` as it is kept. Numbers
    of ranks that leave a rank less than one block are left out.
    """
    found: dict[str, dict[int, float]] = {}
    names = f"selections_{Path(results['plan']).stem}_{{}}.npz", "selections_{}.npz"
    kept = [n for n in names if any((folder / n.format(r["arm"])).exists() for r in results["runs"])][:1]
    for arm in dict.fromkeys(r["arm"] for r in results["runs"]):
        path = folder / kept[0].format(arm) if kept else folder
        if not path.is_file():
            continue
        saved = np.load(path)
        size, kv_heads = int(saved["block_size"]), int(saved["kv_heads"])
        shares: dict[int, list[float]] = {}
        for name in (n for n in saved if n.startswith("layer_")):
            chosen = earlier_blocks(saved[name], size)
            per_group = chosen.reshape(kv_heads, -1, *chosen.shape[1:]).any(1)
            for ranks in (n for n in RANKS if chosen.shape[1] >= n * size):
                share = wanted_share(per_group, size, ranks)
                assert share is not None  # two ranks or more hold a block each
                shares.setdefault(ranks, []).append(share)
        found[arm] = {ranks: float(np.mean(values)) for ranks, values in shares.items()}
    return found


def transfers(results: dict[str, Any], runs: list[Run]) -> str:
    """Wanted share by number of ranks, and bytes of a layer by exchange."""
    shares: dict[str, dict[int, float]] = results.get("wanted", {})
    shares = {arm: shares[arm] for arm in arms(runs) if shares.get(arm)}
    if not shares:
        return "No selections are recorded yet."
    rows = [[a, *(f"{known[n]:.2f}" if n in known else "–" for n in RANKS)] for a, known in shares.items()]
    model, length = runs[0]["config"]["model"], runs[0]["config"]["data"]["length"]
    sizes = (length, model["heads"], model["kv_heads"])

    def mib(ranks: int, exchange: str, share: float = 1.0) -> float:
        # Sizes of blocks matter to bytes only by the share that is wanted.
        layer = Layer(*sizes, block_size=128, topk=1, head_dim=model["head_dim"], wanted_share=share)
        split = Split(ranks, ranks) if exchange == "a2a" else Split(ranks, 1, exchange)
        moved = received(layer, split, Cluster(ranks), backward=False)
        return (moved.heads + moved.sequence) / 2**20

    moved = []
    for ranks in BYTES_OF:
        known = [mib(ranks, "fetch", each[ranks]) for each in shares.values() if ranks in each]
        if known and not sizes[1] % ranks:
            spread = dict.fromkeys(f"{x:.1f}" for x in (min(known), max(known)))
            moved.append([str(ranks), f"{mib(ranks, 'ring'):.1f}", " to ".join(spread), f"{mib(ranks, 'a2a'):.1f}"])
    of_layer = (
        f"MiB that a rank receives per layer in forward, one window of {length:,} tokens, {model['heads']}/{model['kv_heads']} "
        f"heads of {model['head_dim']}, bf16, as `moba-cp plan` counts:"
    )
    return "\n\n".join(
        [
            "Wanted share of the recorded selections, mean over recorded layers (–: a rank holds less than a block):",
            table(["arm", *(f"{n} ranks" for n in RANKS)], rows),
            fold(of_layer),
            table(["ranks", "ring, all_gather", "fetch, pull", "a2a"], moved),
            fold(_saving(shares)),
        ]
    )


def _saving(shares: dict[str, dict[int, float]]) -> str:
    wanted = {ranks: min(known[ranks] for known in shares.values() if ranks in known) for ranks in _numbers_of(shares)}
    whole = [ranks for ranks, share in wanted.items() if share >= WHOLE]
    least = min(wanted.values())
    text = f"Where fewer blocks are wanted, `fetch` and `pull` receive less; the least share here is {least:.2f}."
    if whole:
        text = (
            f"With {', '.join(map(str, whole))} ranks every arm wants all that is in sight, to two digits: `fetch` and `pull` "
            f"then receive as much as a ring. {text}"
        )
    return text


def _numbers_of(shares: dict[str, dict[int, float]]) -> list[int]:
    """Numbers of ranks that some arm has a share for."""
    return sorted({ranks for known in shares.values() for ranks in known})
