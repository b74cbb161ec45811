"""`lazyrec organisation-report`: what each way to organise impressions would make of a log, side by side.

It reads user_sequences and writes no table: examples, context tokens, bytes and impressions a context (k), how often a
transition A->B is a loss target, and the share of trained transitions that another user's later event had shown before.
Definitions are those of `jobs.organisation_measures`. All days count as train days. `--date D` measures the log as it
was at the end of D. Reading a pinned version, it does not wait for the lake's lock.
"""

from __future__ import annotations

import datetime
import time
from contextlib import ExitStack
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from jobs.organisation_measures import ORGANISATIONS, losses, measured
from jobs.organisation_sizes import example_sizes, table_bytes
from jobs.tables import read, read_days
from pipelines.engines import Engines
from pipelines.progress import Progress, answer_console
from schemas.config import Config
from schemas.errors import ContractViolation, MissingUpstream
from schemas.lake import Lake, lake_of

TABLE = "user_sequences"
WIDTH = 140  # of what goes into a file or a pipe
Measures = dict[str, dict[str, float]]
# Key of the answer, heading, format.
COLUMNS = (
    ("examples", "examples", "{:,.0f}"),
    ("impressions_a_context", "k", "{:.2f}"),
    ("context_tokens", "context tokens", "{:,.0f}"),
    ("bytes", "MB", "{:,.1f}"),
    ("trained_mean", "A->B trained, mean", "{:.2f}"),
    ("trained_p99", "99th percentile", "{:.0f}"),
    ("visible_share", "seen later first", "{:.3%}"),
)


def run(config: Config, date: datetime.date | None = None, quiet: bool = False) -> dict[str, Any]:
    """Measures, prints unless `quiet`, and returns the JSON line. Raises MissingUpstream without user_sequences or where
    `date` is newer than they are, ContractViolation where they hold no event."""
    started, lake = time.monotonic(), lake_of(config)
    engines, progress = Engines(config.resources), Progress(quiet)
    with ExitStack() as cleanup:
        cleanup.callback(engines.stop)
        with progress.stage("organisation-report", "what each organiser would make of the log"):
            found = measures(engines, lake, config, days_of(lake, date))
    if not quiet:
        print_measures(found, answer_console(WIDTH))
    seconds = {"organisation-report": round(time.monotonic() - started, 2)}
    return {"stage": "organisation-report", "status": "done", "seconds": seconds, "organisations": found}


def days_of(lake: Lake, date: datetime.date | None) -> list[datetime.date]:
    """The days of user_sequences up to `date`; all of them without one."""
    days = sorted(lake.identities(TABLE))
    if date is not None and days and date > days[-1]:
        raise MissingUpstream(f"--date {date} is newer than {TABLE}, which end on {days[-1]}; run stage sequences first.")
    return [day for day in days if date is None or day <= date]


def measures(engines: Engines, lake: Lake, config: Config, days: list[datetime.date]) -> Measures:
    """By organisation: examples, requests, targets, context_tokens, bytes, impressions, impressions_a_context,
    transitions, trained, trained_mean, trained_p99, visible, visible_share."""
    spark = engines.spark
    version = lake.version(TABLE)
    sequences = read_days(spark, lake, TABLE, days, version) if days else read(spark, lake, TABLE, version).limit(0)
    rows = measured(sequences, config).persist()
    try:
        sizes = {row["organisation"]: row.asDict() for row in example_sizes(rows, config).collect()}
        lost = {row["organisation"]: row.asDict() for row in losses(rows).collect()}
    finally:
        rows.unpersist()
    if not sizes:
        raise ContractViolation(f"Table {TABLE} in {lake.root} holds no event up to the day asked for; check --date.")
    return {name: _completed(sizes[name] | lost.get(name, {})) for name in ORGANISATIONS}


def _completed(found: dict[str, Any]) -> dict[str, float]:
    """Without transitions (every user has one event) nothing is trained twice or too early."""
    found = {"transitions": 0, "trained": 0, "trained_mean": 0.0, "trained_p99": 0.0, "visible": 0} | found
    found["bytes"] = table_bytes(found)
    found["impressions_a_context"] = found["impressions"] / found["examples"]
    found["visible_share"] = found["visible"] / found["trained"] if found["trained"] else 0.0
    return {name: value for name, value in found.items() if name != "organisation"}


def print_measures(found: Measures, console: Console) -> None:
    grid = Grid(title="Organisation of impressions", title_justify="left")
    grid.add_column("organiser")
    for _, heading, _ in COLUMNS:
        grid.add_column(heading, justify="right")
    for name, values in found.items():
        shown = {**values, "bytes": values["bytes"] / 1e6}
        grid.add_row(name, *(form.format(shown[key]) for key, _, form in COLUMNS))
    console.print(grid)
