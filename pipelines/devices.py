"""The device that a Ray Train worker computes on, and its random numbers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping

import torch
from ray.train.torch import get_device
from torch import Tensor

from schemas.errors import ConfigError


def enough_gpus(available: Mapping[str, float], workers: int) -> bool:
    """Whether each of `workers` can have a GPU of Ray's `available` resources."""
    return 0 < workers <= int(available.get("GPU", 0))


def worker_device(workers: int) -> torch.device:
    """That which Ray gave this one of `workers`; in local mode (0) the process's own GPU, if there is one."""
    if workers:
        return get_device()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def require_compiler(device: torch.device) -> None:
    """Raises ConfigError where torch.compile could make no code for the device."""
    if device.type == "cpu" and shutil.which(os.environ.get("CXX", "g++")) is None:
        raise ConfigError(
            "train.compile needs a C++ compiler on a CPU and there is none: install g++, name another in the variable CXX, "
            "or set train.compile: false."
        )


def random_state(device: torch.device) -> Tensor:
    """uint8: the state of the device's generator."""
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def set_random_state(state: Tensor, device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
