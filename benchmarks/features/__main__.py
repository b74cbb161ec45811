"""Feature jobs: seconds and memory by the size of the log, beside the same tables by DuckDB and by Polars.

Every system makes user_sequences, user_features, training_examples (newest_only by request) and rewards (own bucket alone)
of the same simulated log: this project by its stages, Delta in and out, the peers from the same Parquet files, Parquet
out. Each cell is a process of its own with two threads, from its start to its end, so Spark's session counts; the log is in
the page cache. Up to a million impressions the tables are compared row by row, above that by a digest; a difference
ends the benchmark. Of every system a day is a folder; ours come with Delta's constraints, statistics and commits.

    python -m benchmarks.features [--fresh] [--sizes 100000 ...]

FULL=1 adds the largest size. Beside the table, the JSON lines hold the seconds by output and Spark's stages of work.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.features.inputs import OUTPUTS, inputs_of, rules_of
from benchmarks.features.log import make
from benchmarks.features.measured import MIB, measured
from benchmarks.features.same_rows import DifferentRows, compare, digest, files_below, files_of_lake
from schemas.config import Config, RewardsConfig
from schemas.lake import Lake

OUT = Path(__file__).resolve().parent.parent / "out"
SIZES, LARGEST = (1_000_000, 5_000_000), 20_000_000
SYSTEMS = ("lazyrec", "duckdb", "polars")
ROW_BY_ROW = 1_000_000  # impressions; more are compared by digest
COSTS = ("wall_seconds", "cpu_seconds")
ENV = {"POLARS_MAX_THREADS": "2", "OMP_NUM_THREADS": "2"}
Row = dict[str, Any]


def config_of(lake: str) -> Config:
    return Config(name="features", lake=lake, rewards=RewardsConfig(backoff=()))


def room(impressions: int) -> Path:
    return OUT / "features" / str(impressions)


def build(impressions: int, system: str) -> Row:
    """The work of one cell, in this process."""
    lake, out = Lake(str(room(impressions) / "lake")), room(impressions) / system
    config = config_of(str(out / "tables") if system == "lazyrec" else lake.root)
    if system == "lazyrec":
        from benchmarks.features.by_lazyrec import build as by_lazyrec

        return by_lazyrec(config, impressions, out / "events")
    if system == "duckdb":
        from benchmarks.features.by_duckdb import build as by_peer
    else:
        from benchmarks.features.by_polars import build as by_peer
    return {"seconds": by_peer(inputs_of(lake), rules_of(config), out / "tables")}


def written(impressions: int, system: str) -> dict[str, list[str]]:
    """The Parquet files of each output."""
    out = room(impressions) / system / "tables"
    if system == "lazyrec":
        return {table: files_of_lake(Lake(str(out)), table) for table in OUTPUTS}
    return {table: files_below(out, table) for table in OUTPUTS}


def cell(impressions: int, system: str) -> Row:
    """Makes the tables in a process of its own and measures it."""
    lake = make(room(impressions) / "lake", impressions)
    out = room(impressions) / system
    shutil.rmtree(out, ignore_errors=True)
    (out / "tables").mkdir(parents=True)
    if system == "lazyrec":  # writes beside its inputs
        for name in lake.tables():
            (out / "tables" / name).symlink_to(lake.path(name))
    command = [sys.executable, "-m", "benchmarks.features", "--cell", str(impressions), system]
    costs = measured(command, out / "answer", ENV)
    answer = json.loads((out / "answer").read_text().splitlines()[-1])
    files = written(impressions, system)
    row = {
        "work": "features",
        "size": {"impressions": impressions},
        "system": system,
        **costs,
        "written_mib": {table: sum(os.path.getsize(f) for f in found) / MIB for table, found in files.items()},
        "seconds": answer["seconds"],
        "digests": {table: digest(table, found, out / "spill") for table, found in files.items()},
        "stages": answer.get("stages", []),
        "same_rows": False,
    }
    if impressions > ROW_BY_ROW:  # the digests are enough, and three systems' tables of one size are many
        shutil.rmtree(out)
    return row


def check_same(impressions: int, rows: Sequence[Row]) -> None:
    """Raises DifferentRows where the tables of one size differ: by digest, and up to ROW_BY_ROW row by row."""
    digests = {row["system"]: row["digests"] for row in rows}
    for system in SYSTEMS[1:]:
        for table in OUTPUTS:
            if impressions <= ROW_BY_ROW:
                ours, others = (written(impressions, name)[table] for name in ("lazyrec", system))
                compare(table, ours, others, system, room(impressions) / "spill")
            if digests[system][table] != digests["lazyrec"][table]:
                raise DifferentRows(f"Table {table} of {impressions:,} impressions by {system} is not the one by lazyrec.")


def growth(rows: Sequence[Row]) -> Iterator[Row]:
    """Exponents of the costs between one size and the next: 1 is a cost that grows with its input."""
    for system in SYSTEMS:
        of_system = sorted((r for r in rows if r["system"] == system), key=lambda r: r["size"]["impressions"])
        for small, large in pairwise(of_system):
            sizes = [row["size"]["impressions"] for row in (small, large)]
            exponents = {f"{name}_exponent": math.log(large[name] / small[name], sizes[1] / sizes[0]) for name in COSTS}
            size = {"impressions": sizes[1], "from_impressions": sizes[0]}
            yield {"work": "growth_of_features", "size": size, "system": system, **exponents}


def print_table(rows: Sequence[Row]) -> None:
    names = (*OUTPUTS, "other")
    print(f"| impressions | system | wall, s | CPU, s | peak, MiB | written, MiB | {', s | '.join(names)}, s |")
    print("|---" * (6 + len(names)) + "|")
    for row in sorted(rows, key=lambda r: (r["size"]["impressions"], SYSTEMS.index(r["system"]))):
        seconds = [row["seconds"].get(table, 0.0) for table in OUTPUTS]
        seconds.append(row["wall_seconds"] - sum(seconds))  # start, end, and what serves several outputs
        costs = f"{row['wall_seconds']:.1f} | {row['cpu_seconds']:.1f} | {row['peak_pss_mib']:,.0f}"
        size = f"{row['size']['impressions']:,} | {row['system']}"
        print(f"| {size} | {costs} | {sum(row['written_mib'].values()):,.0f} | {' | '.join(f'{s:.1f}' for s in seconds)} |")
    print("\n| from | to | system | exponent of wall seconds | of CPU seconds |\n|---|---|---|---|---|")
    for row in growth(rows):
        span = f"{row['size']['from_impressions']:,} | {row['size']['impressions']:,}"
        print(f"| {span} | {row['system']} | {row['wall_seconds_exponent']:.2f} | {row['cpu_seconds_exponent']:.2f} |")


def run(sizes: Sequence[int], out: Path, fresh: bool) -> None:
    """Makes the cells that are missing and checks each size whose rows are not known to be the same."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lines = [] if fresh or not out.is_file() else [json.loads(line) for line in out.read_text().splitlines()]
    rows = [row for row in lines if row["work"] == "features"]
    for impressions in sizes:
        of_size = [row for row in rows if row["size"]["impressions"] == impressions and is_usable(row)]
        if len(of_size) == len(SYSTEMS) and all(row["same_rows"] for row in of_size):
            continue
        rows = [row for row in rows if row["size"]["impressions"] != impressions] + of_size
        for system in SYSTEMS:
            if system not in {row["system"] for row in of_size}:
                of_size.append(cell(impressions, system))
                rows.append(of_size[-1])
                save(out, rows)
        try:
            check_same(impressions, of_size)
        except DifferentRows:
            save(out, [row for row in rows if row not in of_size])  # no times of different work
            raise
        for row in of_size:
            row["same_rows"] = True
        save(out, rows)
        shutil.rmtree(room(impressions))
    print_table(rows)


def is_usable(row: Row) -> bool:
    """Whether the cell need not run again: its tables are compared, or can be."""
    impressions = row["size"]["impressions"]
    return row["same_rows"] or impressions > ROW_BY_ROW or (room(impressions) / row["system"] / "tables").is_dir()


def save(out: Path, rows: Sequence[Row]) -> None:
    out.write_text("".join(json.dumps(row) + "\n" for row in (*rows, *growth(rows))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fresh", action="store_true", help="run every cell again")
    parser.add_argument("--sizes", nargs="+", type=int, metavar="IMPRESSIONS", help="other sizes than the usual ones")
    parser.add_argument("--cell", nargs=2, metavar=("IMPRESSIONS", "SYSTEM"), help="one cell's work, as a JSON line")
    arguments = parser.parse_args()
    if arguments.cell:
        print(json.dumps(build(int(arguments.cell[0]), arguments.cell[1])))
        return
    usual = (*SIZES, LARGEST) if os.environ.get("FULL") == "1" else SIZES
    run(sorted(arguments.sizes or usual), OUT / "features.jsonl", arguments.fresh)


if __name__ == "__main__":
    main()
