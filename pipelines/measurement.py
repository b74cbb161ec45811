"""Ranks queries by every system, batch by batch, and turns the ranks into metrics, intervals and breakdowns.

Holds one rank a target and system, never the lists. Knows no table and no engine: requests in, numbers out.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from model.positives import history_positives, take_rows
from model.ranking_metrics import Estimate, bootstrap_means, columns_of, estimates, recall_at, target_ranks
from model.requests import Requests
from pipelines.baselines import System
from pipelines.sampling import Sample
from schemas.config import EvaluateConfig

COVERAGE_DEPTH = 10
SAMPLES, SAMPLE_HISTORY, SAMPLE_ITEMS = 10, 3, 5
ITEM_GROUPS = ("head", "tail", "cold")
HISTORY_GROUPS = {"0": (0, 0), "1-5": (1, 5), "6-20": (6, 20), ">20": (21, np.iinfo(np.int64).max)}
MODEL = "model"


def item_groups(train_counts: np.ndarray) -> np.ndarray:
    """int64 [N]: 0 head (the most popular items that make half of the train positives), 1 tail, 2 cold (none)."""
    order = np.argsort(-train_counts, kind="stable")
    before = np.cumsum(train_counts[order]) - train_counts[order]
    groups = np.full(len(train_counts), 1)
    groups[order[before < train_counts.sum() / 2]] = 0
    groups[train_counts == 0] = 2
    return groups


@dataclass
class Measurement:
    """Accumulates ranks of targets; `report` makes the evaluation's manifest."""

    systems: Mapping[str, System]
    config: EvaluateConfig
    train_counts: np.ndarray  # int64 [N]
    item_ids: np.ndarray  # int64 [N], of dense indices
    positive_mask: int
    deep_sample: Sample
    seconds: dict[str, float] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    queries: int = 0
    deep_queries: int = 0
    _parts: dict[str, list[np.ndarray]] = field(default_factory=dict)
    _covered: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def depth(self) -> int:
        return max(*self.config.cutoffs, COVERAGE_DEPTH)

    def add(self, requests: Requests) -> None:
        """Ranks one batch of queries, whose targets are all positive, by all systems."""
        rows = requests.target_rows()
        deep_R = self.deep_sample.keeps(requests.user_ids.numpy(), requests.ts_us.numpy())
        history = history_positives(requests, self.positive_mask)[1].diff()
        self.queries += len(requests)
        self.deep_queries += int(deep_R.sum())
        self._keep("user", requests.user_ids[rows].numpy())
        self._keep("item", requests.target_items.numpy())
        self._keep("history", history[rows].numpy())
        self._keep("deep", deep_R[rows.numpy()])
        deep = take_rows(requests, torch.from_numpy(np.flatnonzero(deep_R)))
        for name, system in self.systems.items():
            started = time.monotonic()
            ranked = system.rank(requests, self.depth, self.config.mask_history)
            self._keep(rank_of(name), target_ranks(ranked, rows, requests.target_items))
            covered = self._covered.setdefault(name, np.zeros(len(self.item_ids) + 1, bool))
            covered[ranked[:, :COVERAGE_DEPTH].flatten().numpy()] = True  # the padding, -1, is the last place
            if len(deep):
                lists = system.rank(deep, self.config.deep_cutoff, self.config.mask_history)
                self._keep(f"deep {name}", target_ranks(lists, deep.target_rows(), deep.target_items))
            self.seconds[name] = self.seconds.get(name, 0.0) + time.monotonic() - started
            if name == MODEL:
                self._show(requests, ranked, deep_R)

    def columns(self) -> dict[str, np.ndarray]:
        """Of every target `user`, `item`, `history` (positives in it), `deep` (bool), and a `rank <system>` each."""
        return {name: self._all(name) for name in ("user", "item", "history", "deep", *map(rank_of, self.systems))}

    def report(self) -> dict[str, Any]:
        """The manifest of evaluation: metrics, differences, breakdowns, coverage and samples."""
        found, config = self.columns(), self.config
        shallow = {name: columns_of(found[rank_of(name)], config.cutoffs) for name in self.systems}
        in_sample = found["deep"].astype(bool)
        deep_name = f"recall@{config.deep_cutoff}"
        deep = {name: {deep_name: recall_at(self._all(f"deep {name}"), config.deep_cutoff)} for name in self.systems}
        metrics, differences = estimated(shallow, found["user"], config)
        if in_sample.any():
            deep_metrics, deep_differences = estimated(deep, found["user"][in_sample], config)
            metrics = {name: metrics[name] | deep_metrics[name] for name in metrics}
            differences = {name: differences[name] | deep_differences[name] for name in differences}
        return {
            "metrics": metrics,
            "differences": differences,
            "breakdowns": breakdowns(found, self.systems, self.train_counts),
            "coverage": {name: float(hit[:-1].mean()) for name, hit in self._covered.items()},
            "queries": self.queries,
            "targets": len(found["user"]),
            "users": len(np.unique(found["user"])),
            "deep": {"cutoff": config.deep_cutoff, "queries": self.deep_queries, "targets": int(in_sample.sum())},
            "rank_seconds": self.seconds,
            "samples": self.samples,
        }

    def _show(self, requests: Requests, ranked: torch.Tensor, deep_R: np.ndarray) -> None:
        """Keeps readable examples: the first queries of the sample, one a user."""
        for row in np.flatnonzero(deep_R).tolist():
            user = int(requests.user_ids[row])
            if len(self.samples) == SAMPLES or user in {sample["user_id"] for sample in self.samples}:
                continue
            one = take_rows(requests, torch.tensor([row]))
            history = history_positives(one, self.positive_mask)[0][-SAMPLE_HISTORY:].numpy()
            items = [item for item in ranked[row, :SAMPLE_ITEMS].tolist() if item >= 0]
            liked = set(one.target_items.tolist())
            self.samples.append(
                {
                    "user_id": user,
                    "history": self.item_ids[history].tolist(),
                    "items": self.item_ids[items].tolist(),
                    "hits": [item in liked for item in items],
                }
            )

    def _keep(self, name: str, values: np.ndarray) -> None:
        self._parts.setdefault(name, []).append(values)

    def _all(self, name: str) -> np.ndarray:
        return np.concatenate(self._parts.get(name, [np.empty(0, np.int64)]))


