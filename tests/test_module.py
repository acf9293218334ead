"""`MoBAAttention`: shapes and layouts; FSDP2 and context parallelism together; the swap in a torchtitan model."""

from __future__ import annotations

import copy
import re
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointError, checkpoint

import moba_cp
from moba_cp import MoBAAttention, MoBAConfig, SequenceLayout, module
from moba_cp.parallel.plan_cache import PLANS
from moba_cp.torchtitan import TitanAttention, swap_attention
from tests.ranks import run_ranks

CONFIG = MoBAConfig(4, 2)
WIDTH, HEADS, VOCABULARY = 16, 4, 32


class Attention(nn.Module):
    """As torchtitan's: projections around an `inner_attention` of `[B, L, heads, head size]`."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, WIDTH * 2, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)
        self.inner_attention = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(2, (8, 4)).split([HEADS, 2, 2], 2)
        return self.out(self.inner_attention(q, k, v, attention_masks=None, scale=None, enable_gqa=True).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(x)
        return x + F.silu(self.mlp(x))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY)
        self.layers = nn.ModuleDict({str(i): Block() for i in range(2)})

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers.values():
            x = layer(x)
        return self.head(x)


def model() -> Model:
    torch.manual_seed(0)
    return Model().double()


def batch(rows: int, length: int) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(VOCABULARY, (rows, length + 1), generator=torch.Generator().manual_seed(1))
    return tokens[:, :-1], tokens[:, 1:]


def steps(model_: nn.Module, tokens: Tensor, labels: Tensor, share: float) -> list[float]:
    """Losses of two steps. `share`: this rank's tokens over the mean of all ranks', for FSDP averages over ranks."""
    optimizer = torch.optim.SGD(model_.parameters(), lr=0.5)
    losses = []
    for _ in range(2):
        loss = F.cross_entropy(model_(tokens).flatten(0, 1), labels.flatten()) * share
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def fsdp_on_rank(rank: int, size: int, compiled: bool) -> tuple[list[float], list[Tensor]]:
    """Two steps of FSDP2 over all ranks, of which pairs share sequences."""
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("dp", "cp"))
    everybody = mesh["dp", "cp"]._flatten("fsdp")
    sharded = model()
    swap_attention(sharded, CONFIG, group=mesh["cp"])
    for block in sharded.layers.values():
        if compiled:
            block.compile(backend="aot_eager", fullgraph=True)
        fully_shard(block, mesh=everybody)
    fully_shard(sharded, mesh=everybody)
    dp, cp = mesh.get_local_rank("dp"), mesh.get_local_rank("cp")
    layout = moba_cp.batch_layout(1, 24, 2)
    tokens, labels = (layout.shard(x[2 * dp : 2 * dp + 2], cp, dim=1) for x in batch(2 * (size // 2), 24))
    losses = steps(sharded, tokens, labels, 1.0)
    total = torch.tensor(losses)
    dist.all_reduce(total)
    whole = [p.full_tensor() if isinstance(p, DTensor) else p for p in sharded.parameters()]
    return (total / size).tolist(), [p.detach() for p in whole]


@pytest.mark.parametrize("compiled", [False, True])
def test_fsdp2_with_context_parallelism_is_the_same_training(compiled: bool) -> None:
    alone = model()
    swap_attention(alone, CONFIG)
    expected = steps(alone, *batch(4, 24), 1.0)
    for losses, parameters in run_ranks(4, fsdp_on_rank, compiled, timeout=240):
        assert losses == pytest.approx(expected, rel=1e-6)  # gathered in fp32
        for a, b in zip(parameters, alone.parameters(), strict=True):
            torch.testing.assert_close(a, b.detach(), rtol=1e-9, atol=1e-12)  # fp64 sums in another order


def module_on_rank(rank: int, size: int) -> list[Tensor]:
    """Batches and packed tokens, the group as a mesh; a mesh of two dimensions is refused."""
    mesh = init_device_mesh("cpu", (size, 1), mesh_dim_names=("cp", "one"))
    module = MoBAAttention(CONFIG, group=mesh["cp"])
    generator = torch.Generator().manual_seed(2)
    whole = [torch.randn(3, 24, heads, 4, generator=generator) for heads in (4, 2, 2)]
    rows = moba_cp.batch_layout(1, 24, size)
    found = [module(*(rows.shard(x, rank, dim=1) for x in whole))]
    packed = SequenceLayout.contiguous([0, 30, 72], size)
    assert moba_cp.set_layout(module, packed) == 1
    found.append(module(*(module.shard(x.flatten(0, 1)) for x in whole)))
    with pytest.raises(ValueError, match="one dimension"):
        MoBAAttention(CONFIG, group=mesh)
    with pytest.raises(ValueError, match="one dimension"):
        moba_cp.moba_attention(*(module.shard(x.flatten(0, 1)) for x in whole), CONFIG, layout=packed, group=mesh)
    return found


def test_the_module_shards_batches_and_packed_tokens() -> None:
    per_rank = run_ranks(2, module_on_rank)
    generator = torch.Generator().manual_seed(2)
    whole = [torch.randn(3, 24, heads, 4, generator=generator) for heads in (4, 2, 2)]
    alone = MoBAAttention(CONFIG)
    rows, packed = moba_cp.batch_layout(1, 24, 2), SequenceLayout.contiguous([0, 30, 72], 2)
    # fp32 sums in another order
    torch.testing.assert_close(rows.unshard([r[0] for r in per_rank], dim=1), alone(*whole), rtol=1e-5, atol=1e-6)
    flat = alone(*(x.flatten(0, 1) for x in whole), layout=SequenceLayout.contiguous([0, 30, 72], 1))
    torch.testing.assert_close(packed.unshard([r[1] for r in per_rank]), flat, rtol=1e-5, atol=1e-6)
    assert alone(*whole).shape == (3, 24, 4, 4)


def copied_on_rank(rank: int, size: int) -> Tensor:
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("cp",))
    model_ = nn.ModuleList([MoBAAttention(CONFIG, group=mesh["cp"]), MoBAAttention(CONFIG, group=mesh["cp"])])
    model_[0].layout = SequenceLayout.contiguous([0, 5, 8], size)
    copied = copy.deepcopy(model_)
    assert copied[0] is not model_[0]
    assert copied[0].group is model_[0].group
    assert copied[0].layout == model_[0].layout
    q = torch.arange(4 * 4 * 4.0).view(4, 4, 4).sin()
    assert torch.equal(copied[0](q, q, q), model_[0](q, q, q))
    return copied[1](q[None], q[None], q[None]) - model_[1](q[None], q[None], q[None])


def test_copies_share_the_group() -> None:
    """As models under averaged weights are copied, modules of several ranks too."""
    assert all(not difference.any() for difference in run_ranks(2, copied_on_rank))


def test_the_module_says_what_it_cannot_do() -> None:
    module, q = MoBAAttention(CONFIG), torch.zeros(8, 2, 4)
    with pytest.raises(ValueError, match=r"need a layout, got \(8, 2, 4\)"):
        module(q, q, q)
    with pytest.raises(ValueError, match="no layout to shard by"):
        module.shard(q)
    with pytest.raises(ValueError, match="multiples of 4 tokens long, got 6"):
        moba_cp.batch_layout(2, 6, 2)
    with pytest.raises(ValueError, match="for 2 ranks, but a module's group has 1"):
        moba_cp.set_layout(module, SequenceLayout.contiguous([0, 8], 2))
    with pytest.raises(ValueError, match="Linear has no MoBAAttention"):
        moba_cp.set_layout(nn.Linear(2, 2), None)
    assert repr(module) == "MoBAAttention(MoBAConfig(block_size=4, topk=2, softmax_scale=None), cp_size=1, comm='auto')"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"comm": "post"}, "comm must be one of .*got 'post'"),
        ({"workspace_bytes": 0}, "workspace_bytes must be at least 1, got 0"),
        ({"exchange_bytes": -1}, "exchange_bytes must be at least 0, got -1"),
        ({"head_parallel": 0}, "head_parallel must be at least 1, got 0"),
        ({"head_parallel": 2}, "head_parallel must divide the 1 ranks of the layout, got 2"),
        ({"layout": SequenceLayout.contiguous([0, 8], 2)}, "for 2 ranks, but a module's group has 1"),
    ],
    ids=str,
)
def test_the_module_checks_its_arguments_when_it_is_made(options: dict, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        MoBAAttention(CONFIG, **options)


def test_budgets_and_split_reach_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict] = []
    attention = module.moba_attention
    noted = lambda *tensors, **options: seen.append(options) or attention(*tensors, **options)  # noqa: E731
    monkeypatch.setattr(module, "moba_attention", noted)
    given = {"comm": "ring", "head_parallel": 1, "workspace_bytes": 4096, "exchange_bytes": 0}
    MoBAAttention(CONFIG, **given)(*(torch.zeros(1, 8, 2, 4) for _ in range(3)))
    assert [{name: options[name] for name in given} for options in seen] == [given]


def refused_on_rank(rank: int, size: int) -> Tensor:
    """Rank 1 passes another batch of keys, then no tensor at all; afterwards the group works."""
    module, q = MoBAAttention(CONFIG, group=dist.group.WORLD), torch.zeros(2, 6, 2, 4)
    with pytest.raises(ValueError, match=r"same batch and length, got q \(2, 6, 2, 4\), k \(3, 4, 2, 4\)"):
        module(q, q.view(3, 4, 2, 4) if rank else q, q)
    with pytest.raises((TypeError, ValueError), match="k must be a tensor, got list"):
        module(q, [q] if rank else q, q)
    return module(q, q, q)


def test_batches_that_differ_are_refused_on_every_rank() -> None:
    assert all(out.shape == (2, 6, 2, 4) for out in run_ranks(2, refused_on_rank))


def test_the_layout_of_a_batch_is_kept_and_counted() -> None:
    PLANS.clear()
    assert moba_cp.batch_layout(3, 8, 2) is moba_cp.batch_layout(3, 8, 2)
    assert moba_cp.kept_bytes().host >= moba_cp.batch_layout(3, 8, 2).nbytes
    with pytest.raises(TypeError, match=r"batch must be an int, got \[2\]"):
        moba_cp.batch_layout([2], 8, 2)


def test_checkpointing_with_another_layout_is_refused() -> None:
    """Though both have equally many tokens, documents and blocks."""
    layouts = [SequenceLayout.contiguous(cu, 1) for cu in ([0, 8, 16], [0, 12, 16])]
    module, x = MoBAAttention(CONFIG), torch.randn(3, 16, 2, 4, dtype=torch.float64, requires_grad=True)

    def gradient(*at: SequenceLayout, **layout: SequenceLayout) -> Tensor:
        """With the module's layout in the forward pass, and in the backward pass."""
        module.layout = at[0]
        out = checkpoint(lambda x: module(*x, **layout).square(), x, use_reentrant=False)
        module.layout = at[1]
        return torch.autograd.grad(out.sum(), x)[0]

    right = [gradient(layout, layout) for layout in layouts]
    with pytest.raises(CheckpointError, match="different metadata"):
        gradient(*layouts)
    assert torch.equal(gradient(*layouts, layout=layouts[1]), right[1])
    assert not torch.equal(*right)


