"""The accounting against PyTorch's counter, and against the papers' names and tables."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.full_requests import full_requests
from model.flops import activations, forward_flops, kv_elements, paper_gflops, parameters
from schemas.model_config import MoeConfig
from schemas.model_sizes import CODES, SIZES, learning_rate
from tests.model.requests import SMALL, catalogue, small_decoder

ITEMS = catalogue(30)
EXPERTS = MoeConfig(experts=4, active=2, width=8, first_dense=1)
SHAPES: dict[str, dict[str, object]] = {
    "lazy": {"l_kv": 2, "s_kv": 2, "g_kv": 1},
    "lazy, experts": {"moe": EXPERTS},
    "lazy, other fields": {"fields": ("item", "author", "gap")},
    "lazy, item head": {"fields": ("item", "author"), "item_head": True},
    "lazy, session": {"target": "session"},
    "encoder-decoder": {"architecture": "encoder_decoder", "encoder_layers": 3, "g_kv": 1},
    "encoder-decoder, experts": {
        "architecture": "encoder_decoder",
        "encoder_layers": 1,
        "moe": dataclasses.replace(EXPERTS, encoder=True),
    },
    "decoder-only": {"architecture": "decoder_only", "g_kv": 1},
    "lazy, lifelong": {"lifelong_length": 5},
    "lazy, lifelong queries": {"lifelong_length": 5, "lifelong_queries": 3, "lifelong_blocks": 3},
    "encoder-decoder, lifelong queries": {
        "architecture": "encoder_decoder", "encoder_layers": 1, "lifelong_length": 5, "lifelong_queries": 3,
    },
    "decoder-only, lifelong": {"architecture": "decoder_only", "lifelong_length": 5},
}  # fmt: skip


@pytest.mark.parametrize("name", SHAPES)
def test_forward_equals_pytorchs_count(name: str) -> None:
    decoder = small_decoder(**SHAPES[name]).eval()
    config, rows, targets = decoder.config, 5, 3
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        requests = full_requests(rows, max(config.short_length, config.positive_length), targets, 30)
        decoder(requests, ITEMS, scored=True)
    work = forward_flops(config, decoder.sizes, config.context_length, targets, rows, items=30)
    assert counter.get_total_flops() == work.total


@pytest.mark.parametrize(("name", "billions"), [
    ("v2-0.1b", 0.0885), ("v2-0.2b", 0.173), ("v2-0.5b", 0.500), ("v2-1b", 1.040), ("v2-2b", 2.102), ("v2-4b", 4.056),
    ("v2-8b", 7.861), ("v2-moe-4b", 4.07),
])  # fmt: skip
def test_blocks_hold_the_parameters_behind_the_papers_names(name: str, billions: float) -> None:
    counted = parameters(SIZES[name], CODES)
    assert counted.blocks == pytest.approx(billions * 1e9, rel=0.005)
    active = 0.4996e9 if name == "v2-moe-4b" else counted.blocks
    assert counted.active == pytest.approx(active, rel=0.005)


@pytest.mark.parametrize(("name", "rate"), [
    ("v2-0.1b", 5e-4), ("v2-0.2b", 3.54e-4), ("v2-0.5b", 2.24e-4), ("v2-1b", 1.58e-4), ("v2-2b", 1.12e-4),
    ("v2-4b", 7.91e-5), ("v2-8b", 5.59e-5),
])  # fmt: skip
def test_the_rule_of_learning_rates_gives_table_5(name: str, rate: float) -> None:
    assert learning_rate(float(name[3:-1]) * 1e9) == pytest.approx(rate, rel=0.005)


def test_appendix_b_gives_table_1_for_a_nominal_billion() -> None:
    """Half a billion in the encoder, half in the decoder, a tenth of that in its keys and values; and the lazy decoder."""
    tokens = 512 / 5
    assert 6 * 0.5 * tokens + 6 * 0.05 * tokens + 6 * 0.45 * 3 == pytest.approx(346, rel=0.002)
    assert 6 * 1 * tokens + 6 * 1 * 3 == pytest.approx(632, rel=0.002)
    lazy, other = SIZES["v2-1b"], dataclasses.replace(SIZES["v2-1b"], architecture="decoder_only")
    scale = 1 / 1.040
    assert paper_gflops(lazy, 0, 5) * scale == pytest.approx(18, rel=0.002)
    assert paper_gflops(other, 512, 5) == pytest.approx(632 * (16 * 18 * 1792**2 / 1e9), rel=0.002)


@pytest.mark.parametrize(("changes", "printed"), [
    ({"s_kv": 2}, 19.19), ({"l_kv": 3}, 19.49), ({"l_kv": 9}, 21.27), ({"l_kv": 18}, 23.95),
    ({"g_kv": 7}, 18.74), ({"g_kv": 2}, 18.64), ({"g_kv": 1}, 18.62),
])  # fmt: skip
def test_keys_and_values_move_tables_3_and_4_as_printed(changes: dict[str, int], printed: float) -> None:
    base = SIZES["v2-1b"]
    moved = paper_gflops(dataclasses.replace(base, **changes), 512, 5) - paper_gflops(base, 512, 5)
    assert 18.89 + moved == pytest.approx(printed, abs=0.01)  # both are rounded


def test_key_value_sizes_and_activations_are_near_tables_2_to_4() -> None:
    base = SIZES["v2-1b"]
    for groups, millions in ((14, 93.95), (7, 46.98), (2, 13.42), (1, 6.71)):
        elements = kv_elements(dataclasses.replace(base, g_kv=groups), 512) / 5 * 512
        assert elements == pytest.approx(millions * 1e6, rel=0.001)
    for name, billions in (("v2-0.1b", 0.31), ("v2-0.5b", 0.77), ("v2-1b", 1.24)):
        assert activations(SIZES[name], CODES, 512, 5) / 5 * 512 == pytest.approx(billions * 1e9, rel=0.05)


def test_a_session_costs_one_more_position_a_target() -> None:
    item, session = SMALL, dataclasses.replace(SMALL, target="session")
    more = forward_flops(session, (8, 8, 8), 11, 2).target - forward_flops(item, (8, 8, 8), 11, 2).target
    layer = 2 * (6 + 12) * 16 * 16 + 4 * 11 * 16  # per position: maps, and scores over the context
    scores = 4 * 16 * (8 * 8 - 2 * 3 * 3)  # among the codes: eight positions together against three and three
    assert more == 2 * (2 * layer + scores)
