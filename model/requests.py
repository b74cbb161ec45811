"""A batch of requests as jagged tensors: what the model and every baseline see of a user.

Items are dense catalogue indices in [0, N); -1 is an item that the catalogue does not know. Row r owns the slice
[offsets[r], offsets[r + 1]) of every array of its group.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

import torch
from torch import Tensor

GROUPS = ("attribute", "history", "target", "lifelong")  # of jagged arrays in a batch of requests
NOTHING = torch.zeros(0, dtype=torch.int64)


@dataclass
class Events:
    """A group of jagged arrays: the events of R requests, oldest first. The arrays have a place an event, int64."""

    offsets: Tensor  # int64 [R + 1]
    items: Tensor  # dense
    authors: Tensor  # raw author ids, -1 unknown
    ts_us: Tensor
    play_ms: Tensor  # -1 unknown
    duration_ms: Tensor  # -1 unknown
    feedback: Tensor  # bits of schemas.feedback


@dataclass
class Requests:
    """R requests. History holds only events strictly before the request, oldest first. What is lifelong are cluster
    representatives of the history up to an earlier day (see lifelong_sequences), oldest first; left out, there are none.
    """

    user_ids: Tensor  # int64 [R]
    ts_us: Tensor  # int64 [R], time of the first impression
    attribute_offsets: Tensor  # int64 [R + 1]
    attributes: Tensor  # int64 [A], hashed static attributes (64-bit, not yet reduced to a table's size)
    history_offsets: Tensor  # int64 [R + 1]
    history_items: Tensor  # int64 [H], dense
    history_authors: Tensor  # int64 [H], raw author ids, -1 unknown
    history_ts_us: Tensor  # int64 [H]
    history_play_ms: Tensor  # int64 [H], -1 unknown
    history_duration_ms: Tensor  # int64 [H], -1 unknown
    history_feedback: Tensor  # int64 [H], bits of schemas.feedback
    target_offsets: Tensor  # int64 [R + 1]
    target_items: Tensor  # int64 [T], dense
    target_feedback: Tensor  # int64 [T]
    target_impressions: Tensor  # int64 [T]
    lifelong_offsets: Tensor = NOTHING  # int64 [R + 1]
    lifelong_items: Tensor = NOTHING  # int64 [M], dense; this array and the next ones as those of the history
    lifelong_authors: Tensor = NOTHING
    lifelong_ts_us: Tensor = NOTHING
    lifelong_play_ms: Tensor = NOTHING
    lifelong_duration_ms: Tensor = NOTHING
    lifelong_feedback: Tensor = NOTHING
    lifelong_weights: Tensor = NOTHING  # int64 [M], events of the cluster

    def __post_init__(self) -> None:
        if not len(self.lifelong_offsets):
            self.lifelong_offsets = torch.zeros_like(self.history_offsets)

    def __len__(self) -> int:
        return len(self.user_ids)

    def to(self, device: torch.device | str) -> Requests:
        return Requests(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def events(self, group: Literal["history", "lifelong"]) -> Events:
        return Events(**{f.name: getattr(self, f"{group}_{f.name}") for f in fields(Events)})

    def target_rows(self) -> Tensor:
        """int64 [T]: the request of each target."""
        return row_of(self.target_offsets)


def row_of(offsets: Tensor) -> Tensor:
    """int64 [offsets[-1]]: the row that owns each element of a jagged array."""
    lengths = offsets.diff()
    return torch.repeat_interleave(torch.arange(len(lengths), device=offsets.device), lengths)


def select_rows(values: Tensor, offsets: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """The elements of a jagged array where `keep` (bool, one an element) holds, and their new offsets."""
    kept_before = torch.cat([offsets.new_zeros(1), keep.long().cumsum(0)])
    return values[keep], kept_before[offsets]
