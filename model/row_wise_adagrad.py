"""Adagrad with one state a row, for embedding tables of which a step reads few rows.

The state of a row is the sum over steps of the mean square of its gradient, as in FBGEMM and TorchRec
(EXACT_ROWWISE_ADAGRAD): h += mean_D(g^2), w -= rate * g / (sqrt(h) + eps). It is exact on sparse gradients, since a zero
gradient moves neither w nor h. Adam is not: its moments decay in the steps that do not touch a row, so a sparse Adam
differs from the dense one, and it holds two values an element where this holds one a row. A row's first step is as long
as AdamW's, the learning rate, so both take the same one; a row that is met often slows down.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

EPS = 1e-8
SUMS = "square_sums"


class RowWiseAdagrad(torch.optim.Optimizer):
    """Of tables float [V, D] with sparse gradients; the states, float [V], are there from the start."""

    def __init__(self, tables: Sequence[nn.Parameter], lr: float) -> None:
        super().__init__(tables, {"lr": lr})
        for table in tables:
            self.state[table][SUMS] = torch.zeros(len(table), device=table.device)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for table in group["params"]:
                gradient = table.grad.coalesce()
                rows_N, g_ND = gradient.indices()[0], gradient.values()
                sums_V = self.state[table][SUMS]
                sums_N = sums_V[rows_N] + g_ND.square().mean(1)
                sums_V[rows_N] = sums_N
                table.index_add_(0, rows_N, g_ND / (sums_N.sqrt() + EPS)[:, None], alpha=-group["lr"])
