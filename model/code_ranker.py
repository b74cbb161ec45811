"""A small click model that shows what quantitative codes add (QARM): the same network with and without them.

Base features: user, item, author, tags and duration as embeddings, and the user's newest positives before the impression,
pooled by their mean and by attention of the target (in the manner of Zhou et al., KDD 2018). An item's vector, its VQ and
its RQ codes are added as further features of an item, each in up to three places: of the target; of the sequence, pooled by
attention of the target; crossed with the target, which is how many of the positives share its first code, or its first two,
and the mean of what the base features say of them. Code embeddings are learned with everything else, codes are frozen. A VQ
code is a set of items of one table, so its embedding is their mean; an RQ code is one code a level, so its embedding is a
sum. Labels are learned together, by the sum of their binary cross-entropies over one body.

Shapes: B impressions, H positives, U distinct items of a batch, N items, L levels, K nearest, T tags, Y labels, D width,
V width of the vectors.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, fields
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.auc import aucs

Kind = Literal["vector", "vq", "rq"]
Place = Literal["target", "sequence", "cross"]
PREFIXES = (1, 2)  # codes that a positive shares with the target


@dataclass(frozen=True)
class RankerSettings:
    """The ranker and its training; every system is trained alike."""

    kinds: tuple[Kind, ...] = ()
    places: tuple[Place, ...] = ("target", "sequence", "cross")
    width: int = 64
    hidden: tuple[int, ...] = (256, 64)
    buckets: int = 20_000  # of the hashes of users, of items and of authors
    dropout: float = 0.2
    learning_rate: float = 2e-3
    batch: int = 2048
    epochs: int = 6  # at most; training ends with the first that does not raise the AUC of the first label on validation


@dataclass(frozen=True)
class ItemFeatures:
    """What is known of every item, by dense index. Codes and hashes start at 1; 0 is none."""

    ids_N: Tensor  # int64
    authors_N: Tensor  # int64
    tags_NT: Tensor  # int64
    durations_N: Tensor  # int64
    vectors_NV: Tensor  # float32
    vq_NK: Tensor  # int64, 1 + dense index of each nearest item
    rq_NL: Tensor  # int64, distinct over levels


@dataclass(frozen=True)
class Impressions:
    """Impressions with what was known strictly before each of them."""

    users_I: Tensor  # int64, hashed
    items_I: Tensor  # int64, dense
    history_IH: Tensor  # int64, dense, newest first, -1 behind
    labels_IY: Tensor  # float32

    def __len__(self) -> int:
        return len(self.users_I)

    def take(self, rows: Tensor) -> Impressions:
        return Impressions(*(getattr(self, field.name)[rows] for field in fields(self)))


class CodeRanker(nn.Module):
    """Logits of every label for a batch of impressions."""

    def __init__(self, items: ItemFeatures, labels: int, settings: RankerSettings) -> None:
        super().__init__()
        self.settings, width = settings, settings.width
        for field in fields(items):
            self.register_buffer(field.name, getattr(items, field.name), persistent=False)
        known = {"ids": items.ids_N, "authors": items.authors_N, "durations": items.durations_N, "tags": items.tags_NT}
        sizes = {"users": settings.buckets + 1, **{name: int(values.max()) + 1 for name, values in known.items()}}
        self.tags = nn.EmbeddingBag(sizes.pop("tags"), width, mode="mean", padding_idx=0)
        self.tables = nn.ModuleDict({name: nn.Embedding(size, width) for name, size in sizes.items()})
        if "vector" in settings.kinds:
            self.vector = nn.Linear(items.vectors_NV.shape[1], width)
        if "vq" in settings.kinds:
            self.vq = nn.EmbeddingBag(len(items.ids_N) + 1, width, mode="mean", padding_idx=0)
        if "rq" in settings.kinds:
            self.rq = nn.EmbeddingBag(int(items.rq_NL.max()) + 1, width, mode="sum", padding_idx=0)
        self.apply(_initialise)
        layers: list[nn.Module] = []
        size = self._inputs()
        for hidden in settings.hidden:
            layers += [nn.Linear(size, hidden), nn.ReLU(), nn.Dropout(settings.dropout)]
            size = hidden
        self.body = nn.Sequential(*layers, nn.Linear(size, labels))

    def _inputs(self) -> int:
        """Width of all features side by side."""
        width, places = self.settings.width, self.settings.places
        plain = sum(place in places for place in ("target", "sequence")) * width
        crossed = len(PREFIXES) * (width + 1) if "cross" in places else 0
        return 7 * width + sum(plain + (0 if kind == "vector" else crossed) for kind in self.settings.kinds)

    def forward(self, users_B: Tensor, items_B: Tensor, history_BH: Tensor) -> Tensor:
        """float32 [B, Y]."""
        known_BH = history_BH >= 0
        items_U, place = torch.unique(torch.cat([items_B, history_BH.clamp(min=0).flatten()]), return_inverse=True)
        target_B, positive_BH = place[: len(items_B)], place[len(items_B) :].view(history_BH.shape)
        base = [self.tables[name](self.get_buffer(f"{name}_N")[items_U]) for name in ("ids", "authors", "durations")]
        base.append(self.tags(self.get_buffer("tags_NT")[items_U]))
        token_UD = torch.stack(base).sum(0)
        positives_BHD = token_UD[positive_BH]
        mean_BD = _mean(positives_BHD, known_BH)
        features = [self.tables["users"](users_B), *(table_UD[target_B] for table_UD in base), mean_BD]
        features.append(attended(token_UD[target_B], positives_BHD, known_BH))
        for kind in self.settings.kinds:
            features += self._added(kind, items_U, target_B, positive_BH, known_BH, positives_BHD)
        logits_BY: Tensor = self.body(torch.cat(features, 1))
        return logits_BY

    def _added(
        self, kind: Kind, items_U: Tensor, target_B: Tensor, positive_BH: Tensor, known_BH: Tensor, positives_BHD: Tensor
    ) -> list[Tensor]:
        """The features of one kind in all its places."""
        values = self.get_buffer({"vector": "vectors_NV", "vq": "vq_NK", "rq": "rq_NL"}[kind])[items_U]
        added = []
        if {"target", "sequence"} & {*self.settings.places}:
            code_UD = getattr(self, kind)(values)
        if "target" in self.settings.places:
            added.append(code_UD[target_B])
        if "sequence" in self.settings.places:
            added.append(attended(code_UD[target_B], code_UD[positive_BH], known_BH))
        if "cross" in self.settings.places and kind != "vector":  # a vector has no first code
            for same_BH in shared_prefixes(values[target_B], values[positive_BH], known_BH):
                added += [same_BH.sum(1, keepdim=True).float().log1p(), _mean(positives_BHD, same_BH)]
        return added


def shared_prefixes(target_BL: Tensor, positive_BHL: Tensor, known_BH: Tensor) -> list[Tensor]:
    """bool [B, H] for each of PREFIXES: the known positives whose first codes are those of the target; 0 is no code."""
    longest = max(PREFIXES)
    equal_BHL = (positive_BHL[:, :, :longest] == target_BL[:, None, :longest]) & (target_BL[:, None, :longest] > 0)
    return [known_BH & equal_BHL[:, :, :length].all(2) for length in PREFIXES]


def attended(query_BD: Tensor, values_BHD: Tensor, known_BH: Tensor) -> Tensor:
    """float32 [B, D]: the known values weighted by the softmax of their products with the query; zero without any."""
    scores_BH = (values_BHD @ query_BD[:, :, None])[:, :, 0] / math.sqrt(query_BD.shape[1])
    weight_BH = scores_BH.masked_fill(~known_BH, -1e9).softmax(1) * known_BH
    return (weight_BH[:, None] @ values_BHD)[:, 0]


def _mean(values_BHD: Tensor, kept_BH: Tensor) -> Tensor:
    weight_BH = kept_BH.float() / kept_BH.sum(1, keepdim=True).clamp(min=1)
    return (weight_BH[:, None] @ values_BHD)[:, 0]


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        nn.init.normal_(module.weight, std=0.05)
        if module.padding_idx is not None:
            with torch.no_grad():
                module.weight[module.padding_idx] = 0


def fit_ranker(
    items: ItemFeatures, train: Impressions, validation: Impressions, settings: RankerSettings, seed: int
) -> tuple[CodeRanker, list[float]]:
    """The ranker of the best epoch, and the AUC of the first label on validation after each."""
    torch.manual_seed(seed)
    model = CodeRanker(items, train.labels_IY.shape[1], settings)
    optimiser = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    best, found = copy.deepcopy(model.state_dict()), list[float]()
    for _ in range(settings.epochs):
        model.train()
        for rows in torch.randperm(len(train)).split(settings.batch):
            batch = train.take(rows)
            logits_BY = model(batch.users_I, batch.items_I, batch.history_IH)
            loss = F.binary_cross_entropy_with_logits(logits_BY, batch.labels_IY, reduction="none").mean(0).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        found.append(_first_auc(predict(model, validation), validation))
        if found[-1] < max(found):
            break
        best = copy.deepcopy(model.state_dict())
    model.load_state_dict(best)
    return model, found


def _first_auc(logits_IY: Tensor, impressions: Impressions) -> float:
    scores, labels = logits_IY[:, 0].numpy(), impressions.labels_IY[:, 0].numpy() > 0
    nobody = torch.zeros(len(impressions), dtype=torch.int64).numpy()
    return float(aucs(scores, labels, nobody, (nobody[:1] + 1)[None])[0])


@torch.no_grad()
def predict(model: CodeRanker, impressions: Impressions) -> Tensor:
    """float32 [I, Y] logits."""
    model.eval()
    parts = [impressions.take(rows) for rows in torch.arange(len(impressions)).split(8 * model.settings.batch)]
    return torch.cat([model(part.users_I, part.items_I, part.history_IH) for part in parts])
