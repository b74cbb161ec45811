"""Items scored directly, beside their codes: a request's state before the first code against a vector of every item.

The vector is the embedding of the item's hashed id and, with `model.item_head_codes`, those of its codes, by the tables
that the context reads: what a history teaches of an item counts where the item is a target. With codes an item that nobody
has met has their vector; without, items of few events are told apart better.
The newest engaged items' own vectors, weighed by learned weights of their ages, join the query without passing the blocks
(as in FISM, Kabbur et al., 2013): few data suffice to learn that what was liked together is liked next.
Trained by full softmax over the catalogue beside the codes. `share` is the weight of the item's log-probability where
`model.fused_ranking` adds the two; training sets it by validation. `model.item_memory` may join the head in rankings.
Shapes: R requests, T targets, N items, E = embed_dim, D = d_model.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.chunked_cross_entropy import Weigh, chunked_cross_entropy, weighed_cross_entropy
from model.item_memory import ItemMemory
from model.item_table import ItemTable
from model.layout import ages
from model.norm import RMSNorm
from model.pathways import EventFields
from model.requests import select_rows
from schemas.model_config import ModelConfig

FADING = 0.6  # of the weight from an event to the one before it, at first
LENGTH = 3.0  # of what the newest items give to the query, at first


class ItemHead(nn.Module):
    share: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(config.d_model)
        self.query = nn.Linear(config.d_model, config.embed_dim)
        nn.init.normal_(self.query.weight, std=config.d_model**-0.5)
        self.ages = nn.Parameter(FADING ** torch.arange(config.positive_length))
        self.length = nn.Parameter(torch.tensor([LENGTH]))  # no scalar: FSDP2 spreads none
        self.recent = nn.Linear(config.embed_dim, config.embed_dim, bias=False)
        nn.init.eye_(self.recent.weight)
        self.dropout = nn.Dropout(config.dropout)
        self.memory = ItemMemory(config.item_rows, config.item_neighbours) if config.item_neighbours else None
        self.register_buffer("share", torch.tensor(0.5))
        self.register_load_state_dict_pre_hook(_length_of_earlier_models)

    def liked(self, engaged_M: Tensor, offsets: Tensor, vectors_NE: Tensor) -> Tensor:
        """[R, E]: of the newest engaged items (dense, -1 unknown; offsets int64 [R + 1]); 0 where none is known."""
        engaged_M, offsets = select_rows(engaged_M, offsets, engaged_M >= 0)
        weights_M = self.ages[ages(offsets)]
        sum_RE = F.embedding_bag(
            engaged_M, vectors_NE, offsets, mode="sum", per_sample_weights=weights_M, include_last_offset=True
        )
        liked_RE: Tensor = self.recent(self.dropout(self.length * F.normalize(sum_RE, dim=1)))
        return liked_RE

    def forward(self, states_TD: Tensor, liked_TE: Tensor) -> Tensor:
        """[T, E]: what is compared with the items' vectors."""
        query_TE: Tensor = self.query(self.norm(states_TD)) + liked_TE
        return query_TE

    def nll(
        self, states_TD: Tensor, liked_TE: Tensor, vectors_NE: Tensor, targets_T: Tensor, weigh: Weigh | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The mean negative log-likelihood of the targets (int64 [T], dense) over all N items; with `weigh` the
        weighed sum, and the log-probabilities [T]."""
        query_TE = self(states_TD, liked_TE)
        if weigh is None:
            return chunked_cross_entropy(query_TE, vectors_NE, targets_T), None
        return weighed_cross_entropy(query_TE, vectors_NE, targets_T, weigh)


def _length_of_earlier_models(_: nn.Module, state: dict[str, Tensor], prefix: str, *__: Any) -> None:
    """They hold a scalar."""
    name = f"{prefix}length"
    if name in state and not state[name].dim():
        state[name] = state[name][None]


def item_vectors(fields: EventFields, items: ItemTable, codes: bool) -> Tensor:
    """[N, E], of all items but the unknown one."""
    if fields.items is None:
        raise ValueError("An item head needs `item` among model.fields.")
    vectors_NE: Tensor = fields.items(items.ids[:-1])
    if not codes:
        return vectors_NE
    levels = items.codes.shape[1]
    return vectors_NE + F.embedding_bag(items.codes[:-1] + fields.starts[:levels], fields.small.weight, mode="sum")
