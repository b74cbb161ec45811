"""Blocks by torch.compile: the scores and gradients of plain ones on batches of any shape, in training alone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from model.decoder import Decoder
from schemas.model_config import MoeConfig
from tests.model.requests import catalogue, random_requests, small_decoder

ITEMS = catalogue(30)
EXPERTS = MoeConfig(experts=4, active=2, width=8, first_dense=1)


@pytest.mark.long  # a compiler for a minute
@pytest.mark.skipif(torch.cuda.is_available(), reason="compares the numbers of a CPU")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("changes", [{}, {"moe": EXPERTS}, {"architecture": "encoder_decoder", "encoder_layers": 1}])
def test_compiled_blocks_are_the_plain_ones(changes: dict[str, Any], recompute: bool) -> None:
    plain = small_decoder(**changes)
    compiled = copy.deepcopy(plain)
    compiled.compile_blocks()
    compiled.recompute = recompute
    assert compiled.state_dict().keys() == plain.state_dict().keys()
    ran = counted(compiled)
    for seed, rows in enumerate((1, 5, 8, 3, 11, 2)):
        requests = random_requests(rows, 30, seed)
        wanted, got = plain.loss(requests, ITEMS).total, compiled.loss(requests, ITEMS).total
        assert torch.allclose(wanted, got, atol=1e-5)
        for decoder, loss in ((plain, wanted), (compiled, got)):
            decoder.zero_grad()
            loss.backward()
        for one, other in zip(plain.parameters(), compiled.parameters(), strict=True):
            assert torch.allclose(gradient(one), gradient(other), atol=1e-5)
    before = len(ran)
    requests = random_requests(6, 30, 9)
    scores = [decoder.eval().target_log_probs(requests, ITEMS) for decoder in (plain, compiled)]
    assert before == len(ran) == 6 * plain.config.layers * (1 + recompute)
    assert torch.equal(*scores)


def counted(decoder: Decoder) -> list[int]:
    """An entry a call of a compiled block: its layer."""
    ran: list[int] = []

    def counting(layer: int, block: Callable[..., Any], *arguments: Any) -> Any:
        ran.append(layer)
        return block(*arguments)

    decoder.compiled = [partial(counting, layer, block) for layer, block in enumerate(decoder.compiled)]
    return ran


def gradient(parameter: Tensor) -> Tensor:
    """Zero for an expert that no token chose."""
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
