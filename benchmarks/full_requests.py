"""Made-up requests of one length, and a catalogue behind them: work of a known size for the model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from model.item_table import ItemTable, build_item_table
from model.requests import Requests

LIKED = 1  # makes an event part of the positive pathway, for an engaged mask of 1


def full_requests(rows: int, events: int, targets: int, items: int, seed: int = 0) -> Requests:
    """`rows` requests with one attribute, `events` liked events, as many representatives and `targets` targets each."""
    g = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, size: int) -> Tensor:
        return torch.randint(low, high, (size,), generator=g)

    def events_of(group: str, longest_us: int) -> dict[str, Tensor]:
        return {
            f"{group}_offsets": torch.arange(rows + 1) * events,
            f"{group}_items": integers(0, items, n),
            f"{group}_authors": integers(0, 1000, n),
            f"{group}_ts_us": 10**15 - integers(1, longest_us, n),
            f"{group}_play_ms": integers(0, 50_000, n),
            f"{group}_duration_ms": integers(1, 30_000, n),
            f"{group}_feedback": torch.full((n,), LIKED),
        }

    n, wanted = rows * events, rows * targets
    return Requests(
        user_ids=torch.arange(rows),
        ts_us=torch.full((rows,), 10**15),
        attribute_offsets=torch.arange(rows + 1),
        attributes=integers(0, 1000, rows),
        **events_of("history", 10**12),
        target_offsets=torch.arange(rows + 1) * targets,
        target_items=integers(0, items, wanted),
        target_feedback=torch.full((wanted,), LIKED),
        target_impressions=torch.arange(wanted),
        **events_of("lifelong", 10**14),
        lifelong_weights=integers(1, 500, n),
    )


def random_items(items: int, sizes: Sequence[int], buckets: int, seed: int = 0) -> ItemTable:
    """Items with random codes, authors and tags."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.stack([torch.randint(0, size, (items,), generator=g) for size in sizes], dim=1)
    authors = torch.randint(0, 1000, (items,), generator=g)
    tags = torch.randint(0, 2**60, (items, 3), generator=g)
    absent = torch.rand(items, 3, generator=g) > 0.6
    return build_item_table(torch.arange(items), codes, authors, tags, absent, sizes, buckets)