def test_layers_are_swapped_by_name() -> None:
    swapped = model()
    assert swap_attention(swapped, CONFIG, layers=[1]) == ["1"]
    kinds = [type(block.attention.inner_attention) for block in swapped.layers.values()]
    assert kinds == [nn.Identity, TitanAttention]
    before = copy.deepcopy(model().state_dict())
    assert all(torch.equal(a, before[name]) for name, a in swapped.state_dict().items())
    with pytest.raises(ValueError, match="layers must be among 0, 1; got 7"):
        swap_attention(swapped, CONFIG, layers=[7])
    assert swap_attention(swapped, CONFIG, layers=[1, "1"]) == ["1"]
    for layers in (1, "1"):
        with pytest.raises(TypeError, match=f"layers must be names or numbers of layers, got {layers!r}"):
            swap_attention(swapped, CONFIG, layers=layers)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="Linear has no layers"):
        swap_attention(nn.Linear(2, 2), CONFIG)


def test_torchtitan_arguments() -> None:
    module = TitanAttention(CONFIG)
    q = torch.randn(2, 12, 2, 4)
    expected = MoBAAttention(MoBAConfig(4, 2, 0.3))(q, q, q)
    assert torch.equal(module(q, q, q, scale=0.3, enable_gqa=True, attention_masks=None), expected)
    documents = SimpleNamespace(cu_seq_q=torch.tensor([0, 5, 24], dtype=torch.int32))
    packed = MoBAAttention(CONFIG)(q, q, q, layout=SequenceLayout.contiguous([0, 5, 24], 1))
    assert torch.equal(module(q, q, q, attention_masks=documents), packed)
    documents.cu_seq_k = documents.cu_seq_q.clone()
    assert torch.equal(module(q, q, q, attention_masks=documents), packed)
    compiled = torch.compile(module, backend="aot_eager")  # with a graph break: documents are read on the host
    assert torch.equal(compiled(q, q, q, attention_masks=documents), packed)
    of_keys = SimpleNamespace(cu_seq_q=documents.cu_seq_q, cu_seq_k=torch.tensor([0, 6, 24], dtype=torch.int32))
    module.layout = SequenceLayout.contiguous([0, 5, 24], 1)
    assert torch.equal(module(q, q, q, attention_masks=object()), packed)  # the layout says the documents
    module.layout = None
    for options, text in (
        ({"is_causal": False}, "is causal, got is_causal=False"),
        ({"attention_masks": object()}, "must be None or VarlenMetadata, got object"),
        ({"attention_masks": of_keys}, r"cu_seq_q \[0, 5, 24\], cu_seq_k \[0, 6, 24\]"),
        ({"score_mod": abs}, "has no score_mod"),
        ({"out_transform": abs}, "has no out_transform"),
    ):
        with pytest.raises(ValueError, match=text):
            module(q, q, q, **options)
    with pytest.raises(ValueError, match="the model's scale is 0.3, but the configuration's softmax_scale is 0.5"):
        TitanAttention(MoBAConfig(4, 2, 0.5))(q, q, q, scale=0.3)


