"""The whole run: simulated or real logs in, a registered and measured recommender out.

ingest -> sequences -> item_pairs -> embed -> tokenize -> organise -> rewards -> train -> evaluate -> register
"""

from __future__ import annotations

import dataclasses
import datetime
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.engines import Engines
from pipelines.item_names import readable
from pipelines.progress import MemoryWatch, Progress
from pipelines.runner import Outcome, Runner
from pipelines.stage import StageFunction, StageResult
from schemas.calendar import Calendar, calendar_of
from schemas.config import Config, SimulateConfig
from schemas.errors import ConfigError, MissingUpstream
from schemas.lake import Lake, lake_of
from schemas.lineage import STAGES, StageSpec, artifact_identity, digest
from schemas.locks import lake_lock

if TYPE_CHECKING:
    from jobs.ingest_plan import IngestReport


def stage_function(name: str) -> StageFunction:
    """The function behind a stage; imported when it is needed, so that a skip loads neither PyTorch nor Ray."""
    from importlib import import_module

    module, function = {
        "sequences": ("pipelines.features", "sequences"),
        "item_pairs": ("pipelines.features", "item_pairs"),
        "organise": ("pipelines.features", "organise"),
        "rewards": ("pipelines.features", "rewards"),
        "embed": ("pipelines.embed", "run"),
        "tokenize": ("pipelines.tokenize_items", "run"),
        "train": ("pipelines.train", "run"),
        "evaluate": ("pipelines.evaluate", "run"),
        "register": ("pipelines.register", "run"),
    }[name]
    return getattr(import_module(module), function)


@dataclasses.dataclass
class Summary:
    """What a run did and what is there now."""

    config: Config
    lake: Lake
    calendar: Calendar
    outcomes: list[Outcome]
    ingested: dict[str, Any]  # counts and reasons of the newest ingest
    manifests: dict[str, dict[str, Any]]  # of train, evaluate, register
    samples: list[dict[str, Any]]  # recommendations in words
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    report: Path | None = None

    @property
    def status(self) -> str:
        return "done" if any(outcome.status == "done" for outcome in self.outcomes) else "skipped"

    def tables(self) -> dict[str, tuple[int, int]]:
        """name: (version, rows) of every table that exists."""
        lake = self.lake
        return {name: (lake.open(name).version(), lake.row_count(name)) for name in lake.tables()}


def run_all(config: Config, force: bool, progress: Progress) -> Summary:
    """Every stage in order, under the lake's lock; a stage whose identity is already there is skipped."""
    started = time.monotonic()
    lake = lake_of(config)
    engines = Engines(config.resources)
    with lake_lock(lake), MemoryWatch() as memory, ExitStack() as cleanup:
        cleanup.callback(engines.stop)
        runner = Runner(config, lake, engines, progress)
        try:
            config, outcomes = with_logs(config, engines, progress)
            runner.config = config
            ingested, calendar, outcome = _ingest(runner, force)
            outcomes.append(outcome)
            for place, spec in enumerate(STAGES):
                if all(later.engine != "spark" for later in STAGES[place:]):
                    engines.stop_spark()  # its memory is of use to training
                outcomes.append(runner.run_stage(spec, stage_function(spec.name), calendar, force))
            summary = summarise(config, lake, calendar, outcomes, ingested)
            summary.seconds, summary.peak_memory_bytes = time.monotonic() - started, memory.peak_bytes
            summary.report = _report(summary)
        except BaseException:
            runner.end(failed=True)
            raise
        runner.end({"seconds": summary.seconds, "peak_memory_bytes": memory.peak_bytes}, summary.report)
    return summary


def run_one(name: str, config: Config, force: bool, date: datetime.date | None, progress: Progress) -> Outcome:
    """One stage on a lake that holds what comes before it."""
    lake = lake_of(config)
    engines = Engines(config.resources)
    with lake_lock(lake), ExitStack() as cleanup:
        cleanup.callback(engines.stop)
        runner = Runner(config, lake, engines, progress)
        if name == "ingest":
            runner.config = with_logs(config, engines, progress)[0]
            outcome = _ingest(runner, force, date)[2]
        else:
            spec = spec_of(name)
            outcome = runner.run_stage(spec, stage_function(name), log_calendar(config, lake), force, date)
        runner.end()
    return outcome


