"""The codes of a catalogue as a trie of arrays: which codes may follow a prefix, and which items a whole triple names.

The nodes of a level are its distinct prefixes in lexicographic order, so the children of a node are one range of the
next level (CSR): memory grows with the prefixes, never with prefixes * K, K the codes of a level. Where a level's whole
table of masks is small it is kept ready, otherwise masks are made for the beams at hand.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

TABLE_CELLS = 2**26  # a level's table of masks is kept up to this size, in bytes


class Trie:
    """Over `codes` int [N, L] of dense items with `ranks` int [N] among the items that share them.

    A node of level l is an int64 index into that level's prefixes; level 0 has the root alone, leaves have level L.
    """

    def __init__(self, codes: Tensor, ranks: Tensor, num_codes: Sequence[int], table_cells: int = TABLE_CELLS) -> None:
        codes = codes.long()
        self.num_items, self.levels = codes.shape
        self.num_codes = tuple(num_codes)  # of each level
        node_N = codes.new_zeros(self.num_items)
        self.keys: list[Tensor] = []  # of level l + 1: parent * K + code, ascending
        self.starts: list[Tensor] = []  # children of node p of level l: [starts[l][p], starts[l][p + 1])
        sizes = [1]
        for level in range(self.levels):
            keys, node_N = torch.unique(node_N * num_codes[level] + codes[:, level], return_inverse=True)
            counts = torch.bincount(keys // num_codes[level], minlength=sizes[-1])
            self.keys.append(keys)
            self.starts.append(torch.cat([counts.new_zeros(1), counts.cumsum(0)]))
            sizes.append(len(keys))
        self.sizes = tuple(sizes)
        by_rank = torch.argsort(ranks.long(), stable=True)
        self.leaf_items = by_rank[torch.argsort(node_N[by_rank], stable=True)]
        counts = torch.bincount(node_N, minlength=sizes[-1])
        self.leaf_starts = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        self._tables = [
            self._table(level) if sizes[level] * num_codes[level] <= table_cells else None for level in range(self.levels)
        ]

    def children_mask(self, level: int, nodes: Tensor) -> Tensor:
        """bool [..., K]: the codes that may follow the nodes (int64 [...]) of `level`; none for the node -1."""
        table = self._tables[level]
        if table is not None:
            mask = table[nodes.clamp(min=0)]
            return mask & (nodes >= 0)[..., None]
        flat = nodes.flatten()
        first = self.starts[level][flat.clamp(min=0)]
        counts = torch.where(flat < 0, 0, self.starts[level][flat.clamp(min=0) + 1] - first)
        row = torch.repeat_interleave(torch.arange(len(flat), device=flat.device), counts)
        within = torch.arange(len(row), device=flat.device) - (counts.cumsum(0) - counts)[row]
        num_codes = self.num_codes[level]
        mask = torch.zeros(len(flat), num_codes, dtype=torch.bool, device=flat.device)
        mask[row, self.keys[level][first[row] + within] % num_codes] = True
        return mask.view(*nodes.shape, num_codes)

    def child(self, level: int, nodes: Tensor, codes: Tensor) -> Tensor:
        """int64 [...]: the node of `level` + 1 below each node by its code, -1 where there is none."""
        wanted = nodes * self.num_codes[level] + codes
        place = torch.searchsorted(self.keys[level], wanted.contiguous()).clamp(max=len(self.keys[level]) - 1)
        return torch.where((self.keys[level][place] == wanted) & (nodes >= 0), place, -1)

    def find(self, codes: Tensor) -> Tensor:
        """int64 [...]: the leaf of each code sequence (int64 [..., L]), -1 where no item has it."""
        nodes = torch.zeros(codes.shape[:-1], dtype=torch.long, device=codes.device)
        for level in range(self.levels):
            nodes = self.child(level, nodes, codes[..., level])
        return nodes

    def items(self, leaves: Tensor) -> tuple[Tensor, Tensor]:
        """Dense items below the leaves (int64 [M], -1 for none), ordered by rank: (items, offsets int64 [M + 1])."""
        known = leaves.clamp(min=0)
        first = self.leaf_starts[known]
        counts = torch.where(leaves < 0, 0, self.leaf_starts[known + 1] - first)
        offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
        row = torch.repeat_interleave(torch.arange(len(leaves), device=leaves.device), counts)
        within = torch.arange(len(row), device=leaves.device) - offsets[row]
        return self.leaf_items[first[row] + within], offsets

    def _table(self, level: int) -> Tensor:
        keys = self.keys[level]
        num_codes = self.num_codes[level]
        table = torch.zeros(self.sizes[level], num_codes, dtype=torch.bool, device=keys.device)
        table[keys // num_codes, keys % num_codes] = True
        return table
