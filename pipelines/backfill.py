"""Late or corrected days: their ingest, and every Spark table brought up to date from the first of them on.

What is recomputed follows from identities: a corrected day makes stale what reads it, on later days too, and nothing
before it. Nothing is fitted or trained, so that codebook and models stay; the answer names the stages that a whole run
would do since, as `lazyrec plan` does, and leaves to the operator when. The next night takes the days as they are.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Mapping
from dataclasses import dataclass

from pipelines import steps
from pipelines.guard import check_days
from pipelines.plan_view import RUN, plan_views
from pipelines.runner import Outcome, Runner
from pipelines.source_logs import ingest_days
from pipelines.stage import StageResult
from pipelines.steps import Step
from schemas.calendar import DayRange
from schemas.errors import ContractViolation
from schemas.lake import Lake, stamped_identities
from schemas.lineage import SEQUENCES, plan


@dataclass(frozen=True)
class Written:
    """What a backfill wrote of one table."""

    version: int
    days: tuple[datetime.date, ...]
    rows: int  # of those days


@dataclass(frozen=True)
class Backfilled:
    outcomes: list[Outcome]
    written: dict[str, Written]  # by table
    would_run: list[str]  # stages that a whole run would do now
    seconds: float

    @property
    def status(self) -> str:
        return "done" if any(outcome.status == "done" for outcome in self.outcomes) else "skipped"


def backfill(runner: Runner, days: DayRange, force: bool) -> Backfilled:
    """Ingests the days of the source in `days` and makes what is stale from the first of them on.

    Raises MissingUpstream where the source holds none of them, ContractViolation for a day that the guard refuses.
    """
    started = time.monotonic()
    before = versions_of(runner.lake)
    outcomes = [ingest_days(runner, force, days)[1]]
    todo = steps.backfill(runner.config, runner.lake, days.first)
    check_new_days(runner, todo, days, force)
    outcomes += [bring_up_to_date(runner, step, force) for step in todo]
    stale = stages_to_run(runner)
    return Backfilled(outcomes, written_since(runner.lake, before), stale, time.monotonic() - started)


def check_new_days(runner: Runner, todo: list[Step], days: DayRange, force: bool) -> None:
    """The guard on those of `days` whose events are not in user_sequences yet: what has just been ingested, and what an
    earlier try has ingested and refused. A day that was accepted once is not refused when another one comes late."""
    step = next(step for step in todo if step.spec is SEQUENCES)
    planned = plan(step.spec, runner.config, runner.lake, step.calendar, force, only=step.only)
    check_days(runner.lake, runner.config, [day for day in planned.todo["user_sequences"] if day in days])


def bring_up_to_date(runner: Runner, step: Step, force: bool) -> Outcome:
    """Runs what is stale of a stage. One whose inputs are not there yet is left, and the outcome says why."""
    spec = step.spec
    missing = plan(spec, runner.config, runner.lake, step.calendar, only=step.only).missing
    if missing and not spec.off(runner.config):
        runner.progress.say(f"{spec.name}  [yellow]left[/yellow]: {missing[0]}")
        return Outcome(spec.name, "skipped", 0.0, StageResult(skipped=missing[0]))
    return runner.run_stage(step, force)


def stages_to_run(runner: Runner) -> list[str]:
    """What a whole run would do now, by the plan; none while the log is too short for one."""
    try:
        views = plan_views(runner.config, explained=False)
    except ContractViolation as reason:
        runner.progress.say(f"no whole run yet: {reason}")
        return []
    found = [view.stage for view in views if view.would == RUN]
    if found:
        runner.progress.say(f"a whole run would now do {', '.join(found)}; `lazyrec plan` says why")
    return found


def written_since(lake: Lake, before: Mapping[str, int]) -> dict[str, Written]:
    """The partitions of each table that commits after its version in `before` replaced."""
    found = {}
    for table, version in versions_of(lake).items():
        days = stamped_days(lake, table, version - before.get(table, -1))
        if days:
            rows = lake.rows_by_day(table, version)
            found[table] = Written(version, days, sum(rows.get(day, 0) for day in days))
    return found


def versions_of(lake: Lake) -> dict[str, int]:
    return {table: lake.open(table).version() for table in lake.tables()}


def stamped_days(lake: Lake, table: str, commits: int) -> tuple[datetime.date, ...]:
    """The days that the last `commits` of a table replaced."""
    history = lake.open(table).history(commits) if commits else []
    return tuple(sorted({day for commit in history for day in stamped_identities(commit)}))
