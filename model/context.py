"""Pathways: a user's features as context tokens (OneRec-V1, section 2.2, which OneRec-V2 refers to).

Each pathway selects its events, embeds them and maps them by its own Dense - LeakyReLU - Dense to the common width
d_in. No token sees another one, so everything here works on packed tokens: one row a real token and none for padding.
Fields that the papers leave open: gap to the request and duration are bucketed by logarithm, play time as the ratio
to the duration, authors and tags are hashed; a token's position counts from the newest event.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.item_table import ItemTable, hashed
from model.requests import Requests, row_of, select_rows
from schemas.feedback import NUM_BITS
from schemas.model_config import ModelConfig

GAPS, RATIOS, DURATIONS = 64, 22, 64  # buckets
BUCKETS = {"gap": GAPS, "play": RATIOS, "duration": DURATIONS}  # of the fields with a small vocabulary
INIT_STD = 0.05


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
        self.items = hashed_table() if "item" in fields else None
        self.register_buffer("bits", 1 << torch.arange(NUM_BITS), persistent=False)
        self.large_width = width * sum(part is not None for part in (self.authors, self.tags, self.feedback, self.items))
        for table in (self.small, self.authors, self.tags, self.items):
            if table is not None:
                nn.init.normal_(table.weight, std=INIT_STD)
        if self.tags is not None:
            with torch.no_grad():
                self.tags.weight[0].zero_()

    def forward(self, requests: Requests, items: ItemTable, index: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Of the events `index` (places in the history arrays) of the requests `rows`: rows of `small`, int64 [N, F],
        and the embeddings of the other fields, [N, large_width]."""
        place = items.place(requests.history_items[index])
        duration = requests.history_duration_ms[index]
        small = list(items.codes[place].unbind(1))
        if "gap" in self.chosen:
            small.append(gap_bucket(requests.ts_us[rows] - requests.history_ts_us[index]))
        if "play" in self.chosen:
            small.append(ratio_bucket(requests.history_play_ms[index], duration))
        if "duration" in self.chosen:
            small.append(duration_bucket(duration))
        large = [self.small.weight.new_zeros(len(index), 0)]
        if self.authors is not None:
            given = requests.history_authors[index]
            large.append(self.authors(torch.where(given < 0, items.authors[place], hashed(given, self.buckets))))
        if self.tags is not None:
            tags = self.tags
            large.append(F.embedding_bag(items.tags[place], tags.weight, mode="mean", padding_idx=0, sparse=tags.sparse))
        if self.feedback is not None:
            flags = (requests.history_feedback[index, None] & self.bits) != 0
            large.append(self.feedback(flags.to(self.small.weight.dtype)))
        if self.items is not None:
            large.append(self.items(items.ids[place]))
        return torch.stack(small, dim=1) + self.starts, torch.cat(large, dim=1)


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
        self.network = FeedForward((len(fields.sizes) + 1) * embed_dim + fields.large_width, width)

    def select(self, requests: Requests) -> tuple[Tensor, Tensor]:
        """Places in the history arrays (int64 [N]), and their offsets (int64 [R + 1])."""
        offsets = requests.history_offsets
        index = torch.arange(len(requests.history_items), device=offsets.device)
        if self.mask is not None:
            index, offsets = select_rows(index, offsets, (requests.history_feedback & self.mask) != 0)
        return select_rows(index, offsets, ages(offsets) < self.length)

    def forward(self, fields: EventFields, requests: Requests, items: ItemTable) -> Tokens:
        index, offsets = self.select(requests)
        small_NF, large_NC = fields(requests, items, index, row_of(offsets))
        places_NF = torch.cat([small_NF, len(fields.small.weight) + ages(offsets)[:, None]], dim=1)
        hidden = self._first_dense(fields, places_NF, large_NC)
        return Tokens(self.network.finish(hidden), offsets)

    def _first_dense(self, fields: EventFields, places_NF: Tensor, large_NC: Tensor) -> Tensor:
        """The network's first Dense on the concatenation of all fields, [N, width].

        A Dense of a concatenation is a sum of parts. Small vocabularies pass through theirs once a value, not once an
        event, which saves a third of the pathway's work.
        """
        dense = self.network.first
        tables = [*fields.small.weight.split(fields.sizes), self.positions.weight]
        *parts, large = dense.weight.split([self.positions.embedding_dim] * len(tables) + [fields.large_width], dim=1)
        mapped_VD = torch.cat([table @ part.T for table, part in zip(tables, parts, strict=True)])
        return F.embedding_bag(places_NF, mapped_VD, mode="sum") + F.linear(large_NC, large, dense.bias)


def context_tokens(requests: Requests, config: ModelConfig, engaged_mask: int) -> Tensor:
    """int64 [R]: how many tokens `Context` makes of each request."""
    offsets = requests.history_offsets
    engaged = torch.cat([offsets.new_zeros(1), ((requests.history_feedback & engaged_mask) != 0).cumsum(0)])
    positive_R = (engaged[offsets[1:]] - engaged[offsets[:-1]]).clamp(max=config.positive_length)
    return 1 + offsets.diff().clamp(max=config.short_length) + positive_R


def ages(offsets: Tensor) -> Tensor:
    """int64 [offsets[-1]]: the place of each element of a jagged array from its row's end, 0 the newest."""
    ends = torch.repeat_interleave(offsets[1:], offsets.diff())
    return ends - 1 - torch.arange(len(ends), device=offsets.device)


class Context(nn.Module):
    """All pathways. A further pathway (lifelong) is one more entry of `_pathways`."""

    def __init__(self, config: ModelConfig, sizes: Sequence[int], engaged_mask: int) -> None:
        super().__init__()
        width = config.d_model  # d_in, which the papers leave open
        self.fields = EventFields(config, sizes)
        self.static = StaticPathway(config, width)
        self.short = EventPathway(self.fields, config.short_length, None, config.embed_dim, width)
        self.positive = EventPathway(self.fields, config.positive_length, engaged_mask, config.embed_dim, width)

    def hashed_tables(self) -> list[nn.Embedding]:
        """The tables of which a batch reads few rows."""
        found = (self.fields.authors, self.fields.tags, self.fields.items, self.static.attributes)
        return [table for table in found if table is not None]

    def _pathways(self, requests: Requests, items: ItemTable) -> list[Tokens]:
        return [
            self.static(requests),
            self.short(self.fields, requests, items),
            self.positive(self.fields, requests, items),
        ]

    def forward(self, requests: Requests, items: ItemTable) -> tuple[Tensor, Layout]:
        """Packed tokens [N, d_in] of all pathways, and where they lie in the padded grid."""
        parts = self._pathways(requests, items)
        return torch.cat([part.values_ND for part in parts]), layout_of([part.offsets for part in parts])


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
