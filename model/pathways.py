"""Pathways: a user's features as context tokens (OneRec-V1, section 2.2, which OneRec-V2 refers to).

Each pathway selects its events, embeds them and maps them by its own Dense - LeakyReLU - Dense to the common width
d_in. No token sees another one, so everything here works on packed tokens: one row a real token and none for padding.
Fields that the papers leave open: gap to the request and duration are bucketed by logarithm, play time as the ratio
to the duration, authors and tags are hashed; a token's position counts from the newest event.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.item_table import ItemEmbeddings, ItemTable, hashed
from model.layout import Tokens, ages
from model.requests import Events, Requests, row_of, select_rows
from schemas.feedback import NUM_BITS
from schemas.model_config import ModelConfig

GAPS, RATIOS, DURATIONS = 64, 22, 64  # buckets
BUCKETS = {"gap": GAPS, "play": RATIOS, "duration": DURATIONS}  # of the fields with a small vocabulary
INIT_STD = 0.05


class FeedForward(nn.Module):
    """h = Dense(LeakyReLU(Dense(f)))."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width_in, width)
        self.second = nn.Linear(width, width)

    def forward(self, f: Tensor) -> Tensor:
        return self.finish(self.first(f))

    def finish(self, hidden: Tensor) -> Tensor:
        return self.second(F.leaky_relu(hidden))


class EventFields(nn.Module):
    """Embeddings of an event's fields but its position; shared by the pathways that read events."""

    starts: Tensor
    bits: Tensor

    def __init__(self, config: ModelConfig, sizes: Sequence[int]) -> None:
        super().__init__()
        self.buckets, self.chosen = config.hash_buckets, config.fields
        width, fields = config.embed_dim, config.fields
        self.sizes = [size + 1 for size in sizes]  # +1: the unknown item's code
        self.sizes += [size for name, size in BUCKETS.items() if name in fields]
        self.small = nn.Embedding(sum(self.sizes), width)  # the small vocabularies one after the other
        all_sizes = torch.tensor(self.sizes)
        self.register_buffer("starts", all_sizes.cumsum(0) - all_sizes, persistent=False)
        hashed_table = partial(nn.Embedding, config.hash_buckets + 1, width)
        self.authors = hashed_table() if "author" in fields else None
        self.tags = hashed_table(padding_idx=0) if "tags" in fields else None
        self.feedback = nn.Linear(NUM_BITS, width) if "feedback" in fields else None
        self.items = ItemEmbeddings(config.item_rows, config.hash_buckets, width) if "item" in fields else None
        self.register_buffer("bits", 1 << torch.arange(NUM_BITS), persistent=False)
        self.large_width = width * sum(part is not None for part in (self.authors, self.tags, self.feedback, self.items))
        for table in (self.small, self.authors, self.tags, self.items):
            if table is not None:
                nn.init.normal_(table.weight, std=INIT_STD)
        if self.tags is not None:
            with torch.no_grad():
                self.tags.weight[0].zero_()

    def forward(self, events: Events, items: ItemTable, index: Tensor, now_us: Tensor) -> tuple[Tensor, Tensor]:
        """Of the events `index` (int64 [N], places in the arrays) of requests at `now_us` (int64 [N]): rows of `small`,
        int64 [N, F], and the embeddings of the other fields, [N, large_width]."""
        place = items.place(events.items[index])
        duration = events.duration_ms[index]
        small = list(items.codes[place].unbind(1))
        if "gap" in self.chosen:
            small.append(gap_bucket(now_us - events.ts_us[index]))
        if "play" in self.chosen:
            small.append(ratio_bucket(events.play_ms[index], duration))
        if "duration" in self.chosen:
            small.append(duration_bucket(duration))
        large = [self.small.weight.new_zeros(len(index), 0)]
        if self.authors is not None:
            given = events.authors[index]
            large.append(self.authors(torch.where(given < 0, items.authors[place], hashed(given, self.buckets))))
        if self.tags is not None:
            tags = self.tags
            large.append(F.embedding_bag(items.tags[place], tags.weight, mode="mean", padding_idx=0, sparse=tags.sparse))
        if self.feedback is not None:
            flags = (events.feedback[index, None] & self.bits) != 0
            large.append(self.feedback(flags.to(self.small.weight.dtype)))
        if self.items is not None:
            large.append(self.items(items.ids[place]))
        return torch.stack(small, dim=1) + self.starts, torch.cat(large, dim=1)

    def mapped(self, dense: nn.Linear, own: nn.Embedding, own_N: Tensor, small_NF: Tensor, large_NC: Tensor) -> Tensor:
        """A Dense on the concatenation of all fields and a pathway's `own` with the values `own_N`, [N, width].

        A Dense of a concatenation is a sum of parts. Small vocabularies pass through theirs once a value, not once an
        event, which saves a third of the pathway's work.
        """
        tables = [*self.small.weight.split(self.sizes), own.weight]
        *parts, large = dense.weight.split([self.small.embedding_dim] * len(tables) + [self.large_width], dim=1)
        mapped_VD = torch.cat([table @ part.T for table, part in zip(tables, parts, strict=True)])
        places_NF = torch.cat([small_NF, len(self.small.weight) + own_N[:, None]], dim=1)
        return F.embedding_bag(places_NF, mapped_VD, mode="sum") + F.linear(large_NC, large, dense.bias)

    def network(self, width: int) -> FeedForward:
        """Of a pathway with a field of its own."""
        return FeedForward((len(self.sizes) + 1) * self.small.embedding_dim + self.large_width, width)


