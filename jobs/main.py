"""The command line of a single Spark job: `python -m jobs.sequences --config F [--date D] [--force]`, or the same file by
`spark-submit`, which then decides on master, memory and JARs.

It plans, locks the lake, runs and stamps exactly as the stage of the whole run does, without Ray or MLflow, and prints
one JSON object as the last line; an error is one sentence on standard error, which spark-submit puts on standard output.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pyspark.sql import SparkSession

from jobs.session import spark_session
from schemas.calendar import Calendar, log_calendar
from schemas.config import Config
from schemas.errors import EXIT_DONE, MissingUpstream
from schemas.lake import Identities, Lake, lake_of
from schemas.lineage import StageSpec, plan
from schemas.loader import load_config, parse_date
from schemas.locks import lake_lock
from schemas.outages import explained, sentence_of
from schemas.tables import TABLES

Run = Callable[
    [SparkSession, Lake, Config, Calendar, Mapping[str, Identities], Mapping[str, int]],
    dict[str, int],
]
Work = Callable[[Config, argparse.Namespace], dict[str, Any]]


def main(spec: StageSpec, run: Run, arguments: Sequence[str] | None = None) -> int:
    """Runs one job by its command line and returns the exit code (see schemas.errors)."""

    def work(config: Config, options: argparse.Namespace) -> dict[str, Any]:
        day = parse_date(options.date) if options.date else None
        with lake_lock(lake_of(config)):
            tables = run_job(spec, run, config, day, options.force)
        return {"status": "done" if tables else "skipped", "tables": tables}

    return command(spec.name, day_parser(spec.name, spec.summary), work, arguments)


def job_parser(name: str, summary: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=f"jobs/{name}.py", description=summary)
    parser.add_argument("--config", required=True, help="YAML file of the deployment")
    return parser


def day_parser(name: str, summary: str) -> argparse.ArgumentParser:
    """Of a job that writes days of tables."""
    parser = job_parser(name, summary)
    parser.add_argument("--date", help="write this day only (YYYY-MM-DD); default: every stale day in one pass")
    parser.add_argument("--force", action="store_true", help="write again what is already there")
    return parser


def command(name: str, parser: argparse.ArgumentParser, work: Work, arguments: Sequence[str] | None = None) -> int:
    """Parses, works, prints the answer as one JSON object; an error for people is one line and its exit code."""
    options = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        config = load_config(options.config)
        with explained(config):
            answer = work(config, options)
    except Exception as error:
        known = sentence_of(error)
        if known is None:
            raise
        sys.stderr.write(f"{known}\n")
        return known.exit_code
    seconds = {name: round(time.monotonic() - started, 3)}
    sys.stdout.write(json.dumps({"stage": name, "seconds": seconds, **answer}) + "\n")
    return EXIT_DONE


def run_job(
    spec: StageSpec, run: Run, config: Config, day: datetime.date | None = None, force: bool = False
) -> dict[str, int]:
    """Writes the stale days, or `day` alone; the versions written, none where all is fresh or the stage is off.

    Raises MissingUpstream where an input is missing or `day` is newer than the log.
    """
    lake = lake_of(config)
    calendar = log_calendar(config, lake)
    todo = todo_of(spec, config, lake, calendar, day, force)
    if not todo or spec.off(config):
        return {}
    pins = {name: version for name in TABLES if (version := lake.version(name)) is not None}
    return run(spark_session(config.resources), lake, config, calendar, todo, pins)


def todo_of(
    spec: StageSpec, config: Config, lake: Lake, calendar: Calendar, day: datetime.date | None, force: bool
) -> dict[str, Identities]:
    """The identities to stamp by table and stale day; tables without a stale day are left out."""
    if day is not None and day not in calendar.days:
        raise MissingUpstream(f"The log has no day {day}: its days are {calendar.days[0]} to {calendar.days[-1]}.")
    # A day's inputs lie on or before it, so later days need not be there.
    upto = dataclasses.replace(calendar, days=tuple(d for d in calendar.days if day is None or d <= day))
    planned = plan(spec, config, lake, upto, force)
    if planned.missing:
        raise MissingUpstream(f"{planned.missing[0]}; run the stage that writes it first.")
    wanted = {table: [d for d in days if day in (None, d)] for table, days in planned.todo.items()}
    return {table: {d: planned.expected[table][d] for d in days} for table, days in wanted.items() if days}
