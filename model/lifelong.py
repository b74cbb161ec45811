"""The lifelong pathway: cluster representatives of a user's whole history (OneRec-V1, section 2.2, stage 2).

The newest `lifelong_length` representatives are embedded as events are; the number of events that one stands for is a
field of its own, bucketed by logarithm, in the place of a position. Without queries each is a token. With them a QFormer
makes `lifelong_queries` tokens: N_l blocks of h <- CrossAttn(h, v_l, v_l), h <- FFN(RMSNorm(h)) (`model.query_former`).

A request without representatives has no token in the first case. In the second it has as many as any other: the queries
look at one more vector, learned and the same for all, which is all that there is then.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.item_table import ItemTable
from model.layout import Tokens, ages, layout_of
from model.norm import RMSNorm
from model.pathways import INIT_STD, EventFields
from model.query_former import QueryAttention, ResidualFeedForward
from model.requests import Requests, row_of, select_rows
from schemas.model_config import ModelConfig

WEIGHTS = 36  # buckets


class LifelongPathway(nn.Module):
    def __init__(self, fields: EventFields, config: ModelConfig, width: int) -> None:
        super().__init__()
        self.length = config.lifelong_length
        self.weights = nn.Embedding(WEIGHTS, config.embed_dim)
        nn.init.normal_(self.weights.weight, std=INIT_STD)
        self.network = fields.network(width)
        self.queries = LifelongQueries(config, width) if config.lifelong_queries else None

    def forward(self, fields: EventFields, requests: Requests, items: ItemTable) -> Tokens:
        events = requests.events("lifelong")
        every = torch.arange(len(events.items), device=events.offsets.device)
        index, offsets = select_rows(every, events.offsets, ages(events.offsets) < self.length)
        small_NF, large_NC = fields(events, items, index, requests.ts_us[row_of(offsets)])
        weights_N = weight_bucket(requests.lifelong_weights[index])
        hidden = fields.mapped(self.network.first, self.weights, weights_N, small_NF, large_NC)
        tokens = Tokens(self.network.finish(hidden), offsets)
        return tokens if self.queries is None else self.queries(tokens)


class LifelongQueries(nn.Module):
    """Q queries of R requests on their packed representatives: Q tokens each."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        blocks = range(config.lifelong_blocks)
        self.memory_norm = RMSNorm(width)
        self.empty = nn.Parameter(torch.randn(width))
        self.queries = nn.Embedding(config.lifelong_queries, width)
        self.attention = nn.ModuleList(QueryAttention(width, config.heads, config.dropout) for _ in blocks)
        self.ffn = nn.ModuleList(ResidualFeedForward(width, config.ffn_width * width, config.dropout) for _ in blocks)

    def forward(self, tokens: Tokens) -> Tokens:
        layout = layout_of([tokens.offsets])
        empty_R1D = self.empty.to(tokens.values_ND.dtype).expand(layout.rows, 1, -1)
        memory_RMD = self.memory_norm(torch.cat([empty_R1D, layout.pad(tokens.values_ND)], dim=1))
        there_R11M = F.pad(layout.valid_RT, (1, 0), value=True)[:, None, None]
        each = torch.arange(self.queries.num_embeddings, device=tokens.offsets.device)
        h_RQD = self.queries(each).expand(layout.rows, -1, -1)
        for attention, ffn in zip(self.attention, self.ffn, strict=True):
            h_RQD = ffn(attention(h_RQD, memory_RMD, there_R11M))
        rows = torch.arange(layout.rows + 1, device=tokens.offsets.device)
        return Tokens(h_RQD.flatten(0, 1), rows * len(each))


def weight_bucket(weights: Tensor) -> Tensor:
    """Two buckets an octave of the events of a cluster; the last holds all from 185,364 on."""
    return (2 * torch.log2(weights.clamp(min=1).float())).long().clamp(max=WEIGHTS - 1)
