# torchrun --nproc-per-node 2 examples/hf_train.py
"""Train a Hugging Face Llama with MoBA under context parallelism: sequences split over the ranks, parameters too (FSDP2)."""

import gc
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from moba_cp import MoBAConfig, SequenceLayout
from moba_cp.transformers import configure

VOCABULARY, TOKENS, STEPS = 64, 512, int(os.environ.get("STEPS", "10"))
DOCUMENTS = [0, 200, 512]  # two packed documents per step; they do not see each other

if "RANK" not in os.environ:
    raise SystemExit("start this with torchrun: torchrun --nproc-per-node 2 examples/hf_train.py")
cuda = torch.cuda.is_available()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if cuda else torch.device("cpu")
if cuda:
    torch.cuda.set_device(device)
dist.init_process_group("nccl" if cuda else "gloo")
rank, size = dist.get_rank(), dist.get_world_size()

torch.manual_seed(0)  # the same weights on every rank
sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, num_hidden_layers=2, **sizes)).to(device)
configure(model, MoBAConfig(block_size=64, topk=3), full_last=1)
model.gradient_checkpointing_enable()
mesh = init_device_mesh(device.type, (size,))
for layer in model.model.layers:
    fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

# Zigzag: every rank holds as much of the early tokens as of the late ones.
layout = SequenceLayout.zigzag(DOCUMENTS, cp_size=size)
positions = torch.cat([torch.arange(b - a) for a, b in zip(DOCUMENTS[:-1], DOCUMENTS[1:], strict=True)])
local = lambda x: layout.shard(x, rank)[None].to(device)  # noqa: E731

model.train()
for step in range(STEPS):
    ids = (torch.arange(TOKENS) * 7 + step) % VOCABULARY  # easy to learn
    labels = torch.cat([ids[1:], ids[:1]])
    labels[[end - 1 for end in DOCUMENTS[1:]]] = -100  # the last token of a document predicts nothing
    logits = model(
        local(ids), position_ids=local(positions), use_cache=False, moba_layout=layout, moba_group=dist.group.WORLD
    ).logits
    # Targets are sharded like tokens, so they are shifted before. FSDP averages gradients over the ranks: times `size`.
    total = int((labels >= 0).sum())
    loss = F.cross_entropy(logits[0].float(), local(labels)[0], ignore_index=-100, reduction="sum") / total
    (loss * size).backward()
    optimizer.step()
    optimizer.zero_grad()
    loss = loss.detach()
    dist.all_reduce(loss)
    if rank == 0:
        print(f"step {step}  loss {loss.item():.5f}", flush=True)
# What FSDP2 made holds the group, some of it in cycles, and gloo's threads must end before the process does.
del model, layer, optimizer, mesh
logits = loss = None
gc.collect()
dist.destroy_process_group()
