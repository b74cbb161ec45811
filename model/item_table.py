"""What the model reads of each item of a catalogue: its id, and codes, author and tags as places in embedding tables.

The table is data and no part of the weights: a model trained on one catalogue ranks over any later one of the same
codebook. Its last row stands for an item that the catalogue does not know; the dense index -1 leads there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

MAX_TAGS = 3
NO_ID = torch.iinfo(torch.int64).max  # of a row that no item has yet; ids in use are below
_MIX = -7046029254386353131  # 2^64 / golden ratio as int64: spreads consecutive ids


@dataclass(frozen=True)
class ItemTable:
    """N items and, as row N, the unknown one. K is the number of codes of a level."""

    codes: Tensor  # int64 [N + 1, L]; K in the last row
    authors: Tensor  # int64 [N + 1], 1 + bucket; 0 unknown
    tags: Tensor  # int64 [N + 1, MAX_TAGS], 1 + bucket; 0 none
    ids: Tensor  # int64 [N + 1], the items' own; -1 unknown

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
        ids=with_unknown(ids, -1),
    )


def with_unknown(values: Tensor, unknown: int = 0) -> Tensor:
    """A row more, for the item that the catalogue does not know."""
    return torch.cat([values, values.new_full((1, *values.shape[1:]), unknown)])


class ItemEmbeddings(nn.Embedding):
    """Of item ids: `rows` items have a row each, all others share `buckets` rows by a hash, the unknown one has row 0.

    Which items have their own is settled once, before training, and is part of the weights: a later catalogue, and a
    training that goes on, find every item where it was.
    """

    own_ids: Tensor

    def __init__(self, rows: int, buckets: int, width: int) -> None:
        super().__init__(1 + buckets + rows, width)
        self.buckets = buckets
        self.register_buffer("own_ids", torch.full((rows,), NO_ID), persistent=rows > 0)  # int64 [rows], ascending

    def give_rows(self, ids: Tensor) -> None:
        """To the items of these distinct ids (int64), `rows` at most, and to no others."""
        self.own_ids.fill_(NO_ID)
        self.own_ids[: len(ids)] = ids.sort().values

    def places(self, ids: Tensor) -> Tensor:
        """The row of each id (int64, -1 unknown)."""
        shared = hashed(ids, self.buckets)
        if not len(self.own_ids):
            return shared
        own = torch.searchsorted(self.own_ids, ids).clamp(max=len(self.own_ids) - 1)
        return torch.where(self.own_ids[own] == ids, 1 + self.buckets + own, shared)

    def own_rows(self, ids: Tensor) -> Tensor:
        """Which of the `rows` rows is each id's own (int64, -1 none)."""
        return (self.places(ids) - 1 - self.buckets).clamp(min=-1)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(self.places(ids))
