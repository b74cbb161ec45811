"""A training step's cost for a large embedding table: AdamW on all rows, or states for the rows that it reads.

A step looks up 30,000 random rows of 32, as ten thousand events with a few hashed fields do, goes back, clips the norm and
moves the table. `adamw` and `rowwise` are the values of train.table_optimizer, as pipelines/descent.py has them; the peers
are PyTorch's own optimisers for sparse gradients, which hold two values and one an element.

ms      wall time of a step, the median of the steps after the first ones, one thread
peak    MiB of the process at its largest, beside what imports take: weights, gradients, states
states  MiB of the optimiser's states, which every checkpoint holds

    python -m benchmarks.table_optimizer

A cell is a process of its own. The largest one (AdamW, 10^7 rows) takes 6 GB.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before the libraries look

import torch
from torch import Tensor, nn

from model.row_wise_adagrad import RowWiseAdagrad
from pipelines.descent import clip_norm

ROWS = (100_000, 1_000_000, 10_000_000)
WIDTH, LOOKUPS, STEPS, FIRST = 32, 30_000, 12, 3
RATE = 1e-3
SYSTEMS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "adamw": lambda tables: torch.optim.AdamW(tables, RATE, weight_decay=0.0, fused=True),
    "rowwise": lambda tables: RowWiseAdagrad(tables, RATE),
    "torch SparseAdam": lambda tables: torch.optim.SparseAdam(tables, RATE),
    "torch Adagrad, sparse": lambda tables: torch.optim.Adagrad(tables, RATE),
}


def measure(system: str, rows: int) -> dict[str, float]:
    torch.manual_seed(0)
    before = _resident()
    table = nn.Embedding(rows, WIDTH, sparse=system != "adamw")
    parameters = list(table.parameters())
    dense, sparse = ([], parameters) if table.sparse else (parameters, [])
    optimizer = SYSTEMS[system](parameters)
    seconds = []
    for _ in range(FIRST + STEPS):
        read = torch.randint(rows, (LOOKUPS,))
        started = time.perf_counter()
        table(read).square().sum().backward()
        clip_norm(dense, sparse, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        seconds.append(time.perf_counter() - started)
    states = [v for state in optimizer.state.values() for v in state.values() if isinstance(v, Tensor)]
    return {
        "ms": 1000 * statistics.median(seconds[FIRST:]),
        "peak": (_resident() - before) / 2**20,
        "states": sum(state.nbytes for state in states) / 2**20,
    }


def _resident() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def row_of(system: str, rows: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.table_optimizer", "--cell", system, str(rows)]
    answer = subprocess.run(command, capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(f"{system}, {rows} rows: {answer.stderr[-2000:]}")
    return json.loads(answer.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.cell:
        print(json.dumps(measure(options.cell[0], int(options.cell[1]))))
        return
    print("| rows | optimiser | ms | of rowwise | peak | states |\n|---|---|---|---|---|---|")
    for rows in ROWS:
        found = {system: row_of(system, rows) for system in SYSTEMS}
        for system, row in found.items():
            ratio = row["ms"] / found["rowwise"]["ms"]
            print(f"| {rows:,} | {system} | {row['ms']:.3g} | {ratio:.2g} | {row['peak']:,.0f} | {row['states']:,.1f} |")


if __name__ == "__main__":
    main()
