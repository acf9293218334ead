"""On GPUs: full causal attention by each of torch's kernels, in pieces on one GPU and over two."""

from __future__ import annotations

import pytest
import torch

from moba_cp import SequenceLayout
from moba_cp.dense import causal_attention
from moba_cp.kernels import dense
from tests.gpu_ranks import run_gpu_ranks

pytestmark = pytest.mark.gpu

# Partial results are rounded to bf16, 2 ** -9 each; gradients once more for each piece.
BF16 = (5e-3, 1e-2)
FP32 = (1e-5, 1e-5)
BIG = (4, 2, 128, 128)  # q heads, kv heads, D, Dv


def make(
    cu: list[int], heads: tuple[int, int, int, int], dtype: torch.dtype = torch.bfloat16
) -> tuple[torch.Tensor, ...]:
    """q, k, v and the gradient of the output."""
    q_heads, kv_heads, dim, value_dim = heads
    g = torch.Generator("cuda").manual_seed(0)
    shapes = [(q_heads, dim), (kv_heads, dim), (kv_heads, value_dim), (q_heads, value_dim)]
    return tuple(torch.randn(cu[-1], *s, device="cuda", generator=g).to(dtype) for s in shapes)


def expected(cu: list[int], inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    """out, dq, dk, dv by plain fp64 products."""
    *leaves, dout = (x.double() for x in inputs)
    for x in leaves:
        x.requires_grad_()
    outputs = []
    for a, b in zip(cu[:-1], cu[1:], strict=True):
        q, k, v = (x[a:b] for x in leaves)
        k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        score = torch.einsum("qhd,khd->hqk", q, k) * q.shape[2] ** -0.5
        hidden = torch.ones(b - a, b - a, dtype=torch.bool, device="cuda").triu(1)
        outputs.append(torch.einsum("hqk,khd->qhd", score.masked_fill(hidden, float("-inf")).softmax(-1), v))
    out = torch.cat(outputs)
    return [out.detach(), *torch.autograd.grad(out, leaves, dout)]


def check(got: list[torch.Tensor], want: list[torch.Tensor], tolerance: tuple[float, float]) -> None:
    for name, a, b in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        error = ((a.double() - b).norm() / b.norm()).item()
        assert error < tolerance[name != "out"], f"{name} is off by {error:.1e}"


def in_two_shards(inputs: tuple[torch.Tensor, ...], cut: int, steady: bool) -> list[torch.Tensor]:
    """The sequence cut in two: what the second shard sees of itself, then what it sees of the first."""
    q, k, v, dout = inputs
    scale, acc = q.shape[2] ** -0.5, torch.float32
    first, rest = slice(0, cut), slice(cut, None)
    pieces = [(first, first, True), (rest, rest, True), (rest, first, False)]
    total, lse = torch.zeros_like(dout, dtype=acc), q.new_full((q.shape[1], len(q)), float("-inf"), dtype=acc)
    for rows, keys, causal in pieces:
        dense.attend(q[rows], k[keys], v[keys], scale, causal, total[rows], lse[:, rows], steady)
    out = total.to(q.dtype)
    gradients = dq, dk, dv = [torch.zeros_like(x, dtype=acc) for x in (q, k, v)]
    for rows, keys, causal in pieces:
        dense.attend_backward(
            *(q[rows], k[keys], v[keys], out[rows], lse[:, rows], dout[rows], scale, causal),
            *(dq[rows], dk[keys], dv[keys], steady),
        )
    return [out, *gradients]


@pytest.mark.parametrize("cut", [512, 333])
@pytest.mark.parametrize(
    ("kernel", "heads", "dtype", "tolerance"),
    [
        ("flash", BIG, torch.bfloat16, BF16),
        ("flash", (2, 2, 60, 96), torch.bfloat16, BF16),  # padded
        ("flash", (2, 1, 256, 256), torch.float16, BF16),
        ("cudnn", BIG, torch.bfloat16, BF16),
        ("cudnn", (4, 1, 64, 64), torch.float16, BF16),
        ("math", (2, 1, 288, 288), torch.bfloat16, BF16),
        ("math", (4, 2, 64, 32), torch.float32, FP32),
    ],
)
def test_two_shards_give_the_whole(
    kernel: str, heads: tuple, dtype: torch.dtype, tolerance: tuple, cut: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kernel == "cudnn" and not dense._prefers_cudnn(torch.device("cuda")):
        pytest.skip("needs sm_90 or sm_100 and a cuDNN that is right for all lengths")
    choose = dense.choose_kernel
    chosen = set()

    def noted(*call: object) -> str:
        chosen.add(choose(*call))
        return choose(*call)

    monkeypatch.setattr(dense, "choose_kernel", noted)
    inputs = make([0, 1000], heads, dtype)
    check(in_two_shards(inputs, cut, steady=kernel == "cudnn"), expected([0, 1000], inputs), tolerance)
    assert chosen == {kernel}


def run(inputs: tuple[torch.Tensor, ...], layout: SequenceLayout, rank: int, comm: str) -> list[torch.Tensor]:
    """out, dq, dk, dv of this rank's tokens."""
    *local, dout = (layout.shard(x, rank) for x in inputs)
    for x in local:
        x.requires_grad_()
    out = causal_attention(*local, None, layout=layout, comm=comm)
    return [out.detach(), *torch.autograd.grad(out, local, dout)]


@pytest.mark.parametrize("cu", [[0, 2048], [0, 100, 100, 101, 1500]], ids=str)
def test_one_gpu_and_again(cu: list[int]) -> None:
    """Against fp64; out, dk and dv are the same bits each time, and dq too if torch is told to be deterministic."""
    inputs, layout = make(cu, BIG), SequenceLayout.contiguous(cu, 1)
    got = run(inputs, layout, 0, "auto")
    check(got, expected(cu, inputs), BF16)
    again = run(inputs, layout, 0, "auto")
    assert all(torch.equal(got[i], again[i]) for i in (0, 2, 3))
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (run(inputs, layout, 0, "auto") for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    check(first, expected(cu, inputs), BF16)
    assert all(map(torch.equal, first, second))


def _rank(rank: int, size: int) -> None:
    for cu in ([0, 2048], [0, 100, 100, 101, 1500]):
        inputs = make(cu, BIG)
        want = expected(cu, inputs)
        middle = cu[-1] // 3
        for layout in (
            SequenceLayout.contiguous(cu, size),
            SequenceLayout.zigzag(cu, size),
            SequenceLayout.from_runs([[(middle, cu[-1]), (0, middle)], []], cu),
        ):
            results = {comm: run(inputs, layout, rank, comm) for comm in ("ring", "all_gather")}
            if layout.local_tokens(rank):
                check(results["ring"], [layout.shard(x, rank) for x in want], BF16)
            for i in (0, 2, 3):  # dq is summed in no fixed order
                assert torch.equal(results["ring"][i], results["all_gather"][i]), f"{layout} {i}"


def test_two_ranks_over_nccl() -> None:
    run_gpu_ranks(2, _rank)
