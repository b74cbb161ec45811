"""A memory beside the item head: which items were liked after each item, as evidence that the head's belief is mixed with.

ItemKNN (`model/itemknn.py`) scores an item by the engaged items of a context, each weighed by its age. The evidence e_i is
the score to the power SHARPNESS, in units of what a request usually has in all, E; the belief q is the head's distribution
to the power FLATNESS. Item i has the probability

    p_i = (weight e_i + (1 - weight) q_i) / (weight E + 1 - weight).

So the head is the prior of a Dirichlet smoothing (Zhai and Lafferty, 2004, where the evidence is counts of words): what the
context's items agree on counts, and a request of which the memory knows little is left to the head. kNN-LM (Khandelwal et
al., 2020) mixes with the same weight whatever is known. What a pair of rare items has in common is looked up, where an
embedding needs many examples to learn it.
The memory is filled and weighed after training, and is part of the weights. It knows items with a row of their own in the
table of item ids, by that row; the others are left to the head.
Shapes: R requests, M rows, K neighbours, N items of a catalogue, H engaged items of all requests.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from model.layout import ages
from model.requests import row_of

SHARPNESS, FLATNESS = 1.4, 0.7  # by validation, the same on four datasets; the weight is chosen for each


class ItemMemory(nn.Module):
    near: Tensor
    similarity: Tensor
    recency: Tensor
    usual: Tensor
    weight: Tensor

    def __init__(self, rows: int, neighbours: int) -> None:
        super().__init__()
        self.register_buffer("near", torch.zeros(rows, neighbours, dtype=torch.int32))  # rows
        self.register_buffer("similarity", torch.zeros(rows, neighbours))  # 0 where there is no neighbour
        self.register_buffer("recency", torch.tensor(1.0))  # weight of an engaged item is recency ** age
        self.register_buffer("usual", torch.tensor(1.0))  # `usual_evidence` of validation requests
        self.register_buffer("weight", torch.tensor(0.0))  # in [0, 1): what the memory has of a request of usual evidence

    def fill(self, similarity: sparse.csr_array, recency: float, rows_N: Tensor) -> None:
        """`similarity` [N, N] of a catalogue whose items have the rows `rows_N` (int64, -1 none). Of more neighbours than
        K the most similar count."""
        entries = similarity.tocoo()
        first, second = (rows_N.cpu().numpy()[side] for side in entries.coords)
        known = (first >= 0) & (second >= 0)
        first, second, values = first[known], second[known], entries.data[known]
        order = np.lexsort((second, -values, first))
        first, second, values = first[order], second[order], values[order]
        place = np.arange(len(first)) - np.searchsorted(first, first)
        kept = place < self.near.shape[1]
        where = torch.from_numpy(first[kept]), torch.from_numpy(place[kept])
        near, found = torch.zeros(self.near.shape, dtype=torch.int32), torch.zeros(self.similarity.shape)
        near[where] = torch.from_numpy(second[kept].astype(np.int32))
        found[where] = torch.from_numpy(values[kept].astype(np.float32))
        self.near.copy_(near)
        self.similarity.copy_(found)
        self.recency.fill_(recency)

    def recall(self, rows_H: Tensor, offsets: Tensor, rows_N: Tensor) -> Recalled:
        """For requests with the engaged items of rows `rows_H` (int64, -1 none; oldest first, offsets int64 [R + 1])."""
        weight_H = self.recency ** ages(offsets)
        known = rows_H >= 0
        return Recalled(self, rows_H[known], weight_H[known], row_of(offsets)[known], rows_N)


@dataclass
class Recalled:
    """What the memory holds for some requests and a catalogue."""

    memory: ItemMemory
    rows_H: Tensor
    weight_H: Tensor
    request_H: Tensor
    rows_N: Tensor

    def scores(self, start: int, stop: int) -> Tensor:
        """float32 [B, N], of the requests from `start` to before `stop`; 0 where the memory knows nothing."""
        memory, (B, M) = self.memory, (stop - start, len(self.memory.near))
        here = (self.request_H >= start) & (self.request_H < stop)
        rows_h = self.rows_H[here]
        scores = memory.similarity.new_zeros(B * (M + 1))  # the last one of a request: items without a row
        place_hK = (self.request_H[here] - start)[:, None] * (M + 1) + memory.near[rows_h]
        scores.scatter_add_(0, place_hK.flatten(), (memory.similarity[rows_h] * self.weight_H[here, None]).flatten())
        return scores.view(B, M + 1)[:, torch.where(self.rows_N < 0, M, self.rows_N)]

    def mixed(self, log_BN: Tensor, start: int) -> Tensor:
        """Log-probabilities [B, N] of the requests from `start` on, by both."""
        return mix(log_BN, self.scores(start, start + len(log_BN)), self.memory.usual, self.memory.weight)


def evidence(scores: Tensor) -> Tensor:
    """Of ItemKNN's scores, which are not negative; in no unit yet."""
    return scores.pow(SHARPNESS)


def usual_evidence(scores: Iterable[Tensor]) -> float:
    """The median of the requests' evidence in all, of those that have any; `scores` [B, N] of some requests at a time. 1
    where none has."""
    total = torch.cat([torch.zeros(0), *(evidence(scores_BN).sum(1).cpu() for scores_BN in scores)])
    known = total[total > 0]
    return float(known.median()) if len(known) else 1.0


def mix(log_BN: Tensor, scores_BN: Tensor, usual: Tensor, weight: Tensor) -> Tensor:
    """log p as above, of log-probabilities and ItemKNN's scores. A row of which the memory knows nothing keeps its own, and
    so do all without weight."""
    evidence_BN = evidence(scores_BN) * (weight / usual)
    total_B1 = evidence_BN.sum(1, keepdim=True)
    belief_BN = torch.log_softmax(FLATNESS * log_BN, dim=1) + (1 - weight).log()
    mixed_BN = torch.logaddexp(belief_BN, evidence_BN.log()) - (total_B1 + 1 - weight).log()
    return torch.where(total_B1 > 0, mixed_BN, log_BN)
