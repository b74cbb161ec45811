"""Layers of a QFormer: queries cross-attend to a memory M and pass a feed-forward part (OneRec-V1, sections 2.1 and 2.2).

Both write residuals before RMSNorm, h + CrossAttn(RMSNorm(h), M) and h + FFN(RMSNorm(h)): the paper's formulas show none,
without them training is slower and less steady.

Shapes: B rows, Q queries, M vectors of the memory, C their common width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from model.feed_forward import SwiGLU
from model.norm import RMSNorm


class QueryAttention(nn.Module):
    """h + CrossAttn(RMSNorm(h), M, M)."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.norm, self.dropout = heads, RMSNorm(width), nn.Dropout(dropout)
        self.w_q = nn.Linear(width, width, bias=False)
        self.w_kv = nn.Linear(width, 2 * width, bias=False)
        self.w_o = nn.Linear(width, width, bias=False)

    def forward(self, h_BQC: Tensor, m_BMC: Tensor, mask_B11M: Tensor) -> Tensor:
        """`mask_B11M` (bool) is true where there is a vector to look at: at one place a row at least."""
        key, value = self.w_kv(m_BMC).chunk(2, dim=-1)
        query, key, value = (self._heads(x) for x in (self.w_q(self.norm(h_BQC)), key, value))
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_B11M)
        return h_BQC + self.dropout(self.w_o(out.transpose(1, 2).flatten(2)))

    def _heads(self, x_BSC: Tensor) -> Tensor:
        return x_BSC.unflatten(2, (self.heads, -1)).transpose(1, 2)


class ResidualFeedForward(nn.Module):
    """h + FFN(RMSNorm(h))."""

    def __init__(self, width: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.norm, self.ffn = RMSNorm(width), SwiGLU(width, hidden)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.dropout(self.ffn(self.norm(h)))
