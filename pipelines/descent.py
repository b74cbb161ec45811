"""A step down the gradient: AdamW, and with `train.table_optimizer: rowwise` another optimiser for the large tables.

Their gradients are sparse, where PyTorch's own means stop short: clip_grad_norm_ takes none, DistributedDataParallel none
over NCCL, fully_shard none at all. So the tables stay out of both: every worker holds them whole and makes the same step on
the same gradient.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from model.decoder import Decoder
from model.row_wise_adagrad import RowWiseAdagrad
from schemas.config import TrainConfig


def sparse_tables(decoder: Decoder, settings: TrainConfig) -> set[nn.Parameter]:
    """The tables with an optimiser of their own, whose gradients are sparse from here on."""
    if settings.table_optimizer == "adamw":
        return set()
    tables = decoder.context.hashed_tables()
    for table in tables:
        table.sparse = True
    return {cast(nn.Parameter, table.weight) for table in tables}


class Descent:
    """The optimisers of a decoder that may be sharded but for its `tables`."""

    def __init__(self, decoder: Decoder, tables: Set[nn.Parameter], settings: TrainConfig) -> None:
        self.clip = settings.clip_norm
        self.dense = [p for p in decoder.parameters() if p not in tables]
        self.tables = [p for p in decoder.parameters() if p in tables]
        groups = _groups(decoder, self.dense, settings.weight_decay)
        self.optimizers: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, fused=True)]
        if self.tables:
            self.optimizers.append(RowWiseAdagrad(self.tables, settings.learning_rate))

    def step(self, rate: float) -> Tensor:
        """One step on the gradients, which are cleared; their norm before clipping."""
        if dist.is_initialized():
            for table in self.tables:
                table.grad = mean_over_workers(_gradient(table))
        norm = clip_norm(self.dense, self.tables, self.clip)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return norm


def _groups(decoder: Decoder, dense: Sequence[nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices of linear maps only: neither embeddings, gains nor biases."""
    tables = {m.weight for m in decoder.modules() if isinstance(m, nn.Embedding)}
    decayed = [p for p in dense if p.dim() == 2 and p not in tables]
    rest = [p for p in dense if p.dim() != 2 or p in tables]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": rest, "weight_decay": 0.0}]


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def mean_over_workers(gradient: Tensor) -> Tensor:
    """Of a sparse gradient [V, D] a worker, the same on every worker. The parts travel padded to the longest, since
    all_gather wants them equal: (workers * rows of the longest), whatever V."""
    gradient, world = gradient.coalesce(), dist.get_world_size()
    rows_N, g_ND = gradient.indices()[0], gradient.values()
    counts = [int(count) for count in _gather(torch.tensor([len(rows_N)], device=gradient.device))]
    missing = max(counts) - len(rows_N)
    all_rows = _gather(torch.cat([rows_N, rows_N.new_zeros(missing)]))
    all_g = _gather(torch.cat([g_ND, g_ND.new_zeros(missing, g_ND.shape[1])]))
    rows = torch.cat([part[:count] for part, count in zip(all_rows, counts, strict=True)])
    g = torch.cat([part[:count] for part, count in zip(all_g, counts, strict=True)])
    return torch.sparse_coo_tensor(rows[None], g / world, gradient.shape, check_invariants=False).coalesce()


def _gather(own: Tensor) -> list[Tensor]:
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    return found


def clip_norm(dense: Sequence[nn.Parameter], tables: Sequence[nn.Parameter], limit: float) -> Tensor:
    """Scales all gradients so that their common norm is at most `limit`, and returns what it was."""
    norm = nn.utils.get_total_norm([p.grad for p in dense if p.grad is not None])
    norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
    if tables:
        for table in tables:
            table.grad = _gradient(table).coalesce()  # a row that stands twice counts by its sum
        values = [_gradient(table).values() for table in tables]
        norm = torch.linalg.vector_norm(torch.stack([norm, nn.utils.get_total_norm(values)]))
        torch._foreach_mul_(values, (limit / (norm + 1e-6)).clamp(max=1.0))
    nn.utils.clip_grads_with_norm_(dense, limit, norm)
    return norm
