"""Do an item's nearest neighbours agree with what the same users like next? Each way of making item vectors beside others.

Everything is fitted on the items and pairs up to the fit day. The truth are pairs of different items that one user liked
on held-out days, both of them, at most `item_pairs.window` positives and `item_pairs.max_gap_hours` apart (a log that is
split by user: the held-out positive with those before it), each once in either direction. Told is the share of them whose
partner is among the k nearest of all items by cosine; among equals the order is random, so a tie counts by its chance.
`all` are all such pairs, `unseen` those without a co-occurrence up to the fit day, `cold` those of a query item that
has no pair up to it. Popular items are partners of everything, so vectors that say little but how popular an item is
do well there; in `even` every partner counts alike, however often it is one, which such vectors gain nothing by. Intervals
are of 95 %, by resampling query items. `popularity` ranks by train pairs, alike for all queries.

    python -m benchmarks.item_vectors --config conf/kuairand.yaml [--set KEY=VALUE] [--days validation] [--fresh]

needs a lake with ingest, sequences and item_pairs. Settings are chosen on the validation days; the test days are there
to read.
"""

from __future__ import annotations

import argparse
import datetime
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from model.ranking_metrics import bootstrap_means
from pipelines import embed
from pipelines.cli import overrides
from pipelines.engines import Engines
from pipelines.item_vectors import DayItems, Fitted, item_vectors, normalised
from pipelines.pair_vectors import summed_pairs
from pipelines.ray_tables import read_arrow
from pipelines.stage import StageContext
from schemas.calendar import log_calendar
from schemas.config import Config
from schemas.feedback import mask_of
from schemas.lake import lake_of
from schemas.lineage import EMBED, StagePlan
from schemas.loader import load_config

OUT = Path(__file__).resolve().parent / "out" / "item_vectors.jsonl"
CUTOFFS = (10, 50, 100)
SLICES = ("all", "even", "unseen", "cold")
RESAMPLES, CHUNK = 1000, 256
HOUR_US = 3_600_000_000
Source = Literal["text", "pairs", "attributes", "vector", "aligned"]
# Sources with their weights, and the aligner's model where there is one.
SYSTEMS: dict[str, tuple[dict[Source, float], str]] = {
    "content only": ({"text": 1.0, "attributes": 1.0}, ""),
    "pairs only": ({"pairs": 1.0}, ""),
    "both (default)": ({"text": 1.0, "pairs": 1.0, "attributes": 0.5}, ""),
    "aligned mlp": ({"aligned": 1.0}, "mlp"),
    "aligned qformer": ({"aligned": 1.0}, "qformer"),
    "aligned mlp + pairs": ({"aligned": 1.0, "pairs": 1.0}, "mlp"),
    "aligned qformer + pairs": ({"aligned": 1.0, "pairs": 1.0}, "qformer"),
}
POPULARITY = "popularity"


