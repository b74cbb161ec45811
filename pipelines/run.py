"""The ways to run: everything, one night, one stage, late days.

ingest -> sequences -> item_pairs -> embed -> tokenize -> codes -> lifelong -> organise -> sessions -> rewards -> train ->
align -> evaluate -> register -> recommend; a night evaluates before it trains, see `pipelines.steps`.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from pipelines.backfill import Backfilled, backfill
from pipelines.engines import Engines
from pipelines.progress import MemoryWatch, Progress
from pipelines.runner import Outcome, Runner
from pipelines.source_logs import ingest_logs, simulate_logs, with_logs
from pipelines.steps import Step, append, night, spec_of, whole_run
from pipelines.summary import MODELS, Summary, summarise
from schemas.calendar import DayRange, log_calendar
from schemas.config import Config
from schemas.errors import ConfigError
from schemas.lake import lake_of
from schemas.locks import lake_lock


def run_all(config: Config, force: bool, progress: Progress, date: datetime.date | None = None) -> Summary:
    """Every stage in order, or the night of `date`, under the lake's lock; what is there already is skipped."""
    started = time.monotonic()
    lake = lake_of(config)
    engines = Engines(config.resources)
    with lake_lock(lake), MemoryWatch() as memory, ExitStack() as cleanup:
        cleanup.callback(engines.stop)
        runner = Runner(config, lake, engines, progress)
        try:
            runner.config, outcomes = with_logs(config, engines, progress)
            ingested, outcome = ingest_logs(runner, force, date)
            outcomes.append(outcome)
            steps = night(runner.config, lake, date) if date else whole_run(log_calendar(config, lake))
            outcomes += run_steps(runner, steps, force)
            identities = {outcome.name: outcome.identity for outcome in outcomes}
            summary = summarise(runner.config, lake, steps[0].calendar, identities, ingested, outcomes)
            summary.seconds, summary.peak_memory_bytes = time.monotonic() - started, memory.peak_bytes
            summary.report = _report(summary)
        except BaseException:
            runner.end(failed=True)
            raise
        runner.end({"seconds": summary.seconds, "peak_memory_bytes": memory.peak_bytes}, summary.report)
    return summary


def run_steps(runner: Runner, steps: list[Step], force: bool) -> list[Outcome]:
    outcomes = []
    for place, step in enumerate(steps):
        if all(later.spec.engine != "spark" for later in steps[place:]):
            runner.engines.stop_spark()  # its memory is of use to training
        outcomes.append(runner.run_stage(step, force))
    return outcomes


def run_one(name: str, config: Config, force: bool, date: datetime.date | None, progress: Progress) -> Outcome:
    """One stage on a lake that holds what comes before it."""
    with running(config, progress) as runner:
        if name == "ingest":
            runner.config = with_logs(config, runner.engines, progress)[0]
            return ingest_logs(runner, force, date)[1]
        return runner.run_stage(Step(spec_of(name), log_calendar(config, runner.lake)), force, date)


def run_append(name: str, config: Config, force: bool, date: datetime.date | None, progress: Progress) -> Outcome:
    """The new items of `date` alone, as a night appends them to what stage `name` has fitted; never a fit."""
    if date is None:
        raise ConfigError("--append needs --date, the day whose new items are to be appended.")
    with running(config, progress) as runner:
        return runner.run_stage(append(name, config, runner.lake, date), force)


def run_backfill(config: Config, days: DayRange, force: bool, progress: Progress) -> Backfilled:
    """Ingests late or corrected days and brings the Spark tables up to date from the first of them on."""
    with running(config, progress) as runner:
        runner.config = with_logs(config, runner.engines, progress)[0]
        return backfill(runner, days, force)


@contextmanager
def running(config: Config, progress: Progress) -> Iterator[Runner]:
    """A runner under the lake's lock. With the block its engines stop and its parent run in MLflow ends."""
    lake, engines = lake_of(config), Engines(config.resources)
    with lake_lock(lake), ExitStack() as cleanup:
        cleanup.callback(engines.stop)
        runner = Runner(config, lake, engines, progress)
        try:
            yield runner
        except BaseException:
            runner.end(failed=True)
            raise
        runner.end()


def report_only(config: Config) -> Path:
    """Writes the report of what the lake holds. Raises MissingUpstream where nothing was ingested."""
    from pipelines import ingest

    lake = lake_of(config)
    config = with_logs(config, Engines(config.resources), Progress(quiet=True))[0]
    report = ingest.done(lake, config)
    counts = {"rows": report.rows, "reasons": report.reasons} if report else {}
    newest = {name: lake.newest_artifact(name) or "none" for name in MODELS}
    return _report(summarise(config, lake, log_calendar(config, lake), newest, counts, []))


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
