"""The seam between a program over shards and what carries its messages.

An SPMD program (exact K-means) sees only a `Reducer`: alone in a process, over a torch.distributed group (gloo on CPUs,
NCCL on GPUs), or in lockstep threads in a test. Sums are over integers, maxima and minima over anything, so that no
result depends on the order in which the ranks are reduced.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

Operation = Literal["sum", "max", "min"]


class Reducer(Protocol):
    """What every rank calls at the same points of the program, with tensors of the same shape and type."""

    rank: int
    size: int

    def reduce(self, value: Tensor, operation: Operation) -> Tensor:
        """The elementwise reduction over all ranks, on every rank."""
        ...

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, one below the other in rank order; ranks may have different numbers of rows."""
        ...


class Alone:
    """One process owns all rows."""

    rank, size = 0, 1

    def reduce(self, value: Tensor, operation: Operation) -> Tensor:
        return value

    def gather(self, rows: Tensor) -> Tensor:
        return rows


class Group:
    """The ranks of a torch.distributed process group; None: the default one."""

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def reduce(self, value: Tensor, operation: Operation) -> Tensor:
        operations = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}
        result = value.clone()
        dist.all_reduce(result, operations[operation], group=self.group)
        return result

    def gather(self, rows: Tensor) -> Tensor:
        lengths = rows.new_zeros(self.size, dtype=torch.int64)
        lengths[self.rank] = len(rows)
        counts: list[int] = self.reduce(lengths, "sum").tolist()
        padded = rows.new_zeros(max(counts), *rows.shape[1:])  # a collective wants equal shapes
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded, group=self.group)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def reducer_of_process() -> Reducer:
    """Over the default process group where more than one rank has joined it, else alone."""
    return Group() if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1 else Alone()
