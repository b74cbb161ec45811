"""Packed context tokens, and where they lie in a padded grid: a row a request, the tokens of its pathways side by side."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from model.requests import row_of


@dataclass
class Tokens:
    """Packed tokens of R requests, in the order of rows. N tokens, row r owns [offsets[r], offsets[r + 1])."""

    values_ND: Tensor
    offsets: Tensor  # int64 [R + 1]


@dataclass
class Layout:
    """Where the packed tokens of all pathways lie in a padded [R, T] grid."""

    places: Tensor  # int64 [N], row * T + column
    rows: int
    width: int  # T
    valid_RT: Tensor  # bool

    def pad(self, packed_NC: Tensor) -> Tensor:
        """[R, T, C], zero where there is no token."""
        grid = packed_NC.new_zeros(self.rows * self.width, packed_NC.shape[1]).index_copy(0, self.places, packed_NC)
        return grid.view(self.rows, self.width, -1)

    def unpad(self, grid_RTC: Tensor) -> Tensor:
        """[N, C]"""
        return grid_RTC.flatten(0, 1).index_select(0, self.places)

    def bias(self, dtype: torch.dtype) -> Tensor:
        """[R, 1, 1, T]: 0 at tokens, -inf at padding."""
        zeros = torch.zeros(self.valid_RT.shape, dtype=dtype, device=self.valid_RT.device)
        return zeros.masked_fill(~self.valid_RT, float("-inf"))[:, None, None, :]


def layout_of(offsets: list[Tensor]) -> Layout:
    """Rows side by side: in each row the tokens of the pathways follow each other without gaps."""
    lengths = torch.stack([o.diff() for o in offsets])  # [pathways, R]
    firsts = lengths.cumsum(0) - lengths
    total_R = lengths.sum(0)
    width = max(int(total_R.max()), 1) if len(total_R) else 1
    places = []
    for first_R, offset in zip(firsts, offsets, strict=True):
        row = row_of(offset)
        column = first_R[row] + torch.arange(len(row), device=row.device) - offset[row]
        places.append(row * width + column)
    valid_RT = torch.arange(width, device=total_R.device) < total_R[:, None]
    return Layout(torch.cat(places), len(total_R), width, valid_RT)


def ages(offsets: Tensor) -> Tensor:
    """int64 [offsets[-1]]: the place of each element of a jagged array from its row's end, 0 the newest."""
    ends = torch.repeat_interleave(offsets[1:], offsets.diff())
    return ends - 1 - torch.arange(len(ends), device=offsets.device)
