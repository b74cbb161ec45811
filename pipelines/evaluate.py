"""Evaluation: the whole catalogue ranked for every test query by the model and by baselines that see what it sees.

Baselines are fitted on the train positives and tuned on validation; only then are test requests read, once. Every
system ranks the same requests over the same catalogue (all items known up to the last test day) with the same mask.
Intervals come from a bootstrap over users, paired between systems. Deep recall and the legality of unconstrained
generation are measured on a sample of requests whose size the manifest states.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from model.beam import legality
from model.positives import Positives, take_rows
from model.ranker import Ranker
from model.requests import Requests
from pipelines import report_plots
from pipelines.baselines import Fitted, Fitting, System, fit_baselines
from pipelines.bundle import build_trie
from pipelines.candidates import model_folder
from pipelines.catalogue import Catalogue, load_catalogue
from pipelines.checkpoints import load_model, refuse_other_codebook
from pipelines.evaluation_data import EvaluationData
from pipelines.example_roles import load_roles
from pipelines.item_fields import item_table
from pipelines.long_histories import long_histories
from pipelines.measurement import MODEL, Measurement
from pipelines.sampling import Sample
from pipelines.stage import StageContext, StageResult
from schemas.errors import ContractViolation
from schemas.feedback import mask_of

VALIDATION_REQUESTS = 2_000  # on which baselines are tuned


@dataclass
class ModelSystem:
    """The model's ranker with the beam of the configuration, widened where a longer list is asked for."""

    ranker: Ranker
    beam: int

    def rank(self, requests: Requests, k: int, exclude_history: bool = False) -> Tensor:
        return self.ranker.rank(requests, k, max(self.beam, k), exclude_history)


def run(context: StageContext) -> StageResult:
    """Measures the trained model beside its baselines. Raises ContractViolation where there is nothing to test on."""
    config = context.config.evaluate
    context.engines.ray()
    data = evaluation_data(context, context.config.model.lifelong_length)
    fitting = fitting_of(context, replace(data, long=None))  # which no baseline reads
    fitted = fit_baselines(fitting)
    model = load_ranker(context, data.catalogue)
    systems: dict[str, System] = {MODEL: ModelSystem(model, config.beam)}
    systems |= {name: found.system for name, found in fitted.items()}
    user_ids, ts_us = data.targets("test").requests()
    if not len(user_ids):
        raise ContractViolation(
            "No request of the test has a positive target; check split.test_days and targets.positive in the configuration."
        )
    deep = Sample.of(user_ids, ts_us, config.deep_sample, config.seed)
    measurement = Measurement(
        systems, config, fitting.positives.counts, data.catalogue.item_ids, fitting.positive_mask, deep
    )
    legal = Legality(model, config.beam)
    measure_all(context, measurement, legal, data.queries("test"), len(user_ids))
    return result_of(measurement.report(), fitted, legal, fitting.positives)


def evaluation_data(context: StageContext, lifelong_length: int = 0) -> EvaluationData:
    """The pinned examples, split into roles, and the catalogue as it is known on the last test day. The models that are
    asked read the newest `lifelong_length` representatives."""
    config, calendar = context.config, context.calendar
    version = context.pins["training_examples"]
    catalogue = load_catalogue(context.lake, context.pins["semantic_ids"], calendar.fit_day, calendar.test[-1])
    return EvaluationData(
        lake=context.lake,
        version=version,
        catalogue=catalogue,
        roles=load_roles(context.lake, version, config, calendar),
        calendar=calendar,
        positive_mask=mask_of(config.targets.positive),
        batch_rows=config.evaluate.batch_requests,
        long=long_histories(config, context.lake, context.pins, catalogue, lifelong_length),
    )