def rank_of(system: str) -> str:
    """The name of a system's column of ranks."""
    return f"rank {system}"


def estimated(
    columns: Mapping[str, Mapping[str, np.ndarray]], users_T: np.ndarray, config: EvaluateConfig
) -> tuple[dict, dict]:
    """Estimates of each system's metrics, and of model minus baseline on the same resamples."""
    names = list(next(iter(columns.values())))
    values = {system: np.column_stack(list(cells.values())) for system, cells in columns.items()}
    draws = bootstrap_means(np.concatenate(list(values.values()), axis=1), users_T, config.bootstrap, config.seed)
    drawn = {system: draws[:, i * len(names) : (i + 1) * len(names)] for i, system in enumerate(values)}

    def cells(value: np.ndarray, means: np.ndarray) -> dict[str, dict[str, float]]:
        found: list[Estimate] = estimates(value, means, config.confidence)
        return {name: vars(estimate) for name, estimate in zip(names, found, strict=True)}

    metrics = {system: cells(values[system], drawn[system]) for system in values}
    baselines = [system for system in values if system != MODEL and MODEL in values]
    gaps = {b: cells(values[MODEL] - values[b], drawn[MODEL] - drawn[b]) for b in baselines}
    return metrics, gaps


def breakdowns(
    found: Mapping[str, np.ndarray], systems: Iterable[str], train_counts: np.ndarray
) -> dict[str, dict[str, Any]]:
    """Recall@10 and NDCG@10 of each system by kind of item and by positives in the history, of a measurement's columns."""
    items, history = found["item"], found["history"]
    group_T = np.where(items >= 0, item_groups(train_counts)[items], len(ITEM_GROUPS) - 1)
    by_item = {name: group_T == place for place, name in enumerate(ITEM_GROUPS)}
    by_history = {name: (history >= low) & (history <= high) for name, (low, high) in HISTORY_GROUPS.items()}
    columns = {name: columns_of(found[rank_of(name)], (COVERAGE_DEPTH,)) for name in systems}

    def cell(chosen: np.ndarray) -> dict[str, Any]:
        means: dict[str, Any] = {"targets": int(chosen.sum())}
        for metric in (f"recall@{COVERAGE_DEPTH}", f"ndcg@{COVERAGE_DEPTH}"):
            means[metric] = {
                system: float(cells[metric][chosen].mean()) if chosen.any() else None for system, cells in columns.items()
            }
        return means

    groups = {"item": by_item, "history": by_history}
    return {kind: {name: cell(chosen) for name, chosen in masks.items()} for kind, masks in groups.items()}


def measure(measurement: Measurement, queries: Iterable[Requests]) -> dict[str, Any]:
    """Ranks every query and reports."""
    for requests in queries:
        measurement.add(requests)
    return measurement.report()
