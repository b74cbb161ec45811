"""Popularity: the same list for everybody, by counts of train positives. The baseline that a model must beat."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from model.positives import Positives, ScoreRanker
from model.requests import Requests

DAY_US = 86_400_000_000


class Popularity(ScoreRanker):
    """Counts of train positives, halved for every `half_life_days` of age at the last of them; inf: plain counts.

    Scores are places in the order by count, so that ties break by the lower dense index whatever the count.
    """

    def __init__(self, positives: Positives, half_life_days: float = math.inf) -> None:
        newest = positives.ts_us.max(initial=0)
        weights = np.exp2(-(newest - positives.ts_us) / (half_life_days * DAY_US))
        counts = np.bincount(positives.items, weights, minlength=positives.num_items)
        order = np.argsort(-counts, kind="stable")
        places = np.empty(len(order), dtype=np.float32)
        places[order] = np.arange(len(order), 0, -1, dtype=np.float32)
        self.places_N = torch.from_numpy(places)  # float32 [N], N for the most popular down to 1

    @property
    def num_items(self) -> int:
        return len(self.places_N)

    def scores(self, requests: Requests) -> Tensor:
        return self.places_N.expand(len(requests), -1).clone()
