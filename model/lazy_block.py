"""A lazy decoder block (OneRec-V2, section 2.2.2, equations 6 to 8): cross-attention, causal self-attention, FFN.

All three are pre-RMSNorm with a residual. Cross-attention holds 2 d^2 parameters, W_q and W_o: its keys and values come
ready from the Context Processor. The FFN is gated (SwiGLU), which fits the paper's parameter counts; no biases.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from schemas.config import ModelConfig

Pair = tuple[Tensor, Tensor]


@dataclass
class QueryLayout:
    """Which request each of B query sequences reads: [R, width] slots, so that K/V are never copied for a target."""

    rows: int
    width: int  # slots a request
    slots: Tensor | None  # int64 [B], row * width + place; None: the sequences fill all slots in order

    def pad(self, x_BC: Tensor) -> Tensor:
        if self.slots is None:
            return x_BC
        return x_BC.new_zeros(self.rows * self.width, x_BC.shape[1]).index_copy(0, self.slots, x_BC)

    def unpad(self, x_PC: Tensor) -> Tensor:
        return x_PC if self.slots is None else x_PC.index_select(0, self.slots)


def target_layout(target_offsets: Tensor) -> QueryLayout:
    """Slots for the targets of R requests (int64 offsets [R + 1])."""
    counts = target_offsets.diff()
    rows, width = len(counts), max(int(counts.max()), 1) if len(counts) else 1
    row = torch.repeat_interleave(torch.arange(rows, device=counts.device), counts)
    if len(row) == rows * width:
        return QueryLayout(rows, width, None)
    place = torch.arange(len(row), device=row.device) - target_offsets[row]
    return QueryLayout(rows, width, row * width + place)


class CrossAttention(nn.Module):
    """Queries of the targets on the context's keys and values; grouped queries where G_kv < heads."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.w_q = nn.Linear(d_model, d_model, bias=False)
        self.w_o = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x_BSD: Tensor, pair: Pair, bias_R11T: Tensor, layout: QueryLayout) -> Tensor:
        B, S, D = x_BSD.shape
        q_PC = layout.pad(self.w_q(x_BSD).view(B, S * D))
        q_RHQd = q_PC.view(layout.rows, layout.width * S, self.heads, D // self.heads).transpose(1, 2)
        key, value = pair
        grouped = key.shape[1] != self.heads
        out = F.scaled_dot_product_attention(q_RHQd, key, value, attn_mask=bias_R11T, enable_gqa=grouped)
        out_PC = out.transpose(1, 2).reshape(layout.rows * layout.width, S * D)
        return self.w_o(layout.unpad(out_PC).view(B, S, D))


class SelfAttention(nn.Module):
    """Causal attention among the codes of one target; `past` holds the keys and values of the codes before."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.w_qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.w_o = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x_BSD: Tensor, past: Pair | None = None) -> tuple[Tensor, Pair]:
        B, S, D = x_BSD.shape
        q, k, v = self.w_qkv(x_BSD).view(B, S, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=past is None and S > 1)
        return self.w_o(out.transpose(1, 2).reshape(B, S, D)), (k, v)


class SwiGLU(nn.Module):
    def __init__(self, d_model: int, hidden: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * hidden, bias=False)
        self.down = nn.Linear(hidden, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class LazyBlock(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        d_model = config.d_model
        self.cross_norm = nn.RMSNorm(d_model, eps=1e-6)
        self.cross = CrossAttention(d_model, config.heads)
        self.self_norm = nn.RMSNorm(d_model, eps=1e-6)
        self.attention = SelfAttention(d_model, config.heads)
        self.ffn_norm = nn.RMSNorm(d_model, eps=1e-6)
        self.ffn = SwiGLU(d_model, config.ffn_width * d_model)
        self.dropout = nn.Dropout(config.dropout)
        with torch.no_grad():  # keeps the residual stream's size whatever the depth
            for linear in (self.cross.w_o, self.attention.w_o, self.ffn.down):
                linear.weight.mul_((3 * config.layers) ** -0.5)

    def forward(
        self, h_BSD: Tensor, pair: Pair, bias_R11T: Tensor, layout: QueryLayout, past: Pair | None = None
    ) -> tuple[Tensor, Pair]:
        h_BSD = h_BSD + self.dropout(self.cross(self.cross_norm(h_BSD), pair, bias_R11T, layout))
        attended, present = self.attention(self.self_norm(h_BSD), past)
        h_BSD = h_BSD + self.dropout(attended)
        return h_BSD + self.dropout(self.ffn(self.ffn_norm(h_BSD))), present
