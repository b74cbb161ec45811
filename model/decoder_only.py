"""The naive decoder-only model (OneRec-V2, section 2.1): context and codes are one causal sequence through the same blocks.

Keys and values of the context are made once a request and read by all its targets; a target sees the context and its own
codes, in one softmax.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Pair, QueryLayout
from model.context_processor import ContextKV
from model.decoder import Decoder
from model.encoder_decoder import ContextAttention, ContextPositions
from model.feed_forward import feed_forward, shrink
from model.item_table import ItemTable
from model.layout import Layout
from model.norm import RMSNorm
from model.requests import Requests
from schemas.model_config import ModelConfig


class DecoderOnlyBlock(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.d_model)
        self.attention = ContextAttention(config, causal=True)
        self.ffn_norm = RMSNorm(config.d_model)
        self.ffn = feed_forward(config, layer)
        self.dropout = nn.Dropout(config.dropout)
        shrink([self.attention.w_o.weight, *self.ffn.outputs()], 2 * config.layers)

    def context(self, h_ND: Tensor, layout: Layout) -> tuple[Tensor, Pair]:
        """The context tokens through the block, and their keys and values."""
        attended, pair = self.attention(self.attention_norm(h_ND), layout)
        h_ND = h_ND + self.dropout(attended)
        return h_ND + self.dropout(self.ffn(self.ffn_norm(h_ND))), pair

    def forward(
        self, h_BSD: Tensor, pair: Pair, bias_R11T: Tensor, layout: QueryLayout, past: Pair | None = None
    ) -> tuple[Tensor, Pair]:
        attended, present = self._attend(self.attention_norm(h_BSD), pair, bias_R11T, layout, past)
        h_BSD = h_BSD + self.dropout(attended)
        return h_BSD + self.dropout(self.ffn(self.ffn_norm(h_BSD))), present

    def _attend(
        self, x_BSD: Tensor, pair: Pair, bias_R11T: Tensor, layout: QueryLayout, past: Pair | None
    ) -> tuple[Tensor, Pair]:
        part = self.attention
        B, S, D = x_BSD.shape
        key, value = part.w_kv(x_BSD).unflatten(2, (2, part.groups, -1)).permute(2, 0, 3, 1, 4)  # [B, G, S, d_head]
        if past is not None:
            key, value = torch.cat([past[0], key], dim=2), torch.cat([past[1], value], dim=2)
        q_RHQd = _by_request(part.w_q(x_BSD).unflatten(2, (part.heads, -1)).transpose(1, 2), layout)
        keys = torch.cat([pair[0], _by_request(key, layout)], dim=2)
        values = torch.cat([pair[1], _by_request(value, layout)], dim=2)
        own_QP = _own_codes(layout, S, key.shape[2], q_RHQd.device)
        bias_R1QT = bias_R11T.expand(-1, -1, q_RHQd.shape[2], -1)
        zeros = torch.zeros(own_QP.shape, dtype=bias_R11T.dtype, device=own_QP.device)
        own_R1QP = zeros.masked_fill(~own_QP, float("-inf")).expand(layout.rows, 1, -1, -1)
        bias = torch.cat([bias_R1QT, own_R1QP], dim=3)
        out = F.scaled_dot_product_attention(q_RHQd, keys, values, attn_mask=bias, enable_gqa=part.groups != part.heads)
        out_PC = out.transpose(1, 2).reshape(layout.rows * layout.width, S * D)
        return part.w_o(layout.unpad(out_PC).view(B, S, D)), (key, value)


def _by_request(x_BHSd: Tensor, layout: QueryLayout) -> Tensor:
    """[R, H, width * S, d]: the sequences of a request one after the other, padded."""
    _, H, S, d = x_BHSd.shape
    grid = layout.pad(x_BHSd.transpose(1, 2).flatten(1))
    return grid.view(layout.rows, layout.width * S, H, d).transpose(1, 2)


def _own_codes(layout: QueryLayout, queries: int, keys: int, device: torch.device) -> Tensor:
    """bool [width * queries, width * keys]: the codes that a code sees, those before it and itself. The queries are the
    last of the keys of their sequence."""
    q, k = (torch.arange(layout.width * n, device=device) for n in (queries, keys))
    sequence_q, sequence_k = q // queries, k // keys
    before = (k % keys)[None] <= (q % queries + keys - queries)[:, None]
    same = sequence_k[None] == sequence_q[:, None]
    return (same & before) | (layout.joined & (sequence_k[None] < sequence_q[:, None]))


class DecoderOnly(Decoder):
    def make_processor(self, config: ModelConfig) -> nn.Module:
        return ContextPositions(config)

    def make_block(self, config: ModelConfig, layer: int) -> nn.Module:
        return DecoderOnlyBlock(config, layer)

    blocks: Sequence[DecoderOnlyBlock]  # type: ignore[assignment]  # a ModuleList of them

    def encode(self, requests: Requests, items: ItemTable) -> ContextKV:
        tokens_ND, layout = self.context(requests, items)
        h_ND, pairs = self.processor(tokens_ND, layout), []
        for block in self.blocks[:-1]:
            h_ND, pair = block.context(h_ND, layout)
            pairs.append(pair)
        last = self.blocks[-1]  # no context leaves it
        pairs.append(last.attention.keys(last.attention_norm(h_ND), layout))
        return ContextKV(pairs, layout.bias(pairs[0][0].dtype))
