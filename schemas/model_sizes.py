"""The papers' model configurations by name: OneRec-V2's Table 5 and OneRec-V1's Table 1.

V2's defaults where its table is silent: L_kv = S_kv = 1, G_kv = heads, about 512 context tokens (1 static, 255 short-term,
256 positive ones here), gated feed-forward parts of 4 d_model, which fits the names by parameters. V1 states feed-forward
widths and the number of encoder and decoder layers together, half of them each.
"""

from __future__ import annotations

import math
from dataclasses import replace

from schemas.model_config import ModelConfig, MoeConfig

CODES = (8192, 8192, 8192)  # of both papers' tokenizers


def _v2(d_model: int, layers: int, heads: int, embed_dim: int, moe: MoeConfig | None = None) -> ModelConfig:
    return ModelConfig(
        d_model=d_model,
        layers=layers,
        heads=heads,
        g_kv=heads,
        embed_dim=embed_dim,
        short_length=255,
        positive_length=256,
        dropout=0.0,
        moe=moe or MoeConfig(),
    )


def _v1(d_model: int, layers: int, heads: int, moe: MoeConfig | None = None) -> ModelConfig:
    return ModelConfig(
        architecture="encoder_decoder",
        d_model=d_model,
        layers=layers // 2,
        encoder_layers=layers // 2,
        heads=heads,
        g_kv=heads,
        ffn_width=2,
        embed_dim=128,
        positive_length=256,
        dropout=0.0,
        moe=moe or MoeConfig(),
    )


SIZES: dict[str, ModelConfig] = {
    "v2-0.1b": _v2(640, 12, 10, 32),
    "v2-0.2b": _v2(896, 12, 14, 45),
    "v2-0.5b": _v2(1408, 14, 11, 70),
    "v2-1b": _v2(1792, 18, 14, 90),
    "v2-2b": _v2(2304, 22, 18, 115),
    "v2-4b": _v2(2944, 26, 23, 147),
    "v2-8b": _v2(3584, 34, 28, 179),
    "v2-moe-4b": _v2(1408, 14, 11, 70, MoeConfig(experts=53, active=3, shared=1, width=1408, first_dense=2)),
    "v1-0.015b": _v1(128, 4, 4),
    "v1-0.121b": _v1(1024, 8, 8),
    "v1-0.935b": _v1(1024, 8, 8, MoeConfig(experts=24, active=2, shared=0, width=2048, first_dense=0)),
    "v1-2.633b": _v1(1024, 24, 8, MoeConfig(experts=24, active=4, shared=0, width=2048, first_dense=0, encoder=True)),
}


def learning_rate(parameters: float) -> float:
    """V2's rule for the blocks' parameters, which gives every rate of its Table 5: 5e-4 at 0.1 B, falling with the root."""
    return 5e-4 * math.sqrt(0.1e9 / parameters)


def peers(config: ModelConfig) -> dict[str, ModelConfig]:
    """The other architectures at the same width and as many layers in all; fewer than two or three leave a peer out."""
    total = config.layers + config.encoder_layers
    base = replace(config, architecture="lazy", layers=total, encoder_layers=0, l_kv=min(config.l_kv, total))
    found = {"lazy": base, "decoder-only": replace(base, architecture="decoder_only")}
    for name, encoder in (("1:1", total // 2), ("1:2", total // 3)):
        if encoder:
            found[f"encoder-decoder {name}"] = replace(
                base, architecture="encoder_decoder", encoder_layers=encoder, layers=total - encoder, l_kv=1
            )
    return {name: peer for name, peer in found.items() if peer != config}
