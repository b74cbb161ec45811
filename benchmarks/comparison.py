"""Rows of a comparison: models that differ from a configuration in one thing each, trained and ranked alike.

All start from the configuration without its item head, which would hide what codes do; rows may add one. Every row makes
what its change makes stale, trains on the train days without alignment, and ranks the whole catalogue for every held-out
request. With several seeds of training a figure is the mean over them. Intervals of 95 % resample users, who bring their
positives in every seed; those of differences to the configuration are paired. They know nothing of seeds, so a difference
counts where it is beyond both its interval and what the columns by seed show.

The loss is nats a code of the positives of the table's days, each request read whole as in training; "not trained" where
it is not 10 % below the entropy of the codes of train positives. Its difference is left out where items have other codes
than in the configuration. Columns beside, chosen by `Comparison.columns`:

shared      items that share their codes with another one before ranks tell them apart
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
import itertools
import json
import os
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lakes import prepare
from model.decoder import code_nll
from model.positives import keep_targets
from model.ranker import Ranker
from model.ranking_metrics import bootstrap_means, columns_of, estimates, target_ranks
from model.requests import Requests
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

FULL = os.environ.get("FULL") == "1"
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
    columns: tuple[str, ...] = ("parameters", "MFLOP", "seconds")
    base: Change = lambda config: config


def changed(section: str, **settings: Any) -> Change:
    """Other settings of a section of the configuration."""
    return lambda config: replace(config, **{section: replace(getattr(config, section), **settings)})


def codes_alone(config: Config) -> Config:
    """Without an item head, its memory, and ids of items in the context."""
    fields = tuple(name for name in config.model.fields if name != "item")
    model = changed("model", fields=fields, item_rows=0, item_head=False, item_head_codes=True, item_neighbours=0)
    return model(changed("train", item_start="random")(config))


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
    parser.add_argument("--seeds", type=int, default=3 if FULL else 1, help="of training, for every row")
    options, config = start(parser)
    config = comparison.base(config)
    folder = OUT / comparison.name
    calendar = prepare(config, comparison.shared)
    rows: dict[str, list[Row]] = {}

    def measure(system: str, change: Change, seed: int) -> None:
        name = system.replace(": ", "-").replace(", ", "-").replace(" ", "_") + (f"-seed_{seed}" if seed else "")
        seeded = changed("train", seed=config.train.seed + seed)(change(config))
        row = kept_or_made(
            folder / f"{config.name}-{name}.npz", seeded, options.fresh, lambda c: measured(c, calendar, comparison.made)
        )
        rows.setdefault(system, []).append(row)
        print(f"\n{config.name}, {system}, seed {seed}", flush=True)
        for role in ROLES:
            print("\n".join(["", *table(rows, role, comparison.columns)]), flush=True)

    own: dict[str, Change] = {OWN: lambda unchanged: unchanged}
    measure(OWN, own[OWN], 0)
    systems = comparison.systems
    others = systems(rows[OWN][0]) if callable(systems) else systems
    wanted = own | {name: change for name, change in others.items() if name in options.only or not options.only}
    for seed, (system, change) in itertools.product(range(options.seeds), wanted.items()):
        if (system, seed) != (OWN, 0):
            measure(system, change, seed)


def measured(config: Config, calendar: Calendar, made: tuple[StageSpec, ...]) -> Row:
    """For each role user, time, item and rank of every positive, and its loss; and the columns of the row."""
    started = time.monotonic()
    with trained(config, calendar, (*made, TRAIN)) as (context, data, models):
        model = models[TRAIN.name]
        found = ranks(context, data, model) | training_figures(model) | {"entropy": code_entropy(data)}
        found["codes"] = np.array(zlib.crc32(data.catalogue.codes.tobytes()))
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
        parts, losses = [], []
        for requests in data.queries(role):
            rows = requests.target_rows()
            losses.append(code_losses(ranker, requests))
            ranked = ranker.rank(requests, CUTOFF, settings.beam, settings.mask_history)
            rank = target_ranks(ranked, rows, requests.target_items)
            parts.append(
                [requests.user_ids[rows].numpy(), requests.ts_us[rows].numpy(), requests.target_items.numpy(), rank]
            )
        columns = np.stack([np.concatenate(column) for column in zip(*parts, strict=True)])
        order = np.lexsort(columns[2::-1])  # that of the requests may differ between systems
        found |= {role: columns[:, order], loss_of(role): np.concatenate(losses)[order]}
    return found


def loss_of(role: Role) -> str:
    return f"{role} loss"


@torch.no_grad()
def code_losses(ranker: Ranker, requests: Requests) -> np.ndarray:
    """float64 [T]: nats a code of each target, the mean over levels; NaN of an item that the catalogue does not know."""
    known_T = requests.target_items >= 0
    kept = keep_targets(requests, known_T)
    loss_T = torch.full(known_T.shape, torch.nan, dtype=torch.float64)
    nll_TL = code_nll(ranker.decoder(kept, ranker.items).logits, ranker.items.codes[kept.target_items])
    loss_T[known_T] = nll_TL.mean(1).double()
    return loss_T.numpy()


def training_figures(model: Path) -> dict[str, np.ndarray]:
    reports = [row for row in json.loads((model / "history.json").read_text()) if "flops" in row]
    work, targets = sum(row["flops"] for row in reports), sum(row["targets"] for row in reports)
    parameters = json.loads((model / "model.json").read_text())["parameters"]
    return {
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


def table(rows: Mapping[str, Sequence[Row]], role: Role, columns: tuple[str, ...]) -> Iterator[str]:
    """The lines of one role's table, in Markdown. `rows` are those of a system's seeds."""
    own = rows[OWN][0]
    user_T = own[role][0]
    several = max(len(seeds) for seeds in rows.values()) > 1
    names = [f"recall@{CUTOFF}", f"ndcg@{CUTOFF}", "loss"]
    heads = [cell for name in names for cell in (name, f"minus {OWN}")]
    heads += [f"{name} by seed" for name in (names[0], names[2]) if several] + list(columns)
    yield f"{role}: {len(user_T):,} positives of {len(np.unique(user_T)):,} users\n"
    yield f"| row | {' | '.join(heads)} |"
    yield "|---" * (1 + len(heads)) + "|"
    base_TM = figures(rows[OWN], role).mean(0)
    for system, seeds in rows.items():
        if any(not np.array_equal(seed[role][:3], own[role][:3]) for seed in seeds):
            raise ValueError(f"{system} was measured on other requests than {OWN}; start anew with --fresh.")
        values_STM = figures(seeds, role)
        mean_TM = values_STM.mean(0)
        both_T2M = np.stack([mean_TM, mean_TM - base_TM], axis=1)
        known_T = ~np.isnan(both_T2M).any((1, 2))  # the others have ranks alone
        (recall, ndcg), (recall_gap, ndcg_gap) = intervals(both_T2M[..., :2], user_T)
        (loss,), (loss_gap,) = intervals(both_T2M[known_T, :, 2:], user_T[known_T])
        means, gaps = [recall, ndcg, loss], [recall_gap, ndcg_gap, loss_gap]
        if np.nanmean(values_STM[..., 2]) >= TRAINED * seeds[0]["entropy"]:
            means[2] += ", not trained"
        if seeds[0]["codes"] != own["codes"]:
            gaps[2] = ""
        cells = [cell for mean, gap in zip(means, gaps, strict=True) for cell in (mean, "" if system == OWN else gap)]
        if several:
            cells += [", ".join(short(f"{mean:.4f}") for mean in np.nanmean(values_STM[..., m], 1)) for m in (0, 2)]
        yield " | ".join([f"| {system}", *cells, *(shown(seeds, name) for name in columns)]) + " |"


def figures(seeds: Sequence[Row], role: Role) -> np.ndarray:
    """float64 [S, T, 3]: recall, NDCG and loss of every positive, by seed."""
    found = [(*columns_of(seed[role][3], (CUTOFF,)).values(), seed[loss_of(role)]) for seed in seeds]
    return np.array(found, np.float64).swapaxes(1, 2)


def intervals(values_TGC: np.ndarray, user_T: np.ndarray) -> list[list[str]]:
    """The mean of each column of each group with its interval; all share the draws of users."""
    groups, columns = values_TGC.shape[1:]
    flat_TM = values_TGC.reshape(len(values_TGC), -1)
    found = estimates(flat_TM, bootstrap_means(flat_TM, user_T, RESAMPLES, 0), CONFIDENCE)
    return [[interval(vars(each)) for each in found[g * columns : (g + 1) * columns]] for g in range(groups)]


def short(text: str) -> str:
    """Shares without the zero before the point."""
    return text.replace("0.", ".")


def interval(cell: dict[str, float]) -> str:
    return short(interval_text(cell))


def shown(seeds: Sequence[Row], column: str) -> str:
    value = float(np.mean([seed[column] for seed in seeds]))
    if column == "shared":
        return f"{100 * value:.2f} %"
    return f"{value:,.1f}" if column.endswith("FLOP") else f"{value:,.0f}"
