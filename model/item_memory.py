"""A memory beside the item head: which items were liked after each item, mixed in as a probability.

ItemKNN (`model/itemknn.py`) scores an item by the engaged items of a context, each weighed by its age. Divided by their sum
the scores are a distribution, and the head's becomes (1 - weight) p_head + weight p_memory, as in kNN-LM (Khandelwal et
al., 2020). What a pair of rare items has in common is looked up, where an embedding needs many examples to learn it.
The memory is filled and weighed after training, and is part of the weights. It knows items with a row of their own in the
table of item ids, by that row; the others are left to the head.
Shapes: R requests, M rows, K neighbours, N items of a catalogue, H engaged items of all requests.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor, nn

from model.layout import ages
from model.requests import row_of


class ItemMemory(nn.Module):
    near: Tensor
    similarity: Tensor
    recency: Tensor
    weight: Tensor

    def __init__(self, rows: int, neighbours: int) -> None:
        super().__init__()
        self.register_buffer("near", torch.zeros(rows, neighbours, dtype=torch.int32))  # rows
        self.register_buffer("similarity", torch.zeros(rows, neighbours))  # 0 where there is no neighbour
        self.register_buffer("recency", torch.tensor(1.0))  # weight of an engaged item is recency ** age
        self.register_buffer("weight", torch.tensor(0.0))

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

    def mixed(self, log_BN: Tensor, start: int) -> Tensor:
        """Log-probabilities of the requests from `start` on, the memory's mixed in; a request of which it knows nothing
        keeps its own."""
        memory, (B, M) = self.memory, (len(log_BN), len(self.memory.near))
        here = (self.request_H >= start) & (self.request_H < start + B)
        rows_h = self.rows_H[here]
        scores = log_BN.new_zeros(B * (M + 1))  # the last one of a request: items without a row
        place_hK = (self.request_H[here] - start)[:, None] * (M + 1) + memory.near[rows_h]
        scores.scatter_add_(0, place_hK.flatten(), (memory.similarity[rows_h] * self.weight_H[here, None]).flatten())
        scores_BN = scores.view(B, M + 1)[:, torch.where(self.rows_N < 0, M, self.rows_N)]
        return mix(log_BN, scores_BN, memory.weight)


def mix(log_BN: Tensor, scores_BN: Tensor, weight: Tensor) -> Tensor:
    """Log-probabilities of (1 - weight) p + weight scores / sum of scores; a row whose scores are all 0 keeps its own."""
    sum_B1 = scores_BN.sum(1, keepdim=True)
    share_BN = weight * scores_BN / torch.where(sum_B1 > 0, sum_B1, 1.0)
    return torch.where(sum_B1 > 0, torch.logaddexp(log_BN + (1 - weight).log(), share_BN.log()), log_BN)
