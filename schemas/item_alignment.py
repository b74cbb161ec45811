"""Settings of the aligned item vectors (`embed.aligned`): content that item pairs have bent (OneRec-V1, section 2.1)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from schemas.settings import require, resource


@dataclass(frozen=True)
class ItemAlignmentConfig:
    """An aligner of content blocks, trained on pairs up to the fit day (OneRec-V1, section 2.1; QARM, its item alignment).

    The papers leave open the temperature, the weight of the second loss, whether the first is symmetric and how popular
    negatives count; the defaults are what `make bench-item-vectors` found best on a validation day.
    """

    content: tuple[Literal["text", "attributes", "vector"], ...] = ("text", "attributes", "vector")
    attributes_width: int = 256  # of the hashed attributes that the aligner reads; more than a block of its own needs
    kinds: tuple[Literal["cooccurrence", "swing", "user_to_item"], ...] = ("cooccurrence",)
    model: Literal["mlp", "qformer"] = "mlp"
    width: int = 64  # of the aligned vector; of qformer, all queries side by side
    hidden: int = 128
    layers: int = 2
    heads: int = 4  # of qformer
    queries: int = 4  # of qformer
    block_tokens: int = 4  # of qformer: vectors into which a content block unfolds
    dropout: float = 0.1
    temperature: float = 0.1
    symmetric: bool = True  # the partner is found from either side; else the second item from the first
    popularity_correction: bool = True  # minus the log of the chance that an item is drawn as a negative
    weight_power: float = 0.5  # of a pair's weight in the loss; 0: all pairs count alike
    content_weight: float = 0.3  # of the loss that keeps the content, beside the contrastive one
    epochs: int = 30  # at most
    patience: int = 3  # epochs without a better validation loss end the training
    batch_pairs: int = 512
    learning_rate: float = 1e-3
    weight_decay: float = 0.01
    held_out: Literal["share", "day"] = "share"  # what validates: a share of the pairs, or those of the last train day
    held_out_share: float = 0.1
    seed: int = 0
    num_workers: int = resource(0)  # 0: in this process

    def __post_init__(self) -> None:
        for name in ("content", "kinds"):
            values = getattr(self, name)
            require(len(set(values)) == len(values) > 0, f"embed.aligned.{name}", "must name one or more, each once")
        for name in (
            "attributes_width",
            "width",
            "hidden",
            "layers",
            "heads",
            "queries",
            "block_tokens",
            "epochs",
            "patience",
        ):
            require(getattr(self, name) >= 1, f"embed.aligned.{name}", "must be at least 1")
        require(self.width % self.queries == 0, "embed.aligned.queries", "must divide width")
        require(self.hidden % self.heads == 0, "embed.aligned.heads", "must divide hidden")
        require(self.temperature > 0, "embed.aligned.temperature", "must be above 0")
        require(
            self.batch_pairs >= 2, "embed.aligned.batch_pairs", "must be at least 2: the others of a batch are negatives"
        )
        require(0 < self.held_out_share < 1, "embed.aligned.held_out_share", "must lie between 0 and 1")
        require(0 <= self.dropout < 1, "embed.aligned.dropout", "must be at least 0 and below 1")
