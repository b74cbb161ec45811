"""The baselines, each fitted on the train positives and tuned on validation requests alone.

What is tuned: the half-life of popularity, the neighbourhood of ItemKNN, dropout and epoch of SASRec, by NDCG@10 over the
validation targets; the weight of ItemKNN where SASRec is mixed with it, by NDCG@50 like that of the head's memory. Test
requests never come near this file. A budget in seconds makes SASRec's epoch count depend on the machine; without one the
fit repeats for a number of threads.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from model.item_memory import usual_evidence
from model.itemknn import ItemKnn, KnnSettings, both_ways, co_occurrence, nearest
from model.mixed_ranker import MixedRanker
from model.popularity import Popularity
from model.positives import Positives, ScoreRanker
from model.ranking_metrics import ndcg_at, recall_at, target_ranks
from model.requests import Requests
from model.sasrec import Sasrec, SasrecRanker, SasrecSize
from model.sequence_windows import Windows, cut_windows
from schemas.config import SASREC_ITEMKNN, EvaluateConfig

HALF_LIVES_DAYS = (math.inf, 3.0, 1.0)
SHRINKAGES = (5.0, 20.0)
MEMORIES = (0.0, 0.03, 0.06, 0.11, 0.2, 0.33, 0.5, 0.67, 0.8, 0.89)  # weights of ItemKNN beside another; their odds double
PATIENCE = 10  # epochs without a better validation before SASRec stops
DEPTH = 10
DEEPER = 50  # places by which weights are chosen: among ten, noise is as large as what they differ by


class System(Protocol):
    """What evaluation asks of the model and of every baseline."""

    def rank(self, requests: Requests, k: int, exclude_history: bool = False) -> Tensor:
        """int64 [R, k]: dense catalogue indices, best first, -1 padded."""
        ...


@dataclass
class Fitted:
    """A baseline, what was chosen for it on validation, and its curves (epoch, value)."""

    system: System
    chosen: dict[str, Any]
    curves: dict[str, list[tuple[int, float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Fitting:
    """What all baselines are fitted with. `validation` holds positive targets only."""

    positives: Positives
    validation: Sequence[Requests]
    positive_mask: int
    config: EvaluateConfig
    dated: bool = True  # times are times of day and not mere order
    say: Callable[[str], None] = lambda line: None
    on_best: Callable[[dict[str, Tensor]], None] = lambda weights: None  # given SASRec's weights whenever they improve

    def score(self, system: System, depth: int = DEPTH) -> dict[str, float]:
        """Recall and NDCG at ten and at `depth` on validation; 0 where there are no validation targets."""
        ranks = [np.empty(0, np.int64)]
        for requests in self.validation:
            ranked = system.rank(requests, depth, self.config.mask_history)
            ranks.append(target_ranks(ranked, requests.target_rows(), requests.target_items))
        every = np.concatenate(ranks)
        means: dict[str, np.ndarray] = {}
        for cutoff in sorted({DEPTH, depth}):
            means |= {f"recall@{cutoff}": recall_at(every, cutoff), f"ndcg@{cutoff}": ndcg_at(every, cutoff)}
        return {name: float(values.mean()) if len(values) else 0.0 for name, values in means.items()}

    def best(self, systems: Mapping[float, System], depth: int = DEPTH) -> tuple[float, System, dict[str, float]]:
        """The setting of the system with the best NDCG at `depth`, the first of equals; the system; its scores."""
        scores = {setting: self.score(system, depth) for setting, system in systems.items()}
        setting = max(scores, key=lambda each: scores[each][f"ndcg@{depth}"])
        return setting, systems[setting], scores[setting]


def fit_popularity(fitting: Fitting) -> Fitted:
    """The half-life with the best NDCG@10; plain counts where times are no dates."""
    half_lives = HALF_LIVES_DAYS if fitting.dated else (math.inf,)
    half_life, system, score = fitting.best({each: Popularity(fitting.positives, each) for each in half_lives})
    return Fitted(system, {"half_life_days": str(half_life), "validation": score})


def fit_itemknn(fitting: Fitting, directions: Sequence[bool] = (False, True)) -> Fitted:
    """The neighbourhood with the best NDCG@10, over direction, shrinkage, neighbours and recency."""
    popularity, counts = Popularity(fitting.positives), fitting.positives.counts
    best: tuple[float, Fitted] | None = None
    one_way = co_occurrence(fitting.positives, directed=True)
    for directed in directions:
        pairs = one_way if directed else both_ways(one_way)
        for shrinkage in SHRINKAGES:
            sizes = fitting.config.itemknn_neighbours
            similarities = zip(sizes, nearest(pairs, counts, shrinkage, sizes), strict=True)
            for (neighbours, similarity), recency in itertools.product(similarities, fitting.config.itemknn_recency):
                system = ItemKnn(similarity, recency, popularity, fitting.positive_mask)
                score = fitting.score(system)
                if best is None or score["ndcg@10"] > best[0]:
                    settings = asdict(KnnSettings(neighbours, recency, shrinkage, directed))
                    best = (score["ndcg@10"], Fitted(system, settings | {"validation": score}))
    assert best is not None
    return best[1]


def fit_sasrec(fitting: Fitting) -> Fitted:
    """The dropout and epoch with the best NDCG@10. Draws its randomness from `config.seed` and leaves torch's alone."""
    config = fitting.config
    windows = cut_windows(fitting.positives, config.sasrec_length)
    budget = math.inf if config.sasrec_seconds is None else config.sasrec_seconds / len(config.sasrec_dropouts)
    runs = []
    for dropout in config.sasrec_dropouts:
        size = SasrecSize(
            fitting.positives.num_items,
            width=config.sasrec_width,
            layers=config.sasrec_layers,
            length=config.sasrec_length,
            dropout=dropout,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            runs.append(SasrecTraining(fitting, windows, size, budget).run())
    return max(runs, key=lambda run: run.chosen["validation"]["ndcg@10"])


class SasrecTraining:
    """Epochs over the windows, the best of them by validation kept."""

    def __init__(self, fitting: Fitting, windows: Windows, size: SasrecSize, budget_s: float) -> None:
        self.fitting, self.windows, self.config = fitting, windows, fitting.config
        self.deadline = time.monotonic() + budget_s
        self.model = Sasrec(size)
        self.optimiser = torch.optim.Adam(
            self.model.parameters(), lr=self.config.sasrec_learning_rate, betas=(0.9, 0.98), fused=True
        )
        self.ranker = SasrecRanker(self.model, fitting.positive_mask, Popularity(fitting.positives).places_N)
        self.fitted = Fitted(self.ranker, {"epoch": 0, "dropout": size.dropout, "validation": fitting.score(self.ranker)})
        self.best = {name: value.clone() for name, value in self.model.state_dict().items()}

    def run(self) -> Fitted:
        generator = np.random.default_rng(self.config.seed)
        loss_curve = self.fitted.curves.setdefault("sasrec_loss", [])
        score_curve = self.fitted.curves.setdefault("sasrec_validation_ndcg@10", [])
        for epoch in range(1, self.config.sasrec_epochs + 1):
            started = time.monotonic()
            loss = self.train_epoch(generator)
            score = self.fitting.score(self.ranker)
            loss_curve.append((epoch, loss))
            score_curve.append((epoch, score["ndcg@10"]))
            self.keep(epoch, score)
            self.fitting.say(
                f"sasrec epoch {epoch}: loss {loss:.3f}, validation recall@10 {score['recall@10']:.4f}, "
                f"ndcg@10 {score['ndcg@10']:.4f}, {time.monotonic() - started:.1f} s"
            )
            if time.monotonic() > self.deadline or epoch - self.fitted.chosen["epoch"] >= PATIENCE:
                break
        self.model.load_state_dict(self.best)
        return self.fitted

    def train_epoch(self, generator: np.random.Generator) -> float:
        """Mean loss of a predicted position; the epoch ends early where the budget does."""
        self.model.train()
        total, predicted = 0.0, 0
        for chosen in self.windows.batches(self.config.sasrec_batch_tokens, generator):
            batch = self.windows.batch(chosen)
            loss = self.model.loss(*batch)
            self.optimiser.zero_grad(set_to_none=True)
            loss.backward()
            self.optimiser.step()
            count = int(batch[2].sum())
            total, predicted = total + float(loss.detach()) * count, predicted + count
            if time.monotonic() > self.deadline:
                break
        self.model.eval()
        return total / max(predicted, 1)

    def keep(self, epoch: int, score: dict[str, float]) -> None:
        if score["ndcg@10"] > self.fitted.chosen["validation"]["ndcg@10"]:
            self.fitted.chosen |= {"epoch": epoch, "validation": score}
            self.best = {name: value.clone() for name, value in self.model.state_dict().items()}
            self.fitting.on_best(self.best)


def fit_sasrec_itemknn(fitting: Fitting, fitted: Mapping[str, Fitted]) -> Fitted:
    """SASRec with ItemKNN as its memory, both as they were fitted: what the model's item head has, too."""
    sasrec, itemknn = (fitted[name].system for name in ("sasrec", "itemknn"))
    assert isinstance(sasrec, ScoreRanker) and isinstance(itemknn, ScoreRanker)
    usual = usual_evidence(itemknn.scores(requests) for requests in fitting.validation)
    mixed = {weight: MixedRanker(sasrec, itemknn, usual, weight) for weight in MEMORIES}
    weight, system, score = fitting.best(mixed, DEEPER)
    return Fitted(system, {"weight": weight, "validation": score})


FITS: dict[str, Callable[[Fitting], Fitted]] = {
    "popularity": fit_popularity,
    "itemknn": fit_itemknn,
    "sasrec": fit_sasrec,
}


def fit_baselines(fitting: Fitting) -> dict[str, Fitted]:
    """Those of the configuration, in its order."""
    fitted: dict[str, Fitted] = {}
    for name in fitting.config.baselines:
        fitted[name] = fit_sasrec_itemknn(fitting, fitted) if name == SASREC_ITEMKNN else FITS[name](fitting)
        fitting.say(f"{name}: validation ndcg@10 {fitted[name].chosen['validation']['ndcg@10']:.4f}")
    return fitted
