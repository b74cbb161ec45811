"""`lazyrec forget`: deletes users from the lake, and says what still knows of them and until when.

The rows go at once, by Spark (`jobs.forget`). Older versions of the tables hold them until `lazyrec maintain` removes
those: after the retention, and never where a registered model pins them. `--purge` removes every file but the newest
version's of each table about users, whoever pins it. A training that was broken off would go on with what it has read, so
it starts over.
"""

from __future__ import annotations

import datetime
import shutil
import time
from collections.abc import Collection
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from pipelines.engines import Engines
from pipelines.maintenance import vacuum
from pipelines.status import size_text
from pipelines.table_pins import pins_of, unfinished
from schemas.config import Config
from schemas.errors import ConfigError, LazyRecError
from schemas.lake import Lake, lake_of
from schemas.locks import lake_lock
from schemas.tables import REJECTED_ROWS

# What is made of many users and is not taken apart again.
TRACES = (
    "item_pairs, item_embeddings, the codebook and the weights, until they are fitted anew (`lazyrec run --force`)",
    "quantiles in rewards whose pool is population, until those days are made anew",
    "reports and metrics written before, the source's files, and the tables' logs, which name ids in statistics",
)


def forget(config: Config, users: Collection[int], source_ids: Collection[str], purge: bool) -> dict[str, Any]:
    """The JSON line. Raises ConfigError where nobody is named or an id cannot be one, LazyRecError for an empty lake."""
    if not users and not source_ids:
        raise ConfigError("forget needs --user ID or --source-id TEXT.")
    if any(not 0 <= user < 2**63 for user in users):
        raise ConfigError("--user must be an id of the table users, from 0 on; --source-id takes the source's own.")
    started, lake, engines = time.monotonic(), lake_of(config), Engines(config.resources)
    if not lake.tables():
        raise LazyRecError(f"{lake.root} holds no table, so there is nobody to forget; correct `lake`.")
    with lake_lock(lake), ExitStack() as cleanup:
        cleanup.callback(engines.stop)
        from jobs import forget as job

        chosen = sorted({*users, *(job.user_ids(engines.spark, config.source, source_ids) if source_ids else ())})
        restarted = _end_unfinished(lake)
        found = job.forget(engines.spark, lake, chosen, datetime.datetime.now(datetime.UTC).date())
        texts = job.clear_texts(engines.spark, lake)
        names = [name for name in (*job.tables_of_users(), REJECTED_ROWS.name) if lake.exists(name)]
        old = _purged(config, lake, names) if purge else _old_versions(config, lake, names)
    return {
        "stage": "forget",
        "status": "done",
        "seconds": {"forget": round(time.monotonic() - started, 2)},
        "users": chosen,
        "unknown": [user for user in chosen if not any(user in counts for counts in found.values())],
        "rows": {name: sum(counts.values()) for name, counts in found.items()} | {REJECTED_ROWS.name: texts},
        "tables": {name: lake.version(name) for name in lake.tables()},
        "restarted_trainings": restarted,
        "old_versions": old,
        "still_in": list(TRACES),
    }


def _end_unfinished(lake: Lake) -> list[str]:
    ended = [folder for folder, version in unfinished(lake) if version is not None]
    for folder in ended:
        shutil.rmtree(folder)
    return [f"{folder.parent.name}/{folder.name}" for folder in ended]


def _old_versions(config: Config, lake: Lake, names: Collection[str]) -> dict[str, Any]:
    days = config.maintenance.retention_days
    until = datetime.datetime.now(datetime.UTC).date() + datetime.timedelta(days=days)
    return {"purged": False, "readable_until": str(until), "pinned_by": pinned_old(config, lake, names)}


def _purged(config: Config, lake: Lake, names: Collection[str]) -> dict[str, Any]:
    lost = pinned_old(config, lake, names)  # before their files are gone
    removed = [vacuum(lake, name, 0, (), dry_run=False) for name in names]
    counts = {"files_removed": sum(n for n, _ in removed), "bytes_freed": sum(size for _, size in removed)}
    return {"purged": True, **counts, "lost_by": lost}


def pinned_old(config: Config, lake: Lake, names: Collection[str]) -> dict[str, list[str]]:
    """By registered model, the tables of which it pins a version with files that the newest version no longer has."""
    pins = pins_of(config, lake)
    found: dict[str, set[str]] = {}
    for name in names:
        newest = set(lake.open(name).file_uris())
        for version, models in pins.of_models(name).items():
            if version < (lake.version(name) or 0) and not set(lake.open(name, version).file_uris()) <= newest:
                for model in models:
                    found.setdefault(model, set()).add(name)
    return {model: sorted(tables) for model, tables in sorted(found.items())}


def print_forgotten(found: dict[str, Any], console: Console) -> None:
    grid = Grid("table", "rows deleted")
    for name, rows in found["rows"].items():
        grid.add_row(name, f"{rows:,} text(s) cleared" if name == REJECTED_ROWS.name else f"{rows:,}")
    console.print(grid)
    if found["unknown"]:
        console.print(f"Not in any table, remembered all the same: {', '.join(map(str, found['unknown']))}")
    for training in found["restarted_trainings"]:
        console.print(f"Starts over: {training}")
    old = found["old_versions"]
    if old["purged"]:
        console.print(f"Old versions: {old['files_removed']} files removed, {size_text(old['bytes_freed'])} freed")
    else:
        console.print(f"Old versions hold the rows until `lazyrec maintain` runs after {old['readable_until']}")
    verb = "has lost" if old["purged"] else "keeps for longer"
    for model, tables in (old["lost_by"] if old["purged"] else old["pinned_by"]).items():
        console.print(f"  {model} {verb}: {', '.join(tables)}", soft_wrap=True)
    for trace in found["still_in"]:
        console.print(f"Still in {trace}", soft_wrap=True)
