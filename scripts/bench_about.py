"""What a benchmark ran on, for the head of its results."""

from __future__ import annotations

import platform
import subprocess
from typing import Any

import torch
import triton


def about(commit: str = "") -> dict[str, Any]:
    """Device (without a GPU "CPU"), versions and commit (`commit` where the checkout has no .git)."""
    if not commit:
        found = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = found.stdout.strip() or "unknown"
    cuda = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if cuda else "CPU",
        "capability": torch.cuda.get_device_capability() if cuda else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if cuda else None,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": commit,
    }
