"""`lazyrec maintain`: merges the small files of closed days, and removes what is old and needed by nothing.

Delta-rs does it, not Spark: no JVM starts (seconds and a gigabyte of a laptop), it streams, its merging keeps the order of
a day's rows, and its vacuum spares versions by name, which Spark's cannot. There is no clustering by user: the tables of
users are written by hash of the user and sorted by user or time within each file (`jobs.arrow_files`), so a Z-order would
move rows and help no reader. `training_examples`, whose batches follow its rows, is merged by whole days only, and left
alone while a training that was broken off stands in its newest version. Nothing here changes a row or an identity.
"""

from __future__ import annotations

import datetime
import shutil
import time
from collections import defaultdict
from collections.abc import Collection
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs
from deltalake import DeltaTable, WriterProperties
from deltalake.fs import DeltaStorageHandler
from rich.console import Console
from rich.table import Table as Grid

from pipelines.example_stream import TABLE as STREAM
from pipelines.status import folder_bytes, size_text
from pipelines.table_pins import ARTIFACT_STAGES, Pins, pins_of, resumable, unfinished
from schemas.config import Config
from schemas.errors import ConfigError
from schemas.lake import Lake, lake_of
from schemas.locks import lake_lock
from schemas.tables import PARTITION

MB = 2**20
ROW_GROUP = 32 * MB  # of compressed data; a reader holds a few times as much
ZSTD = 3  # the level that Spark writes with


@dataclass(frozen=True)
class File:
    day: datetime.date
    size: int
    rows: int


def maintain(config: Config, dry_run: bool = False, retention_days: int | None = None) -> dict[str, Any]:
    """The JSON line. Raises MissingUpstream where a run works on the lake, LazyRecError where a model hides its pins."""
    started, lake = time.monotonic(), lake_of(config)
    days = config.maintenance.retention_days if retention_days is None else retention_days
    if days < 0:
        raise ConfigError("--retention-days must be at least 0.")
    with nullcontext() if dry_run else lake_lock(lake):
        pins, held = pins_of(config, lake), resumable(lake)
        closed = max(lake.identities("impressions"), default=datetime.date.min)
        tables = {}
        for name in lake.tables():
            reason = f"{len(held)} broken-off training(s) would lose their place" if name == STREAM and held else None
            tables[name] = _tidied(config, lake, name, closed, pins, days, dry_run, reason)
        artifacts = _remove_artifacts(lake, pins, held, days, dry_run)
    changed = artifacts["removed"] or any(t["days_merged"] or t["files_removed"] for t in tables.values())
    return {
        "stage": "maintain",
        "status": "done" if changed else "skipped",
        "dry_run": dry_run,
        "retention_days": days,
        "seconds": {"maintain": round(time.monotonic() - started, 2)},
        "tables": tables,
        "artifacts": artifacts,
    }


def _tidied(
    config: Config, lake: Lake, name: str, closed: datetime.date, pins: Pins, days: int, dry_run: bool, reason: str | None
) -> dict[str, Any]:
    target, files = config.maintenance.target_file_mb * MB, files_of(lake.open(name))
    merged = [] if reason else days_to_merge(files, target, closed, whole=name == STREAM)
    if merged and not dry_run:
        merged = merged if merge(lake, name, merged, target) else []
    kept = {v: sorted(who) for v, who in sorted(pins.versions.get(name, {}).items())}
    removed, freed = (0, 0) if reason else vacuum(lake, name, days, kept, dry_run)
    now = lake.open(name)
    return {
        "version": now.version(),
        "files_before": len(files),
        "files_after": None if dry_run and merged else len(files_of(now)),
        "days_merged": len(merged),
        "files_removed": removed,
        "bytes_freed": freed,
        "versions_kept": {str(v): who for v, who in kept.items() if v <= now.version()},
        "left_alone": reason,
    }


def files_of(delta: DeltaTable) -> list[File]:
    """The files of a version by its log."""
    actions = delta.get_add_actions(flatten=True)
    columns = (actions.column(name).to_pylist() for name in (f"partition.{PARTITION}", "size_bytes", "num_records"))
    return [File(day, size, rows or 0) for day, size, rows in zip(*columns, strict=True)]


