"""What a model costs: floating-point operations, activations, keys and values, from its configuration alone.

One multiply-add is two operations. Backward costs twice forward. N context tokens a request, k targets that share them, S
positions a target (its codes, and BOS but the last; with sessions BOS and all codes), d = d_model, g = G_kv * d_head.
Counted are the products of matrices, attention's own among them; embeddings, norms and softmax are not. Requests have
equal lengths here: padding costs what its attention costs.

The papers count otherwise (OneRec-V2, appendix B): 6 operations a parameter and token forward and backward, none for
attention scores, and context tokens that come from 3 embeddings by one linear map; see `paper_gflops`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from model.architectures import build_decoder
from model.feed_forward import DENSE, mixtures
from model.lifelong import WEIGHTS
from model.pathways import BUCKETS
from schemas.feedback import NUM_BITS
from schemas.model_config import ModelConfig

FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Flops:
    """Forward, of a batch."""

    features: float  # pathways: fields to context tokens
    context: float  # context tokens to all keys and values
    target: float  # blocks and heads, also that of items

    @property
    def total(self) -> float:
        return self.features + self.context + self.target


@dataclass(frozen=True)
class Parameters:
    embeddings: int  # code, hashed and position tables
    context: int  # dense parts of the pathways, and the processor or encoder
    blocks: int
    active: int  # of `blocks`, those that a token meets
    heads: int


def forward_flops(
    config: ModelConfig,
    sizes: Sequence[int],
    context: float,
    targets: float,
    requests: int = 1,
    representatives: float | None = None,
    items: int = 0,
) -> Flops:
    """Of a batch of `requests` with `context` tokens and `targets` each, which an item head compares with `items`.

    One token is static, lifelong queries make one a query, the others are events. The queries read `representatives`, by
    default as many as the model reads.
    """
    read = config.lifelong_length if representatives is None else representatives
    per_request = _features(config, context - config.lifelong_queries) * requests
    if config.lifelong_queries:
        per_request += (read * _event(config) + _queries(config, read)) * requests
    # Small vocabularies pass a pathway's first map once a batch, and so does its own, of positions or weights.
    fields = sum(sizes) + len(sizes) + sum(size for name, size in BUCKETS.items() if name in config.fields)
    own = config.short_length + config.positive_length + (WEIGHTS if config.lifelong_length else 0)
    pathways = 3 if config.lifelong_length else 2
    tables = 2 * (pathways * fields + own) * config.embed_dim * config.d_model
    features = per_request + tables
    target = requests * (_target(config, sizes, context, targets) + _item_head(config, items, targets))
    return Flops(features, requests * _context(config, context), target)


def _features(config: ModelConfig, tokens: float) -> float:
    """The static token and one an event."""
    d, e = config.d_model, config.embed_dim
    return (tokens - 1) * _event(config) + 2 * e * d + 2 * d * d


def _event(config: ModelConfig) -> float:
    """Fields of large vocabularies through the first map, then the second map."""
    d, e = config.d_model, config.embed_dim
    large = sum(name not in BUCKETS for name in config.fields)
    return 2 * NUM_BITS * e * ("feedback" in config.fields) + 2 * large * e * d + 2 * d * d


def _queries(config: ModelConfig, read: float) -> float:
    """The blocks of a request's lifelong queries on what they read and on the vector that is always there."""
    d, q, m = config.d_model, config.lifelong_queries, read + 1
    attention = 2 * q * 2 * d * d + 2 * m * 2 * d * d + 4 * q * m * d
    return config.lifelong_blocks * (attention + 2 * q * 3 * config.ffn_width * d * d)


def _context(config: ModelConfig, n: float) -> float:
    d, g = config.d_model, config.d_model // config.heads * config.g_kv
    attention = 2 * n * (2 * d * d + 2 * d * g) + 4 * n * n * d
    if config.architecture == "lazy":
        return 2 * n * d * config.s_kv * config.l_kv * g
    if config.architecture == "decoder_only":
        last = 2 * n * 2 * d * g  # keys and values alone
        return last + sum(attention + n * _feed_forward(config, layer) for layer in range(config.layers - 1))
    feed_forward = _feed_forward(config, config.layers if config.moe.encoder else DENSE)
    return config.encoder_layers * (attention + n * feed_forward) + 2 * n * d * 2 * g * config.layers


