"""Gates of promotion: what must hold before the alias `champion` moves.

Candidate and champion rank the same test requests, on days that neither trained on, each over its own catalogue; what
the candidate's catalogue does not know counts as a miss for both.
"""

from __future__ import annotations

import datetime
from dataclasses import dataclass
from typing import Any

import mlflow
import numpy as np
import torch
from torch import Tensor

from model.requests import Requests
from pipelines.baselines import System
from pipelines.bundle import Bundle
from pipelines.catalogue import Catalogue
from pipelines.evaluate import ModelSystem, evaluation_data, load_ranker
from pipelines.measurement import MODEL, Measurement, measure
from pipelines.registry import CHAMPION
from pipelines.sampling import NO_REQUEST
from pipelines.stage import StageContext


@dataclass(frozen=True)
class Gate:
    """One condition and the sentence that says how it came out."""

    passed: bool
    text: str


def better_than_popularity(evaluated: dict[str, Any], metric: str) -> Gate:
    """Holds where the interval of model minus popularity lies above zero."""
    cell = evaluated.get("differences", {}).get("popularity", {}).get(metric)
    if cell is None:
        return Gate(False, f"{metric} of popularity was not measured, add it to evaluate.baselines")
    verdict = "above" if cell["low"] > 0 else "not above"
    return Gate(
        cell["low"] > 0,
        f"{metric} is {verdict} popularity: difference {cell['value']:+.4f} [{cell['low']:+.4f}, {cell['high']:+.4f}]",
    )


def not_worse_than_champion(context: StageContext, champion: dict[str, Any]) -> Gate:
    """Holds where the candidate's metric is at most `register.max_regression` below the champion's, relatively."""
    name = f"version {champion['version']}, the champion"
    bundle: Bundle = mlflow.pyfunc.load_model(champion["uri"]).unwrap_python_model().bundle
    if bundle.lineage["model"] == context.plan.artifact("align"):
        return Gate(True, f"the model is the same as {name}")
    first_test = context.calendar.test[0]
    trained_until = datetime.date.fromisoformat(bundle.lineage["trained_until"])
    if context.config.split.by == "days" and trained_until >= first_test:
        return Gate(False, f"{name}, trained on days up to {trained_until} and cannot be compared on {first_test}")
    if bundle.lifelong_length and not context.config.model.lifelong_length:
        return Gate(False, f"{name}, reads long histories, which this configuration does not, and cannot be compared")
    metric = context.config.register.gate_metric
    report = compare(context, bundle)
    ours, theirs = report["metrics"][MODEL][metric]["value"], report["metrics"][CHAMPION][metric]["value"]
    floor = theirs * (1 - context.config.register.max_regression)
    verdict = "not worse than" if ours >= floor else "worse than"
    return Gate(ours >= floor, f"{metric} {ours:.4f} is {verdict} the {theirs:.4f} of {name}")


def compare(context: StageContext, champion: Bundle) -> dict[str, Any]:
    """Measures candidate and champion on the test queries of this log."""
    context.engines.ray()
    config = context.config.evaluate
    data = evaluation_data(context, max(context.config.model.lifelong_length, champion.lifelong_length))
    systems: dict[str, System] = {
        MODEL: ModelSystem(load_ranker(context, data.catalogue), config.beam),
        CHAMPION: ForeignSystem(champion, data.catalogue, config.beam),
    }
    measurement = Measurement(
        systems,
        config,
        np.zeros(len(data.catalogue), np.int64),
        data.catalogue.item_ids,
        data.positive_mask,
        NO_REQUEST,
    )
    return measure(measurement, data.queries("test"))


@dataclass
class ForeignSystem:
    """A model with a catalogue of its own, asked and understood in the dense indices of another catalogue."""

    bundle: Bundle
    catalogue: Catalogue
    beam: int

    def rank(self, requests: Requests, k: int, exclude_history: bool = False) -> Tensor:
        names = ("history_items", "lifelong_items")
        items = {name: translate(getattr(requests, name), self.catalogue, self.bundle.catalogue) for name in names}
        own = Requests(**vars(requests) | items)
        ranked = self.bundle.ranker.rank(own, k, max(self.beam, k), exclude_history)
        return translate(ranked, self.bundle.catalogue, self.catalogue)


def translate(items: Tensor, source: Catalogue, target: Catalogue) -> Tensor:
    """Dense indices of `source` as those of `target`; -1 stays, and stands for what `target` does not know."""
    values = items.numpy()
    dense = target.dense(source.item_ids[np.maximum(values, 0)])
    return torch.from_numpy(np.where(values < 0, -1, dense))
