"""How a model in training does on a sample of validation requests: its loss, and its NDCG over the whole catalogue."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from model.decoder import Decoder, code_nll
from model.fused_ranking import fused_scores
from model.item_memory import usual_evidence
from model.item_table import ItemTable
from model.itemknn import ItemKnn
from model.positives import take_rows
from model.ranker import Ranker, best_of
from model.ranking_metrics import ndcg_at, target_ranks
from model.requests import Requests
from model.trie import Trie
from pipelines.baselines import DEEPER, MEMORIES, Fitting, fit_itemknn
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
        settings, ranker = self.data.config.evaluate, Ranker(decoder, self.items, self._trie)

        def answer(some: Requests) -> list[Tensor]:
            return [ranker.rank(some, CUTOFF, settings.beam, settings.mask_history)]

        return self._ndcgs(take_rows(requests, torch.arange(min(len(requests), RANKED))), answer, CUTOFF)[0]

    def choose_share(self, decoder: Decoder) -> float:
        """Sets the weight of the item head in the ranking to the one of SHARES with the best NDCG; the middle one where
        there are no requests to choose by."""
        assert decoder.item_head is not None
        settings, requests = self.data.config.evaluate, self.data.validation()
        ranker = Ranker(decoder, self.items, self._trie)

        def answers(some: Requests) -> list[Tensor]:
            found = ranker.candidates(some, settings.beam, settings.mask_history)
            return [best_of(found, fused_scores(found, share), DEEPER).items for share in SHARES]

        if len(requests):
            decoder.item_head.share.fill_(self._best(SHARES, requests, answers))
        return float(decoder.item_head.share)

    def fill_memory(self, decoder: Decoder) -> float:
        """Fills the item head's memory with the neighbours of ItemKNN, fitted on the train positives and tuned as the
        baseline is; its weight is the one of MEMORIES by whose NDCG the head ranks best alone. Nothing without requests."""
        assert decoder.item_head is not None and decoder.item_head.memory is not None
        memory = decoder.item_head.memory
        settings, requests = self.data.config.evaluate, self.data.validation()
        if not len(requests):
            return float(memory.weight)
        found = fit_itemknn(Fitting(self.data.train_positives(), [requests], self.data.positive_mask, settings)).system
        assert isinstance(found, ItemKnn)
        memory.fill(found.similarity, found.recency, decoder.own_rows(self.items))
        ranker = Ranker(decoder, self.items, self._trie)
        batches = (ranker.recalled_scores(some.to(self.device)) for some in self._batches(requests))
        memory.usual.fill_(usual_evidence(itertools.chain.from_iterable(batches)))

        def answers(some: Requests) -> list[Tensor]:
            return ranker.rank_by_memory_weights(some, MEMORIES, DEEPER, settings.mask_history)

        best = self._best(MEMORIES, requests, answers)
        memory.weight.fill_(best)
        return best

    def _best(self, choices: Sequence[float], requests: Requests, answers: Callable[[Requests], list[Tensor]]) -> float:
        """The one of the choices, whose rankings `answers` gives, with the best NDCG."""
        return choices[int(np.argmax(self._ndcgs(requests, answers, DEEPER)))]

    def _batches(self, requests: Requests) -> Iterator[Requests]:
        for rows in torch.arange(len(requests)).split(self.data.config.evaluate.batch_requests):
            yield take_rows(requests, rows)

    def _ndcgs(self, requests: Requests, answers: Callable[[Requests], list[Tensor]], cutoff: int) -> list[float]:
        """Of each of the rankings (int64 [R, cutoff]) that `answers` gives to a batch of the requests."""
        ranks = []
        for some in self._batches(requests):
            found = answers(some.to(self.device))
            ranks.append([target_ranks(each.cpu(), some.target_rows(), some.target_items) for each in found])
        return [float(ndcg_at(np.concatenate(each), cutoff).mean()) for each in zip(*ranks, strict=True)]

    @cached_property
    def _trie(self) -> Trie:
        return build_trie(self.data.catalogue, self.device)
