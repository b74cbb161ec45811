"""Ranks a catalogue for requests: what evaluation, batch recommendation and online prediction share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.beam import Beams, beam_search, rank_items
from model.decoder import Decoder
from model.item_table import ItemTable
from model.requests import Requests, row_of
from model.trie import Trie


@dataclass
class Ranking:
    """The best k items of R requests; -1 where there are fewer."""

    items: Tensor  # int64 [R, k], dense
    scores: Tensor  # float32 [R, k]
    log_probs: Tensor  # float32 [R, k, L], a code; 0 where there is no item


class Ranker:
    """A decoder with the item table and the trie of one catalogue."""

    def __init__(self, decoder: Decoder, items: ItemTable, trie: Trie) -> None:
        self.decoder, self.items, self.trie = decoder.eval(), items, trie

    def rank(self, requests: Requests, k: int, beam: int, exclude_history: bool = False) -> Tensor:
        """int64 [R, k]: dense items, best first, -1 where the beams hold fewer than k items."""
        return self.ranking(requests, k, beam, exclude_history).items

    @torch.no_grad()
    def ranking(
        self, requests: Requests, k: int, beam: int, exclude_history: bool = False, withheld: Tensor | None = None
    ) -> Ranking:
        """`withheld` (bool [N]) marks items that nobody may be shown; a wider beam makes room for what is left out."""
        beams = self.search(requests, beam)
        excluded = _seen(requests) if exclude_history else None
        items, scores, origin = rank_items(beams, self.trie, k, excluded, withheld)
        picked = origin.clamp(min=0)[..., None].expand(-1, -1, self.decoder.levels)
        log_probs = beams.log_probs.gather(1, picked).masked_fill((origin < 0)[..., None], 0.0)
        return Ranking(items, scores, log_probs)

    @torch.no_grad()
    def search(self, requests: Requests, beam: int, free: bool = False) -> Beams:
        """The beams themselves; `free` leaves the trie out, which shows what the model learned of legality."""
        self.decoder.eval()
        kv = self.decoder.encode(requests, self.items)
        return beam_search(self.decoder, kv, None if free else self.trie, beam)


def _seen(requests: Requests) -> tuple[Tensor, Tensor]:
    """The known items of every history as (rows, items)."""
    known = requests.history_items >= 0
    return row_of(requests.history_offsets)[known], requests.history_items[known]