class Bench:
    """The catalogue with its titles encoded once, and the pairs of the held-out days."""

    def __init__(self, config: Config, role: str, engines: Engines) -> None:
        self.config, self.lake, self.role, self.engines = config, lake_of(config), role, engines
        self.aligners: dict[str, Fitted] = {}
        self.calendar = log_calendar(config, self.lake)
        self.held_out = self.calendar.test if role == "test" else self.calendar.validation
        self.pins = {name: self.lake.version(name) or 0 for name in ("items", "item_pairs", "user_sequences")}
        context, fit_day = self.context(config), self.calendar.fit_day
        days = [fit_day, *(day for day in self.calendar.appended if day <= self.held_out[-1])]
        items = embed.items_by_day(context, days)
        every = replace(config, embed=replace(config.embed, sources=("text", "attributes"), weights=(1.0, 1.0)))
        self.days: dict[datetime.date, DayItems] = embed.with_text(
            context, items, embed.usable_sources(self.context(every), items[fit_day]).text
        )
        self.ids = np.concatenate([day.ids for day in self.days.values()])
        self.order = np.argsort(self.ids)
        self._truth()

    def context(self, config: Config) -> StageContext:
        return StageContext(config, self.lake, self.calendar, StagePlan(EMBED), self.engines, self.pins, lambda _: None)

    def _truth(self) -> None:
        """`query` and `partner`: places among `ids` of each pair, and its slices."""
        known = summed_pairs(self.lake, self.pins["item_pairs"], embed.train_days(self.context(self.config)))
        ends = np.stack([known.column(name).to_numpy() for name in ("item_a", "item_b")], axis=1)
        weight = known.column("weight").to_numpy()
        pairs = np.array(sorted({pair for a, b in self._together() for pair in ((a, b), (b, a))})).reshape(-1, 2)
        self.lost = len(pairs)
        pairs = pairs[np.isin(pairs, self.ids).all(1)]
        self.lost -= len(pairs)
        self.query, self.partner = (self._places(side) for side in pairs.T)
        seen = {(a, b) for row in ends.tolist() for a, b in (row, row[::-1])}
        self.slices = {  # weight of each pair
            "all": np.ones(len(pairs)),
            "even": 1.0 / np.bincount(self.partner)[self.partner],
            "unseen": np.array([tuple(pair) not in seen for pair in pairs.tolist()], np.float64),
            "cold": (~np.isin(pairs[:, 0], ends)).astype(np.float64),
        }
        kept = np.isin(ends, self.ids).all(1)
        self.popularity = np.zeros(len(self.ids))
        for side in ends[kept].T:
            np.add.at(self.popularity, self._places(side), weight[kept])

    def _places(self, items: np.ndarray) -> np.ndarray:
        return self.order[np.searchsorted(self.ids[self.order], items)]

    def _together(self) -> Iterator[tuple[int, int]]:
        """Items that one user liked together, the later of them held out."""
        by_user, settings = self.config.split.by == "user", self.config.item_pairs
        for items, times in self._timelines():
            held_out = {1 if self.role == "test" else 2} if by_user else set(range(1, len(items) + 1))
            for late in (len(items) - place for place in held_out if place <= len(items)):
                for early in range(max(0, late - settings.window), late):
                    if items[early] != items[late] and times[late] - times[early] <= settings.max_gap_hours * HOUR_US:
                        yield items[early], items[late]

    def _timelines(self) -> Iterator[tuple[list[int], list[int]]]:
        """Items and times of each user's positives on the held-out days, in order."""
        columns = ["user_id", "date", "item_ids", "ts_us", "feedback"]
        rows = read_arrow(self.lake, "user_sequences", self.pins["user_sequences"], columns, self.held_out)
        rows = rows.sort_by([("user_id", "ascending"), ("date", "ascending")])
        lists = [rows.column(name).combine_chunks() for name in ("item_ids", "ts_us", "feedback")]
        users = np.repeat(rows.column("user_id").to_numpy(), np.diff(lists[0].offsets.to_numpy()))
        items, times, feedback = (part.flatten().to_numpy() for part in lists)
        liked = (feedback & mask_of(self.config.targets.positive)) > 0
        users, items, times = users[liked], items[liked], times[liked]
        cuts = np.flatnonzero(users[1:] != users[:-1]) + 1
        for own, when in zip(np.split(items, cuts), np.split(times, cuts), strict=True):
            yield own.tolist(), when.tolist()

    def vectors(self, config: Config) -> np.ndarray:
        """float32 [N, W] of length 1 or zero, as stage embed would make them. An aligner is trained once."""
        model = config.embed.aligned.model if "aligned" in config.embed.sources else ""
        if not model:
            fitted = self._fit(config)
        else:
            if model not in self.aligners:
                beside = replace(config.embed, sources=("aligned", "pairs"), weights=(1.0, 1.0))
                self.aligners[model] = self._fit(replace(config, embed=beside))
            fitted = replace(self.aligners[model], sources=config.embed.sources)
        return normalised(np.concatenate([item_vectors(day, fitted, config.embed)[0] for day in self.days.values()]))

    def _fit(self, config: Config) -> Fitted:
        context, day = self.context(config), self.days[self.calendar.fit_day]
        with tempfile.TemporaryDirectory() as scratch:
            return embed.fit(context, day, embed.usable_sources(context, day.items), Path(scratch) / "align").fitted

    def told(self, vectors: np.ndarray | None) -> np.ndarray:
        """float64 [pairs, cut-offs]: the chance that the partner is among the k nearest; by popularity without vectors."""
        told = np.zeros((len(self.query), len(CUTOFFS)))
        by_query = np.argsort(self.query, kind="stable")
        distinct, starts = np.unique(self.query[by_query], return_index=True)
        groups = np.split(by_query, starts[1:])
        for at in range(0, len(distinct), CHUNK):
            queries = distinct[at : at + CHUNK]
            near_QN = np.tile(self.popularity, (len(queries), 1)) if vectors is None else vectors[queries] @ vectors.T
            for row, query in enumerate(queries):
                near_QN[row, query] = -np.inf
                pairs = groups[at + row]
                ordered, own = np.sort(near_QN[row]), near_QN[row, self.partner[pairs]]
                above = len(ordered) - np.searchsorted(ordered, own, "right")
                equal = len(ordered) - above - np.searchsorted(ordered, own, "left")
                told[pairs] = ((np.array(CUTOFFS) - above[:, None]) / equal[:, None]).clip(0, 1)
        return told

    def measure(self, vectors: np.ndarray | None) -> dict[str, Any]:
        told, row = self.told(vectors), {}
        for name, weights in self.slices.items():
            part = weights > 0
            if not part.any():
                continue
            values = np.column_stack([told, np.ones(len(told))])[part] * weights[part, None]
            draws = bootstrap_means(values, self.query[part], RESAMPLES, seed=0)
            mean, bounds = values.mean(0), np.quantile(draws[:, :-1] / draws[:, -1:], [0.025, 0.975], axis=0)
            for place, k in enumerate(CUTOFFS):
                value, (low, high) = mean[place] / mean[-1], bounds[:, place]
                row[f"{name}@{k}"] = {"value": float(value), "low": float(low), "high": float(high)}
        return row


