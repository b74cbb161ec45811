"""What becomes of items that share their codes, by `tokenize.collisions`. Appending moves nobody under any of the rules.

One order settles every rule: the day on which items got their codes, on the fit day the train positives, most first, then
the id. `place` is an item's place in it among those with the same L codes.

- rank: the place is the item's rank, and decoding ends with it.
- level: the place is a code of a further level, which the model decodes (as in TIGER, Rajput et al., 2023). It has
  twice as many codes as the largest bucket of the fit day has items, or K if that is more; where a bucket outgrows them,
  its last items share the last code and are told apart by rank.
- nearest_free: day by day, the first item at its codes keeps them, and each other one gets the nearest free codes
  (`model.free_codes`). Where all K^L are held, items share codes and are told apart by rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from model.codebook_metrics import collisions
from model.free_codes import free_codes, keys_of
from model.rq_kmeans import Codebook
from pipelines.item_ranks import ranks
from schemas.config import TokenizeConfig
from schemas.errors import ContractViolation

HEADROOM = 2  # times the largest bucket of the fit day
VectorsOf = Callable[[np.datetime64, np.ndarray], Tensor]  # a day and ids of its items: float32 [M, D], in their order


@dataclass(frozen=True)
class Coded:
    """Items with their codes, of one or more days. Those of a settled day keep their order within it as negative counts."""

    item_ids: np.ndarray  # int64 [N]
    codes: np.ndarray  # int32 [N, L]
    days: np.ndarray  # datetime64[D] [N]
    counts: np.ndarray  # int64 [N], train positives; of items of later days 0

    def __len__(self) -> int:
        return len(self.item_ids)


def joined(parts: list[Coded]) -> Coded:
    """All items, one below the other. Raises ContractViolation where an item has codes already."""
    names = ("item_ids", "codes", "days", "counts")
    items = Coded(*(np.concatenate([getattr(part, name) for part in parts]) for name in names))
    if len(np.unique(items.item_ids)) != len(items.item_ids):
        raise ContractViolation(
            "An item of table item_embeddings is new on two days; run stages embed and tokenize with --force."
        )
    return items


def id_sizes(settings: TokenizeConfig, codes_NL: np.ndarray) -> tuple[int, ...]:
    """Codes of each level of an id, by the items of the fit day."""
    if settings.collisions != "level":
        return settings.sizes
    return *settings.sizes, max(*settings.sizes, HEADROOM * collisions(torch.from_numpy(codes_NL)).largest)


def before_settling(rule: str, codes: np.ndarray, rank: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The codes and the counts that put items back in their places, from codes and ranks of `settled`."""
    if rule == "level":
        return codes[:, :-1], -(codes[:, -1].astype(np.int64) + rank)
    return codes, -rank.astype(np.int64)


def settled(
    rule: str,
    codebook: Codebook,
    last_size: int,
    earlier: list[Coded],
    parts: list[Coded],
    vectors: VectorsOf,
) -> tuple[Coded, np.ndarray]:
    """All items with the codes that tell them apart, those of `parts` last, and their ranks (int32 [N]).

    `earlier` are settled days as `before_settling` gives them, `parts` one day each, in order, with the codebook's codes;
    `last_size` is the last of `id_sizes` on the fit day.
    """
    if rule == "nearest_free":
        parts = own_codes(codebook, earlier, parts, vectors)
    items = joined([*earlier, *parts])
    place = ranks(items.codes, items.days, items.counts, items.item_ids)
    if rule != "level":
        return items, place
    last = np.minimum(place, last_size - 1)
    return replace(items, codes=np.concatenate([items.codes, last[:, None]], axis=1)), place - last


def own_codes(codebook: Codebook, earlier: list[Coded], parts: list[Coded], vectors: VectorsOf) -> list[Coded]:
    """`parts` with codes of their own for items whose codes an item before them holds."""
    held = [part.codes for part in earlier]
    found = []
    for part in parts:
        taken = np.concatenate([np.zeros((0, codebook.levels), np.int32), *held])
        moving = displaced(part, keys_of(taken, codebook.codes), codebook.codes)
        codes = part.codes.copy()
        if len(moving):
            kept = np.delete(part.codes, moving, axis=0)
            all_held = np.concatenate([taken, kept])
            x_MD = vectors(part.days[0], part.item_ids[moving])
            codes[moving] = free_codes(codebook, x_MD, part.codes[moving], all_held)
        found.append(replace(part, codes=codes))
        held.append(codes)
    return found


def displaced(part: Coded, held: np.ndarray, k: int) -> np.ndarray:
    """int64 [M]: places of the items of a day that are not the first at their codes, in order; `held` are keys."""
    keys = keys_of(part.codes, k)
    order = np.lexsort((part.item_ids, -part.counts))
    _, first = np.unique(keys[order], return_index=True)
    free = np.zeros(len(part), bool)
    free[order[first]] = True
    free &= ~np.isin(keys, held)
    return order[~free[order]]
