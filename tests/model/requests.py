"""Small random catalogues and requests for tests of the model."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from model.architectures import build_decoder
from model.decoder import Decoder
from model.item_table import ItemTable, build_item_table
from model.requests import GROUPS, Requests
from schemas.model_config import ModelConfig

ENGAGED = 0b11
SMALL = ModelConfig(
    d_model=16, layers=2, heads=2, g_kv=2, embed_dim=4, short_length=4, positive_length=6, hash_buckets=50, dropout=0.0
)


def offsets_of(lengths: Tensor) -> Tensor:
    return torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])


def catalogue(num_items: int, num_codes: int = 8, seed: int = 0, buckets: int = 50) -> ItemTable:
    g = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, num_codes, (num_items, 3), generator=g)
    authors = torch.randint(-1, 9, (num_items,), generator=g)
    tags = torch.randint(0, 2**60, (num_items, 3), generator=g)
    absent = torch.rand(num_items, 3, generator=g) > 0.6
    return build_item_table(torch.arange(num_items), codes, authors, tags, absent, [num_codes] * 3, buckets)


def random_requests(
    rows: int, num_items: int, seed: int = 0, history: int = 12, targets: int = 3, least: int = 1, lifelong: int = 9
) -> Requests:
    """Histories of 0 to `history` events (unknown items, authors and durations among them), 0 to 3 attributes, long
    histories of 0 to `lifelong` representatives."""
    g = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, size: int) -> Tensor:
        return torch.randint(low, high, (size,), generator=g)

    def events_of(group: str, offsets: Tensor, longest_us: int) -> dict[str, Tensor]:
        n = int(offsets[-1])
        return {
            f"{group}_offsets": offsets,
            f"{group}_items": integers(-1, num_items, n),
            f"{group}_authors": integers(-1, 9, n),
            f"{group}_ts_us": 10**15 - integers(1, longest_us, n),
            f"{group}_play_ms": integers(-1, 50_000, n),
            f"{group}_duration_ms": integers(-1, 30_000, n),
            f"{group}_feedback": integers(0, 8, n),
        }

    history_offsets = offsets_of(integers(0, history + 1, rows))
    target_offsets = offsets_of(integers(least, targets + 1, rows))
    attribute_offsets = offsets_of(integers(0, 4, rows))
    wanted = int(target_offsets[-1])
    requests = Requests(
        user_ids=integers(0, 100, rows),
        ts_us=torch.full((rows,), 10**15),
        attribute_offsets=attribute_offsets,
        attributes=integers(-(2**62), 2**62, int(attribute_offsets[-1])),
        **events_of("history", history_offsets, 10**12),
        target_offsets=target_offsets,
        target_items=integers(0, num_items, wanted),
        target_feedback=torch.ones(wanted, dtype=torch.long),
        target_impressions=torch.arange(wanted),
    )
    offsets = offsets_of(integers(0, lifelong + 1, rows))
    representatives = events_of("lifelong", offsets, 10**14)
    return dataclasses.replace(requests, **representatives, lifelong_weights=integers(1, 500, int(offsets[-1])))


def small_decoder(seed: int = 0, sizes: tuple[int, ...] = (8, 8, 8), **changes: object) -> Decoder:
    torch.manual_seed(seed)
    return build_decoder(dataclasses.replace(SMALL, **changes), sizes, engaged_mask=ENGAGED)


def only_row(requests: Requests, row: int, target: int | None = None) -> Requests:
    """One request alone, with all its targets or with one of them."""
    parts = {"user_ids": slice(row, row + 1), "ts_us": slice(row, row + 1)}
    values = {name: getattr(requests, name)[where] for name, where in parts.items()}
    for group in GROUPS:
        start, end = getattr(requests, f"{group}_offsets")[row : row + 2].tolist()
        if group == "target" and target is not None:
            start, end = start + target, start + target + 1
        values[f"{group}_offsets"] = torch.tensor([0, end - start])
        for field in dataclasses.fields(requests):
            if field.name.startswith(group) and field.name != f"{group}_offsets":
                values[field.name] = getattr(requests, field.name)[start:end]
    return Requests(**values)
