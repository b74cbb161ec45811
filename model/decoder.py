"""What the lazy decoder and its peers share: context once to keys and values, then the codes of the targets through blocks.

Common-context compression: a request's context is encoded once, whatever the number of its targets, and the targets
attend to it as further query rows. Loss positions are the codes of the newest impressions alone (equation 10).
The papers leave open: code embeddings are learned at full width, with one learned position embedding a code.
With `model.target: session` (OneRec, arXiv 2502.18965, section 3.3) the targets of a request are one sequence, in the order
in which they were shown: [BOS, s1, s2, s3] each, and a code is predicted from the codes of the items before it, too. A
request is decoded by its first item, as the others.
Shapes: R requests, B code sequences (targets or beams), S codes, L levels, K codes of a level, D = d_model.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from model.attention import Pair, QueryLayout, target_layout
from model.chunked_cross_entropy import Weigh
from model.context import Context
from model.context_processor import ContextKV
from model.item_head import ItemHead, item_vectors
from model.item_memory import Recalled
from model.item_table import ItemTable
from model.norm import RMSNorm
from model.pathways import INIT_STD
from model.requests import Requests
from schemas.model_config import ModelConfig


@dataclass
class Loss:
    """`total` is the mean over targets and levels, equation 10; `per_level` [L] the means over targets."""

    total: Tensor
    per_level: Tensor
    targets: int


class Outputs(NamedTuple):
    """Of T targets."""

    logits: list[Tensor]  # [T, K] a level, given the true codes before it
    item_nll: Tensor | None  # by the item head the mean of -log p(item), or the sum by the weights asked for
    item_log_probs: Tensor | None  # [T], where weights were asked for; no gradient


class Decoder(nn.Module, ABC):
    """`sizes`: codes a level; `engaged_mask`: the feedback bits that make an event part of the positive pathway.

    An architecture gives the processor of the context and the blocks.
    """

    def __init__(self, config: ModelConfig, sizes: Sequence[int], engaged_mask: int) -> None:
        super().__init__()
        self.config, self.sizes, self.engaged_mask = config, tuple(sizes), engaged_mask
        levels = self.levels = len(sizes)
        d_model = config.d_model
        self.context = Context(config, sizes, engaged_mask)
        self.processor = self.make_processor(config)
        self.bos = nn.Parameter(torch.randn(d_model) * INIT_STD)
        self.joined = config.target == "session"
        self.codes = nn.ModuleList(nn.Embedding(size, d_model) for size in (sizes if self.joined else sizes[:-1]))
        self.positions = nn.Embedding(levels + self.joined, d_model)
        self.blocks = nn.ModuleList(self.make_block(config, layer) for layer in range(config.layers))
        self.head_norms = nn.ModuleList(RMSNorm(d_model) for _ in range(levels))
        self.heads = nn.ModuleList(nn.Linear(d_model, size) for size in sizes)
        self.item_head = ItemHead(config) if config.item_head else None
        self.dropout = nn.Dropout(config.dropout)
        self.recompute = False  # blocks keep no activations for the backward pass
        self.compiled: list[Callable[..., Any]] = []  # the blocks as training steps run them; no modules of this one
        for table in (*self.codes, self.positions):
            nn.init.normal_(table.weight, std=INIT_STD)

    @abstractmethod
    def make_processor(self, config: ModelConfig) -> nn.Module:
        """What makes `ContextKV` of packed context tokens and their layout."""

    @abstractmethod
    def make_block(self, config: ModelConfig, layer: int) -> nn.Module:
        """A block: (h_BSD, pair of keys and values, bias_R11T, layout, past) to (h_BSD, present)."""

    def kv_index(self, layer: int) -> int:
        """Which pair of the context a layer reads (both from 0)."""
        return layer

    def compile_blocks(self) -> None:
        """Training steps run the blocks by torch.compile from here on; evaluation and the names of weights stay plain.
        Sizes that it sees vary become symbolic, and PyTorch's recompile limit bounds the variants of a block."""
        self.compiled = [torch.compile(block) for block in self.blocks]

    def encode(self, requests: Requests, items: ItemTable) -> ContextKV:
        """Keys and values of every request's context, once."""
        return self.processor(*self.context(requests, items))

    def embed(self, prefix_BS: Tensor) -> Tensor:
        """[B, 1 + S, D]: BOS and the codes s1..sS (int64 [B, S]) with their positions."""
        B, S = prefix_BS.shape
        parts = [self.bos.expand(B, 1, -1), *(self.codes[i](prefix_BS[:, i, None]) for i in range(S))]
        return self.dropout(torch.cat(parts, dim=1) + self.positions.weight[: S + 1])

    def hidden(
        self, h_BSD: Tensor, kv: ContextKV, layout: QueryLayout, past: list[Pair] | None = None
    ) -> tuple[Tensor, list[Pair]]:
        """The blocks; `past` and the result's second part are the self-attention keys and values a block."""
        present = []
        for layer, block in enumerate(self.blocks):
            arguments = (h_BSD, kv.pairs[self.kv_index(layer)], kv.bias_R11T, layout, past[layer] if past else None)
            run: Callable[..., Any] = self.compiled[layer] if self.compiled and self.training else block
            if self.recompute and self.training:
                h_BSD, now = checkpoint(run, *arguments, use_reentrant=False)
            else:
                h_BSD, now = run(*arguments)
            present.append(now)
        return h_BSD, present

    def logits(self, h_BD: Tensor, level: int) -> Tensor:
        """[..., K] from the last hidden state at the place that predicts `level`."""
        return self.heads[level](self.head_norms[level](h_BD))

    def item_vectors(self, items: ItemTable) -> Tensor:
        """[N, E]: what the item head compares its queries with."""
        return item_vectors(self.context.fields, items, self.config.item_head_codes)

    def liked(self, requests: Requests, vectors_NE: Tensor) -> Tensor:
        """[R, E]: what the item head learns from the items of the positive pathway themselves."""
        assert self.item_head is not None
        index, offsets = self.context.positive.select(requests)
        return self.item_head.liked(requests.history_items[index], offsets, vectors_NE)

    def own_rows(self, items: ItemTable) -> Tensor:
        """int64 [N]: by which the item head's memory knows the items; -1 none."""
        assert self.context.fields.items is not None
        return self.context.fields.items.own_rows(items.ids[:-1])

    def recalled(self, requests: Requests, rows_N: Tensor) -> Recalled:
        """What the item head's memory holds for the items of the positive pathway, by the `own_rows` of a catalogue."""
        assert self.item_head is not None and self.item_head.memory is not None
        index, offsets = self.context.positive.select(requests)
        items_H = requests.history_items[index]
        rows_H = torch.where(items_H < 0, -1, rows_N[items_H])
        return self.item_head.memory.recall(rows_H, offsets, rows_N)

    def item_queries(self, requests: Requests, kv: ContextKV, vectors_NE: Tensor) -> Tensor:
        """[R, E]: by the item head, before the first code."""
        assert self.item_head is not None
        no_codes_R0 = requests.target_items.new_empty(len(requests), 0)
        h_R1D, _ = self.hidden(self.embed(no_codes_R0), kv, QueryLayout(len(requests), 1, None))
        query_RE: Tensor = self.item_head(h_R1D[:, 0], self.liked(requests, vectors_NE))
        return query_RE

    def forward(self, requests: Requests, items: ItemTable, scored: bool = False, weigh: Weigh | None = None) -> Outputs:
        """Of the targets of the requests; with `scored` by an item head, too, where there is one."""
        kv = self.encode(requests, items)
        codes_TL = items.codes[requests.target_items]
        prefix_TS = codes_TL if self.joined else codes_TL[:, :-1]
        h_TSD, _ = self.hidden(self.embed(prefix_TS), kv, target_layout(requests.target_offsets, self.joined))
        by_item: tuple[Tensor | None, Tensor | None] = None, None
        if self.item_head is not None and scored:
            vectors_NE = self.item_vectors(items)
            liked_TE = self.liked(requests, vectors_NE)[requests.target_rows()]
            by_item = self.item_head.nll(h_TSD[:, 0], liked_TE, vectors_NE, requests.target_items, weigh)
        return Outputs([self.logits(h_TSD[:, level], level) for level in range(self.levels)], *by_item)

    def loss(self, requests: Requests, items: ItemTable, label_smoothing: float = 0.0) -> Loss:
        nll_TL = code_nll(self(requests, items).logits, items.codes[requests.target_items], label_smoothing)
        return Loss(nll_TL.mean(), nll_TL.detach().mean(0), len(nll_TL))

    def target_log_probs(self, requests: Requests, items: ItemTable) -> Tensor:
        """[T, L]: the log-probability of each code of each target."""
        return -code_nll(self(requests, items).logits, items.codes[requests.target_items])


def code_nll(logits: list[Tensor], codes_TL: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """[T, L]: the negative log-likelihood of each code. Every target must be a known item."""
    parts = [
        F.cross_entropy(level, codes, reduction="none", label_smoothing=label_smoothing)
        for level, codes in zip(logits, codes_TL.unbind(1), strict=True)
    ]
    return torch.stack(parts, dim=1)
