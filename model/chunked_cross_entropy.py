"""Cross-entropy of a linear classifier with many classes, whose logits are never held together.

The gradients are computed with the loss, a chunk of rows at a time, so that no [P, N] matrix is held or computed twice.
Where autocast wants bfloat16, the factors of all products are rounded to it; softmax and sums stay float32.
Shapes: P rows, N classes, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Weigh = Callable[[Tensor, slice], Tensor]  # log-probabilities of the labels of these rows to the weights of their losses


class ChunkedCrossEntropy(torch.autograd.Function):
    """The mean over the rows, or with `weigh` the weighed sum; and the log-probabilities of the labels [P]."""

    CHUNK, LOGITS = 256, 1 << 26  # rows, and logits, at most: those of ten thousand classes stay in the last-level cache

    @staticmethod
    def forward(
        ctx: Any,
        hidden_PD: Tensor,
        weight_ND: Tensor,
        labels_P: Tensor,
        factors: torch.dtype,
        weigh: Weigh | None,
    ) -> tuple[Tensor, Tensor]:
        total, log_probs_P = hidden_PD.new_zeros(()), hidden_PD.new_empty(len(labels_P))
        grad_hidden, grad_weight = torch.empty_like(hidden_PD), torch.zeros_like(weight_ND)
        scale = 1.0 / max(len(labels_P), 1) if weigh is None else 1.0
        rounded_PD, rounded_ND = hidden_PD.to(factors), weight_ND.to(factors)
        rows = max(1, min(ChunkedCrossEntropy.CHUNK, ChunkedCrossEntropy.LOGITS // len(weight_ND)))
        buffer = hidden_PD.new_empty(min(len(labels_P), rows), len(weight_ND))
        apart = factors != buffer.dtype  # products in a type of their own need places of their own
        products = torch.empty_like(buffer, dtype=factors) if apart else buffer
        part_ND = torch.empty_like(rounded_ND) if apart else grad_weight
        for start in range(0, len(labels_P), rows):
            part = slice(start, start + rows)
            hidden, labels = rounded_PD[part], labels_P[part, None]
            logits, factor = buffer[: len(hidden)], products[: len(hidden)]
            torch.mm(hidden, rounded_ND.T, out=factor)
            if apart:
                logits.copy_(factor)
            logits -= logits.amax(1, keepdim=True)
            label_logits = logits.gather(1, labels)
            sums = logits.exp_().sum(1, keepdim=True)
            nll = sums.log() - label_logits
            log_probs_P[part] = -nll[:, 0]
            weights = hidden_PD.new_tensor(1.0) if weigh is None else weigh(log_probs_P[part], part)[:, None]
            total += (nll * weights).sum()
            if not any(ctx.needs_input_grad):
                continue
            logits *= scale * weights / sums  # now the gradient of the loss by the logits, but for the labels
            logits.scatter_add_(1, labels, (-scale * weights).expand(labels.shape))
            if apart:
                factor.copy_(logits)
                grad_weight += torch.mm(factor.T, hidden, out=part_ND)
            else:
                grad_weight.addmm_(factor.T, hidden)
            grad_hidden[part] = factor @ rounded_ND
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.mark_non_differentiable(log_probs_P)
        return total * scale, log_probs_P

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grads[0], grad_weight * grads[0], None, None, None


def chunked_cross_entropy(hidden_PD: Tensor, weight_ND: Tensor, labels_P: Tensor) -> Tensor:
    """Equals F.cross_entropy(hidden_PD @ weight_ND.T, labels_P) in value and gradient; 0 without rows."""
    return _applied(hidden_PD, weight_ND, labels_P, None)[0]


def weighed_cross_entropy(hidden_PD: Tensor, weight_ND: Tensor, labels_P: Tensor, weigh: Weigh) -> tuple[Tensor, Tensor]:
    """The sum of the rows' losses by weights that count as constants, and the log-probabilities of the labels [P]."""
    return _applied(hidden_PD, weight_ND, labels_P, weigh)


def _applied(hidden_PD: Tensor, weight_ND: Tensor, labels_P: Tensor, weigh: Weigh | None) -> tuple[Tensor, Tensor]:
    device = hidden_PD.device.type
    factors = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32
    with torch.autocast(device, enabled=False):
        found: tuple[Tensor, Tensor] = ChunkedCrossEntropy.apply(
            hidden_PD.float(), weight_ND.float(), labels_P, factors, weigh
        )
    return found
