"""What quantitative codes add to a click model (QARM): one ranker with and without them, on the test days.

    python -m benchmarks.code_ranker --config conf/kuairand.yaml --set source.path=FOLDER [--set KEY=VALUE] [--fresh]

Runs the stages up to `codes` for the configuration (what is done already is skipped), then trains one ranker a system and
seed on the newest 200,000 impressions of the train days, ends training by the AUC on the validation days, and reads the
test days once. Systems: the base; the item vector as a frozen feature; VQ; RQ; both; and RQ in each of its three places
alone. `difference` is that to the base, the mean over seeds, with the 95 % interval of a bootstrap over users, paired; it
knows nothing of seeds, whose spread stands beside it. `unseen` is the AUC over items that the training has not shown.

A cell that is there is not trained again: its scores of the test impressions lie below benchmarks/out/code_ranker.
FULL=1: five seeds, and all train impressions.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.click_data import ClickData, Reading, read_click_data
from model.auc import aucs, drawn_users, gaucs
from model.code_ranker import RankerSettings, fit_ranker, predict
from pipelines.cli import overrides
from pipelines.progress import Progress
from pipelines.run import run_steps, running
from pipelines.source_logs import ingest_logs, with_logs
from pipelines.steps import Step
from schemas.calendar import Calendar, log_calendar
from schemas.config import Config
from schemas.errors import ConfigError
from schemas.lake import Lake, lake_of
from schemas.lineage import CODES, EMBED, ITEM_PAIRS, SEQUENCES, digest
from schemas.loader import load_config, to_mapping

OUT = Path(__file__).resolve().parent / "out" / "code_ranker.jsonl"
LABELS = ("click", "long_view", "like")
HISTORY = 30
TRAIN = 200_000
RESAMPLES = 500
BASE = RankerSettings()
SYSTEMS: dict[str, RankerSettings] = {
    "base": BASE,
    "vector": dataclasses.replace(BASE, kinds=("vector",)),
    "vq": dataclasses.replace(BASE, kinds=("vq",)),
    "rq": dataclasses.replace(BASE, kinds=("rq",)),
    "vq and rq": dataclasses.replace(BASE, kinds=("vq", "rq")),
    "rq, target": dataclasses.replace(BASE, kinds=("rq",), places=("target",)),
    "rq, sequence": dataclasses.replace(BASE, kinds=("rq",), places=("sequence",)),
    "rq, cross": dataclasses.replace(BASE, kinds=("rq",), places=("cross",)),
}


def prepare(config: Config) -> tuple[Lake, Calendar]:
    """Runs what is stale of the stages up to `codes`. Raises ConfigError for a split by user."""
    if config.split.by == "user":
        raise ConfigError("The benchmark needs test days; set split.by to days.")
    with running(config, Progress()) as runner:
        runner.config = with_logs(config, runner.engines, runner.progress)[0]
        ingest_logs(runner, False)
        calendar = log_calendar(config, runner.lake)
        run_steps(runner, [Step(spec, calendar) for spec in (SEQUENCES, ITEM_PAIRS, EMBED, CODES)], False)
    return lake_of(config), calendar


def scores_of(data: ClickData, system: str, seed: int, name: str, fresh: bool) -> np.ndarray:
    """float32 [I, Y] of the test impressions."""
    path = OUT.with_suffix("") / f"{digest(name, to_mapping(SYSTEMS[system]), seed)}.npy"
    if path.is_file() and not fresh:
        return np.load(path)
    started = time.monotonic()
    model, curve = fit_ranker(data.items, data.parts["train"], data.parts["validation"], SYSTEMS[system], seed)
    scores: np.ndarray = predict(model, data.parts["test"]).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".draft.npy")
    np.save(draft, scores)
    draft.replace(path)
    told = ", ".join(f"{value:.4f}" for value in curve)
    print(f"{system}, seed {seed}: validation {told}; {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
    return scores


def draws_of(data: ClickData, scores_IY: np.ndarray, weight_BU: np.ndarray) -> dict[str, np.ndarray]:
    """float64 [1 + B] of every measure."""
    labels_IY = data.parts["test"].labels_IY.numpy() > 0
    found = {
        f"auc_{label}": aucs(scores_IY[:, y], labels_IY[:, y], data.users, weight_BU) for y, label in enumerate(LABELS)
    }
    found["gauc_click"] = gaucs(scores_IY[:, 0], labels_IY[:, 0], data.users, weight_BU)
    new = data.unseen
    if new.any():
        found["auc_click_unseen"] = aucs(scores_IY[new, 0], labels_IY[new, 0], data.users[new], weight_BU)
    return found


def rows_of(data: ClickData, drawn: dict[str, list[dict[str, np.ndarray]]], work: str) -> list[dict[str, Any]]:
    """One row a system: its measures, and the differences to the base with their intervals."""
    train, test = len(data.parts["train"]), len(data.parts["test"])
    size = {"train": train, "test": test, "users": data.num_users, "unseen": int(data.unseen.sum())}
    rows = []
    for system, seeds in drawn.items():
        row: dict[str, Any] = {"work": work, "size": size, "system": system, "seeds": len(seeds)}
        for name in seeds[0]:
            values = np.array([draws[name] for draws in seeds])
            less = values - np.array([draws[name] for draws in drawn["base"]])
            low, high = np.nanquantile(less.mean(0)[1:], [0.025, 0.975])
            row |= {name: values[:, 0].mean(), f"{name}_difference": less[:, 0].mean()}
            row |= {f"{name}_low": low, f"{name}_high": high, f"{name}_seed_spread": less[:, 0].std()}
        rows.append({key: float(value) if isinstance(value, np.floating) else value for key, value in row.items()})
    return rows


def print_table(rows: list[dict[str, Any]]) -> None:
    size = ", ".join(f"{value:,} {name}" for name, value in rows[0]["size"].items())
    print(f"{rows[0]['work']}: {size}; {rows[0]['seeds']} seed(s); differences to the base in points of AUC (%)")
    names = [key.removesuffix("_difference") for key in rows[0] if key.endswith("_difference")]
    print("| system | " + " | ".join(f"{name} | difference, interval, spread" for name in names) + " |")
    print("|---" * (1 + 2 * len(names)) + "|")
    for row in rows:
        cells = []
        for name in names:
            value, *less = (100 * row[name + end] for end in ("", "_difference", "_low", "_high", "_seed_spread"))
            cells += [f"{value:.2f}", "" if row["system"] == "base" else "{:+.2f} [{:+.2f}, {:+.2f}] {:.2f}".format(*less)]
        print(f"| {row['system']} | " + " | ".join(cells) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True)
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--fresh", action="store_true", help="train every cell again")
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch; 0: its default")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    config = load_config(options.config, overrides(options.set) | {"codes.enabled": True})
    lake, calendar = prepare(config)
    full = os.environ.get("FULL") == "1"
    reading = Reading(LABELS, config.targets.positive, HISTORY, sys.maxsize if full else TRAIN, BASE.buckets)
    data = read_click_data(lake, calendar, reading)
    tables = ("user_sequences", "items", "item_codes")
    name = digest(*({str(d): i for d, i in lake.identities(table).items()} for table in tables), to_mapping(reading))
    weight_BU = drawn_users(data.num_users, RESAMPLES, seed=0)
    drawn: dict[str, list[dict[str, np.ndarray]]] = {system: [] for system in SYSTEMS}
    for seed in range(5 if full else 3):
        for system in SYSTEMS:
            drawn[system].append(draws_of(data, scores_of(data, system, seed, name, options.fresh), weight_BU))
    work = f"code_ranker_{config.name}"
    rows = rows_of(data, drawn, work)
    OUT.parent.mkdir(parents=True, exist_ok=True)
    others = [line for line in (OUT.read_text().splitlines() if OUT.is_file() else []) if json.loads(line)["work"] != work]
    OUT.write_text("".join(line + "\n" for line in [*others, *map(json.dumps, rows)]))
    print_table(rows)


if __name__ == "__main__":
    main()