def _target(config: ModelConfig, sizes: Sequence[int], n: float, k: float) -> float:
    d, g = config.d_model, config.d_model // config.heads * config.g_kv
    session = config.target == "session"
    positions = k * (len(sizes) + session)
    own = positions if session else len(sizes)  # what a code's row of self-attention scores spans
    total = 0.0
    for layer in range(config.layers):
        if config.architecture == "decoder_only":  # one softmax over the context and the targets of the request
            attention = 2 * positions * (2 * d * d + 2 * d * g) + 4 * positions * (n + positions) * d
        else:
            attention = 2 * positions * (2 + 4) * d * d + 4 * positions * (n + own) * d
        total += attention + positions * _feed_forward(config, layer)
    return total + k * sum(2 * d * size for size in sizes)


def _item_head(config: ModelConfig, items: int, k: float) -> float:
    """What was liked through its map, once, and `k` queries on all items."""
    e = config.embed_dim
    return 2 * e * e + k * 2 * e * (config.d_model + items) if config.item_head else 0.0


def _feed_forward(config: ModelConfig, layer: int) -> float:
    """Of one token."""
    d, moe = config.d_model, config.moe
    if config.has_experts(layer):
        return 2 * moe.experts * d + 2 * 3 * d * moe.width * (moe.active + moe.shared)
    return 2 * 3 * config.ffn_width * d * d


def activations(config: ModelConfig, sizes: Sequence[int], context: int, targets: int) -> float:
    """Elements that a request's forward leaves for the backward: outputs of norms, maps, attention and gates in blocks and
    encoder, and the context's keys and values. Pathways and heads are left out, as it seems in the paper's figures."""
    d, moe = config.d_model, config.moe
    positions = targets * (len(sizes) + (config.target == "session"))
    dense = (2 + 3 * config.ffn_width) * d  # norm, gate, up, their product, down
    experts = moe.experts + (1 + moe.active) * d + 3 * (moe.active + moe.shared) * moe.width + moe.shared * d
    parts = [experts if config.has_experts(layer) else dense for layer in range(config.layers)]
    attention = {"lazy": 4 + 6, "encoder_decoder": 4 + 6, "decoder_only": 6}[config.architecture] * d
    total = float(positions * (config.layers * attention + sum(parts)))
    if config.architecture == "decoder_only":
        total += context * (config.layers * attention + sum(parts))
    elif config.architecture == "encoder_decoder":
        total += context * config.encoder_layers * (6 * d + (experts if moe.encoder and moe.experts else dense))
    return total + kv_elements(config, context) * (config.architecture != "decoder_only")


def kv_elements(config: ModelConfig, context: int) -> int:
    """Keys and values of a request's context, in elements; shared ones count once."""
    chunk = config.d_model // config.heads * config.g_kv
    chunks = config.s_kv * config.l_kv if config.architecture == "lazy" else 2 * config.layers
    return context * chunk * chunks


def parameters(config: ModelConfig, sizes: Sequence[int]) -> Parameters:
    """Counted on the model itself, built without memory."""
    with torch.device("meta"):
        decoder = build_decoder(config, sizes, engaged_mask=1)

    def count(*modules: torch.nn.Module) -> int:
        return sum(p.numel() for module in modules for p in module.parameters())

    tables = [m for m in decoder.modules() if isinstance(m, torch.nn.Embedding)]
    asleep = sum(
        (part.gate_up.numel() + part.down.numel()) * (config.moe.experts - config.moe.active) // config.moe.experts
        for part in mixtures(decoder.blocks)
    )
    heads = count(decoder.heads, decoder.head_norms, *([decoder.item_head] if decoder.item_head is not None else []))
    blocks = count(decoder.blocks)
    rest = count(decoder) - count(*tables) - blocks - heads
    return Parameters(count(*tables), rest, blocks, blocks - asleep, heads)


def paper_gflops(config: ModelConfig, context: int, targets: int) -> float:
    """A training sample by the paper's way of counting (appendix B), with the blocks' own parameters: those of the encoder
    and of the cross-attention's keys and values for context / targets tokens, the others for the 3 target tokens; a lazy
    context is one map of 3 embeddings to each chunk of keys and values."""
    d, g = config.d_model, config.d_model // config.heads * config.g_kv
    tokens = context / targets
    feed_forward = sum(_feed_forward(config, layer) / 2 for layer in range(config.layers))
    if config.architecture == "decoder_only":
        blocks = config.layers * (2 * d * d + 2 * d * g) + feed_forward
        return 6 * blocks * (tokens + 3) / 1e9
    target = 6 * 3 * (config.layers * 6 * d * d + feed_forward)
    if config.architecture == "lazy":
        return (target + 6 * tokens * 3 * config.embed_dim * config.s_kv * config.l_kv * g) / 1e9
    encoder = config.encoder_layers * (2 * d * d + 2 * d * g + 3 * config.ffn_width * d * d)
    return (target + 6 * tokens * (encoder + config.layers * 2 * d * g)) / 1e9