# What rank 1 alone passes to a module of two ranks, and what all ranks read.
REFUSED_ALONE: dict[str, tuple[tuple[object, ...], str]] = {
    "list": (([1.0], torch.zeros(1, 8, 2, 4), torch.zeros(1, 8, 2, 4)), "TypeError: q must be a tensor, got list"),
    "five dimensions": ((torch.zeros(1, 1, 8, 2, 4),) * 3, r"need a layout, got \(1, 1, 8, 2, 4\)"),
    "no layout": ((torch.zeros(8, 2, 4),) * 3, r"need a layout, got \(8, 2, 4\)"),
    "chunks": ((torch.zeros(1, 7, 2, 4),) * 3, "must be multiples of 4 tokens long, got 14"),
    "keys of one document": (
        (torch.zeros(2, 4, 2, 4), torch.zeros(1, 8, 2, 4), torch.zeros(1, 8, 2, 4)),
        r"same batch and length, got q \(2, 4, 2, 4\), k \(1, 8, 2, 4\)",
    ),
    "packed keys": ((torch.zeros(1, 8, 2, 4), torch.zeros(8, 2, 4), torch.zeros(1, 8, 2, 4)), "same batch and length"),
}


def refusing_module(rank: int, size: int) -> tuple[dict[str, str], Tensor]:
    module, good, errors = MoBAAttention(CONFIG, group=dist.group.WORLD), torch.zeros(1, 8, 2, 4), {}
    for name, (bad, _) in REFUSED_ALONE.items():
        with pytest.raises((TypeError, ValueError)) as error:  # the text is looked at below
            module(*(bad if rank else (good, good, good)))
        errors[name] = f"{type(error.value).__name__}: {error.value}"
    return errors, module(good, good, good)


