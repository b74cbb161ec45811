"""Aligned item vectors: content bent by behaviour (OneRec-V1, section 2.1; QARM, its item alignment).

An aligner maps an item's content blocks (text components, hashed attributes, a vector of the source's own), side by side
as x_BW, to Q vectors of width D, which are concatenated and normalised into one. A block that the item lacks is a row of
zeros and is masked; an item without any gets zeros. Two aligners: an MLP (Q = 1), and a QFormer, whose learnable queries
cross-attend to the content. Both are made of the layers in `model.query_former`.

The contrastive loss pulls the partners of a pair together among the others of the batch; a second loss keeps what the
content says, here by rebuilding it (`Reconstruction`). The paper lets a language model write the caption: any `ContentLoss`
can stand in its place.

Shapes: B rows, W width of the content, Q queries, D width of one, M vectors of the content, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.norm import RMSNorm
from model.query_former import QueryAttention, ResidualFeedForward
from schemas.item_alignment import ItemAlignmentConfig


class ContentLoss(Protocol):
    """A module that says how much of the content the aligned vectors have lost; its parameters are trained along."""

    def __call__(self, aligned_BQD: Tensor, rows_B: Tensor, content_BW: Tensor) -> Tensor:
        """float32 [B], from the vectors before normalisation and the content. `rows_B` (int64) are the rows of the items
        among those with content, so that a decoder of captions finds its tokens."""
        ...


ContentLossFactory = Callable[[Sequence[int], ItemAlignmentConfig], nn.Module]  # of the blocks' widths


def blocks_present(content_BW: Tensor, widths: Sequence[int]) -> Tensor:
    """bool [B, blocks]: whether the item has the block, which is not zero then."""
    return torch.stack([block.any(1) for block in content_BW.split(list(widths), dim=1)], dim=1)


class MlpAligner(nn.Module):
    """All blocks at once, with a flag for each that is there; Q = 1."""

    def __init__(self, widths: Sequence[int], settings: ItemAlignmentConfig) -> None:
        super().__init__()
        self.widths, self.width, hidden = tuple(widths), settings.width, settings.hidden
        self.first = nn.Linear(sum(widths) + len(self.widths), hidden)
        self.layers = nn.ModuleList([ResidualFeedForward(hidden, hidden, settings.dropout) for _ in range(settings.layers)])
        self.norm, self.out = RMSNorm(hidden), nn.Linear(hidden, settings.width)

    def forward(self, content_BW: Tensor) -> Tensor:
        h = self.first(torch.cat([content_BW, blocks_present(content_BW, self.widths).float()], dim=1))
        for layer in self.layers:
            h = layer(h)
        return self.out(self.norm(h))[:, None]


class QFormerAligner(nn.Module):
    """Learnable queries on the content, each block unfolded into `block_tokens` vectors. One vector more, learned and the
    same for all items, is there to be looked at where a block is missing."""

    def __init__(self, widths: Sequence[int], settings: ItemAlignmentConfig) -> None:
        super().__init__()
        self.widths, self.width, hidden = tuple(widths), settings.width, settings.hidden
        self.tokens = settings.block_tokens
        self.unfold = nn.ModuleList([nn.Linear(width, self.tokens * hidden) for width in widths])
        self.memory_norm = RMSNorm(hidden)
        self.empty = nn.Parameter(torch.randn(1, 1, hidden))
        self.queries = nn.Parameter(torch.randn(settings.queries, hidden))
        self.attention = nn.ModuleList(
            [QueryAttention(hidden, settings.heads, settings.dropout) for _ in range(settings.layers)]
        )
        self.ffn = nn.ModuleList([ResidualFeedForward(hidden, hidden, settings.dropout) for _ in range(settings.layers)])
        self.norm, self.out = RMSNorm(hidden), nn.Linear(hidden, settings.width // settings.queries)

    def forward(self, content_BW: Tensor) -> Tensor:
        parts = content_BW.split(list(self.widths), dim=1)
        unfolded = [layer(part).unflatten(1, (self.tokens, -1)) for layer, part in zip(self.unfold, parts, strict=True)]
        m_BMC = self.memory_norm(torch.cat([self.empty.expand(len(content_BW), -1, -1), *unfolded], dim=1))
        there = blocks_present(content_BW, self.widths).repeat_interleave(self.tokens, dim=1)
        mask_B11M = F.pad(there, (1, 0), value=True)[:, None, None]
        h_BQC = self.queries.expand(len(content_BW), -1, -1)
        for attention, ffn in zip(self.attention, self.ffn, strict=True):
            h_BQC = ffn(attention(h_BQC, m_BMC, mask_B11M))
        return self.out(self.norm(h_BQC))


Aligner = MlpAligner | QFormerAligner


def build_aligner(widths: Sequence[int], settings: ItemAlignmentConfig) -> Aligner:
    """An untrained aligner of blocks of these widths."""
    return (QFormerAligner if settings.model == "qformer" else MlpAligner)(widths, settings)


def one_vector(aligned_BQD: Tensor) -> Tensor:
    """float32 [B, Q * D] of length 1: the queries' vectors side by side, clustered as one (OneRec-V1, section 2.2)."""
    return F.normalize(aligned_BQD.flatten(1), dim=1)


