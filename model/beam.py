"""Beam search over codes, kept to the catalogue by a trie or free, and the items behind the beams.

The context's keys and values are read in place for all beams of a request; self-attention keeps keys and values of
the codes before, so a step computes one position a beam. Scores are the model's own log-probabilities: the trie removes
codes and renormalises nothing, so that a beam as wide as the catalogue ranks exactly by the probability of the codes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.attention import Pair, QueryLayout
from model.context_processor import ContextKV
from model.decoder import Decoder
from model.trie import Trie

NEVER = float("-inf")


@dataclass
class Beams:
    """W beams of each of R requests, best first. A beam that could not be filled has score -inf and leaf -1."""

    codes: Tensor  # int64 [R, W, L]
    log_probs: Tensor  # float32 [R, W, L], a code
    scores: Tensor  # float32 [R, W], their sum; -inf: no beam
    leaves: Tensor  # int64 [R, W], of the trie; -1 without one
    steps: list[Expanded]  # a level, where they were asked for


@dataclass
class Expanded:
    """What a step of the search computed of the next code."""

    nodes: Tensor  # int64 [R, W]: prefixes, of the trie
    log_probs: Tensor  # float32 [R, W, K]


@torch.no_grad()
def beam_search(decoder: Decoder, kv: ContextKV, trie: Trie | None, beam: int, keep_steps: bool = False) -> Beams:
    """The `beam` most probable code sequences; with a trie every one is an item's."""
    rows = len(kv)
    device = kv.bias_R11T.device
    state = _State.start(rows, device)
    past: list[Pair] | None = None
    steps: list[Expanded] = []
    for level in range(decoder.levels):
        width = state.scores.shape[1]
        layout = QueryLayout(rows, width, None)
        h_BSD, past = decoder.hidden(_newest(decoder, state.codes), kv, layout, past)
        log_probs = torch.log_softmax(decoder.logits(h_BSD[:, 0], level).float(), dim=-1).view(rows, width, -1)
        if keep_steps:
            steps.append(Expanded(state.nodes, log_probs))
        state, parents = _extend(state, log_probs, trie, level, beam)
        if level + 1 < decoder.levels:
            flat = (parents + width * torch.arange(rows, device=device)[:, None]).flatten()
            past = [(k.index_select(0, flat), v.index_select(0, flat)) for k, v in past]
    return Beams(state.codes, state.log_probs, state.scores, state.nodes, steps)


@dataclass
class _State:
    codes: Tensor  # [R, W, l]
    log_probs: Tensor  # [R, W, l]
    scores: Tensor  # [R, W]
    nodes: Tensor  # [R, W]

    @staticmethod
    def start(rows: int, device: torch.device) -> _State:
        empty = torch.zeros(rows, 1, 0, device=device)
        return _State(empty.long(), empty, empty.sum(-1), torch.zeros(rows, 1, dtype=torch.long, device=device))


def _newest(decoder: Decoder, codes_RWl: Tensor) -> Tensor:
    """[R * W, 1, D]: the embedding of the newest position alone."""
    rows, width, level = codes_RWl.shape
    position = decoder.positions.weight[level]
    if level == 0:
        return (decoder.bos + position).expand(rows * width, 1, -1)
    return decoder.codes[level - 1](codes_RWl[:, :, -1].flatten())[:, None] + position


def _extend(state: _State, log_probs_RWK: Tensor, trie: Trie | None, level: int, beam: int) -> tuple[_State, Tensor]:
    """The best `beam` extensions of all beams of a row, and their parents (int64 [R, beam])."""
    num_codes = log_probs_RWK.shape[-1]
    totals = state.scores[..., None] + log_probs_RWK
    if trie is not None:
        totals = totals.masked_fill(~trie.children_mask(level, state.nodes), NEVER)
    flat = totals.flatten(1)
    scores, best = flat.topk(min(beam, flat.shape[1]), dim=1)
    parents, codes = best // num_codes, best % num_codes
    chosen = log_probs_RWK.flatten(1).gather(1, best)
    nodes = torch.full_like(parents, -1)
    if trie is not None:
        nodes = trie.child(level, state.nodes.gather(1, parents), codes)
    picked = parents[..., None].expand(-1, -1, level)
    return _State(
        torch.cat([state.codes.gather(1, picked), codes[..., None]], dim=-1),
        torch.cat([state.log_probs.gather(1, picked), chosen[..., None]], dim=-1),
        scores,
        torch.where(scores == NEVER, -1, nodes),
    ), parents


