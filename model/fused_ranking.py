"""Items ranked by codes and item head together: generative and dense retrieval in one model.

Candidates are the items of the beams and as many of the best by the item head. Each has two log-probabilities of the same
event, that it is the next item: the sum over its codes, and the head's; the score is their weighted mean, with the weight
`ItemHead.share`. So a row's best items do not depend on the batch.
The search computed the codes of most of the head's candidates on its way. Of the others it knows the first ones at
least, and a log-probability is never above 0: those that cannot reach the best k whatever their last codes are left out.
Shapes: R requests, N items, C candidates of the head, W of the beams, L levels, E = embed_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from model.attention import target_layout
from model.beam import NEVER, Beams, at_places, known_log_probs, rank_items
from model.context_processor import ContextKV
from model.decoder import Decoder, code_nll
from model.item_memory import Recalled, mix
from model.item_table import ItemTable
from model.nearest import blocks
from model.trie import Trie

SCORES = 1 << 26  # of requests and items that are held together


@dataclass
class Candidates:
    """Of R requests, at most one place an item; -1 and NEVER where there is none."""

    items: Tensor  # int64 [R, C + W], dense
    item_log_probs: Tensor  # float32 [R, C + W], by the head
    code_log_probs: Tensor  # float32 [R, C + W, L]; 0 where there is no item, or where it was not needed


@dataclass
class HeadScores:
    """What the item head knows of R requests and N items."""

    queries_RE: Tensor
    vectors_NE: Tensor
    recalled: Recalled | None  # of the head's memory

    def own(self, rows: slice) -> Tensor:
        """Log-probabilities [B, N] of the requests `rows`, without the memory."""
        return torch.log_softmax(self.queries_RE[rows] @ self.vectors_NE.T, dim=1)

    def log_probs(self, rows: slice) -> Tensor:
        """[B, N], of the requests `rows`."""
        log_BN = self.own(rows)
        return log_BN if self.recalled is None else self.recalled.mixed(log_BN, rows.start)


def find_candidates(
    decoder: Decoder,
    items: ItemTable,
    scores: HeadScores,
    kv: ContextKV,
    beams: Beams,
    trie: Trie,
    excluded: tuple[Tensor, Tensor] | None,
    withheld: Tensor | None,
    best: int | None = None,
) -> Candidates:
    """As many items of the head as there are beams, and those of the beams; left out are those of `rank_items`. With `best`
    the code log-probabilities are complete for the so many best by `fused_scores` with the head's own share alone; others
    stay below those."""
    width = min(beams.scores.shape[1], len(items))
    found_RW, _, origin_RW = rank_items(beams, trie, width, excluded, withheld)
    best_RC, best_log_RC, found_log_RW = best_by_head(scores, width, found_RW, excluded, withheld)
    found_RW = torch.where((found_RW[:, :, None] == best_RC[:, None, :]).any(2), -1, found_RW)
    found_codes_RWL = at_places(beams.log_probs, torch.where(found_RW < 0, -1, origin_RW))
    best_codes_RCL, known_RCL = known_log_probs(beams.steps, trie, items.codes[best_RC.clamp(min=0)])
    found = Candidates(
        torch.cat([best_RC, found_RW], 1),
        torch.cat([best_log_RC, found_log_RW.masked_fill(found_RW < 0, NEVER)], 1),
        torch.cat([best_codes_RCL.masked_fill((best_RC < 0)[..., None], 0.0), found_codes_RWL], 1),
    )
    missing_RC = ~known_RCL.all(2) & (best_RC >= 0)
    if best is not None:
        assert decoder.item_head is not None
        missing_RC &= could_be_best(found, missing_RC, decoder.item_head.share, best)
    rows, places = missing_RC.nonzero(as_tuple=True)
    found.code_log_probs[rows, places] = code_log_probs(decoder, items, kv, best_RC, missing_RC)
    return found


def could_be_best(found: Candidates, missing_RC: Tensor, share: Tensor, best: int) -> Tensor:
    """bool [R, C]: the head's candidates of which codes are `missing` that could be among the best if those were sure."""
    scores = fused_scores(found, share)
    C = missing_RC.shape[1]
    whole = scores.masked_fill(F.pad(missing_RC, (0, scores.shape[1] - C)), NEVER)
    least_R1 = F.pad(whole, (0, best), value=NEVER).topk(best, dim=1).values[:, -1:]
    return scores[:, :C] >= least_R1


