"""conf/production_1b.yaml is the paper's 1B model, on places that a cluster shares."""

from __future__ import annotations

import math
from dataclasses import replace

import torch

from model.architectures import build_decoder
from schemas.lake import lake_of
from schemas.loader import load_config
from schemas.model_sizes import SIZES, learning_rate
from tests.conftest import REPOSITORY

PRODUCTION = load_config(REPOSITORY / "conf" / "production_1b.yaml")


def test_its_blocks_hold_what_the_paper_calls_1b() -> None:
    config = PRODUCTION.model
    with torch.device("meta"):  # shapes without memory
        decoder = build_decoder(config, PRODUCTION.tokenize.sizes, engaged_mask=1)
    matrices = [p for p in decoder.blocks.parameters() if p.dim() == 2]
    # Cross-attention 2 (queries, output), self-attention 4, gated feed-forward 3 * 4; the norms are vectors.
    assert sum(p.numel() for p in matrices) == (2 + 4 + 3 * config.ffn_width) * config.d_model**2 * config.layers
    assert math.isclose(sum(p.numel() for p in decoder.blocks.parameters()), 1.04e9, rel_tol=0.001)


def test_its_settings_follow_table_5_and_the_defaults_of_the_paper() -> None:
    model, train = PRODUCTION.model, PRODUCTION.train
    assert (model.d_model, model.layers, model.heads, model.embed_dim) == (1792, 18, 14, 90)
    assert (model.l_kv, model.s_kv, model.g_kv) == (1, 1, model.heads)
    assert replace(model, hash_buckets=SIZES["v2-1b"].hash_buckets) == SIZES["v2-1b"]
    assert 1 + model.short_length + model.positive_length == 512
    assert math.isclose(train.learning_rate, learning_rate(1e9), rel_tol=0.005)
    assert math.isclose(train.learning_rate, 5e-4 * math.sqrt(0.1), rel_tol=0.005)
    assert (PRODUCTION.tokenize.levels, PRODUCTION.tokenize.codes) == (3, 8192)
    # The model must not ask for more history than the examples carry.
    assert PRODUCTION.sequences.short_length >= model.short_length
    assert PRODUCTION.sequences.positive_length >= model.positive_length


def test_its_places_are_shared() -> None:
    lake = lake_of(PRODUCTION)
    assert lake.root.startswith("s3://")
    assert lake.path("items") == f"{PRODUCTION.lake}/items"
    assert str(lake.artifact("train", "1")) == f"{PRODUCTION.artifacts}/_artifacts/train/1"
    assert not PRODUCTION.tracking_uri.startswith("sqlite")
    assert min(PRODUCTION.train.num_workers, PRODUCTION.tokenize.num_workers) > 1