def days_to_merge(files: Collection[File], target: int, closed: datetime.date, whole: bool) -> list[datetime.date]:
    """Days before `closed` in more files than their size asks for; with `whole` only those that become one file."""
    by_day = defaultdict(list)
    for file in files:
        by_day[file.day].append(file.size)
    found = []
    for day, sizes in by_day.items():
        wanted = max(1, -(-sum(sizes) // target))
        if day < closed and len(sizes) > wanted and not (whole and wanted > 1):
            found.append(day)
    return sorted(found)


def merge(lake: Lake, name: str, days: Collection[datetime.date], target: int) -> bool:
    """Merges the small files of `days` in one commit without identities; whether there was anything to merge."""
    delta = lake.open(name)
    files = files_of(delta)
    bytes_a_row = max(1, sum(f.size for f in files) // max(1, sum(f.rows for f in files)))
    rows = min(2**20, max(1024, ROW_GROUP // bytes_a_row))
    done = delta.optimize.compact(
        partition_filters=[(PARTITION, "in", [day.isoformat() for day in days])],
        target_size=target,
        writer_properties=WriterProperties(compression="ZSTD", compression_level=ZSTD, max_row_group_size=rows),
    )
    return bool(done["numFilesRemoved"])


def vacuum(lake: Lake, name: str, days: int, keep: Collection[int], dry_run: bool) -> tuple[int, int]:
    """Removes the files that belong to no version of `keep`, nor to the newest, and left the table `days` ago or more;
    how many, and their bytes."""
    delta, root = lake.open(name), lake.path(name)
    spared = sorted(version for version in keep if version <= delta.version())
    settings: dict[str, Any] = {
        "retention_hours": days * 24,
        "enforce_retention_duration": False,
        "full": True,  # files that a killed run left, too
        "keep_versions": spared,
    }
    listed = {Path(path).name for path in delta.vacuum(dry_run=True, **settings)}  # some absolute, some not
    # The log names files that an earlier vacuum removed as well: to remove them again would be an empty commit each time.
    # Nor do the checksums count that Hadoop writes beside each file on a disk: they are no file of any log.
    there = {path: size for path, size in sizes_below(root).items() if (n := Path(path).name) in listed and n[0] != "."}
    if there and not dry_run:
        delta.vacuum(dry_run=False, **settings)
    return len(there), sum(there.values())


def sizes_below(root: str) -> dict[str, int]:
    """Bytes of every file below a table's root, by its path there; on a disk or in an object store."""
    store = pafs.PyFileSystem(DeltaStorageHandler(root))
    found = store.get_file_info(pafs.FileSelector("", recursive=True))
    return {info.path: info.size for info in found if info.type == pafs.FileType.File}


def _remove_artifacts(lake: Lake, pins: Pins, held: Collection[Path], days: int, dry_run: bool) -> dict[str, Any]:
    """Complete artifacts that nothing needs and drafts that nothing continues, both older than the retention. Those of
    `ingest`, `embed`, `tokenize` and `codes` stay: no larger than the catalogue, and what was fitted once must not be
    fitted otherwise."""
    before = time.time() - days * 86_400
    drafts = {folder for folder, _ in unfinished(lake)} - set(held)
    gone = {folder: "broken off" for folder in drafts if newest_change(folder) < before}
    for stage in ARTIFACT_STAGES:
        for manifest in lake.artifact(stage, "any").parent.glob("*/manifest.json"):
            folder = manifest.parent
            if (stage, folder.name) not in pins.artifacts and manifest.stat().st_mtime < before:
                gone[folder] = "needed by nothing"
    freed = sum(folder_bytes(folder) for folder in gone)
    for folder in gone if not dry_run else ():
        (folder / "manifest.json").unlink(missing_ok=True)  # a kill within leaves a draft and no artifact with holes
        shutil.rmtree(folder)
    removed = {f"{folder.parent.name}/{folder.name}": why for folder, why in sorted(gone.items())}
    return {"removed": removed, "kept": len(pins.artifacts), "bytes_freed": freed}


def newest_change(folder: Path) -> float:
    return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))


def print_maintained(found: dict[str, Any], console: Console) -> None:
    if found["dry_run"]:
        console.print("Nothing was changed (--dry-run).")
    grid = Grid("table", "files", "days merged", "files removed", "freed", "versions kept")
    for name, facts in found["tables"].items():
        after = "?" if facts["files_after"] is None else str(facts["files_after"])
        kept = "; ".join(f"{version}: {', '.join(who)}" for version, who in facts["versions_kept"].items())
        counts = [f"{facts['files_before']} -> {after}", str(facts["days_merged"]), str(facts["files_removed"])]
        grid.add_row(name, *counts, size_text(facts["bytes_freed"]), facts["left_alone"] or kept or "-")
    console.print(grid)
    artifacts = found["artifacts"]
    console.print(f"Artifacts: {len(artifacts['removed'])} removed, {size_text(artifacts['bytes_freed'])} freed")
    for name, why in artifacts["removed"].items():
        console.print(f"  {name}: {why}", soft_wrap=True)
