"""Popularity, ItemKNN and SASRec on the Beauty file: leave-last-out, whole catalogue, history masked.

Everything is fitted on the train events (all but a user's last two) and tuned on the last but one; the row "itemknn with
validation" is fitted again with the validation events before the test, the other protocol in use. The last event is
read once, at the end. A cell that the output holds already is not run again.

    python -m benchmarks.baselines [--data Beauty.txt] [--threads 2] [--fresh]

SASRec stops after 20 minutes at most; FULL=1 gives it 60 epochs whatever they take.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from model.itemknn import ItemKnn, KnnSettings
from model.positives import Positives
from model.ranking_metrics import bootstrap_means, columns_of, estimates, target_ranks
from model.requests import Requests
from pipelines.baselines import Fitted, Fitting, System, fit_itemknn, fit_popularity, fit_sasrec
from schemas.config import EvaluateConfig
from schemas.feedback import mask_of

REPOSITORY = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("LAZYREC_DATA", REPOSITORY.parent / "shared" / "data"))
OUT = REPOSITORY / "benchmarks" / "out"
CUTOFFS = (5, 10, 50)
POSITIVE = mask_of(["click"])
VALIDATION_USERS = 5_000
BATCH = 1_000


def read_sequences(path: Path) -> list[np.ndarray]:
    """Item indices from 0 of each user, in the order of the file."""
    return [np.array(line.split()[1:], dtype=np.int64) - 1 for line in path.read_text().splitlines()]


def positives_of(sequences: list[np.ndarray], held_out: int, num_items: int) -> Positives:
    """All but the last `held_out` events of every user."""
    kept = [sequence[: len(sequence) - held_out] for sequence in sequences]
    users = np.repeat(np.arange(len(kept)), [len(sequence) for sequence in kept])
    ts_us = np.concatenate([np.arange(len(sequence)) for sequence in kept])
    return Positives.of(users, ts_us, np.concatenate(kept), num_items)


def requests_of(sequences: list[np.ndarray], users: np.ndarray, held_out: int) -> list[Requests]:
    """Requests for the event `held_out` from the end (1: the last), in batches; the history is all before it."""
    return [batch_of(sequences, part, held_out) for part in np.array_split(users, max(1, len(users) // BATCH))]


def batch_of(sequences: list[np.ndarray], users: np.ndarray, held_out: int) -> Requests:
    histories = [sequences[user][: len(sequences[user]) - held_out] for user in users]
    items = torch.from_numpy(np.concatenate(histories))
    offsets = torch.tensor([0, *np.cumsum([len(history) for history in histories])])
    unknown, one_each = torch.full_like(items, -1), torch.arange(len(users) + 1)
    return Requests(
        user_ids=torch.from_numpy(users),
        ts_us=offsets.diff(),
        attribute_offsets=torch.zeros_like(one_each),
        attributes=items[:0],
        history_offsets=offsets,
        history_items=items,
        history_authors=unknown,
        history_ts_us=torch.zeros_like(items),
        history_play_ms=unknown,
        history_duration_ms=unknown,
        history_feedback=torch.full_like(items, POSITIVE),
        target_offsets=one_each,
        target_items=torch.tensor([sequences[user][-held_out] for user in users]),
        target_feedback=torch.full((len(users),), POSITIVE),
        target_impressions=torch.from_numpy(users),
    )


def measure(system: System, requests: list[Requests]) -> dict[str, float]:
    """Means with the bounds of their 95 % intervals over users."""
    lists = [(system.rank(batch, max(CUTOFFS), True), batch) for batch in requests]
    ranks = np.concatenate([target_ranks(ranked, batch.target_rows(), batch.target_items) for ranked, batch in lists])
    columns = columns_of(ranks, CUTOFFS)
    values = np.column_stack(list(columns.values()))
    found = estimates(values, bootstrap_means(values, np.arange(len(values)), 1000, seed=0), 0.95)
    row: dict[str, float] = {}
    for name, estimate in zip(columns, found, strict=True):
        row |= {name: estimate.value, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
    return row


def cells(sequences: list[np.ndarray], num_items: int, full: bool) -> dict[str, Callable[[], Fitted]]:
    """System name: how it is fitted."""
    sample = np.random.default_rng(0).permutation(len(sequences))[:VALIDATION_USERS]
    config = EvaluateConfig(
        mask_history=True,
        itemknn_neighbours=(50, 200),
        sasrec_epochs=60,
        sasrec_batch_tokens=1024,
        sasrec_seconds=None if full else 20 * 60,
    )
    fitting = Fitting(
        positives_of(sequences, 2, num_items),
        requests_of(sequences, np.sort(sample), 2),
        POSITIVE,
        config,
        dated=False,
        say=lambda line: print(line, file=sys.stderr, flush=True),
        on_best=lambda weights: save_file(weights, OUT / "sasrec_beauty.safetensors"),
    )

    def refitted() -> Fitted:
        chosen = fit_itemknn(fitting).chosen
        settings = KnnSettings(**{name: value for name, value in chosen.items() if name != "validation"})
        return Fitted(ItemKnn.fit(positives_of(sequences, 1, num_items), settings, POSITIVE), chosen)

    return {
        "popularity": lambda: fit_popularity(fitting),
        "itemknn symmetric": lambda: fit_itemknn(fitting, directions=(False,)),
        "itemknn": lambda: fit_itemknn(fitting),
        "itemknn with validation": refitted,
        "sasrec": lambda: fit_sasrec(fitting),
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    print(f"{'system':<26}{'recall@10':>24}{'ndcg@10':>24}{'seconds':>9}")
    for row in rows:
        shown = [f"{row[m]:.4f} [{row[m + '_low']:.4f}, {row[m + '_high']:.4f}]" for m in ("recall@10", "ndcg@10")]
        print(f"{row['system']:<26}{shown[0]:>24}{shown[1]:>24}{row['seconds']:>9.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA / "amazon_beauty" / "Beauty.txt")
    parser.add_argument("--threads", type=int, default=0, help="of PyTorch; 0: its default")
    parser.add_argument("--fresh", action="store_true", help="run every cell again")
    arguments = parser.parse_args()
    if not arguments.data.is_file():
        sys.exit(f"The Beauty file is not at {arguments.data}; give its place by --data or set LAZYREC_DATA.")
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    full = os.environ.get("FULL") == "1"
    sequences = read_sequences(arguments.data)
    num_items = 1 + max(int(sequence.max()) for sequence in sequences)
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / "baselines.jsonl"
    rows = [] if arguments.fresh or not path.is_file() else [json.loads(line) for line in path.read_text().splitlines()]
    size = {"users": len(sequences), "items": num_items, "full": full}
    test = requests_of(sequences, np.arange(len(sequences)), 1)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for system, fit in cells(sequences, num_items, full).items():
        if any(row["system"] == system and row["size"] == size for row in rows):
            continue
        started = time.monotonic()
        fitted = fit()
        seconds = time.monotonic() - started
        row = {"work": "beauty_leave_last_out", "size": size, "system": system, "seconds": seconds}
        rows.append(row | measure(fitted.system, test) | {"chosen": fitted.chosen})
        with path.open("a") as out:
            out.write(json.dumps(rows[-1]) + "\n")
    print_table([row for row in rows if row["size"] == size])


if __name__ == "__main__":
    main()
