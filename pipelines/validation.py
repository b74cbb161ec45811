"""How a model in training does on a sample of validation requests: its loss, and its NDCG over the whole catalogue."""

from __future__ import annotations

from functools import cached_property

import numpy as np
import torch

from model.decoder import Decoder, code_nll
from model.fused_ranking import fused_scores
from model.item_table import ItemTable
from model.positives import take_rows
from model.ranker import Ranker, best_of
from model.ranking_metrics import columns_of, ndcg_at, target_ranks
from model.requests import Requests
from model.trie import Trie
from pipelines.bundle import build_trie
from pipelines.training_data import TrainingData

NDCG = "validation_ndcg"
RANKED, CUTOFF = 500, 10  # requests that are ranked, and at which place
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


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
            parts.append(code_nll(decoder(some, self.items).logits, self.items.codes[some.target_items]))
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

    def choose_share(self, decoder: Decoder) -> float:
        """Sets the weight of the item head in the ranking to the one of SHARES with the best NDCG; the middle one where
        there are no requests to choose by."""
        assert decoder.item_head is not None
        settings, requests, ranker = (
            self.data.config.evaluate,
            self.data.validation(),
            Ranker(decoder, self.items, self._trie),
        )
        ranks: dict[float, list[np.ndarray]] = {share: [] for share in SHARES}
        for rows in torch.arange(len(requests)).split(settings.batch_requests):
            some = take_rows(requests, rows)
            found = ranker.candidates(some.to(self.device), settings.beam, settings.mask_history)
            for share, of_share in ranks.items():
                best = best_of(found, fused_scores(found, share), CUTOFF).items.cpu()
                of_share.append(target_ranks(best, some.target_rows(), some.target_items))
        if len(requests):
            ndcg = {share: ndcg_at(np.concatenate(of_share), CUTOFF).mean() for share, of_share in ranks.items()}
            decoder.item_head.share.fill_(max(ndcg, key=lambda share: ndcg[share]))
        return float(decoder.item_head.share)

    @cached_property
    def _trie(self) -> Trie:
        return build_trie(self.data.catalogue, self.device)
