"""GBPO with the duration-aware advantage (OneRec-V2, sections 3.1.1 and 3.1.2): logged exposures as a policy gradient.

    A_i = +1 if q_i > tau_B and neg_i = 0;  -1 if neg_i = 1;  0 otherwise (filtered out)
    J   = -mean_i A_i * pi(o_i) / pi'(o_i),   pi' = max(pi_old, sg(pi))      where A_i >= 0
                                                    max(pi_old, 1 - sg(pi))  where A_i < 0

No ratio is clipped: the denominator moves with the policy and keeps every gradient at or below that of a binary
cross-entropy. Where the behaviour probability is unknown, pi_old is the detached present one. The paper writes items and
argues about codes; here one ratio is a code's by default (mean over levels) or an item's (the product over levels).
T targets, L levels.
"""

from __future__ import annotations

import torch
from torch import Tensor


def advantages(quantile_T: Tensor, negative_T: Tensor, top_share: float) -> Tensor:
    """float32 [T] of -1, 0, +1 from float quantiles (NaN: unknown) and explicit negatives (bool).

    tau_B is the value at `top_share` from the top of the batch's known quantiles of non-negative targets. The comparison
    is strict as printed; only where the cut falls on the largest value do targets at the cut count, else a batch
    in which many watched longer than ever before would have no positive.
    """
    advantage_T = torch.zeros(len(quantile_T))
    known_T = ~quantile_T.isnan() & ~negative_T
    if known_T.any():
        descending = quantile_T[known_T].sort(descending=True).values
        tau = descending[min(int(top_share * len(descending)), len(descending) - 1)]
        above_T = quantile_T >= tau if tau == descending[0] else quantile_T > tau
        advantage_T[known_T & above_T] = 1.0
    advantage_T[negative_T] = -1.0
    return advantage_T


def gbpo_loss(log_probs: Tensor, old_log_probs: Tensor, advantage: Tensor) -> Tensor:
    """[...]: -A * pi / pi' of each element; `old_log_probs` is NaN where the behaviour is unknown. A = 0 gives 0."""
    with torch.no_grad():
        pi = log_probs.exp()
        old = torch.where(old_log_probs.isnan(), pi, old_log_probs.exp())
        bound = torch.maximum(old, torch.where(advantage >= 0, pi, 1 - pi))
    return -advantage * (log_probs - bound.log()).exp()


def nll_weights(log_probs: Tensor, advantage: Tensor) -> Tensor:
    """[...]: the weight of -log pi that gives the gradient of `gbpo_loss` where the behaviour is unknown: A * pi / pi'."""
    return -gbpo_loss(log_probs.detach(), torch.full_like(log_probs, torch.nan), advantage)


def policy_loss(log_probs_TL: Tensor, old_TL: Tensor, advantage_T: Tensor, unit: str) -> Tensor:
    """[T]: the loss of each target, by code (mean over levels) or by item (one ratio of products)."""
    if unit == "item":
        return gbpo_loss(log_probs_TL.sum(1), old_TL.sum(1), advantage_T)
    return gbpo_loss(log_probs_TL, old_TL, advantage_T[:, None]).mean(1)
