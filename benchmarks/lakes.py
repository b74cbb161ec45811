"""A lake for a benchmark: the log, simulated where the configuration says so, and the stages that the benchmark reads."""

from __future__ import annotations

from collections.abc import Iterable

from pipelines.progress import Progress
from pipelines.run import run_steps, running
from pipelines.source_logs import ingest_logs, with_logs
from pipelines.steps import Step
from schemas.calendar import Calendar, log_calendar
from schemas.config import Config
from schemas.lineage import StageSpec


def prepare(config: Config, stages: Iterable[StageSpec]) -> Calendar:
    """Runs what is stale of ingest and of `stages`, which come in order; the days of the log."""
    with running(config, Progress()) as runner:
        runner.config = with_logs(config, runner.engines, runner.progress)[0]
        ingest_logs(runner, False)
        calendar = log_calendar(config, runner.lake)
        run_steps(runner, [Step(spec, calendar) for spec in stages], False)
    return calendar
