"""Attention of the target codes: on the context's keys and values, and among themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Pair = tuple[Tensor, Tensor]


@dataclass
class QueryLayout:
    """Which request each of B query sequences reads: [R, width] slots, so that K/V are never copied for a target."""

    rows: int
    width: int  # slots a request
    slots: Tensor | None  # int64 [B], row * width + place; None: the sequences fill all slots in order
    joined: bool = False  # a sequence sees those of its request before it (a session), not itself alone

    def pad(self, x_BC: Tensor) -> Tensor:
        if self.slots is None:
            return x_BC
        return x_BC.new_zeros(self.rows * self.width, x_BC.shape[1]).index_copy(0, self.slots, x_BC)

    def unpad(self, x_PC: Tensor) -> Tensor:
        return x_PC if self.slots is None else x_PC.index_select(0, self.slots)


def target_layout(target_offsets: Tensor, joined: bool = False) -> QueryLayout:
    """Slots for the targets of R requests (int64 offsets [R + 1])."""
    counts = target_offsets.diff()
    rows, width = len(counts), max(int(counts.max()), 1) if len(counts) else 1
    row = torch.repeat_interleave(torch.arange(rows, device=counts.device), counts)
    if len(row) == rows * width:
        return QueryLayout(rows, width, None, joined)
    place = torch.arange(len(row), device=row.device) - target_offsets[row]
    return QueryLayout(rows, width, row * width + place, joined)


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
    """Causal attention among the codes of one target, or of all targets of a request where they are `joined`; `past` holds
    the keys and values of the codes before."""

    def __init__(self, d_model: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.w_qkv = nn.Linear(d_model, 3 * d_model, bias=False)
        self.w_o = nn.Linear(d_model, d_model, bias=False)

    def forward(self, x_BSD: Tensor, layout: QueryLayout, past: Pair | None = None) -> tuple[Tensor, Pair]:
        B, S, D = x_BSD.shape
        if layout.joined:  # padding comes last in a request, so that causality hides it
            x_BSD = layout.pad(x_BSD.view(B, S * D)).view(layout.rows, layout.width * S, D)
        rows, length, _ = x_BSD.shape
        q, k, v = self.w_qkv(x_BSD).view(rows, length, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], dim=2), torch.cat([past[1], v], dim=2)
        out = F.scaled_dot_product_attention(q, k, v, is_causal=past is None and length > 1)
        out = out.transpose(1, 2).reshape(rows, length, D)
        if layout.joined:
            out = layout.unpad(out.view(layout.rows * layout.width, S * D)).view(B, S, D)
        return self.w_o(out), (k, v)
