"""How fast a device multiplies matrices: what the rate of a model's operations is a share of (MFU)."""

from __future__ import annotations

import time

import torch

SIDES = {"cpu": 768}  # of square matrices; small, since a CPU reaches its rate early
SIDE = 8192  # on other devices
REPEATS = 8


def peak_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a large product of matrices of this type, the best of some; with PyTorch's threads as they are."""
    side = SIDES.get(device.type, SIDE)
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    best = float("inf")
    for _ in range(REPEATS):
        started = time.perf_counter()
        a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best