def best_by_head(
    scores: HeadScores,
    width: int,
    also_RW: Tensor,
    excluded: tuple[Tensor, Tensor] | None,
    withheld: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best items (int64 [R, C]) by log-probability (float32 [R, C]), and those [R, W] of the items `also_RW`."""
    best, best_log, also_log = [], [], []
    for s in blocks(len(scores.queries_RE), len(scores.vectors_NE), SCORES):
        log_BN = scores.log_probs(s)
        also_log.append(log_BN.gather(1, also_RW[s].clamp(min=0)))
        items_BC, values_BC = _best_allowed(log_BN, s, width, excluded, withheld)
        best.append(items_BC)
        best_log.append(values_BC)
    return torch.cat(best), torch.cat(best_log), torch.cat(also_log)


def best_by_memory_weights(
    scores: HeadScores, weights_W: Tensor, width: int, excluded: tuple[Tensor, Tensor] | None
) -> list[Tensor]:
    """The best items (int64 [R, C]) with each of the weights of the head's memory."""
    assert scores.recalled is not None
    best: list[list[Tensor]] = [[] for _ in weights_W]
    for s in blocks(len(scores.queries_RE), len(scores.vectors_NE), SCORES):
        own_BN, recalled_BN = scores.own(s), scores.recalled.scores(s.start, s.stop)
        for found, weight in zip(best, weights_W, strict=True):
            log_BN = mix(own_BN, recalled_BN, scores.recalled.memory.usual, weight)
            found.append(_best_allowed(log_BN, s, width, excluded, None)[0])
    return [torch.cat(found) for found in best]


def _best_allowed(
    log_BN: Tensor, s: slice, width: int, excluded: tuple[Tensor, Tensor] | None, withheld: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Of the requests `s`; items [B, C] and log-probabilities. Overwrites those of items left out."""
    if excluded is not None:
        here = (excluded[0] >= s.start) & (excluded[0] < s.stop)
        log_BN[excluded[0][here] - s.start, excluded[1][here]] = NEVER
    if withheld is not None:
        log_BN[:, withheld] = NEVER
    values_BC, items_BC = log_BN.topk(width, dim=1)
    return items_BC.masked_fill(values_BC == NEVER, -1), values_BC


def fused_scores(found: Candidates, share: Tensor | float) -> Tensor:
    """float32 [R, C + W], with the item head's share; NEVER where there is no item."""
    scores_RC = share * found.item_log_probs + (1 - share) * found.code_log_probs.sum(2)
    return scores_RC.masked_fill(found.item_log_probs == NEVER, NEVER)  # 0 times minus infinity is no number


def code_log_probs(decoder: Decoder, items: ItemTable, kv: ContextKV, items_RC: Tensor, asked_RC: Tensor) -> Tensor:
    """float32 [M, L]: of the codes of the M items asked for (bool [R, C]), each given those before it, in their order."""
    counts_R = asked_RC.sum(1)
    offsets = torch.cat([counts_R.new_zeros(1), counts_R.cumsum(0)])
    codes_ML = items.codes[items_RC[asked_RC]]
    embedded_MSD = decoder.embed(codes_ML[:, : decoder.levels - 1])
    h_MSD, _ = decoder.hidden(embedded_MSD, kv, target_layout(offsets))
    return -code_nll([decoder.logits(h_MSD[:, level], level).float() for level in range(decoder.levels)], codes_ML)
