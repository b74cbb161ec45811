"""A request's context: the tokens of all pathways (`model.pathways`, `model.lifelong`), packed, and where they lie."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.item_table import ItemTable
from model.layout import Layout, Tokens, layout_of
from model.lifelong import LifelongPathway
from model.pathways import EventFields, EventPathway, StaticPathway
from model.requests import Requests
from schemas.model_config import ModelConfig


def context_tokens(requests: Requests, config: ModelConfig, engaged_mask: int) -> Tensor:
    """int64 [R]: how many tokens `Context` makes of each request."""
    offsets = requests.history_offsets
    engaged = torch.cat([offsets.new_zeros(1), ((requests.history_feedback & engaged_mask) != 0).cumsum(0)])
    positive_R = (engaged[offsets[1:]] - engaged[offsets[:-1]]).clamp(max=config.positive_length)
    lifelong_R = requests.lifelong_offsets.diff().clamp(max=config.lifelong_length)
    if config.lifelong_queries:
        lifelong_R = torch.full_like(lifelong_R, config.lifelong_queries)
    return 1 + offsets.diff().clamp(max=config.short_length) + positive_R + lifelong_R


class Context(nn.Module):
    """All pathways. A further one is one more entry of `_pathways`."""

    def __init__(self, config: ModelConfig, sizes: Sequence[int], engaged_mask: int) -> None:
        super().__init__()
        width = config.d_model  # d_in, which the papers leave open
        self.fields = EventFields(config, sizes)
        self.static = StaticPathway(config, width)
        self.short = EventPathway(self.fields, config.short_length, None, config.embed_dim, width)
        self.positive = EventPathway(self.fields, config.positive_length, engaged_mask, config.embed_dim, width)
        self.lifelong = LifelongPathway(self.fields, config, width) if config.lifelong_length else None
        self.dropout = nn.Dropout(config.context_dropout)

    def hashed_tables(self) -> list[nn.Embedding]:
        """The tables of which a batch reads few rows."""
        found = (self.fields.authors, self.fields.tags, self.fields.items, self.static.attributes)
        return [table for table in found if table is not None]

    def _pathways(self, requests: Requests, items: ItemTable) -> list[Tokens]:
        events = [path for path in (self.short, self.positive, self.lifelong) if path is not None]
        return [self.static(requests), *(path(self.fields, requests, items) for path in events)]

    def forward(self, requests: Requests, items: ItemTable) -> tuple[Tensor, Layout]:
        """Packed tokens [N, d_in] of all pathways, and where they lie in the padded grid."""
        parts = self._pathways(requests, items)
        tokens_ND = self.dropout(torch.cat([part.values_ND for part in parts]))
        return tokens_ND, layout_of([part.offsets for part in parts])
