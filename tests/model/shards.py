"""Several ranks in one process: threads in lockstep, so that properties of shards are tested in milliseconds."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from model.reduction import Operation

COMBINE = {"sum": torch.add, "max": torch.maximum, "min": torch.minimum}


class Threads:
    """A rank among threads. Every rank posts its tensor, waits for all, and combines them in rank order."""

    def __init__(self, rank: int, posted: list[Tensor | None], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(posted)
        self._posted, self._barrier = posted, barrier

    def _exchange(self, value: Tensor) -> list[Tensor]:
        self._posted[self.rank] = value.clone()  # a message: what its sender does next cannot change it
        self._barrier.wait(timeout=60)
        everyone = [tensor for tensor in self._posted if tensor is not None]
        self._barrier.wait(timeout=60)
        return everyone

    def reduce(self, value: Tensor, operation: Operation) -> Tensor:
        return reduce(COMBINE[operation], self._exchange(value))

    def gather(self, rows: Tensor) -> Tensor:
        return torch.cat(self._exchange(rows))


def on_ranks(size: int, program: Callable[[Threads], Any]) -> list[Any]:
    """The results of `program(reducer)` on every rank. A rank that raises ends the others, and its error is raised."""
    barrier = threading.Barrier(size)
    posted: list[Tensor | None] = [None] * size

    def guarded(rank: int) -> Any:
        try:
            return program(Threads(rank, posted, barrier))
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(guarded, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    if errors:
        raise next((e for e in errors if not isinstance(e, threading.BrokenBarrierError)), errors[0])
    return [future.result() for future in futures]
