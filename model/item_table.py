"""What the model knows of each item of a catalogue: codes, author and tags as places in embedding tables.

The table is data and no part of the weights: a model trained on one catalogue ranks over any later one of the same
codebook. Its last row stands for an item that the catalogue does not know; the dense index -1 leads there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

MAX_TAGS = 3
_MIX = -7046029254386353131  # 2^64 / golden ratio as int64: spreads consecutive ids


@dataclass(frozen=True)
class ItemTable:
    """N items and, as row N, the unknown one. K is the number of codes of a level."""

    codes: Tensor  # int64 [N + 1, L]; K in the last row
    authors: Tensor  # int64 [N + 1], 1 + bucket; 0 unknown
    tags: Tensor  # int64 [N + 1, MAX_TAGS], 1 + bucket; 0 none
    ids: Tensor  # int64 [N + 1], 1 + bucket of the item's own id; 0 unknown

    def __len__(self) -> int:
        return len(self.codes) - 1

    def place(self, items: Tensor) -> Tensor:
        """Rows of dense indices, with -1 at the last row."""
        return torch.where(items < 0, len(self), items)

    def to(self, device: torch.device | str) -> ItemTable:
        return ItemTable(**{f.name: getattr(self, f.name).to(device) for f in fields(self)})


def hashed(ids: Tensor, buckets: int) -> Tensor:
    """1 + bucket of each id (int64), the same on every machine; 0 where the id is negative."""
    mixed = ids * _MIX
    mixed = (mixed ^ (mixed >> 29)) * _MIX
    return torch.where(ids < 0, 0, 1 + (mixed ^ (mixed >> 32)).remainder(buckets))


def build_item_table(
    ids: Tensor, codes: Tensor, authors: Tensor, tag_hashes: Tensor, no_tag: Tensor, sizes: Sequence[int], buckets: int
) -> ItemTable:
    """`ids` int64 [N], `codes` int [N, L], raw `authors` int64 [N] (-1 unknown), `tag_hashes` int64 [N, MAX_TAGS] with the
    bool mask `no_tag` of absent ones; `sizes` are the codes of each level, `buckets` those of the hashes."""
    tags = torch.where(no_tag, 0, 1 + tag_hashes.remainder(buckets))
    return ItemTable(
        codes=torch.cat([codes.long(), torch.tensor([list(sizes)], device=codes.device)]),
        authors=with_unknown(hashed(authors, buckets)),
        tags=with_unknown(tags),
        ids=with_unknown(hashed(ids, buckets)),
    )


def with_unknown(places: Tensor) -> Tensor:
    """A row of zeros more, for the item that the catalogue does not know."""
    return torch.cat([places, places.new_zeros(1, *places.shape[1:])])
