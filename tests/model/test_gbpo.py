"""GBPO: its gradients are those of the paper's analysis and stay bounded; advantages equal a count by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.gbpo import advantages, gbpo_loss, nll_weights, policy_loss

UNKNOWN = math.nan
quantiles = st.one_of(st.just(UNKNOWN), st.sampled_from([0.0, 0.25, 0.5, 0.75, 1.0]), st.floats(0, 1, width=32))


def gradient(p: float, old: float, advantage: float) -> float:
    """Of the loss with respect to the probability itself."""
    probability = torch.tensor([p], dtype=torch.float64, requires_grad=True)
    old_log = torch.tensor([old], dtype=torch.float64).log()
    gbpo_loss(probability.log(), old_log, torch.tensor([advantage], dtype=torch.float64)).sum().backward()
    return probability.grad.item()


@given(st.floats(1e-6, 1 - 1e-6))
def test_without_a_logged_probability_a_positive_descends_like_the_next_token_loss(p: float) -> None:
    assert gradient(p, UNKNOWN, 1.0) == pytest.approx(-1 / p, rel=1e-6)


@given(st.floats(1e-6, 1 - 1e-6), st.one_of(st.just(UNKNOWN), st.floats(1e-6, 1.0)))
def test_no_gradient_exceeds_that_of_binary_cross_entropy(p: float, old: float) -> None:
    assert -1 / p * (1 + 1e-9) <= gradient(p, old, 1.0) < 0
    assert 0 < gradient(p, old, -1.0) <= 1 / (1 - p) * (1 + 1e-9)
    assert gradient(p, old, 0.0) == 0


@given(st.floats(0.001, 0.999), st.sampled_from([-1.0, 0.0, 1.0]))
def test_a_weighed_log_likelihood_descends_like_the_loss(p: float, advantage: float) -> None:
    log_p = torch.tensor([p], dtype=torch.float64).log().requires_grad_()
    (nll_weights(log_p, torch.tensor([advantage], dtype=torch.float64)) * -log_p).sum().backward()
    assert log_p.grad.item() / p == pytest.approx(gradient(p, UNKNOWN, advantage))


@given(st.floats(0.01, 0.99), st.floats(0.01, 0.99))
def test_the_denominator_is_the_larger_of_behaviour_and_bound(p: float, old: float) -> None:
    assert gradient(p, old, 1.0) == pytest.approx(-1 / max(old, p))
    assert gradient(p, old, -1.0) == pytest.approx(1 / max(old, 1 - p))


@given(st.lists(st.tuples(quantiles, st.booleans()), min_size=1, max_size=30), st.sampled_from([0.1, 0.25, 0.5]))
def test_advantages_equal_a_count_by_hand(rows: list[tuple[float, bool]], top_share: float) -> None:
    quantile, negative = torch.tensor([q for q, _ in rows]), torch.tensor([n for _, n in rows])
    found = advantages(quantile, negative, top_share).tolist()
    known = sorted((q for q, n in zip(quantile.tolist(), negative.tolist(), strict=True) if not n and q == q), reverse=True)
    tau = known[min(int(top_share * len(known)), len(known) - 1)] if known else None
    for q, n, advantage in zip(quantile.tolist(), negative.tolist(), found, strict=True):
        above = tau is not None and (q > tau or (q == tau == known[0]))
        assert advantage == (-1 if n else 1 if above else 0)
    if len(set(known)) == len(known) > 4:
        assert sum(a > 0 for a in found) == int(top_share * len(known)) or top_share * len(known) < 1


def test_an_items_ratio_is_the_product_of_its_codes() -> None:
    generator = np.random.default_rng(0)
    log_probs = torch.from_numpy(generator.uniform(-3, -0.1, (6, 3)))
    old = torch.from_numpy(generator.uniform(-3, -0.1, (6, 3)))
    old[2] = UNKNOWN
    advantage = torch.tensor([1.0, -1.0, 1.0, 0.0, -1.0, 1.0], dtype=torch.float64)
    by_item = policy_loss(log_probs, old, advantage, "item")
    assert torch.allclose(by_item, gbpo_loss(log_probs.sum(1), old.sum(1), advantage))
    by_code = policy_loss(log_probs, old, advantage, "code")
    assert torch.allclose(by_code, gbpo_loss(log_probs, old, advantage[:, None].expand(-1, 3)).mean(1))
    assert by_code[2] == -1 and by_item[2] == -1  # behaviour unknown: the ratio is 1
