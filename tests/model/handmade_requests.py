"""Requests from plain lists, for tests of whatever ranks."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from model.requests import Requests

LIKED, SEEN = 1, 0  # feedback with and without the bit that the tests call positive
POSITIVE = 1


def requests_by_hand(
    histories: Sequence[Sequence[int]],
    targets: Sequence[Sequence[int]] | None = None,
    feedback: Sequence[Sequence[int]] | None = None,
    users: Sequence[int] | None = None,
) -> Requests:
    """Dense items, oldest first; everything is liked unless `feedback` says otherwise."""
    targets = [[]] * len(histories) if targets is None else targets
    items, offsets = jagged(histories)
    wanted, target_offsets = jagged(targets)
    bits = jagged(feedback)[0] if feedback is not None else torch.full_like(items, LIKED)
    rows = torch.arange(len(histories))
    return Requests(
        user_ids=rows if users is None else torch.tensor(users),
        ts_us=1_000 + rows,
        attribute_offsets=torch.zeros(len(histories) + 1, dtype=torch.long),
        attributes=items[:0],
        history_offsets=offsets,
        history_items=items,
        history_authors=torch.full_like(items, -1),
        history_ts_us=torch.arange(len(items)),
        history_play_ms=torch.full_like(items, -1),
        history_duration_ms=torch.full_like(items, -1),
        history_feedback=bits,
        target_offsets=target_offsets,
        target_items=wanted,
        target_feedback=torch.full_like(wanted, LIKED),
        target_impressions=torch.arange(len(wanted)),
    )


def jagged(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    values = torch.tensor([value for row in rows for value in row], dtype=torch.long)
    return values, torch.tensor([0, *(len(row) for row in rows)]).cumsum(0)
