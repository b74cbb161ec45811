"""SASRec (Kang and McAuley, 2018) with full softmax cross-entropy over the catalogue: the baseline that usually wins.

A causal transformer over the positives of a user; every position predicts the next one; item embeddings are tied.
Trained with the full softmax instead of sampled negatives it is far stronger than published figures say
(Klenitskiy and Vasilev, 2023). Made for a CPU: projections and the softmax run on real tokens only (packed, no
padding), attention alone sees the padded [B, L] layout, and no [tokens, catalogue] matrix is held.

Shapes: B sequences, L positions, T real tokens of the batch, P predicted positions, N items, D width, H heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.chunked_cross_entropy import chunked_cross_entropy
from model.positives import ScoreRanker, history_positives
from model.requests import Requests, row_of, select_rows


@dataclass(frozen=True)
class SasrecSize:
    """`length` is the number of newest items that the model sees."""

    num_items: int
    width: int = 128
    layers: int = 2
    heads: int = 2
    length: int = 20
    dropout: float = 0.5


class Block(nn.Module):
    """Pre-norm self-attention and a feed-forward layer, on packed tokens."""

    def __init__(self, size: SasrecSize) -> None:
        super().__init__()
        self.heads = size.heads
        self.norm_attention = nn.LayerNorm(size.width)
        self.qkv = nn.Linear(size.width, 3 * size.width)
        self.out = nn.Linear(size.width, size.width)
        self.norm_ffn = nn.LayerNorm(size.width)
        self.ffn = nn.Sequential(nn.Linear(size.width, size.width), nn.GELU(), nn.Linear(size.width, size.width))
        self.drop = nn.Dropout(size.dropout)

    def forward(self, x_TD: Tensor, slot_T: Tensor, shape: tuple[int, int]) -> Tensor:
        x_TD = x_TD + self.drop(self.out(self.attend(self.qkv(self.norm_attention(x_TD)), slot_T, shape)))
        return x_TD + self.drop(self.ffn(self.norm_ffn(x_TD)))

    def attend(self, qkv_TE: Tensor, slot_T: Tensor, shape: tuple[int, int]) -> Tensor:
        """Causal attention within each sequence. Padding lies behind the tokens, so that causality hides it."""
        rows, length = shape
        padded = qkv_TE.new_zeros(rows * length, qkv_TE.shape[1]).index_copy(0, slot_T, qkv_TE)
        q, k, v = padded.view(rows, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        mixed_BHLd = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return mixed_BHLd.transpose(1, 2).reshape(rows * length, -1)[slot_T]


class Sasrec(nn.Module):
    """Items [T] and sequence offsets [B + 1] to one hidden vector a token."""

    def __init__(self, size: SasrecSize) -> None:
        super().__init__()
        self.size = size
        self.items = nn.Embedding(size.num_items, size.width)
        self.positions = nn.Embedding(size.length, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.drop = nn.Dropout(size.dropout)
        self.apply(initialise)

    def forward(self, items_T: Tensor, offsets: Tensor) -> Tensor:
        """float32 [T, D]. No sequence may be longer than `size.length`."""
        place_T = torch.arange(len(items_T), device=items_T.device) - offsets[row_of(offsets)]
        shape = (len(offsets) - 1, int(offsets.diff().max()) if len(offsets) > 1 else 0)
        slot_T = row_of(offsets) * shape[1] + place_T
        x_TD = self.items(items_T) * math.sqrt(self.size.width) + self.positions(place_T)
        x_TD = self.drop(x_TD)
        for block in self.blocks:
            x_TD = block(x_TD, slot_T, shape)
        return self.norm(x_TD)

    def loss(self, items_T: Tensor, offsets: Tensor, predicted_T: Tensor, next_T: Tensor) -> Tensor:
        """Mean cross-entropy of `next_T` at the tokens where `predicted_T` (bool) holds."""
        hidden_PD = self(items_T, offsets)[predicted_T]
        return chunked_cross_entropy(hidden_PD, self.items.weight, next_T[predicted_T])


def initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
    if isinstance(module, nn.Linear):
        nn.init.zeros_(module.bias)


class SasrecRanker(ScoreRanker):
    """A fitted model; a request without history gets `fallback_N` (float32 [N], say popularity)."""

    def __init__(self, model: Sasrec, positive_mask: int, fallback_N: Tensor) -> None:
        self.model, self.positive_mask, self.fallback_N = model.eval(), positive_mask, fallback_N

    @property
    def num_items(self) -> int:
        return self.model.size.num_items

    @torch.no_grad()
    def scores(self, requests: Requests) -> Tensor:
        items, offsets = newest(*history_positives(requests, self.positive_mask), self.model.size.length)
        scores_RN = self.fallback_N.expand(len(requests), -1).clone()
        known = offsets.diff() > 0
        if known.any():
            last_RD = self.model(items, offsets)[offsets[1:][known] - 1]
            scores_RN[known] = last_RD @ self.model.items.weight.T
        return scores_RN


def newest(items: Tensor, offsets: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """The newest `length` elements of each row of a jagged array, and their offsets."""
    rows = row_of(offsets)
    keep = torch.arange(len(items), device=items.device) >= offsets[1:][rows] - length
    return select_rows(items, offsets, keep)
