"""Two baselines in one: probabilities of one mixed with the scores of another, as the item head's are with its memory."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.item_memory import mix
from model.positives import ScoreRanker
from model.requests import Requests


@dataclass
class MixedRanker(ScoreRanker):
    """`weight`, in [0, 1), and `usual` are those of `memory`, see `model.item_memory`; `logits` gives the rest."""

    logits: ScoreRanker
    memory: ScoreRanker
    usual: float
    weight: float

    @property
    def num_items(self) -> int:
        return self.logits.num_items

    def scores(self, requests: Requests) -> Tensor:
        log_RN = torch.log_softmax(self.logits.scores(requests), dim=1)
        return mix(log_RN, self.memory.scores(requests), torch.tensor(self.usual), torch.tensor(self.weight))