def fitting_of(context: StageContext, data: EvaluationData) -> Fitting:
    """Train positives, and a sample of the validation queries."""
    positives = data.train_positives()
    user_ids, ts_us = data.targets("validation").requests()
    sample = Sample.of(user_ids, ts_us, VALIDATION_REQUESTS, context.config.evaluate.seed)
    validation = list(data.queries("validation", sample)) if len(user_ids) else []
    context.say(
        f"baselines: {len(positives.items):,} train positives, {sum(map(len, validation)):,} of {len(user_ids):,} "
        "validation requests"
    )
    return Fitting(
        positives,
        validation,
        data.positive_mask,
        context.config.evaluate,
        dated=context.config.split.by == "days",
        say=context.say,
    )


def load_ranker(context: StageContext, catalogue: Catalogue) -> Ranker:
    """The trained decoder over the catalogue of the evaluation. Raises ContractViolation for another codebook's model."""
    return ranker_of(context, model_folder(context.lake, context.plan.artifact("align")), catalogue)


def ranker_of(context: StageContext, folder: Path, catalogue: Catalogue) -> Ranker:
    """The decoder of a model's folder over the catalogue. Raises ContractViolation where it learned another codebook."""
    decoder, description = load_model(folder)
    refuse_other_codebook(folder, description, catalogue.codebook_version)
    items = item_table(
        context.lake,
        context.pins["items"],
        catalogue,
        decoder.config.hash_buckets,
        until=context.calendar.test[-1],
    )
    return Ranker(decoder, items, build_trie(catalogue))


@dataclass
class Legality:
    """The share of real items among what the model generates without the trie, over a sample of requests."""

    ranker: Ranker
    beam: int
    legal: float = 0.0
    generated: int = 0

    def add(self, requests: Requests) -> None:
        codes = self.ranker.search(requests, self.beam, free=True).codes
        count = codes.shape[0] * codes.shape[1]
        self.legal += legality(codes, self.ranker.trie) * count
        self.generated += count

    @property
    def share(self) -> float | None:
        return self.legal / self.generated if self.generated else None


def measure_all(
    context: StageContext, measurement: Measurement, legal: Legality, queries: Iterable[Requests], total: int
) -> None:
    """Ranks every query, the sample of the legality included, and says how far it is."""
    for requests in with_progress(context, queries, total):
        measurement.add(requests)
        chosen = measurement.deep_sample.keeps(requests.user_ids.numpy(), requests.ts_us.numpy())
        if chosen.any():
            legal.add(take_rows(requests, torch.from_numpy(np.flatnonzero(chosen))))


def with_progress(context: StageContext, queries: Iterable[Requests], total: int) -> Iterator[Requests]:
    done, told = 0, 0
    for requests in queries:
        yield requests
        done += len(requests)
        if done * 5 // total > told:
            told = done * 5 // total
            context.say(f"ranked {done:,} of {total:,} test requests")


def result_of(report: dict[str, Any], fitted: Mapping[str, Fitted], legal: Legality, positives: Positives) -> StageResult:
    """The manifest, flat metrics for the tracker, curves, bars and notes."""
    metrics = {
        f"{system}.{name}": cell["value"] for system, cells in report["metrics"].items() for name, cell in cells.items()
    }
    metrics |= {f"{system}.coverage@10": value for system, value in report["coverage"].items()}
    metrics |= {f"{system}.rank_seconds": value for system, value in report["rank_seconds"].items()}
    metrics |= {"queries": float(report["queries"]), "targets": float(report["targets"])}
    if legal.share is not None:
        metrics["model.legality"] = legal.share
    chosen = {name: found.chosen for name, found in fitted.items()}
    manifest = report | {"legality": legal.share, "legality_beams": legal.generated, "chosen": chosen}
    notes = [
        f"Evaluation: {report['queries']:,} test requests of {report['users']:,} users, {report['targets']:,} positives; "
        f"recall@{report['deep']['cutoff']} and legality on a sample of {report['deep']['queries']:,} requests; "
        f"baselines fitted on {len(positives.items):,} train positives and tuned on validation."
    ]
    return StageResult(
        metrics=metrics,
        series={name: curve for found in fitted.values() for name, curve in found.curves.items()},
        figures={kind: report_plots.metric_bars(report["metrics"], kind) for kind in ("recall", "ndcg")},
        notes=notes,
        manifest=manifest,
    )
