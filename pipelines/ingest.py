"""The stage `ingest`: raw logs to tables. It has no upstream partition; its identities come from the files.

Whether there is anything to do is settled from checksums and table logs, without an engine.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable, Collection

from jobs.ingest_plan import IngestReport, done
from pipelines.engines import Engines
from schemas.config import Config
from schemas.lake import Lake

__all__ = ["IngestReport", "done", "run"]


def run(
    engines: Engines,
    lake: Lake,
    config: Config,
    force: bool,
    say: Callable[[str], None],
    days: Collection[datetime.date] | None = None,
) -> IngestReport:
    """Ingests what is new or stale of `config.source`, for `days` alone or the whole log. Errors: see jobs.ingest."""
    report = None if force else done(lake, config, days)
    if report is not None:
        return report
    from jobs.ingest import ingest

    return ingest(engines.spark, lake, config, days, force, say)