def refusing_titan(rank: int, size: int) -> tuple[list[str], Tensor]:
    module, good, errors = TitanAttention(CONFIG, group=dist.group.WORLD), torch.zeros(1, 8, 2, 4), []
    for options in ({"attention_masks": object()}, {"is_causal": False}, {"score_mod": abs}):
        with pytest.raises(ValueError) as error:  # the text is looked at below
            module(good, good, good, **(options if rank else {}))
        errors.append(str(error.value))
    return errors, module(good, good, good)


def test_what_one_rank_of_torchtitan_refuses_ends_the_others_too() -> None:
    for errors, out in run_ranks(2, refusing_titan):
        for text, error in zip(
            ("must be None or VarlenMetadata", "is causal", "has no score_mod"), errors, strict=True
        ):
            assert text in error
        assert out.shape == (1, 8, 2, 4)


def test_what_one_rank_refuses_ends_the_others_too() -> None:
    for errors, out in run_ranks(2, refusing_module):
        for name, (_, text) in REFUSED_ALONE.items():
            assert re.search(text, errors[name]), (name, errors[name])
        assert out.shape == (1, 8, 2, 4)


def test_options_are_checked_when_the_module_is_made() -> None:
    with pytest.raises(ValueError, match="comm must be one of .* got 'smoke'"):
        MoBAAttention(CONFIG, comm="smoke")
    with pytest.raises(ValueError, match="workspace_bytes must be at least 1, got 0"):
        MoBAAttention(CONFIG, workspace_bytes=0)
    with pytest.raises(ValueError, match="for 2 ranks, but a module's group has 1"):
        MoBAAttention(CONFIG, layout=SequenceLayout.contiguous([0, 8], 2))
    with pytest.raises(TypeError, match="model must be a torch module, got list"):
        moba_cp.set_layout([MoBAAttention(CONFIG)], None)  # type: ignore[arg-type]
