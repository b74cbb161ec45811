"""`make soak-days`: a month of simulated days, a file a night, some late, some corrected, some runs killed; in the end the
tables of one full build.

    python -m tests.faults.soak_days --days 30 --impressions 300000 --seed 0

Every night `lazyrec backfill` takes what has arrived. One day arrives three nights late, of one only half the rows come
at first, and of one wrong values, each put right some nights later. Two runs, one of them with a late day, are killed at a
random moment and the command is given again; these are processes of their own, while the other nights share one JVM. A
second lake takes the complete log in one run. Then every table must hold the same rows (by key; arrays in their order)
under the same identities. Exits 1 where anything is not as it must be.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import gzip
import io
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from pipelines.engines import Engines
from schemas.config import ResourceConfig, SimulateConfig
from schemas.errors import EXIT_DONE
from schemas.lake import Lake
from tests.conftest import INTERPRETED
from tests.faults.fingerprint import rows_digest
from tests.faults.soak import Moment, Seen, finish, killed_run
from tests.faults.tiny import Tiny, start
from tests.pipelines.command_line import answer_of, shared_engines

RESOURCES: dict[str, Any] = {
    "spark_master": "local[2]",
    "spark_heap": "2g",
    "spark_partitions": 4,
    "spark_conf": list(INTERPRETED),
}
CONFIG: dict[str, Any] = {
    "name": "month",
    "source": {"kind": "kuairand", "path": "source"},
    "item_pairs": {"kinds": ["cooccurrence", "swing", "user_to_item"]},
    "sequences": {"watch_quantile": 0.8},
    "sessions": {"enabled": True},
    "guard": {"enabled": False},
    "resources": RESOURCES,
}
FEWEST_DAYS = 10
KILLED_AFTER = (5.0, 60.0)  # seconds from the start of a process
Change = Callable[[Path, Path], None]


@dataclass(frozen=True)
class Late:
    """The night on which a day is put right, and what came of it in its own night, if anything."""

    right_on: int
    at_first: Change | None


def plan_of(days: int) -> dict[int, Late]:
    """By number of the day."""
    return {
        days // 5: Late(days // 5 + 3, None),
        days * 2 // 5: Late(days * 2 // 5 + 2, first_half),
        days * 7 // 10: Late(days * 7 // 10 + 2, wrong_values),
    }


def first_half(source: Path, target: Path) -> None:
    lines = gzip.decompress(source.read_bytes()).splitlines(keepends=True)
    target.write_bytes(gzip.compress(b"".join(lines[: len(lines) // 2])))


def wrong_values(source: Path, target: Path) -> None:
    """Every click undone, every play three seconds longer."""
    rows = list(csv.DictReader(io.StringIO(gzip.decompress(source.read_bytes()).decode())))
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(row | {"is_click": "0", "play_time_ms": str(int(row["play_time_ms"]) + 3_000)})
    target.write_bytes(gzip.compress(text.getvalue().encode()))


def deployment(folder: Path, raw: Path) -> Tiny:
    """Without a day of the log, with the catalogues."""
    made = Tiny(folder)
    made.source.mkdir(parents=True)
    for path in raw.glob("*_simulated.csv.gz"):
        shutil.copy(path, made.source)
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"lake": "lake", **CONFIG}))
    return made


def files_of(raw: Path, day: datetime.date) -> list[Path]:
    return sorted(raw.glob(f"log_standard_{day:%Y%m%d}-*.csv.gz"))


def arrive(raw: Path, to: Tiny, day: datetime.date, change: Change | None = None) -> None:
    for path in files_of(raw, day):
        (change or shutil.copy)(path, to.source / path.name)


def backfill(first: datetime.date) -> list[str]:
    return ["backfill", "--from", str(first)]


def soak_month(
    raw: Path, made: Tiny, engines: Engines, days: Sequence[datetime.date], chance: random.Random, seen: Seen
) -> None:
    late = plan_of(len(days))
    righted = sorted(of.right_on for of in late.values())
    kills = {chance.choice(righted), chance.choice([n for n in range(3, len(days)) if n not in righted])}
    for number, day in enumerate(days):
        came = files_come(raw, made, days, number, late)
        if not came:
            seen.say(f"night {number + 1}, {day}: nothing has come")
            continue
        command, started = backfill(min(came)), time.monotonic()
        if number in kills:
            said, _, faults = killed_run(made, command, Moment(chance.uniform(*KILLED_AFTER)), chance, seen)
            seen.say(f"night {number + 1}, {day}: {said}", faults + finish(made, command, seen)[1])
        answer = one_run(engines, made, min(came))
        seen.say(f"night {number + 1}, {day}: {written(answer)}, {time.monotonic() - started:.0f} s")


def files_come(
    raw: Path, made: Tiny, days: Sequence[datetime.date], number: int, late: dict[int, Late]
) -> list[datetime.date]:
    """Puts there what comes in a night; the days of which something came."""
    came = [days[other] for other, of in late.items() if of.right_on == number]
    for day in came:
        arrive(raw, made, day)
    change = late[number].at_first if number in late else None
    if number not in late or change is not None:
        arrive(raw, made, days[number], change)
        came.append(days[number])
    return came


def written(answer: dict[str, Any]) -> str:
    """The days of each table that a run wrote."""
    return ", ".join(f"{table} {len(days)}" for table, days in answer["days"].items()) or "nothing left to write"


def state(lake: Lake) -> dict[str, Any]:
    """Of each table the rows, whatever their order, and the identities."""
    return {name: (rows_digest(lake, name), sorted(lake.identities(name).items())) for name in lake.tables()}


def one_run(engines: Engines, made: Tiny, first: datetime.date) -> dict[str, Any]:
    """The answer of a backfill in this process."""
    with shared_engines(engines, made.folder):
        return answer_of([*backfill(first), "--quiet", *made.arguments], made.folder)


def simulated(folder: Path, settings: SimulateConfig) -> Path:
    """The folder of the raw logs."""
    made = Tiny(folder)
    folder.mkdir(parents=True)
    numbers = {name: getattr(settings, name) for name in ("impressions", "users", "items", "days", "seed")}
    (folder / "tiny.yaml").write_text(yaml.safe_dump({"lake": "lake", "simulate": numbers}))
    assert start(made, ["simulate", "--out", "raw"]).wait() == EXIT_DONE, (folder / "log.err").read_text()
    return folder / "raw"


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tests.faults.soak_days", description="days one at a time, late ones, kills")
    parser.add_argument("--days", type=int, default=30, help=f"{FEWEST_DAYS} or more")
    parser.add_argument("--impressions", type=int, default=300_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.days < FEWEST_DAYS:
        parser.error(f"--days must be at least {FEWEST_DAYS}")
    settings = SimulateConfig(
        options.impressions, max(100, options.impressions // 50), 2_000, days=options.days, seed=options.seed
    )
    seen, chance = Seen(), random.Random(options.seed)
    days = [settings.first_day + datetime.timedelta(days=number) for number in range(options.days)]
    with tempfile.TemporaryDirectory(prefix="lazyrec_month_") as folder:
        raw = simulated(Path(folder) / "simulated", settings)
        month, whole = (deployment(Path(folder) / name, raw) for name in ("month", "whole"))
        engines = Engines(ResourceConfig(**RESOURCES))
        with ExitStack() as cleanup:
            cleanup.callback(engines.stop)
            soak_month(raw, month, engines, days, chance, seen)
            for day in days:
                arrive(raw, whole, day)
            started = time.monotonic()
            answer = one_run(engines, whole, days[0])
        seen.say(f"one full build: {written(answer)}, {time.monotonic() - started:.0f} s")
        found, wanted = state(month.lake), state(whole.lake)
        for name in sorted({*found, *wanted}):
            (rows, _), stamps = wanted[name]
            faults = [] if found.get(name) == wanted[name] else ["differs"]
            seen.say(f"  {name}: {rows:,} rows, {len(stamps)} days", faults)
    seen.say(f"{len(days)} nights, {seen.kills} kills, {seen.faults} not as they must be")
    return 1 if seen.faults else 0


if __name__ == "__main__":
    sys.exit(main())
