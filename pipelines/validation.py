"""How a model in training does on a sample of validation requests: its loss, and its NDCG over the whole catalogue."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from model.decoder import Decoder, code_nll
from model.item_table import ItemTable
from model.positives import take_rows
from model.ranker import Ranker
from model.ranking_metrics import columns_of, target_ranks
from model.requests import Requests
from model.trie import Trie
from pipelines.bundle import build_trie
from pipelines.training_data import TrainingData

NDCG = "validation_ndcg"
RANKED, CUTOFF = 500, 10  # requests that are ranked, and at which place


class Validation:
    """On the device of `items`."""

    def __init__(self, data: TrainingData, items: ItemTable) -> None:
        self.data, self.items, self.device = data, items, items.codes.device

    @torch.no_grad()
    def figures(self, decoder: Decoder, ranked: bool) -> dict[str, float]:
        """validation_loss, that of each level, and with `ranked` NDCG; nothing where there are no such requests."""
        requests = self.data.validation()
        if not len(requests):
            return {}
        parts = []
        for rows in torch.arange(len(requests)).split(self.data.config.train.batch_requests):
            some = take_rows(requests, rows).to(self.device)
            parts.append(code_nll(decoder(some, self.items), self.items.codes[some.target_items]))
        per_level = torch.cat(parts).mean(0).tolist()
        found = {"validation_loss": float(np.mean(per_level))}
        found |= {f"validation_loss_level_{i + 1}": value for i, value in enumerate(per_level)}
        return found | ({NDCG: self._ndcg(decoder, requests)} if ranked else {})

    def _ndcg(self, decoder: Decoder, requests: Requests) -> float:
        settings, ranker, ranks = self.data.config.evaluate, Ranker(decoder, self.items, self._trie), []
        for rows in torch.arange(min(len(requests), RANKED)).split(settings.batch_requests):
            some = take_rows(requests, rows)
            found = ranker.rank(some.to(self.device), CUTOFF, settings.beam, settings.mask_history).cpu()
            ranks.append(target_ranks(found, some.target_rows(), some.target_items))
        return float(columns_of(np.concatenate(ranks), (CUTOFF,))[f"ndcg@{CUTOFF}"].mean())

    @cached_property
    def _trie(self) -> Trie:
        return build_trie(self.data.catalogue, self.device)
