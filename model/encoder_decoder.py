"""The encoder-decoder of OneRec-V1 (sections 2.2 and 2.4 of its report), the lazy decoder's peer.

Encoder: learned positions are added to the context tokens, then layers of full self-attention and feed-forward, pre-RMSNorm
with a residual. Decoder block: causal self-attention, cross-attention, feed-forward or experts. Keys and values of the
cross-attention are projections of the encoder's output, one pair a block, made once a request; with G_kv groups. The report
shows a norm before the experts alone; here all three parts have one, as a deep stack needs.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Pair, QueryLayout
from model.context_processor import ContextKV
from model.decoder import Decoder
from model.feed_forward import DENSE, feed_forward, shrink
from model.layout import Layout
from model.lazy_block import LazyBlock
from model.norm import RMSNorm
from model.pathways import INIT_STD
from schemas.model_config import ModelConfig


class ContextAttention(nn.Module):
    """Self-attention among the packed context tokens of each request, full or causal; G_kv groups of keys and values."""

    def __init__(self, config: ModelConfig, causal: bool) -> None:
        super().__init__()
        d_model, self.heads, self.groups, self.causal = config.d_model, config.heads, config.g_kv, causal
        self.w_q = nn.Linear(d_model, d_model, bias=False)
        self.w_kv = nn.Linear(d_model, 2 * d_model * config.g_kv // config.heads, bias=False)
        self.w_o = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x_ND: Tensor, layout: Layout) -> tuple[Tensor, Pair]:
        """[N, D], and the keys and values [R, G, T, d_head]."""
        key, value = self.keys(x_ND, layout)
        q_RHTd = layout.pad(self.w_q(x_ND)).unflatten(2, (self.heads, -1)).transpose(1, 2)
        bias = None if self.causal else layout.bias(q_RHTd.dtype)  # padding comes last: causality hides it
        grouped = self.groups != self.heads
        out = F.scaled_dot_product_attention(q_RHTd, key, value, attn_mask=bias, is_causal=self.causal, enable_gqa=grouped)
        return self.w_o(layout.unpad(out.transpose(1, 2).flatten(2))), (key, value)

    def keys(self, x_ND: Tensor, layout: Layout) -> Pair:
        key, value = layout.pad(self.w_kv(x_ND)).unflatten(2, (2, self.groups, -1)).permute(2, 0, 3, 1, 4)
        return key, value


class EncoderLayer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model)
        self.attention = ContextAttention(config, causal=False)
        self.ffn_norm = RMSNorm(config.d_model)
        self.ffn = feed_forward(config, config.layers if config.moe.encoder else DENSE)
        self.dropout = nn.Dropout(config.dropout)
        shrink([self.attention.w_o.weight, *self.ffn.outputs()], 2 * config.encoder_layers)

    def forward(self, z_ND: Tensor, layout: Layout) -> Tensor:
        attended, _ = self.attention(self.attention_norm(z_ND), layout)
        z_ND = z_ND + self.dropout(attended)
        return z_ND + self.dropout(self.ffn(self.ffn_norm(z_ND)))


class Encoder(nn.Module):
    """Packed context tokens to the keys and values of every decoder block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.groups, self.decoder_layers = config.g_kv, config.layers
        self.positions = ContextPositions(config)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.norm = RMSNorm(config.d_model)
        chunk = config.g_kv * config.d_model // config.heads
        self.w_kv = nn.Linear(config.d_model, config.layers * 2 * chunk, bias=False)

    def forward(self, tokens_ND: Tensor, layout: Layout) -> ContextKV:
        z_ND = self.positions(tokens_ND, layout)
        for layer in self.layers:
            z_ND = layer(z_ND, layout)
        chunks = layout.pad(self.w_kv(self.norm(z_ND))).unflatten(2, (self.decoder_layers, 2, self.groups, -1))
        pairs = [(pair[0], pair[1]) for pair in chunks.permute(2, 3, 0, 4, 1, 5)]
        return ContextKV(pairs, layout.bias(chunks.dtype))


class ContextPositions(nn.Module):
    """Adds a learned vector for a token's place in its request."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.places = nn.Embedding(config.context_length, config.d_model)
        nn.init.normal_(self.places.weight, std=INIT_STD)

    def forward(self, tokens_ND: Tensor, layout: Layout) -> Tensor:
        return tokens_ND + self.places(layout.places % layout.width)


class EncoderDecoderBlock(LazyBlock):
    """The parts of a lazy block in another order, on keys and values of the encoder's output."""

    def forward(
        self, h_BSD: Tensor, pair: Pair, bias_R11T: Tensor, layout: QueryLayout, past: Pair | None = None
    ) -> tuple[Tensor, Pair]:
        attended, present = self.attention(self.self_norm(h_BSD), layout, past)
        h_BSD = h_BSD + self.dropout(attended)
        h_BSD = h_BSD + self.dropout(self.cross(self.cross_norm(h_BSD), pair, bias_R11T, layout))
        return h_BSD + self.dropout(self.ffn(self.ffn_norm(h_BSD))), present


class EncoderDecoder(Decoder):
    def make_processor(self, config: ModelConfig) -> nn.Module:
        return Encoder(config)

    def make_block(self, config: ModelConfig, layer: int) -> nn.Module:
        return EncoderDecoderBlock(config, layer)
