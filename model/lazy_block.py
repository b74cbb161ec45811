"""A lazy decoder block (OneRec-V2, section 2.2.2, equations 6 to 8): cross-attention, causal self-attention, FFN.

All three are pre-RMSNorm with a residual. Cross-attention holds 2 d^2 parameters, W_q and W_o: its keys and values come
ready from the Context Processor. The FFN is gated (SwiGLU), which fits the paper's parameter counts; no biases.
"""

from __future__ import annotations

from torch import Tensor, nn

from model.attention import CrossAttention, Pair, QueryLayout, SelfAttention
from model.feed_forward import feed_forward, shrink
from model.norm import RMSNorm
from schemas.model_config import ModelConfig


class LazyBlock(nn.Module):
    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        d_model = config.d_model
        self.cross_norm = RMSNorm(d_model)
        self.cross = CrossAttention(d_model, config.heads)
        self.self_norm = RMSNorm(d_model)
        self.attention = SelfAttention(d_model, config.heads)
        self.ffn_norm = RMSNorm(d_model)
        self.ffn = feed_forward(config, layer)
        self.dropout = nn.Dropout(config.dropout)
        shrink([self.cross.w_o.weight, self.attention.w_o.weight, *self.ffn.outputs()], 3 * config.layers)

    def forward(
        self, h_BSD: Tensor, pair: Pair, bias_R11T: Tensor, layout: QueryLayout, past: Pair | None = None
    ) -> tuple[Tensor, Pair]:
        h_BSD = h_BSD + self.dropout(self.cross(self.cross_norm(h_BSD), pair, bias_R11T, layout))
        attended, present = self.attention(self.self_norm(h_BSD), layout, past)
        h_BSD = h_BSD + self.dropout(attended)
        return h_BSD + self.dropout(self.ffn(self.ffn_norm(h_BSD))), present
