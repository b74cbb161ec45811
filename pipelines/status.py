"""`lazyrec status`: what a lake and its registry hold, from metadata alone. Starts no engine, writes nothing."""

from __future__ import annotations

import datetime
import json
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Run
from mlflow.exceptions import MlflowException
from rich.console import Console
from rich.table import Table as Grid

from jobs.ingest_plan import NEWEST
from pipelines.codebook_registry import TAG
from pipelines.promotion import GATES, registry
from pipelines.registry import CHAMPION
from schemas.config import Config
from schemas.errors import LazyRecError
from schemas.lake import Lake, lake_of
from schemas.locks import lock_holder

RUNS = 5  # of the newest
PARENTS = 200  # runs looked at to find them


def status_of(config: Config) -> dict[str, Any]:
    """The JSON line: tables, artifacts, versions, runs, and who holds the lock."""
    lake = lake_of(config)
    try:
        client: MlflowClient | None = registry(config)
    except LazyRecError:  # nothing has run yet
        client = None
    return {
        "stage": "status",
        "status": "done",
        "lake": lake.root,
        "tables": {name: table_facts(lake, name) for name in lake.tables()},
        "artifacts": artifact_facts(lake),
        "versions": versions(client, config.register.name) if client else [],
        "runs": last_runs(client, config.name) if client else [],
        "lock": lock_holder(lake),
    }


def table_facts(lake: Lake, name: str) -> dict[str, Any]:
    """Version, rows, days and bytes of a table; `disk_bytes` counts older versions too, where the disk is at hand."""
    delta = lake.open(name)
    sizes = delta.get_add_actions(flatten=True).column("size_bytes").to_pylist()
    days = sorted(lake.identities(name))
    return {
        "version": delta.version(),
        "rows": lake.row_count(name),
        "days": len(days),
        "first_day": str(days[0]) if days else None,
        "last_day": str(days[-1]) if days else None,
        "bytes": sum(sizes),
        "disk_bytes": None if "://" in lake.root else folder_bytes(Path(lake.path(name))),
    }


def artifact_facts(lake: Lake) -> dict[str, dict[str, Any]]:
    """By stage: how many artifacts are complete, the newest one, and what all of them take on the disk."""
    found = {}
    for folder in sorted((lake.home / "_artifacts").glob("*")):
        made = [path for path in folder.glob("*/manifest.json") if path.parent.name != NEWEST]
        newest = max(made, key=lambda path: path.stat().st_mtime).parent.name if made else None
        found[folder.name] = {"complete": len(made), "newest": newest, "disk_bytes": folder_bytes(folder)}
    return found


def versions(client: MlflowClient, name: str) -> list[dict[str, Any]]:
    """The registered versions, newest first, with what `register` and `promote` noted of them."""
    try:
        champion = client.get_registered_model(name).aliases.get(CHAMPION)
    except MlflowException:  # nothing is registered under that name
        return []
    found = sorted(client.search_model_versions(f"name='{name}'"), key=lambda version: -int(version.version))
    return [
        {
            "version": str(version.version),
            "alias": CHAMPION if str(version.version) == str(champion) else None,
            "fit_day": version.tags.get("fit_day"),
            "trained_until": version.tags.get("trained_until"),
            "codebook": version.tags.get(TAG),
            "metrics": json.loads(version.tags.get("metrics", "{}")),
            "gates": json.loads(version.tags[GATES]) if GATES in version.tags else None,
        }
        for version in found
    ]


def last_runs(client: MlflowClient, experiment: str) -> list[dict[str, Any]]:
    """The newest pipeline runs with their stages."""
    found = client.get_experiment_by_name(experiment)
    if found is None:
        return []
    runs = client.search_runs([found.experiment_id], max_results=PARENTS, order_by=["attributes.start_time DESC"])
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags][:RUNS]
    return [_run_facts(parent, runs) for parent in parents]


def _run_facts(parent: Run, runs: list[Run]) -> dict[str, Any]:
    stages = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    ended, started = parent.info.end_time, parent.info.start_time
    return {
        "run": parent.info.run_id,
        "started": datetime.datetime.fromtimestamp(started / 1000, datetime.UTC).isoformat(timespec="seconds"),
        "status": parent.info.status,
        "seconds": round((ended - started) / 1000, 1) if ended else None,
        "stages": {run.data.tags.get("stage", ""): run.info.status for run in reversed(stages)},
    }


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def print_status(found: dict[str, Any], console: Console) -> None:
    console.print(f"Lake {found['lake']}", soft_wrap=True)
    tables = Grid("table", "version", "rows", "days", "size", "on disk")
    for name, facts in found["tables"].items():
        days = f"{facts['first_day']} .. {facts['last_day']} ({facts['days']})" if facts["days"] else "none"
        sizes = [size_text(facts["bytes"]), size_text(facts["disk_bytes"])]
        tables.add_row(name, str(facts["version"]), f"{facts['rows']:,}", days, *sizes)
    artifacts = Grid("artifact", "complete", "newest", "on disk")
    for stage, facts in found["artifacts"].items():
        artifacts.add_row(stage, str(facts["complete"]), facts["newest"] or "-", size_text(facts["disk_bytes"]))
    for grid in (tables, artifacts, _versions_grid(found["versions"]), _runs_grid(found["runs"])):
        console.print(grid)
    console.print(f"Lock: {found['lock'] or 'free'}")


def _versions_grid(found: list[dict[str, Any]]) -> Grid:
    grid = Grid("model version", "alias", "fit day", "trained until", "metrics", "gates")
    for version in found:
        metrics = ", ".join(f"{name} {value:.4f}" for name, value in version["metrics"].items())
        failed = [gate["text"] for gate in version["gates"] or [] if not gate["passed"]]
        gates = "not recorded" if version["gates"] is None else "; ".join(failed) or "passed"
        days = [version["fit_day"] or "-", version["trained_until"] or "-"]
        grid.add_row(version["version"], version["alias"] or "", *days, metrics, gates)
    return grid


def _runs_grid(found: list[dict[str, Any]]) -> Grid:
    grid = Grid("run started", "status", "seconds", "stages")
    for run in found:
        stages = ", ".join(name if status == "FINISHED" else f"{name}: {status}" for name, status in run["stages"].items())
        grid.add_row(run["started"], run["status"], str(run["seconds"] or "-"), stages)
    return grid


def size_text(size: int | None) -> str:
    """Bytes as a person reads them."""
    if size is None:
        return "-"
    value = float(size)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
