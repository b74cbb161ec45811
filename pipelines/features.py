"""The Spark stages that turn impressions into features: sequences, item_pairs, lifelong, organise, sessions, rewards.

Each hands its job the plan's stale days and the pinned versions; the job makes all days in one pass and commits.
"""

from __future__ import annotations

from types import ModuleType

from jobs import item_pairs as item_pairs_job
from jobs import lifelong as lifelong_job
from jobs import organise as organise_job
from jobs import rewards as rewards_job
from jobs import sequences as sequences_job
from jobs import sessions as sessions_job
from pipelines.stage import StageContext, StageResult
from schemas.errors import MissingUpstream


def sequences(context: StageContext) -> StageResult:
    """Writes user_sequences and user_features. Raises MissingUpstream where an earlier day's features are stale."""
    refuse_stale_base(context)
    return run_job(sequences_job, context)


def item_pairs(context: StageContext) -> StageResult:
    return run_job(item_pairs_job, context)


def lifelong(context: StageContext) -> StageResult:
    return run_job(lifelong_job, context)


def organise(context: StageContext) -> StageResult:
    return run_job(organise_job, context)


def sessions(context: StageContext) -> StageResult:
    return run_job(sessions_job, context)


def rewards(context: StageContext) -> StageResult:
    return run_job(rewards_job, context)


def run_job(job: ModuleType, context: StageContext) -> StageResult:
    """Runs `job` on every table of the stage that has stale days."""
    todo = {table: context.todo(table) for table in context.plan.spec.outputs if context.plan.todo[table]}
    tables = job.run(context.engines.spark, context.lake, context.config, context.calendar, todo, context.pins)
    rows = {}
    for table, version in tables.items():
        by_day = context.lake.rows_by_day(table, version)
        rows[table] = sum(by_day.get(day, 0) for day in todo[table])
    for table, count in rows.items():
        context.say(f"{table}: {count:,} rows in {len(todo[table])} day(s)")
    return StageResult(tables=tables, rows=rows)


def refuse_stale_base(context: StageContext) -> None:
    """user_features of a day continues the rows of earlier days: those must be what the plan expects, or be made too."""
    todo, expected = context.plan.todo["user_features"], context.plan.expected["user_features"]
    present = context.lake.identities("user_features") if todo else {}
    for day, identity in expected.items():
        if todo and day < min(todo) and present.get(day, identity) != identity:
            raise MissingUpstream(
                f"user_features of {min(todo)} continues those of {day}, which are stale; "
                f"run stage sequences for {day} first, or without a date."
            )