def config_of(config: Config, system: str) -> Config:
    weights, model = SYSTEMS[system]
    aligned = replace(config.embed.aligned, model=model) if model else config.embed.aligned  # type: ignore[arg-type]
    own = replace(config.embed, sources=tuple(weights), weights=tuple(weights.values()), aligned=aligned)
    return replace(config, embed=own)


def print_table(rows: list[dict[str, Any]]) -> None:
    for name in SLICES:
        print(f"{name:<26}" + "".join(f"{'@' + str(k):>24}" for k in CUTOFFS))
        for row in rows:
            cells = [row.get(f"{name}@{k}") for k in CUTOFFS]
            shown = [f"{c['value']:.4f} [{c['low']:.4f}, {c['high']:.4f}]" if c else "-" for c in cells]
            print(f"{row['system']:<26}" + "".join(f"{cell:>24}" for cell in shown))
        print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--days", choices=("validation", "test"), default="test")
    parser.add_argument("--only", action="append", choices=(POPULARITY, *SYSTEMS), help="these systems")
    parser.add_argument("--fresh", action="store_true", help="run every cell again")
    options = parser.parse_args()
    config = load_config(options.config, overrides(options.set))
    engines = Engines(config.resources)
    engines.ray()
    bench = Bench(config, options.days, engines)
    size: dict[str, Any] = {
        "config": config.name,
        "days": options.days,
        "set": sorted(options.set),
        "items": len(bench.ids),
    }
    size |= {f"pairs_{name}": int((w > 0).sum()) for name, w in bench.slices.items() if name != "even"} | {
        "pairs_unknown": bench.lost
    }
    print(json.dumps(size), flush=True)
    OUT.parent.mkdir(exist_ok=True)
    rows = [json.loads(line) for line in OUT.read_text().splitlines()] if OUT.is_file() else []
    wanted = options.only or [POPULARITY, *SYSTEMS]
    if options.fresh:
        rows = [row for row in rows if row["size"] != size or row["system"] not in wanted]
    for system in wanted:
        if any(row["size"] == size and row["system"] == system for row in rows):
            continue
        started = time.monotonic()
        vectors = None if system == POPULARITY else bench.vectors(config_of(config, system))
        seconds = time.monotonic() - started
        rows.append({"work": "neighbours", "size": size, "system": system, "seconds": seconds} | bench.measure(vectors))
        OUT.write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{system}: {seconds:.0f} s", flush=True)
    print_table([row for row in rows if row["size"] == size])
    engines.stop()


if __name__ == "__main__":
    main()
