"""The device that a Ray Train worker computes on."""

from __future__ import annotations

import torch
from ray.train.torch import get_device


def worker_device(workers: int) -> torch.device:
    """That which Ray gave this one of `workers`; in local mode (0) the process's own GPU, if there is one."""
    if workers:
        return get_device()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