def rank_items(
    beams: Beams, trie: Trie, k: int, excluded: tuple[Tensor, Tensor] | None = None, withheld: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Items of the beams, best first; items that share their codes follow each other by rank.

    Left out are `excluded` = (rows, dense items), int64 [E] each, and the items that `withheld` (bool [N]) marks.
    Returns items int64 [R, k] with -1 where there are too few, scores float32 [R, k] (-inf there), and the beam of each
    item, int64 [R, k].
    """
    rows, width = beams.leaves.shape
    items, offsets = trie.items(beams.leaves.flatten())
    counts = offsets.diff()
    slot = torch.repeat_interleave(torch.arange(rows * width, device=items.device), counts)
    row = slot // width
    keep = torch.ones_like(items, dtype=torch.bool) if withheld is None else ~withheld[items]
    if excluded is not None:
        keep &= ~torch.isin(row * trie.num_items + items, excluded[0] * trie.num_items + excluded[1])
    if excluded is not None or withheld is not None:
        items, slot, row = items[keep], slot[keep], row[keep]
    per_row = torch.bincount(row, minlength=rows)
    place = torch.arange(len(row), device=items.device) - (per_row.cumsum(0) - per_row)[row]
    first = place < k
    at = (row[first], place[first])
    ranked = torch.full((rows, k), -1, dtype=torch.long, device=items.device)
    scores = torch.full((rows, k), NEVER, device=items.device)
    origin = torch.full((rows, k), -1, dtype=torch.long, device=items.device)
    ranked[at], scores[at], origin[at] = items[first], beams.scores.flatten()[slot[first]], slot[first] % width
    return ranked, scores, origin


def at_places(log_probs_RWL: Tensor, place_RK: Tensor) -> Tensor:
    """float32 [R, K, L]: the log-probabilities at the given places (int64 [R, K]) of each row; 0 at -1."""
    taken = log_probs_RWL.gather(1, place_RK.clamp(min=0)[..., None].expand(-1, -1, log_probs_RWL.shape[2]))
    return taken.masked_fill((place_RK < 0)[..., None], 0.0)


def known_log_probs(steps: list[Expanded], trie: Trie, codes_RCL: Tensor) -> tuple[Tensor, Tensor]:
    """What a search computed of given items' codes on its way: log-probabilities float32 [R, C, L], 0 where it never came,
    and where it came, bool [R, C, L]. From the first level on that it did not reach it knows nothing of an item."""
    nodes_RC = torch.zeros_like(codes_RCL[..., 0])
    log_probs, known = [], []
    for level, step in enumerate(steps):
        codes_RC = codes_RCL[..., level]
        here_RCW = (nodes_RC[:, :, None] == step.nodes[:, None, :]) & (nodes_RC >= 0)[:, :, None]
        place_RC, found_RC = here_RCW.int().argmax(2), here_RCW.any(2)
        row_R1 = torch.arange(len(codes_RC), device=codes_RC.device)[:, None]
        log_probs.append(step.log_probs[row_R1, place_RC, codes_RC].masked_fill(~found_RC, 0.0))
        known.append(found_RC)
        nodes_RC = trie.child(level, nodes_RC, codes_RC)
    return torch.stack(log_probs, 2), torch.stack(known, 2)


def legality(codes: Tensor, trie: Trie) -> float:
    """The share of generated code sequences (int64 [..., L]) that are a real item's."""
    return (trie.find(codes) >= 0).float().mean().item()