@torch.no_grad()
def aligned_vectors(aligner: Aligner, content_NW: Tensor, chunk: int = 8192) -> Tensor:
    """float32 [N, width] of length 1, zero for an item without content; `aligner` is in evaluation mode."""
    parts = [one_vector(aligner(part)) * part.any(1, keepdim=True) for part in content_NW.split(chunk) if len(part)]
    return torch.cat(parts) if parts else content_NW.new_zeros(0, aligner.width)


class Reconstruction(nn.Module):
    """Rebuilds the content from the aligned vector by a layer between: 1 - cosine, the mean over the item's blocks."""

    def __init__(self, widths: Sequence[int], settings: ItemAlignmentConfig) -> None:
        super().__init__()
        self.widths = list(widths)
        self.first, self.second = nn.Linear(settings.width, settings.hidden), nn.Linear(settings.hidden, sum(widths))

    def forward(self, aligned_BQD: Tensor, rows_B: Tensor, content_BW: Tensor) -> Tensor:
        rebuilt_BW = self.second(F.gelu(self.first(one_vector(aligned_BQD))))
        pairs = zip(rebuilt_BW.split(self.widths, 1), content_BW.split(self.widths, 1), strict=True)
        lost = torch.stack([1 - F.cosine_similarity(rebuilt, block, dim=1) for rebuilt, block in pairs], dim=1)
        present = blocks_present(content_BW, self.widths)
        return (lost * present).sum(1) / present.sum(1).clamp(min=1)


class Objective(nn.Module):
    """The aligner with the loss that keeps the content, as one module for Ray Train's workers."""

    def __init__(self, aligner: Aligner, content_loss: nn.Module) -> None:
        super().__init__()
        self.aligner, self.content_loss = aligner, content_loss

    def forward(self, rows_B: Tensor, content_BW: Tensor) -> tuple[Tensor, Tensor]:
        """float32 [B, width] normalised vectors and float32 [B] the content that they lost."""
        aligned_BQD = self.aligner(content_BW)
        return one_vector(aligned_BQD), self.content_loss(aligned_BQD, rows_B, content_BW)


def contrastive_nll(
    queries_BD: Tensor,
    candidates_CD: Tensor,
    own_B: Tensor,
    query_items_B: Tensor,
    candidate_items_C: Tensor,
    temperature: float,
    log_chance_C: Tensor | None = None,
) -> Tensor:
    """float32 [B]: -log softmax of each query's own candidate (`own_B`, its column) among all (OneRec-V1, L_I2I).

    Other candidates that are the query's item or its partner once more are no negatives, nor are those of item -1, which
    fill a batch. `log_chance_C` is subtracted from the logits (Yi et al., RecSys 2019): without it an item is pushed away
    as often as it is drawn, that is, for being popular.
    """
    logits = queries_BD @ candidates_CD.T / temperature
    if log_chance_C is not None:
        logits = logits - log_chance_C
    others = candidate_items_C[None]
    excluded = (others == candidate_items_C[own_B][:, None]) | (others == query_items_B[:, None]) | (others < 0)
    excluded[torch.arange(len(own_B), device=own_B.device), own_B] = False
    return F.cross_entropy(logits.masked_fill(excluded, -torch.inf), own_B, reduction="none")
