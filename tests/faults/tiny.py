"""The smallest deployment on which every stage has something to do, and its command line as a process of its own.

Users like the items of their own group, which a small model learns in no time, so that it is promoted and recommends.
A day's rows are a function of the day alone: two folders hold the same log, and days may arrive one a night.
"""

from __future__ import annotations

import csv
import datetime
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from schemas.lake import Lake
from tests.conftest import INTERPRETED

FIRST = datetime.date(2026, 3, 1)
DAYS = tuple(FIRST + datetime.timedelta(days=n) for n in range(20))
BASE = DAYS[:4]  # of the whole run that comes before the nights
USERS, ITEMS, GROUPS = 60, 40, 4
VALUES = ("click", "hate", "play_ms", "duration_ms")
COLUMNS = ("user_id", "item_id", "ts", *VALUES)
CONFIG: dict[str, Any] = {
    "name": "tiny",
    "source": {
        "kind": "mapped",
        "log": {"files": "day_*", "columns": {name: name for name in COLUMNS}},
        "items": {"files": "items.csv", "columns": {"item_id": "item_id", "tags": "tags"}},
    },
    "embed": {"sources": ["pairs", "attributes"], "weights": [1.0, 1.0], "pairs_width": 16, "attributes_width": 8},
    "tokenize": {"codes": 8, "iterations": 5},
    "model": {"d_model": 32, "layers": 2, "heads": 2, "g_kv": 2, "embed_dim": 16, "dropout": 0.0, "hash_buckets": 100},
    "train": {"epochs": 8, "batch_requests": 32, "learning_rate": 5e-3, "warmup_steps": 5, "checkpoint_steps": 10},
    "evaluate": {"baselines": ["popularity"], "cutoffs": [5, 10], "beam": 40, "bootstrap": 100, "deep_sample": 20},
    "recommend": {"items": 5, "beam": 40},
    "guard": {"enabled": False},
    "resources": {
        "spark_master": "local[2]",
        "spark_heap": "1g",
        "spark_partitions": 2,
        "spark_conf": list(INTERPRETED),
        "ray_cpus": 2,
        "object_store_mb": 100,
    },
}
Row = dict[str, Any]


def day_rows(day: datetime.date) -> list[Row]:
    """Two requests a user of three items each; a new item appears every other day."""
    chance = random.Random(day.toordinal())
    known = ITEMS - 4 + (day - FIRST).days // 2
    rows = []
    for user in range(USERS):
        for hour in (9, 18):
            items = chance.sample([i for i in range(known) if i % GROUPS == user % GROUPS], 2)
            other = chance.choice([i for i in range(known) if i not in items])
            for item in (*items, other):
                liked = item % GROUPS == user % GROUPS
                ts = datetime.datetime.combine(day, datetime.time(hour, user), datetime.UTC)
                played = (20_000 if liked else 2_000) + chance.randrange(1000)
                values = (int(liked), int(not liked and chance.random() < 0.3), played, 30_000)
                rows.append(dict(zip(COLUMNS, (user, item, ts.isoformat(), *values), strict=True)))
    return rows


def write_rows(path: Path, rows: Iterable[Row], columns: Sequence[str] = COLUMNS) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


@dataclass(frozen=True)
class Tiny:
    """A folder with a log, a configuration and a lake."""

    folder: Path

    @property
    def source(self) -> Path:
        return self.folder / "source"

    @property
    def lake(self) -> Lake:
        return Lake(str(self.folder / "lake"))

    @property
    def database(self) -> Path:
        return self.folder / "lake" / "mlflow.db"

    @property
    def arguments(self) -> list[str]:
        return ["--config", str(self.folder / "tiny.yaml")]

    def add_day(self, day: datetime.date) -> None:
        write_rows(self.source / f"day_{day}.csv", day_rows(day))

    def configure(self, changes: Mapping[str, Any] | None = None) -> None:
        """Writes the configuration; `changes` replaces keys within its sections."""
        data = json.loads(json.dumps(CONFIG)) | {"lake": "lake"}
        data["source"]["path"] = "source"
        for key, value in (changes or {}).items():
            data[key] = data[key] | value if isinstance(value, Mapping) else value
        (self.folder / "tiny.yaml").write_text(yaml.safe_dump(data))

    def forget(self) -> None:
        """Removes the lake."""
        shutil.rmtree(self.folder / "lake", ignore_errors=True)


def tiny(folder: Path, days: Iterable[datetime.date] = BASE, database: Path | None = None) -> Tiny:
    """A deployment in `folder`, without a lake; `database` is an MLflow database to begin with."""
    made = Tiny(folder)
    made.source.mkdir(parents=True)
    for day in days:
        made.add_day(day)
    items = [{"item_id": item, "tags": f"group{item % GROUPS}"} for item in range(ITEMS + len(DAYS) // 2)]
    write_rows(made.source / "items.csv", items, ("item_id", "tags"))
    made.configure()
    if database is not None:
        made.database.parent.mkdir()
        shutil.copy(database, made.database)
    return made


def start(
    deployment: Tiny, arguments: Sequence[str], environment: Mapping[str, str] | None = None, log: str = "log"
) -> subprocess.Popen[str]:
    """The command line on `deployment`; what it prints goes to the files LOG.out and LOG.err in its folder."""
    words = [sys.executable, "-m", "pipelines.cli", *arguments, *deployment.arguments]
    with (deployment.folder / f"{log}.out").open("w") as out, (deployment.folder / f"{log}.err").open("w") as err:
        return subprocess.Popen(
            words,
            stdout=out,
            stderr=err,
            text=True,
            cwd=deployment.folder,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )


def printed(deployment: Tiny, log: str = "log") -> list[str]:
    """The lines on standard error so far."""
    return (deployment.folder / f"{log}.err").read_text(errors="replace").splitlines()
