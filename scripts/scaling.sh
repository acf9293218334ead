#!/usr/bin/env bash
# Scaling over 1, 2, 4, ... of this machine's GPUs: bash scripts/scaling.sh configs/scaling/node.yaml --out docs/results/scaling.json
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
gpus=$(python -c "import torch; print(max(1, torch.cuda.device_count()))")
export TORCH_SYMM_MEM_DISABLE_MULTICAST=1 # NVLink multicast is not used, and fails on some hosts
exec python -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node "$gpus" -m scripts.scaling "$@"
