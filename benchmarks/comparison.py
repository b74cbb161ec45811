"""Rows of a comparison: models that differ from a configuration in one thing each, trained and ranked alike.

All start from the configuration without its item head, which would hide what codes do; rows may add one. Every row makes
what its change makes stale, trains on the train days without alignment, and ranks the whole catalogue for every held-out
request. Intervals of 95 % resample users; those of differences to the configuration are paired. They know nothing of seeds,
so a difference counts where it is beyond both its interval and the rows with another seed.

Columns beside the metrics, chosen by `Comparison.columns`:

shared      items that share their codes with another one before ranks tell them apart
loss        validation loss a code, on the seed's own sample of requests: those of two seeds do not compare; "not trained"
            where it is not 10 % below the entropy of the codes of train positives
parameters  of the model, tables included
MFLOP       forward and backward of a target in training, by model/flops.py
TFLOP       of the whole training
targets     that bore a loss, in thousands; one of two epochs counts twice
seconds     of the whole row

Choices are made on the validation days; the test days are there to read. Rows are kept as they come in benchmarks/out,
one file a row, and the next start continues after those of the same settings.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.lakes import prepare
from model.ranking_metrics import bootstrap_means, columns_of, estimates, target_ranks
from pipelines.candidates import model_folder
from pipelines.cli import overrides
from pipelines.evaluate import evaluation_data, ranker_of
from pipelines.evaluation_data import EvaluationData
from pipelines.outcome import interval_text
from pipelines.progress import Progress
from pipelines.run import run_steps, running
from pipelines.split import Role
from pipelines.stage import StageContext
from pipelines.steps import Step
from schemas.calendar import Calendar
from schemas.config import Config
from schemas.lineage import ALIGN, EVALUATE, TRAIN, StagePlan, StageSpec, digest
from schemas.loader import load_config, to_mapping

OUT = Path(__file__).resolve().parent / "out"
CUTOFF, RESAMPLES, CONFIDENCE = 10, 1000, 0.95
TRAINED = 0.9  # of the entropy, which a trained model's loss lies below
ROLES: tuple[Role, Role] = ("validation", "test")
OWN = "configuration"
Change = Callable[[Config], Config]
Row = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Comparison:
    """`systems` are rows by name, beside the configuration's own, or what makes them from its figures; `shared` are the
    stages that all rows have in common, `made` those that a row makes for itself before it trains. `base` changes the
    configuration for all rows."""

    name: str
    systems: Mapping[str, Change] | Callable[[Row], Mapping[str, Change]]
    shared: tuple[StageSpec, ...]
    made: tuple[StageSpec, ...]
    columns: tuple[str, ...] = ("loss", "parameters", "MFLOP", "seconds")
    base: Change = lambda config: config


def changed(section: str, **settings: Any) -> Change:
    """Other settings of a section of the configuration."""
    return lambda config: replace(config, **{section: replace(getattr(config, section), **settings)})


def codes_alone(config: Config) -> Config:
    """Without an item head, its memory, and ids of items in the context."""
    fields = tuple(name for name in config.model.fields if name != "item")
    model = changed("model", fields=fields, item_rows=0, item_head=False, item_head_codes=True, item_neighbours=0)
    return model(changed("train", item_start="random")(config))


def with_seeds(rows: Mapping[str, Change]) -> dict[str, Change]:
    """The rows, and each of them and the configuration itself with two further seeds of training."""

    def seeded(change: Change, seed: int) -> Change:
        return lambda config: changed("train", seed=seed)(change(config))

    all_rows: dict[str, Change] = {OWN: lambda own: own, **rows}
    return {**rows, **{f"{name}, seed {seed}": seeded(row, seed) for name, row in all_rows.items() for seed in (1, 2)}}


def parser_of(page: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=page, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--fresh", action="store_true", help="measure every row again")
    return parser


def start(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Config]:
    """The options, and the configuration that all rows start from."""
    options = parser.parse_args()
    return options, codes_alone(load_config(options.config, overrides(options.set)))


def main(comparison: Comparison, page: str) -> None:
    """The command line of a comparison, whose module says `page` of itself."""
    parser = parser_of(page)
    parser.add_argument("--only", action="append", default=[], help="these rows alone, beside the configuration's own")
    options, config = start(parser)
    config = comparison.base(config)
    folder = OUT / comparison.name
    calendar = prepare(config, comparison.shared)
    rows: dict[str, Row] = {}

    def measure(system: str, change: Change) -> None:
        file = folder / f"{config.name}-{system.replace(': ', '-').replace(', ', '-').replace(' ', '_')}.npz"
        rows[system] = kept_or_made(file, change(config), options.fresh, lambda c: measured(c, calendar, comparison.made))
        print(f"\n{config.name}, {system}", flush=True)
        for role in ROLES:
            print("\n".join(["", *table(rows, role, comparison.columns)]), flush=True)

    measure(OWN, lambda own: own)
    systems = comparison.systems
    for system, change in (systems(rows[OWN]) if callable(systems) else systems).items():
        if not options.only or system in options.only:
            measure(system, change)


def measured(config: Config, calendar: Calendar, made: tuple[StageSpec, ...]) -> Row:
    """For each role user, time, item and rank of every positive; and the columns of the row."""
    started = time.monotonic()
    with trained(config, calendar, (*made, TRAIN)) as (context, data, models):
        model = models[TRAIN.name]
        found = ranks(context, data, model) | training_figures(model) | {"entropy": code_entropy(data)}
    return found | {"seconds": np.array(time.monotonic() - started)}


@contextmanager
def trained(
    config: Config, calendar: Calendar, stages: tuple[StageSpec, ...]
) -> Iterator[tuple[StageContext, EvaluationData, dict[str, Path]]]:
    """What is stale of `stages`, and then what evaluates the models in the folders, by the stage that makes one."""
    with running(config, Progress()) as runner:
        outcomes = run_steps(runner, [Step(spec, calendar) for spec in stages], False)
        runner.engines.ray()
        lake = runner.lake
        tables = [
            "training_examples",
            "semantic_ids",
            "items",
            *(["lifelong_sequences"] if config.lifelong.enabled else []),
        ]
        pins = {name: lake.version(name) or 0 for name in tables}
        context = StageContext(config, lake, calendar, StagePlan(EVALUATE), runner.engines, pins, runner.progress.say)
        identities = {outcome.name: outcome.identity for outcome in outcomes}
        models = {TRAIN.name: lake.artifact(TRAIN.name, identities[TRAIN.name])}
        if ALIGN.name in identities:
            models[ALIGN.name] = model_folder(lake, identities[ALIGN.name])
        yield context, evaluation_data(context, config.model.lifelong_length), models


def ranks(context: StageContext, data: EvaluationData, model: Path) -> dict[str, np.ndarray]:
    settings, ranker = context.config.evaluate, ranker_of(context, model, data.catalogue)
    found: dict[str, np.ndarray] = {"shared": np.array((data.catalogue.ranks > 0).mean())}
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


def training_figures(model: Path) -> dict[str, np.ndarray]:
    history = json.loads((model / "history.json").read_text())
    losses = [row["validation_loss"] for row in history if "validation_loss" in row]
    reports = [row for row in history if "flops" in row]
    work, targets = sum(row["flops"] for row in reports), sum(row["targets"] for row in reports)
    parameters = json.loads((model / "model.json").read_text())["parameters"]
    return {
        "loss": np.array(losses[-1] if losses else np.nan),
        "MFLOP": np.array(work / max(targets, 1) / 1e6),
        "TFLOP": np.array(work / 1e12),
        "targets": np.array(targets / 1e3),
        "parameters": np.array(parameters),
    }


def code_entropy(data: EvaluationData) -> np.ndarray:
    """Nats of a code of the train positives, the mean over levels: the loss of a model that knows nothing but how often
    each code comes."""
    counts = data.train_positives().counts
    values = []
    for level in data.catalogue.codes.T:
        shares = np.bincount(level, weights=counts) / max(counts.sum(), 1)
        values.append(-(shares * np.log(np.where(shares > 0, shares, 1))).sum())
    return np.array(np.mean(values))


def kept_or_made(file: Path, config: Config, fresh: bool, make: Callable[[Config], Row]) -> Row:
    """The row in `file`, if it was measured with this configuration, else a new one."""
    settings = digest(to_mapping(config, identity=True))
    if file.is_file() and not fresh:
        with np.load(file) as saved:
            if str(saved["settings"]) == settings:
                return dict(saved)
    row = {**make(config), "settings": np.array(settings)}
    file.parent.mkdir(parents=True, exist_ok=True)
    np.savez(file, allow_pickle=False, **row)
    return row


def table(rows: Mapping[str, Row], role: Role, columns: tuple[str, ...]) -> Iterator[str]:
    """The lines of one role's table, in Markdown."""
    own = rows[OWN][role]
    yield f"{role}: {len(own[0]):,} positives of {len(np.unique(own[0])):,} users\n"
    yield f"| row | recall@{CUTOFF} | minus {OWN} | ndcg@{CUTOFF} | minus {OWN} | " + " | ".join(columns) + " |"
    yield "|---" * (5 + len(columns)) + "|"
    base = np.column_stack(list(columns_of(own[3], (CUTOFF,)).values()))
    for system, found in rows.items():
        if not np.array_equal(found[role][:3], own[:3]):
            raise ValueError(f"{system} was measured on other requests than {OWN}; start anew with --fresh.")
        values = np.column_stack(list(columns_of(found[role][3], (CUTOFF,)).values()))
        both = np.concatenate([values, values - base], axis=1)
        draws = bootstrap_means(both, own[0], RESAMPLES, 0)
        recall, ndcg, recall_gap, ndcg_gap = (interval(vars(each)) for each in estimates(both, draws, CONFIDENCE))
        gaps = ("", "") if system == OWN else (recall_gap, ndcg_gap)
        yield " | ".join([f"| {system}", recall, gaps[0], ndcg, gaps[1], *(shown(found, name) for name in columns)]) + " |"


def short(text: str) -> str:
    """Shares without the zero before the point."""
    return text.replace("0.", ".")


def interval(cell: dict[str, float]) -> str:
    return short(interval_text(cell))


def shown(row: Row, column: str) -> str:
    value = float(row[column])
    if column == "shared":
        return f"{100 * value:.2f} %"
    if column == "loss":
        return f"{value:.4f}" + ("" if value < TRAINED * float(row["entropy"]) else ", not trained")
    return f"{value:,.1f}" if column.endswith("FLOP") else f"{value:,.0f}"
