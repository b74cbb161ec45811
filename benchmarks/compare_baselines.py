"""The model beside its baselines over three seeds: the README's tables of quality.

A seed is one of training and of SASRec; what Spark makes, vectors and codes are the same for all. Each seed trains, aligns
where the configuration does, fits the baselines on train positives, tunes them on validation, and ranks the whole catalogue
for every test request once. A mean is over targets and seeds; its interval resamples users, who bring their targets in
every seed, so it holds the noise of users but not that of seeds, which the columns by seed show. Differences are paired.

    python -m benchmarks.compare_baselines --config conf/kuairand.yaml [--set KEY=VALUE] [--fresh]

Seeds are kept as they come in benchmarks/out, one file each, and the next start continues after those of the same settings.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.comparison import OUT, Row, interval, kept_or_made, parser_of, short, trained
from benchmarks.lakes import prepare
from model.ranking_metrics import columns_of
from pipelines.baselines import System, fit_baselines
from pipelines.cli import overrides
from pipelines.evaluate import ModelSystem, fitting_of, ranker_of, with_progress
from pipelines.measurement import MODEL, Measurement, breakdowns, estimated, rank_of
from pipelines.outcome import in_order
from pipelines.sampling import NO_REQUEST
from pipelines.train_loop import HISTORY, ITEM_MEMORY, ITEM_SHARE
from schemas.calendar import Calendar
from schemas.config import Config, EvaluateConfig
from schemas.lineage import ALIGN, EMBED, ITEM_PAIRS, ORGANISE, REWARDS, SEQUENCES, TOKENIZE, TRAIN
from schemas.loader import load_config

SEEDS = (0, 1, 2)
BEFORE = "before alignment"
METRICS = ("recall@10", "ndcg@10", "recall@50")
BY_SEED = METRICS[:2]


def of_seed(config: Config, seed: int) -> Config:
    train, evaluate = config.train, config.evaluate
    return replace(
        config,
        train=replace(train, seed=train.seed + seed),
        evaluate=replace(evaluate, seed=evaluate.seed + seed, cutoffs=(10, 50)),
    )


def measured(config: Config, calendar: Calendar) -> Row:
    """A measurement's columns; `counts` of train positives by item; what validation `chose`, as JSON."""
    settings = config.evaluate
    with trained(config, calendar, (TRAIN, ALIGN)) as (context, data, models):
        fitting = fitting_of(context, data)
        fitted = fit_baselines(fitting)
        rankers = {MODEL: models[ALIGN.name]}
        if models[TRAIN.name] not in rankers.values():  # there was something to align with
            rankers[BEFORE] = models[TRAIN.name]
        systems: dict[str, System] = {
            name: ModelSystem(ranker_of(context, folder, data.catalogue), settings.beam) for name, folder in rankers.items()
        }
        systems |= {name: found.system for name, found in fitted.items()}
        counts = fitting.positives.counts
        measurement = Measurement(systems, settings, counts, data.catalogue.item_ids, data.positive_mask, NO_REQUEST)
        requests = len(data.targets("test").requests()[0])
        for queries in with_progress(context, data.queries("test"), requests):
            measurement.add(queries)
        chose = {name: found.chosen for name, found in fitted.items()} | {MODEL: weights(models[ALIGN.name])}
    return measurement.columns() | {"counts": counts, "chose": np.array(json.dumps(chose))}


def weights(folder: Path) -> dict[str, float]:
    """Those that validation gave the item head and its memory."""
    rows = json.loads((folder / HISTORY).read_text())
    return {name: row[name] for row in rows for name in (ITEM_SHARE, ITEM_MEMORY) if name in row}


def page(seeds: Sequence[Row], config: EvaluateConfig) -> Iterator[str]:
    """The tables, in Markdown: means, differences to the model, kinds of items, and what was chosen."""
    found = {name: np.concatenate([seed[name] for seed in seeds]) for name in seeds[0] if seeds[0][name].ndim}
    systems = in_order(name.removeprefix(rank_of("")) for name in found if name.startswith(rank_of("")))
    columns = {system: columns_of(found[rank_of(system)], config.cutoffs) for system in systems}
    metrics, gaps = estimated(columns, found["user"], config)
    targets, users = len(seeds[0]["user"]), len(np.unique(found["user"]))
    yield f"{targets:,} test positives of {users:,} users, {len(seeds)} seeds\n"
    yield "| system | " + " | ".join([*METRICS, *(f"{name} by seed" for name in BY_SEED)]) + " |"
    yield "|---" * (1 + len(METRICS) + len(BY_SEED)) + "|"
    for system in systems:
        each = [columns_of(seed[rank_of(system)], config.cutoffs) for seed in seeds]
        by_seed = [", ".join(short(f"{seed[name].mean():.4f}") for seed in each) for name in BY_SEED]
        yield " | ".join([f"| {system}", *(interval(metrics[system][name]) for name in METRICS), *by_seed]) + " |"
    yield "\n| model minus | " + " | ".join(METRICS) + " |"
    yield "|---" * (1 + len(METRICS)) + "|"
    for system in systems:
        if system != MODEL:
            yield " | ".join([f"| {system}", *(interval(gaps[system][name]) for name in METRICS)]) + " |"
    yield "\n| recall@10 of | positives | " + " | ".join(systems) + " |"
    yield "|---" * (2 + len(systems)) + "|"
    for kind, cell in breakdowns(found, systems, seeds[0]["counts"])["item"].items():
        means = [cell["recall@10"][system] for system in systems]
        cells = ["" if mean is None else short(f"{mean:.4f}") for mean in means]
        yield " | ".join([f"| {kind} items", f"{cell['targets'] // len(seeds):,}", *cells]) + " |"
    yield "\nchosen by validation:\n"
    for seed, row in enumerate(seeds):
        for name, chosen in json.loads(str(row["chose"])).items():
            figures = chosen.pop("validation", {})
            settings = ", ".join(f"{key} {value}" for key, value in chosen.items())
            scores = ", ".join(f"{key} {short(f'{value:.4f}')}" for key, value in figures.items())
            yield f"- seed {seed}, {name}: {settings}" + (f" (validation {scores})" if scores else "")


def main() -> None:
    options = parser_of(__doc__).parse_args()
    config = load_config(options.config, overrides(options.set))
    calendar = prepare(config, (SEQUENCES, ITEM_PAIRS, EMBED, TOKENIZE, ORGANISE, REWARDS))
    seeds = []
    for seed in SEEDS:
        file = OUT / "baselines" / f"{config.name}-{seed}.npz"
        seeds.append(kept_or_made(file, of_seed(config, seed), options.fresh, lambda made: measured(made, calendar)))
        print("\n".join(["", *page(seeds, of_seed(config, 0).evaluate)]), flush=True)


if __name__ == "__main__":
    main()
