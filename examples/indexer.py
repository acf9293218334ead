"""A learned indexer, trained end to end: it selects the blocks that mean keys cannot find. Seconds on a CPU.

    python examples/indexer.py

Each block of eight tokens holds one memory (a code and a value) among seven distractors, which have codes too. A query token
carries the code of an earlier memory and is to answer its value. Attention itself learns to find the token. But the mean of a
block's keys is mostly distractors, so MoBA's own routing rarely selects the right block. The indexer learns which tokens count.

Two losses train two things. The task's reaches q, k and v, as through any attention. The indexer's asks its scores to predict
the shares of attention that the blocks got (`Selection.weights`); `block_scores` has gradients to the gates. First all blocks
are selected, so that all have shares; then only the best `TOPK - 1` and the own block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import moba_cp

CODE, BLOCK, BLOCKS, TOPK, WIDTH = 16, 8, 24, 3, 16
TOKENS = BLOCK * BLOCKS
DENSE, SPARSE = (moba_cp.MoBAConfig(BLOCK, topk, softmax_scale=12.0) for topk in (BLOCKS, TOPK))
LAYOUT = moba_cp.SequenceLayout.contiguous([0, TOKENS], 1)


def draw() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens `[T, 3 * CODE + 1]`, the block that each asks for `[T]` (-1: none), and the answers `[T, CODE]`."""
    code, value = F.normalize(torch.randn(TOKENS, CODE), dim=1), torch.randn(TOKENS, CODE)
    memory = torch.arange(BLOCKS) * BLOCK + torch.randint(BLOCK, (BLOCKS,))
    is_memory = torch.zeros(TOKENS, 1).index_fill_(0, memory, 1.0)
    block = torch.arange(TOKENS) // BLOCK
    wanted = (torch.rand(TOKENS) * block).long().where(block > 0, -1)
    asks = torch.where(wanted[:, None] >= 0, code[memory[wanted]], 0.0)
    tokens = torch.cat([code, value, asks, is_memory], 1)
    return tokens, wanted, value[memory[wanted]]


class Layer(nn.Module):
    """One head of attention, and the indexer that routes it."""

    def __init__(self) -> None:
        super().__init__()
        self.code, self.value, self.out = (nn.Linear(CODE, CODE, bias=False) for _ in range(3))
        nn.init.orthogonal_(self.code.weight)  # equal codes match from the start; what they mean is learned
        self.q_gate = nn.Linear(CODE, WIDTH, bias=False)
        self.k_gate = nn.Sequential(nn.Linear(CODE + 1, 64), nn.ReLU(), nn.Linear(64, WIDTH, bias=False))

    def forward(self, x: Tensor, config: moba_cp.MoBAConfig, learned: bool = True) -> tuple[Tensor, Tensor, Tensor]:
        """Answers, what the indexer has to learn yet, and the selected blocks `[1, T, topk]`."""
        code, value, asks, is_memory = x.split([CODE, CODE, CODE, 1], 1)
        q, k, v = self.code(asks)[:, None], self.code(code)[:, None], self.value(value)[:, None]
        q_gate, k_gate = self.q_gate(asks)[:, None], self.k_gate(torch.cat([code, is_memory], 1))[:, None]
        routing = (q_gate, k_gate) if learned else None
        out, selection = moba_cp.moba_attention(q, k, v, config, layout=LAYOUT, routing=routing, return_selection=True)
        scores = moba_cp.block_scores(q_gate, k_gate, selection.blocks, config, layout=LAYOUT)
        # Shares among the earlier blocks, where there are at least two to choose from.
        rows = selection.earlier.sum(2) > 1
        share = selection.weights.masked_fill(~selection.earlier, 0)[rows]
        predicted = scores.masked_fill(~selection.earlier, -1e4)[rows].log_softmax(1)
        distance = -(share * predicted).sum(1) / share.sum(1).clamp(min=1e-6)
        return self.out(out[:, 0]), (distance * share.sum(1)).mean(), selection.blocks


def found(blocks: Tensor, wanted: Tensor) -> float:
    """Share of queries whose block was selected."""
    asks = wanted >= 0
    return (blocks[0] == wanted[:, None]).any(1)[asks].float().mean().item()


def main(dense_steps: int = 120, sparse_steps: int = 60) -> dict[str, float]:
    """Train, print, and return the figures of the end."""
    torch.manual_seed(0)
    layer = Layer()
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for step in range(dense_steps + sparse_steps):
        tokens, wanted, answer = draw()
        answers, of_indexer, blocks = layer(tokens, DENSE if step < dense_steps else SPARSE)
        of_task = (answers - answer)[wanted >= 0].square().mean()
        optimizer.zero_grad()
        (of_task + of_indexer).backward()
        optimizer.step()
        if step % 30 == 0:
            phase = "all blocks" if step < dense_steps else f"{TOPK} blocks"
            print(f"step {step:3}  {phase:10}  task {of_task.item():.3f}  indexer {of_indexer.item():.3f}")
    result = {}
    with torch.no_grad():
        torch.manual_seed(1)
        for name, learned in (("mean keys", False), ("indexer", True)):
            shares, losses = [], []
            for _ in range(20):
                tokens, wanted, answer = draw()
                answers, _, blocks = layer(tokens, SPARSE, learned)
                shares.append(found(blocks, wanted))
                losses.append((answers - answer)[wanted >= 0].square().mean().item())
            result[name] = sum(shares) / 20
            print(f"{name:10} finds {result[name]:.0%} of the blocks asked for, task {sum(losses) / 20:.3f}")
    return result


if __name__ == "__main__":
    main()
