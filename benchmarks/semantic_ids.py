"""What do the choice of item vector, the balance of codes and the rule for collisions do to the model's recall?

One way to make ids at a time differs from the configuration; the decoder is trained on each from the same seed and ranks
the whole catalogue for every held-out request, without alignment. Rows with another seed and the configuration's own ids
tell how far training alone moves a figure. Intervals of 95 % resample users; those of differences to the configuration
are paired. They know nothing of seeds, so a difference counts where it is beyond both its interval and the seeds' rows.

    python -m benchmarks.semantic_ids --config conf/kuairand.yaml [--set KEY=VALUE] [--fresh]

Choices are made on the validation days (`validation`); the test days are there to read. Rows are kept as they come in
benchmarks/out/semantic_ids, one file a work and system, and the next start continues after those of the same settings.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lakes import prepare
from model.ranking_metrics import bootstrap_means, columns_of, estimates, target_ranks
from pipelines.cli import overrides
from pipelines.evaluate import evaluation_data, ranker_of
from pipelines.progress import Progress
from pipelines.run import run_steps, running
from pipelines.split import Role
from pipelines.stage import StageContext
from pipelines.steps import Step
from schemas.calendar import Calendar
from schemas.config import Config
from schemas.lineage import EMBED, EVALUATE, ITEM_PAIRS, ORGANISE, SEQUENCES, TOKENIZE, TRAIN, StagePlan, digest
from schemas.loader import load_config, to_mapping

OUT = Path(__file__).resolve().parent / "out" / "semantic_ids"
CUTOFF, RESAMPLES, CONFIDENCE = 10, 1000, 0.95
ROLES: tuple[Role, Role] = ("validation", "test")
OWN = "configuration"
Change = Callable[[Config], Config]


def vectors(*sources: Any, model: Any = "mlp") -> Change:
    def change(config: Config) -> Config:
        aligned = replace(config.embed.aligned, model=model)
        weights = tuple(1.0 for _ in sources)
        return replace(config, embed=replace(config.embed, sources=sources, weights=weights, aligned=aligned))

    return change


def ids(**settings: Any) -> Change:
    return lambda config: replace(config, tokenize=replace(config.tokenize, **settings))


def seed(value: int) -> Change:
    return lambda config: replace(config, train=replace(config.train, seed=value))


SYSTEMS: dict[str, Change] = {
    OWN: lambda config: config,
    "seed 1": seed(1),
    "seed 2": seed(2),
    "vectors: content": vectors("text", "attributes"),
    "vectors: pairs": vectors("pairs"),
    "vectors: aligned, MLP": vectors("aligned"),
    "vectors: aligned, MLP, and pairs": vectors("aligned", "pairs"),
    "vectors: aligned, QFormer, and pairs": vectors("aligned", "pairs", model="qformer"),
    "balance: relaxed": ids(balance="relaxed"),
    "balance: equal": ids(balance="equal"),
    "balance: capped": ids(balance="capped"),
    "collisions: level": ids(collisions="level"),
    "collisions: nearest_free": ids(collisions="nearest_free"),
    "balance: capped, collisions: nearest_free": ids(balance="capped", collisions="nearest_free"),
}


def measured(config: Config, calendar: Calendar) -> dict[str, np.ndarray]:
    """Makes the ids, trains on them and ranks. For each role: user, time and item of every positive, and its rank."""
    started = time.monotonic()
    with running(config, Progress()) as runner:
        outcomes = run_steps(runner, [Step(spec, calendar) for spec in (EMBED, TOKENIZE, TRAIN)], False)
        runner.engines.ray()
        lake = runner.lake
        pins = {name: lake.version(name) or 0 for name in ("training_examples", "semantic_ids", "items")}
        context = StageContext(config, lake, calendar, StagePlan(EVALUATE), runner.engines, pins, runner.progress.say)
        found = ranks(context, lake.artifact("train", outcomes[-1].identity))
    return found | {"seconds": np.array(time.monotonic() - started)}


def ranks(context: StageContext, model: Path) -> dict[str, np.ndarray]:
    settings, data = context.config.evaluate, evaluation_data(context, context.config.model.lifelong_length)
    catalogue, ranker = data.catalogue, ranker_of(context, model, data.catalogue)
    found: dict[str, np.ndarray] = {"shared": np.array((catalogue.ranks > 0).mean())}
    for role in ROLES:
        parts = []
        for requests in data.queries(role):
            rows = requests.target_rows()
            ranked = ranker.rank(requests, CUTOFF, settings.beam, settings.mask_history)
            rank = target_ranks(ranked, rows, requests.target_items)
            parts.append(
                [requests.user_ids[rows].numpy(), requests.ts_us[rows].numpy(), requests.target_items.numpy(), rank]
            )
        columns = np.stack([np.concatenate(column) for column in zip(*parts, strict=True)])
        found[role] = columns[:, np.lexsort(columns[2::-1])]  # the order of the requests may differ between systems
    return found


def kept(file: Path, settings: str) -> dict[str, np.ndarray] | None:
    """The row in `file`, if it was measured with these settings."""
    if not file.is_file():
        return None
    with np.load(file) as saved:
        return dict(saved) if str(saved["settings"]) == settings else None


def table(rows: dict[str, dict[str, np.ndarray]], role: Role) -> Iterator[str]:
    """The lines of one role's table, in Markdown."""
    own = rows[OWN][role]
    yield f"{role}: {len(own[0]):,} positives of {len(np.unique(own[0])):,} users\n"
    yield f"| ids | shared | recall@{CUTOFF} | minus {OWN} | ndcg@{CUTOFF} | minus {OWN} | seconds |"
    yield "|---|---|---|---|---|---|---|"
    base = np.column_stack(list(columns_of(own[3], (CUTOFF,)).values()))
    for system, found in rows.items():
        same = np.array_equal(found[role][:3], own[:3])
        if not same:
            raise ValueError(f"{system} was measured on other requests than {OWN}; start anew with --fresh.")
        values = np.column_stack(list(columns_of(found[role][3], (CUTOFF,)).values()))
        both = np.concatenate([values, values - base], axis=1)
        draws = bootstrap_means(both, own[0], RESAMPLES, 0)
        cells = [f"{e.value:.4f} [{e.low:.4f}, {e.high:.4f}]" for e in estimates(both, draws, CONFIDENCE)]
        recall, ndcg, recall_gap, ndcg_gap = (cell.replace("0.", ".") for cell in cells)
        gaps = ("", "") if system == OWN else (recall_gap, ndcg_gap)
        shared = f"{100 * float(found['shared']):.2f} %"
        yield f"| {system} | {shared} | {recall} | {gaps[0]} | {ndcg} | {gaps[1]} | {float(found['seconds']):.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--only", action="append", default=[], help="these systems alone, beside the configuration's own")
    parser.add_argument("--fresh", action="store_true", help="measure every system again")
    options = parser.parse_args()
    config = load_config(options.config, overrides(options.set))
    OUT.mkdir(parents=True, exist_ok=True)
    calendar = prepare(config, (SEQUENCES, ITEM_PAIRS, ORGANISE))
    rows: dict[str, dict[str, np.ndarray]] = {}
    for system, change in SYSTEMS.items():
        if options.only and system not in (OWN, *options.only):
            continue
        file = OUT / f"{config.name}-{system.replace(': ', '-').replace(', ', '-').replace(' ', '_')}.npz"
        settings = digest(to_mapping(change(config), identity=True))
        row = None if options.fresh else kept(file, settings)
        if row is None:
            row = measured(change(config), calendar) | {"settings": np.array(settings)}
            np.savez(file, allow_pickle=False, **row)
        rows[system] = row
        print(f"\n{config.name}, {system}", flush=True)
        for role in ROLES:
            print("\n".join(["", *table(rows, role)]), flush=True)


if __name__ == "__main__":
    main()
