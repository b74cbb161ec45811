"""What a stage is given and what it gives back.

A stage is a plain function from a `StageContext` (pinned inputs, frozen configuration, the dates to make) to a
`StageResult`. It commits its own outputs with the identities of the plan; the runner does everything else: it plans,
skips, locks the lake, reports progress and writes the lineage to MLflow.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.engines import Engines
from schemas.calendar import Calendar
from schemas.config import Config
from schemas.lake import Identities, Lake
from schemas.lineage import StagePlan


@dataclass
class StageContext:
    """Inputs of one stage. `pins` holds the version of every table at the stage's start; read no other."""

    config: Config
    lake: Lake
    calendar: Calendar
    plan: StagePlan
    engines: Engines
    pins: dict[str, int]
    say: Callable[[str], None]  # one line of progress
    run_id: str = ""  # of this stage in MLflow, for the driver's own logging

    def todo(self, table: str) -> Identities:
        """The partitions of `table` to write in this pass, with the identities to stamp on the commit."""
        return {day: self.plan.expected[table][day] for day in self.plan.todo[table]}

    @property
    def dates(self) -> tuple[datetime.date, ...]:
        return self.plan.dates

    @property
    def identity(self) -> str:
        """Of the artifact that this stage makes."""
        return self.plan.identity

    @property
    def folder(self) -> Path:
        """Where this stage's artifact grows; complete once the runner has written the manifest."""
        folder = self.lake.artifact(self.plan.spec.name, self.identity)
        folder.mkdir(parents=True, exist_ok=True)
        return folder


@dataclass
class StageResult:
    """What a stage made. The runner writes `manifest` beside an artifact and everything to MLflow."""

    tables: dict[str, int] = field(default_factory=dict)  # name: version written
    rows: dict[str, int] = field(default_factory=dict)  # name: rows in the partitions written
    metrics: dict[str, float] = field(default_factory=dict)
    series: dict[str, list[tuple[int, float]]] = field(default_factory=dict)  # name: (step, value), as a curve
    figures: dict[str, Any] = field(default_factory=dict)  # name: matplotlib figure
    notes: list[str] = field(default_factory=list)  # sentences for the report
    manifest: dict[str, Any] = field(default_factory=dict)
    skipped: str = ""  # why there was nothing to do, where that is so


StageFunction = Callable[[StageContext], StageResult]
