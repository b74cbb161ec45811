"""Positives as the baselines see them: what they are fitted on, what they read of a request, and one way to rank.

The baselines train on exactly the positives of the train requests, and read exactly the positives of a request's
history, so that none of them knows more than the model. Ranking is the same for all: scores of the whole catalogue,
history masked where asked for, the best k.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

from model.requests import GROUPS, Requests, row_of, select_rows


@dataclass(frozen=True)
class Positives:
    """P positives of U users over N items; user u owns [offsets[u], offsets[u + 1]) in time order."""

    offsets: np.ndarray  # int64 [U + 1]
    items: np.ndarray  # int64 [P], dense catalogue indices
    ts_us: np.ndarray  # int64 [P]
    num_items: int

    @classmethod
    def of(cls, user_ids: np.ndarray, ts_us: np.ndarray, items: np.ndarray, num_items: int) -> Positives:
        """Parallel arrays [P] in any order; equal times keep their order, items below 0 (unknown) are left out."""
        known = items >= 0
        user_ids, ts_us, items = user_ids[known], ts_us[known], items[known]
        order = np.lexsort((ts_us, user_ids))  # stable
        _, counts = np.unique(user_ids, return_counts=True)
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        return cls(offsets, items[order].astype(np.int64), ts_us[order].astype(np.int64), num_items)

    @property
    def counts(self) -> np.ndarray:
        """int64 [N]: positives of each item."""
        return np.bincount(self.items, minlength=self.num_items)

    @property
    def rows(self) -> np.ndarray:
        """int64 [P]: the user of each positive, by place."""
        return np.repeat(np.arange(len(self.offsets) - 1), np.diff(self.offsets))


def history_positives(requests: Requests, positive_mask: int) -> tuple[Tensor, Tensor]:
    """Items (dense, int64) of each request's positive and known history events, oldest first, and offsets [R + 1]."""
    keep = ((requests.history_feedback & positive_mask) != 0) & (requests.history_items >= 0)
    return select_rows(requests.history_items, requests.history_offsets, keep)


def take_rows(requests: Requests, rows: Tensor) -> Requests:
    """The requests `rows` (int64), in that order, with their slices of every jagged array."""

    def place(offsets: Tensor) -> tuple[Tensor, Tensor]:
        lengths = offsets.diff()[rows]
        taken = torch.cat([offsets.new_zeros(1), lengths.cumsum(0)])
        first = torch.repeat_interleave(offsets[rows] - taken[:-1], lengths)
        return torch.arange(int(taken[-1]), device=offsets.device) + first, taken

    groups = {group: place(getattr(requests, f"{group}_offsets")) for group in GROUPS}
    taken: dict[str, Tensor] = {}
    for field in fields(Requests):
        group = field.name.split("_")[0].removesuffix("s")
        values = getattr(requests, field.name)
        if group not in groups:
            taken[field.name] = values[rows]
        else:
            taken[field.name] = groups[group][1] if field.name.endswith("offsets") else values[groups[group][0]]
    return Requests(**taken)


def keep_targets(requests: Requests, keep_T: Tensor) -> Requests:
    """The targets where `keep_T` (bool [T]) holds, and the requests that still have one; order stays."""
    columns = ("target_items", "target_feedback", "target_impressions")
    offsets = select_rows(requests.target_items, requests.target_offsets, keep_T)[1]
    kept = {name: getattr(requests, name)[keep_T] for name in columns}
    return take_rows(Requests(**vars(requests) | kept | {"target_offsets": offsets}), torch.unique(row_of(offsets)))


class ScoreRanker(ABC):
    """Ranks the whole catalogue by a score of every item, in chunks of requests."""

    chunk_scores = 20_000_000  # scores held at a time

    @property
    @abstractmethod
    def num_items(self) -> int:
        """N, the size of the catalogue."""

    @abstractmethod
    def scores(self, requests: Requests) -> Tensor:
        """float32 [R, N]; higher is better, all finite."""

    def rank(self, requests: Requests, k: int, exclude_history: bool = False) -> Tensor:
        """int64 [R, k]: dense indices, best first, -1 where the catalogue gives no more.

        With `exclude_history`, no item of a request's context (every event, positive or not) is recommended.
        """
        step = max(1, self.chunk_scores // max(self.num_items, 1))
        best = [requests.user_ids.new_full((0, k), -1)]
        for start in range(0, len(requests), step):
            part = take_rows(requests, torch.arange(start, min(start + step, len(requests))))
            scores_RN = self.scores(part)
            if exclude_history:
                mask_history(scores_RN, part)
            best.append(top_items(scores_RN, k))
        return torch.cat(best)


def mask_history(scores_RN: Tensor, requests: Requests) -> None:
    """Sets, in place, the score of every item of a request's history to minus infinity."""
    known = requests.history_items >= 0
    scores_RN[row_of(requests.history_offsets)[known], requests.history_items[known]] = -torch.inf


def top_items(scores_RN: Tensor, k: int) -> Tensor:
    """int64 [R, k]: the best items, -1 where fewer than k have a finite score."""
    width = min(k, scores_RN.shape[1])
    values, items = scores_RN.topk(width, dim=1)
    items = items.masked_fill(values == -torch.inf, -1)
    return torch.nn.functional.pad(items, (0, k - width), value=-1)
