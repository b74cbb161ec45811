"""Ranks a catalogue for requests: what evaluation, batch recommendation and online prediction share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.beam import NEVER, Beams, at_places, beam_search, rank_items
from model.context_processor import ContextKV
from model.decoder import Decoder
from model.fused_ranking import (
    SCORES,
    Candidates,
    HeadScores,
    best_by_head,
    best_by_memory_weights,
    code_log_probs,
    find_candidates,
    fused_scores,
)
from model.item_table import ItemTable
from model.nearest import blocks
from model.requests import Requests, row_of
from model.trie import Trie


@dataclass
class Ranking:
    """The best k items of R requests; -1 where there are fewer."""

    items: Tensor  # int64 [R, k], dense
    scores: Tensor  # float32 [R, k]
    log_probs: Tensor  # float32 [R, k, L], a code; 0 where there is no item


class Ranker:
    """A decoder with the item table and the trie of one catalogue. With an item head both rank together."""

    @torch.no_grad()
    def __init__(self, decoder: Decoder, items: ItemTable, trie: Trie) -> None:
        self.decoder, self.items, self.trie = decoder.eval(), items, trie
        head = decoder.item_head
        self.vectors_NE = decoder.item_vectors(items) if head is not None else None
        self.rows_N = decoder.own_rows(items) if head is not None and head.memory is not None else None

    @property
    def _alone(self) -> bool:
        """Whether the item head ranks alone: codes count for nothing, and need no search."""
        head = self.decoder.item_head
        return head is not None and bool(head.share == 1)

    @torch.no_grad()
    def rank(self, requests: Requests, k: int, beam: int, exclude_history: bool = False) -> Tensor:
        """int64 [R, k]: dense items, best first, -1 where the beams hold fewer than k items."""
        if not self._alone:
            return self.ranking(requests, k, beam, exclude_history).items
        best_RC, _ = self._best_by_head(requests, self._encode(requests), k, exclude_history, None)
        return F.pad(best_RC, (0, k - best_RC.shape[1]), value=-1)

    @torch.no_grad()
    def rank_by_memory_weights(
        self, requests: Requests, weights: Sequence[float], k: int, exclude_history: bool = False
    ) -> list[Tensor]:
        """For each of the weights of the head's memory, int64 [R, k] as `rank`, by the head alone, whatever its share."""
        excluded = _seen(requests) if exclude_history else None
        width, weights_W = min(k, len(self.items)), torch.tensor(weights, device=self.items.codes.device)
        scores = self._scores(requests, self._encode(requests))
        found = best_by_memory_weights(scores, weights_W, width, excluded)
        return [F.pad(best_RC, (0, k - width), value=-1) for best_RC in found]

    @torch.no_grad()
    def ranking(
        self, requests: Requests, k: int, beam: int, exclude_history: bool = False, withheld: Tensor | None = None
    ) -> Ranking:
        """`withheld` (bool [N]) marks items that nobody may be shown; a wider beam makes room for what is left out."""
        if self._alone:
            kv = self._encode(requests)
            best_RC, log_RC = self._best_by_head(requests, kv, k, exclude_history, withheld)
            there_RC = best_RC >= 0
            codes_RCL = log_RC.new_zeros(*best_RC.shape, self.decoder.levels)
            codes_RCL[there_RC] = code_log_probs(self.decoder, self.items, kv, best_RC, there_RC)
            return best_of(Candidates(best_RC, log_RC, codes_RCL), log_RC, k)
        if self.decoder.item_head is not None:
            found = self.candidates(requests, beam, exclude_history, withheld, best=k)
            return best_of(found, fused_scores(found, self.decoder.item_head.share), k)
        beams = self.search(requests, beam)
        excluded = _seen(requests) if exclude_history else None
        items, scores, origin = rank_items(beams, self.trie, k, excluded, withheld)
        return Ranking(items, scores, at_places(beams.log_probs, origin))

    @torch.no_grad()
    def candidates(
        self,
        requests: Requests,
        beam: int,
        exclude_history: bool = False,
        withheld: Tensor | None = None,
        best: int | None = None,
    ) -> Candidates:
        """Of codes and item head, see `model.fused_ranking`."""
        kv = self._encode(requests)
        beams = beam_search(self.decoder, kv, self.trie, beam, keep_steps=True)
        excluded = _seen(requests) if exclude_history else None
        scores = self._scores(requests, kv)
        return find_candidates(self.decoder, self.items, scores, kv, beams, self.trie, excluded, withheld, best)

    def _scores(self, requests: Requests, kv: ContextKV) -> HeadScores:
        assert self.vectors_NE is not None
        queries_RE = self.decoder.item_queries(requests, kv, self.vectors_NE)
        recalled = None if self.rows_N is None else self.decoder.recalled(requests, self.rows_N)
        return HeadScores(queries_RE, self.vectors_NE, recalled)

    @torch.no_grad()
    def recalled_scores(self, requests: Requests) -> Iterator[Tensor]:
        """float32 [B, N], some of the requests after others: what the head's memory holds, not mixed yet."""
        assert self.rows_N is not None
        recalled = self.decoder.recalled(requests, self.rows_N)
        for s in blocks(len(requests), len(self.items), SCORES):
            yield recalled.scores(s.start, s.stop)

    def _best_by_head(
        self, requests: Requests, kv: ContextKV, k: int, exclude_history: bool, withheld: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The head's best k items, or all there are, and their log-probabilities."""
        excluded = _seen(requests) if exclude_history else None
        no_others_R0 = requests.target_items.new_empty(len(requests), 0)
        width = min(k, len(self.items))
        return best_by_head(self._scores(requests, kv), width, no_others_R0, excluded, withheld)[:2]

    @torch.no_grad()
    def search(self, requests: Requests, beam: int, free: bool = False) -> Beams:
        """The beams themselves; `free` leaves the trie out, which shows what the model learned of legality."""
        return beam_search(self.decoder, self._encode(requests), None if free else self.trie, beam)

    def _encode(self, requests: Requests) -> ContextKV:
        return self.decoder.eval().encode(requests, self.items)


def best_of(found: Candidates, scores_RC: Tensor, k: int) -> Ranking:
    """The best k of the candidates."""
    short = max(0, k - scores_RC.shape[1])
    scores, place = F.pad(scores_RC, (0, short), value=NEVER).topk(k, dim=1)
    items = F.pad(found.items, (0, short), value=-1).gather(1, place).masked_fill(scores == NEVER, -1)
    return Ranking(items, scores, at_places(F.pad(found.code_log_probs, (0, 0, 0, short)), place))


def _seen(requests: Requests) -> tuple[Tensor, Tensor]:
    """The known items of every history as (rows, items)."""
    known = requests.history_items >= 0
    return row_of(requests.history_offsets)[known], requests.history_items[known]
