"""The model's settings: the lazy decoder, its peers, experts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from schemas.settings import later, require


@dataclass(frozen=True)
class MoeConfig:
    """Experts instead of dense feed-forward parts (OneRec-V2, section 2.2.2); without `experts` all are dense."""

    experts: int = 0  # routed ones of a layer
    active: int = 3  # of a token
    shared: int = 1  # that every token passes
    width: int = 1408  # hidden, of one expert
    first_dense: int = 2  # layers
    encoder: bool = False  # of encoder_decoder: its encoder, too
    speed: float = 1e-3  # of the balancing biases, a step

    def __post_init__(self) -> None:
        require(self.experts >= 0, "model.moe.experts", "must be at least 0")
        require(not self.experts or 1 <= self.active <= self.experts, "model.moe.active", "must lie between 1 and experts")
        require(self.shared >= 0 and self.width >= 1, "model.moe.width", "must be at least 1, and shared at least 0")


EventField = Literal["item", "author", "tags", "feedback", "gap", "play", "duration"]


@dataclass(frozen=True)
class ModelConfig:
    """The lazy decoder (OneRec-V2, section 2.2) and its peers. Names follow the paper's Table 5 and equations 1 to 10."""

    architecture: Literal["lazy", "encoder_decoder", "decoder_only"] = "lazy"
    target: Literal["item", "session"] = "item"  # session: the targets of a request are one sequence
    d_model: int = 128
    layers: int = 4  # of encoder_decoder: of the decoder
    encoder_layers: int = 0  # of encoder_decoder
    heads: int = 4
    ffn_width: int = 4  # of d_model
    embed_dim: int = 32  # of one code, one hashed field
    fields: tuple[EventField, ...] = (
        "author",
        "tags",
        "feedback",
        "gap",
        "play",
        "duration",
    )  # of an event, beside its codes
    l_kv: int = 1  # of lazy, as s_kv
    s_kv: Literal[1, 2] = 1
    g_kv: int = 4
    short_length: int = 20
    positive_length: int = 50
    lifelong_length: int = later(0)  # newest representatives of lifelong_sequences; 0: no such pathway
    lifelong_queries: int = later(0)  # of a QFormer that makes a token each of them; 0: a token a representative
    lifelong_blocks: int = later(2)  # of that QFormer
    hash_buckets: int = 20_000  # of authors, tags and attributes, and of items where `fields` names them
    item_rows: int = later(0)  # the most engaged items, with a row each in the table of item ids; others share hash_buckets
    item_head: bool = later(False)  # scores every item directly, too; see model/item_head.py
    item_head_codes: bool = later(True)  # an item's vector is its id's and its codes', not its id's alone
    item_neighbours: int = later(0)  # of an item with a row, in a memory beside the head; see model/item_memory.py
    dropout: float = 0.1
    context_dropout: float = later(0.0)  # of the context's tokens, as they leave the pathways
    moe: MoeConfig = field(default_factory=MoeConfig)

    @property
    def context_length(self) -> int:
        """Tokens of a context at most, the static one included."""
        return 1 + self.short_length + self.positive_length + (self.lifelong_queries or self.lifelong_length)

    def has_experts(self, layer: int) -> bool:
        """Whether the layer (from 0) has experts; a negative one never has."""
        return self.moe.experts > 0 and layer >= max(0, self.moe.first_dense)

    def __post_init__(self) -> None:
        require(self.d_model % self.heads == 0, "model.heads", "must divide d_model")
        require(self.heads % self.g_kv == 0, "model.g_kv", "must divide heads")
        require(len(set(self.fields)) == len(self.fields), "model.fields", "must name each field once")
        require(self.item_rows >= 0, "model.item_rows", "must be at least 0")
        read = not self.item_rows or "item" in self.fields
        require(read, "model.item_rows", "needs `item` among model.fields: nothing else reads item ids")
        require(self.item_neighbours >= 0, "model.item_neighbours", "must be at least 0")
        kept = not self.item_neighbours or (self.item_head and self.item_rows > 0)
        require(kept, "model.item_neighbours", "needs model.item_head and model.item_rows: the memory lies beside the head")
        tied = not self.item_head or "item" in self.fields
        require(tied, "model.item_head", "needs `item` among model.fields: its vectors are those of the context")
        require(1 <= self.l_kv <= self.layers, "model.l_kv", "must lie between 1 and layers")
        for name in ("lifelong_length", "lifelong_queries"):
            require(getattr(self, name) >= 0, f"model.{name}", "must be at least 0")
        read = self.lifelong_length > 0 or not self.lifelong_queries
        require(read, "model.lifelong_queries", "must be 0 where model.lifelong_length is 0: they have nothing to read")
        require(self.lifelong_blocks >= 1, "model.lifelong_blocks", "must be at least 1")
        encodes = (self.architecture == "encoder_decoder") == (self.encoder_layers > 0)
        require(encodes, "model.encoder_layers", "must be above 0 for architecture encoder_decoder, and 0 for the others")
