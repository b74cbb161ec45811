"""Mixture of experts against its definition, and balancing without a loss."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from model.feed_forward import MixtureOfExperts, mixtures
from schemas.model_config import MoeConfig
from tests.model.requests import SMALL, small_decoder

CONFIG = dataclasses.replace(SMALL, moe=MoeConfig(experts=5, active=2, shared=1, width=12, first_dense=0))


def mixture(**changes: object) -> MixtureOfExperts:
    torch.manual_seed(0)
    part = MixtureOfExperts(dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, **changes)))
    part.bias.copy_(torch.tensor([0.5, 0.0, -0.3, 0.1, 0.0]))
    return part


@pytest.mark.parametrize("shared", [0, 1, 2])
def test_a_token_passes_its_experts_by_definition(shared: int) -> None:
    part, x = mixture(shared=shared), torch.randn(3, 7, CONFIG.d_model)
    out = part(x)
    for i, token in enumerate(x.flatten(0, 1)):
        affinity = torch.sigmoid(part.router.weight @ token).detach()
        chosen = sorted(range(5), key=lambda e: -float(affinity[e] + part.bias[e]))[:2]
        wanted = part.shared(token) if part.shared is not None else torch.zeros(CONFIG.d_model)
        for e in chosen:
            gate, up = (part.gate_up[e] @ token).chunk(2)
            wanted = wanted + affinity[e] / affinity[chosen].sum() * (part.down[e] @ (F.silu(gate) * up))
        assert torch.allclose(out.flatten(0, 1)[i], wanted, atol=1e-5)


def test_the_bias_is_in_no_gate_and_no_gradient() -> None:
    part, x = mixture(), torch.randn(6, CONFIG.d_model)
    assert not part.bias.requires_grad and "bias" in part.state_dict() and "load" not in part.state_dict()
    experts, gates = part.route(x)
    part.bias += 10  # all alike: the choice stays
    again, same = part.route(x)
    assert torch.equal(experts, again) and torch.equal(gates, same)
    assert torch.allclose(gates.sum(1), torch.ones(6))


def test_balancing_evens_the_load_out() -> None:
    torch.manual_seed(1)
    part = MixtureOfExperts(dataclasses.replace(CONFIG, moe=dataclasses.replace(CONFIG.moe, speed=0.01)))
    with torch.no_grad():
        part.router.weight += torch.tensor([2.0, 1.0, 0.0, -1.0, -2.0])[:, None] * 0.2
    x = torch.randn(4000, CONFIG.d_model) + 0.3

    def shares() -> torch.Tensor:
        part(x)
        load = part.load.clone()
        part.balance(load)
        return load / load.sum()

    first = shares()
    for _ in range(150):
        last = shares()
    assert first.max() > 0.3 and last.max() < 0.23 and last.min() > 0.17


def test_load_is_counted_in_training_alone() -> None:
    part, x = mixture(), torch.randn(6, CONFIG.d_model)
    part.eval()(x)
    assert not part.load.any()
    part.train()(x)
    assert int(part.load.sum()) == 12


def test_the_first_layers_are_dense() -> None:
    decoder = small_decoder(layers=4, moe=dataclasses.replace(CONFIG.moe, first_dense=3))
    assert [len(mixtures(block)) for block in decoder.blocks] == [0, 0, 0, 1]
