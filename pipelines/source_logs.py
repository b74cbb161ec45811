"""Before the stages: the raw logs, simulated where the configuration asks for it, and their ingest."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from pipelines import ingest
from pipelines.engines import Engines
from pipelines.guard import check_days
from pipelines.progress import Progress
from pipelines.runner import Outcome, Runner
from pipelines.stage import StageResult
from schemas.config import Config, SimulateConfig
from schemas.errors import ConfigError
from schemas.lake import lake_of
from schemas.lineage import digest


def with_logs(config: Config, engines: Engines, progress: Progress) -> tuple[Config, list[Outcome]]:
    """The configuration with `source.path` set, to the simulated logs where it asks for them, and what that took."""
    if config.source.path:
        if not Path(config.source.path).exists():
            raise ConfigError(f"source.path: {config.source.path} is not there; give the folder or file of the raw logs.")
        return config, []
    if config.simulate is None:
        raise ConfigError("source.path is empty; give the folder of the raw logs, e.g. --set source.path=FOLDER.")
    folder = str(lake_of(config).home / "_raw")
    outcome = simulate_logs(config.simulate, folder, engines, progress)
    return dataclasses.replace(config, source=dataclasses.replace(config.source, path=folder)), [outcome]


def simulate_logs(settings: SimulateConfig, folder: str, engines: Engines, progress: Progress) -> Outcome:
    """Writes simulated logs below `folder`, unless they are there."""
    from jobs.simulate import is_simulated, simulate

    started = time.monotonic()
    if is_simulated(folder, settings):
        progress.say("[bold]simulate[/bold]  [green]skipped[/green], the logs are there")
        return Outcome("simulate", "skipped", time.monotonic() - started)
    with progress.stage("simulate", f"{settings.impressions:,} impressions in KuaiRand's format"):
        simulate(engines.spark, settings, folder)
    seconds = time.monotonic() - started
    progress.say(f"simulate  [green]done[/green] in {seconds:.1f} s")
    return Outcome("simulate", "done", seconds)


def ingest_logs(runner: Runner, force: bool, date: datetime.date | None = None) -> tuple[dict[str, Any], Outcome]:
    """Counts and reasons of the log as ingested, of `date` alone where it is given, and what became of the stage.

    Raises ContractViolation for a day that the guard refuses, whether it was ingested now or before.
    """
    days = None if date is None else [date]
    found = ingest_days(runner, force, days)
    check_days(runner.lake, runner.config, days)
    return found


def ingest_days(
    runner: Runner, force: bool, days: Collection[datetime.date] | None = None
) -> tuple[dict[str, Any], Outcome]:
    """The same for `days`, or the whole log, without the guard."""
    started = time.monotonic()
    report = None if force else ingest.done(runner.lake, runner.config, days)
    if report is not None:
        runner.progress.say("[bold]ingest[/bold]  [green]skipped[/green], the files are the same")
        outcome = Outcome("ingest", "skipped", time.monotonic() - started)
    else:
        with runner.progress.stage("ingest", "raw logs to tables; bad rows aside with their reasons"):
            report = ingest.run(runner.engines, runner.lake, runner.config, force, runner.progress.say, days)
        outcome = Outcome("ingest", "done", time.monotonic() - started, _result(report))
        outcome.result.metrics["seconds"] = outcome.seconds
        identity = digest(sorted(runner.lake.identities("impressions").values()))
        with runner.tracker.stage("ingest", identity) as run_id:
            runner.tracker.log(run_id, None, {}, outcome.result)
        runner.progress.say(f"ingest  [green]done[/green] in {outcome.seconds:.1f} s; {report.rows['kept']:,} impressions")
    return {"rows": report.rows, "reasons": report.reasons}, outcome


def _result(report: ingest.IngestReport) -> StageResult:
    counts = {f"rows.{kind}": float(n) for kind, n in report.rows.items()}
    return StageResult(tables=report.tables, rows=report.rows_by_table, metrics=counts)
