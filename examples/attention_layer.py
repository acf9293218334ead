# torchrun --nproc-per-node 2 example.py
import torch
import torch.distributed as dist

import moba_cp

dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
rank, size = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", rank % torch.cuda.device_count()) if torch.cuda.is_available() else torch.device("cpu")

# Two packed documents of 3000 and 5192 tokens, zigzag over the ranks; 8 query heads, 2 key-value heads.
layout = moba_cp.SequenceLayout.zigzag([0, 3000, 8192], cp_size=size)
config = moba_cp.MoBAConfig(block_size=512, topk=3)
tokens = layout.local_tokens(rank)
q, k, v = (
    torch.randn(tokens, heads, 128, device=device, dtype=torch.bfloat16, requires_grad=True) for heads in (8, 2, 2)
)

out = moba_cp.moba_attention(q, k, v, config, layout=layout)  # [tokens, 8, 128], differentiable
out.float().square().mean().backward()  # q.grad, k.grad, v.grad: complete, this rank's tokens

_, report = moba_cp.moba_attention(q, k, v, config, layout=layout, return_report=True)
if rank == 0:
    print(moba_cp.diagnostics.format_report(report))  # routing and traffic
dist.destroy_process_group()