def spec_of(name: str) -> StageSpec:
    for spec in STAGES:
        if spec.name == name:
            return spec
    raise ConfigError(f"No stage {name!r}; stages: ingest, {', '.join(spec.name for spec in STAGES)}.")


def log_calendar(config: Config, lake: Lake) -> Calendar:
    """The days that ingest has committed. Raises MissingUpstream where there are none."""
    days = lake.identities("impressions")
    if not days:
        raise MissingUpstream(f"Table impressions is not in {lake.root} yet; run `lazyrec ingest` first.")
    return calendar_of(days, config.split)


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


def _ingest(runner: Runner, force: bool, date: datetime.date | None = None) -> tuple[dict[str, Any], Calendar, Outcome]:
    from pipelines import ingest

    started = time.monotonic()
    days = None if date is None else [date]
    report = None if force else ingest.done(runner.lake, runner.config, days)
    if report is not None:
        runner.progress.say("[bold]ingest[/bold]  [green]skipped[/green], the files are the same")
        outcome = Outcome("ingest", "skipped", time.monotonic() - started)
    else:
        with runner.progress.stage("ingest", "raw logs to tables; bad rows aside with their reasons"):
            report = ingest.run(runner.engines, runner.lake, runner.config, force, runner.progress.say, days)
        outcome = Outcome("ingest", "done", time.monotonic() - started, _ingest_result(report))
        outcome.result.metrics["seconds"] = outcome.seconds
        identity = digest(sorted(runner.lake.identities("impressions").values()))
        with runner.tracker.stage("ingest", identity) as run_id:
            runner.tracker.log(run_id, None, {}, outcome.result)
        runner.progress.say(f"ingest  [green]done[/green] in {outcome.seconds:.1f} s; {report.rows['kept']:,} impressions")
    ingested = {"rows": report.rows, "reasons": report.reasons}
    return ingested, calendar_of(runner.lake.identities("impressions"), runner.config.split), outcome


def _ingest_result(report: IngestReport) -> StageResult:
    counts = {f"rows.{kind}": float(n) for kind, n in report.rows.items()}
    return StageResult(tables=report.tables, rows=report.rows_by_table, metrics=counts)


def summarise(config: Config, lake: Lake, calendar: Calendar, outcomes: list[Outcome], ingested: dict[str, Any]) -> Summary:
    """What the lake holds for this configuration, whoever made it."""
    manifests = {
        name: lake.manifest(name, artifact_identity(name, config, lake, calendar)) or {}
        for name in ("train", "evaluate", "register")
    }
    samples = readable(lake, manifests["evaluate"].get("samples", []))
    return Summary(config, lake, calendar, outcomes, ingested, manifests, samples)


def report_only(config: Config) -> Path:
    """Writes the report of what the lake holds. Raises MissingUpstream where nothing was ingested."""
    from pipelines import ingest

    lake = lake_of(config)
    config = with_logs(config, Engines(config.resources), Progress(quiet=True))[0]
    report = ingest.done(lake, config)
    counts = {"rows": report.rows, "reasons": report.reasons} if report else {}
    return _report(summarise(config, lake, log_calendar(config, lake), [], counts))


def _report(summary: Summary) -> Path:
    from pipelines.report import write_report

    return write_report(summary)


def simulate_only(config: Config, folder: str, progress: Progress) -> Outcome:
    """Writes simulated logs below `folder`."""
    if config.simulate is None:
        raise ConfigError("The configuration has no section `simulate`; see conf/demo.yaml.")
    engines = Engines(config.resources)
    with ExitStack() as cleanup:
        cleanup.callback(engines.stop)
        return simulate_logs(config.simulate, folder, engines, progress)