def gap_bucket(gap_us: Tensor) -> Tensor:
    """Two buckets an octave of seconds: 0 is under half a second, 63 over a thousand years."""
    seconds = gap_us.clamp(min=0).float() / 1e6
    return (2 * torch.log2(1 + seconds)).long().clamp(max=GAPS - 1)


def ratio_bucket(play_ms: Tensor, duration_ms: Tensor) -> Tensor:
    """0 unknown; then tenths of the duration, up to twice."""
    ratio = (10 * play_ms.float() / duration_ms.clamp(min=1).float()).long().clamp(0, RATIOS - 2)
    return torch.where((play_ms < 0) | (duration_ms < 0), 0, 1 + ratio)


def duration_bucket(duration_ms: Tensor) -> Tensor:
    """0 unknown; then two buckets an octave of milliseconds."""
    bucket = 1 + (2 * torch.log2(1 + duration_ms.clamp(min=0).float())).long()
    return torch.where(duration_ms < 0, 0, bucket.clamp(max=DURATIONS - 1))


class StaticPathway(nn.Module):
    """One token: the mean of the hashed attributes' embeddings, or a learned one where a user has none."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.buckets = config.hash_buckets
        self.attributes = nn.Embedding(config.hash_buckets, config.embed_dim)
        nn.init.normal_(self.attributes.weight, std=INIT_STD)
        self.empty = nn.Parameter(torch.randn(config.embed_dim) * INIT_STD)
        self.network = FeedForward(config.embed_dim, width)

    def forward(self, requests: Requests) -> Tokens:
        offsets = requests.attribute_offsets
        places = requests.attributes.remainder(self.buckets)
        table, sparse = self.attributes.weight, self.attributes.sparse
        mean_RE = F.embedding_bag(places, table, offsets, mode="mean", sparse=sparse, include_last_offset=True)
        mean_RE = torch.where((offsets.diff() == 0)[:, None], self.empty, mean_RE)
        return Tokens(self.network(mean_RE), torch.arange(len(offsets), device=offsets.device))


class EventPathway(nn.Module):
    """The newest `length` events, of all or of those with a bit of `mask`; one token an event."""

    def __init__(self, fields: EventFields, length: int, mask: int | None, embed_dim: int, width: int) -> None:
        super().__init__()
        self.length, self.mask = length, mask
        self.positions = nn.Embedding(length, embed_dim)
        nn.init.normal_(self.positions.weight, std=INIT_STD)
        self.network = fields.network(width)

    def select(self, requests: Requests) -> tuple[Tensor, Tensor]:
        """Places in the history arrays (int64 [N]), and their offsets (int64 [R + 1])."""
        offsets = requests.history_offsets
        index = torch.arange(len(requests.history_items), device=offsets.device)
        if self.mask is not None:
            index, offsets = select_rows(index, offsets, (requests.history_feedback & self.mask) != 0)
        return select_rows(index, offsets, ages(offsets) < self.length)

    def forward(self, fields: EventFields, requests: Requests, items: ItemTable) -> Tokens:
        index, offsets = self.select(requests)
        small_NF, large_NC = fields(requests.events("history"), items, index, requests.ts_us[row_of(offsets)])
        hidden = fields.mapped(self.network.first, self.positions, ages(offsets), small_NF, large_NC)
        return Tokens(self.network.finish(hidden), offsets)
