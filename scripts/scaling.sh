#!/usr/bin/env bash
# Scaling over 1, 2, 4, ... of this machine's GPUs: bash scripts/scaling.sh configs/scaling/node.yaml --out docs/results/scaling.json
set -euo pipefail
root=$(CDPATH="" cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
if [[ $(pwd -P) != "$root" ]]; then # files that are named here and in configs/ are relative to it
    echo "start this in the root of the repository: cd '$root'" >&2
    exit 2
fi
gpus=$(python -c "import torch; print(max(1, torch.cuda.device_count()))")
export TORCH_SYMM_MEM_DISABLE_MULTICAST=1 # NVLink multicast is not used, and fails on some hosts
exec python -m torch.distributed.run --standalone --local-addr 127.0.0.1 --nproc-per-node "$gpus" -m scripts.scaling "$@"
