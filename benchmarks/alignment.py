"""What alignment changes, judged by the truth behind simulated logs.

`python -m benchmarks.alignment --config conf/demo.yaml [--set KEY=VALUE]` on a lake that holds a whole run: the model
before alignment beside the aligned one, and with FULL=1 beside other weights and the item as unit. Settings are
chosen on the validation day; the test day is there to read. Of the ten best unseen items of each sampled request it
gives the true chance that the user would dislike one (hate), leave one after seconds (short), and the recall of test
positives overall and of those that the user watched for longer than three quarters of like ones (long). Legality is
that of free generation.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.simulated_oracle import Truth, liked, read_truth
from model.beam import legality
from model.ranker import Ranker
from model.ranking_metrics import target_ranks
from pipelines.bundle import build_trie
from pipelines.catalogue import load_catalogue
from pipelines.checkpoints import load_model
from pipelines.cli import overrides
from pipelines.engines import Engines
from pipelines.evaluation_data import EvaluationData
from pipelines.example_roles import load_roles
from pipelines.exposures import load_exposures
from pipelines.item_fields import item_table
from pipelines.progress import Progress
from pipelines.run import run_one
from pipelines.sampling import Sample
from pipelines.split import Role
from schemas.calendar import log_calendar
from schemas.config import Config
from schemas.feedback import mask_of
from schemas.lake import lake_of
from schemas.loader import load_config

OUT = Path(__file__).parent / "out" / "alignment.jsonl"
REQUESTS, DEPTH = 2_000, 10
# Of the policy loss; 0: the next-token loss alone.
WEIGHTS: dict[Literal["code", "item"], tuple[float, ...]] = {"code": (0.0, 0.3, 1.0, 3.0), "item": (1.0, 3.0)}


class Bench:
    """The requests of both held-out days, and what is true of them."""

    def __init__(self, config: Config) -> None:
        self.config, self.lake = config, lake_of(config)
        self.calendar = log_calendar(config, self.lake)
        names = ("training_examples", "semantic_ids", "items", "rewards", "impressions")
        self.pins = {name: self.lake.version(name) or 0 for name in names}
        last = self.calendar.test[-1]
        self.catalogue = load_catalogue(self.lake, self.pins["semantic_ids"], self.calendar.fit_day, last)
        version = self.pins["training_examples"]
        self.data = EvaluationData(
            self.lake,
            version,
            self.catalogue,
            load_roles(self.lake, version, config, self.calendar),
            self.calendar,
            mask_of(config.targets.positive),
        )

    def truth(self, role: Role) -> Truth:
        simulated = self.config.simulate
        assert simulated is not None, "only simulated logs have a truth"
        day = (self.calendar.test if role == "test" else self.calendar.validation)[0]
        return read_truth(self.lake.home / "_raw", (day - simulated.first_day).days, simulated.topics)

    def measure(self, folder: Path, role: Role) -> dict[str, float]:
        decoder, _ = load_model(folder)
        catalogue, truth = self.catalogue, self.truth(role)
        last = self.calendar.test[-1]
        items = item_table(self.lake, self.pins["items"], catalogue, decoder.config.hash_buckets, last)
        ranker = Ranker(decoder, items, build_trie(catalogue))
        days = self.calendar.test if role == "test" else self.calendar.validation
        exposures = load_exposures(self.lake, self.pins, days, catalogue.codebook_version, decoder.levels)
        sample = Sample.of(*self.data.targets(role).requests(), REQUESTS, seed=1)
        parts: dict[str, list[np.ndarray]] = {name: [] for name in ("hate", "short", "ranks", "quantile", "legal")}
        for requests in self.data.queries(role, sample):
            ranked = ranker.rank(requests, DEPTH, self.config.evaluate.beam, self.config.evaluate.mask_history)
            true_RN = liked(truth, requests.user_ids.numpy())
            chance = np.take_along_axis(true_RN, catalogue.item_ids[ranked.numpy().clip(min=0)], axis=1)
            parts["short"].append((1 - chance).ravel())
            parts["hate"].append((0.035 * (1 - chance) ** 2).ravel())
            parts["ranks"].append(target_ranks(ranked, requests.target_rows(), requests.target_items))
            parts["quantile"].append(exposures.of(requests.target_impressions)[0].numpy())
            codes = ranker.search(requests, self.config.evaluate.beam, free=True).codes
            parts["legal"].append(np.array([legality(codes, ranker.trie)]))
        found = {name: np.concatenate(values) for name, values in parts.items()}
        hit = (found["ranks"] >= 0) & (found["ranks"] < DEPTH)
        return {
            "hate_per_mille": 1000 * float(found["hate"].mean()),
            "short_share": float(found["short"].mean()),
            "recall@10": float(hit.mean()),
            "recall@10_long": float(hit[found["quantile"] > 0.75].mean()),
            "legality": float(found["legal"].mean()),
        }


def aligned(config: Config, unit: Literal["code", "item"], weight: float) -> Path:
    """The folder of a model aligned with these settings; made where it is not there."""
    settings = dataclasses.replace(config.align, unit=unit, weight=weight)
    config = dataclasses.replace(config, align=settings)
    outcome = run_one("align", config, False, None, Progress(quiet=True))
    return lake_of(config).artifact("align", outcome.identity)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    config = load_config(options.config, overrides(options.set))
    own = (config.align.unit, config.align.weight)
    variants = [(u, w) for u, weights in WEIGHTS.items() for w in weights] if os.environ.get("FULL") else []
    folders = {f"{unit} {weight:g}": aligned(config, unit, weight) for unit, weight in dict.fromkeys([own, *variants])}
    lake = lake_of(config)
    first = lake.manifest("align", next(iter(folders.values())).name) or {}
    train = lake.artifact("train", next(iter(first["inputs"]["train"]["identities"].values())))
    engines = Engines(config.resources)
    engines.ray()
    bench = Bench(config)
    rows: list[dict[str, Any]] = []
    OUT.parent.mkdir(exist_ok=True)
    with OUT.open("w") as out:
        for role in ("validation", "test"):
            for system, folder in {"before": train, **folders}.items():
                torch.manual_seed(0)
                row = {"work": role, "size": REQUESTS, "system": system} | bench.measure(folder, role)
                rows.append(row)
                out.write(json.dumps(row) + "\n")
                cells = "  ".join(f"{k} {v:.4f}" for k, v in row.items() if isinstance(v, float))
                print(f"{role:10s} {system:10s} {cells}", flush=True)
    engines.stop()


if __name__ == "__main__":
    main()
