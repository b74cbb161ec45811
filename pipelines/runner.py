"""Runs stages: plan, skip, call, complete the artifact, mirror to MLflow. Knows no stage in particular."""

from __future__ import annotations

import datetime
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pipelines.engines import Engines
from pipelines.progress import Progress
from pipelines.registry import CHAMPION, champion_pin
from pipelines.stage import StageContext, StageResult
from pipelines.steps import Step
from pipelines.tracking import Tracker
from schemas.calendar import Calendar
from schemas.config import Config
from schemas.errors import ConfigError, MissingUpstream
from schemas.lake import Lake
from schemas.lineage import StagePlan, StageSpec, plan
from schemas.loader import to_mapping
from schemas.tables import TABLES

Status = Literal["done", "skipped"]


@dataclass
class Outcome:
    """What became of one stage."""

    name: str
    status: Status
    seconds: float
    result: StageResult = field(default_factory=StageResult)
    identity: str = ""  # of what is there now


@dataclass
class Runner:
    """What the stages of one run share."""

    config: Config
    lake: Lake
    engines: Engines
    progress: Progress
    _tracker: Tracker | None = None

    @property
    def tracker(self) -> Tracker:
        if self._tracker is None:
            self._tracker = Tracker(self.config, self.lake)
        return self._tracker

    def end(self, metrics: dict[str, float] | None = None, report: Path | None = None, failed: bool = False) -> None:
        """Ends the parent run in MLflow, where one was begun."""
        if self._tracker is not None:
            self._tracker.finish(metrics or {}, report, failed)

    def run_stage(self, step: Step, force: bool = False, date: datetime.date | None = None) -> Outcome:
        """Runs what is stale of one stage, or skips it. Raises MissingUpstream where an input is not there."""
        started = time.monotonic()
        spec, calendar = step.spec, step.calendar
        if off := spec.off(self.config):
            self.progress.say(f"{spec.name}  [yellow]skipped[/yellow]: {off}")
            return Outcome(spec.name, "skipped", time.monotonic() - started, StageResult(skipped=off))
        pinned = {**step.pinned, **self._champion(spec)}
        stage_plan = plan(spec, self.config, self.lake, calendar, force, pinned, step.only)
        if date is not None:
            restrict(stage_plan, date, calendar)
        if stage_plan.missing:
            raise MissingUpstream(f"Stage {spec.name} cannot run: {stage_plan.missing[0]}; run the stages before it first.")
        identity = stage_plan.identity
        if stage_plan.done:
            self._mirror(stage_plan)
            self.progress.say(f"[bold]{spec.name}[/bold]  [green]skipped[/green], nothing has changed")
            return Outcome(spec.name, "skipped", time.monotonic() - started, identity=identity)
        with self.progress.stage(spec.name, spec.summary):
            result = self._execute(step, stage_plan)
        seconds = time.monotonic() - started
        if result.skipped:
            self.progress.say(f"{spec.name}  [yellow]skipped[/yellow]: {result.skipped}")
            return Outcome(spec.name, "skipped", seconds, result, identity)
        counts = ", ".join(f"{name} {n:,} rows" for name, n in result.rows.items())
        self.progress.say(f"{spec.name}  [green]done[/green] in {seconds:.1f} s{'; ' + counts if counts else ''}")
        return Outcome(spec.name, "done", seconds, result, identity)

    def _champion(self, spec: StageSpec) -> dict[str, str]:
        """Name and version of the model that a stage serves; empty where the stage serves none or none is promoted."""
        if not any(read.source == CHAMPION for reads in spec.outputs.values() for read in reads):
            return {}
        found = champion_pin(self.tracker.client, self.config.register.name)
        return {CHAMPION: found} if found else {}

    def _execute(self, step: Step, stage_plan: StagePlan) -> StageResult:
        spec, pins = step.spec, self._pins(stage_plan)

        def say(text: str) -> None:
            self.progress.say(f"  {text}")

        context = StageContext(self.config, self.lake, step.calendar, stage_plan, self.engines, pins, say)
        started = time.monotonic()
        # An artifact grows in the folder of its identity, where a stage that was stopped goes on.
        with self.tracker.stage(spec.name, stage_plan.identity, resumable=spec.artifact) as run_id:
            context.run_id = run_id
            result = step.function(context)
            result.metrics["seconds"] = time.monotonic() - started
            if spec.artifact:
                self._complete(spec, stage_plan, pins, run_id, result)
            self.tracker.log(run_id, stage_plan, pins, result)
        return result

    def _complete(
        self, spec: StageSpec, stage_plan: StagePlan, pins: dict[str, int], run_id: str, result: StageResult
    ) -> None:
        content = {
            "config": to_mapping(self.config),
            "inputs": {
                table: {"version": pins.get(table), "identities": {str(d): i for d, i in ids.items()}}
                for table, ids in stage_plan.inputs.items()
            },
            "mlflow_run": run_id,
            "metrics": result.metrics,
            "series": result.series,
            "notes": result.notes,
        }
        self.lake.write_manifest(spec.name, stage_plan.identity, content | result.manifest)

    def _mirror(self, stage_plan: StagePlan) -> None:
        """A kill between the lake's commit and MLflow's leaves a stage without a run: it gets one now."""
        if self.tracker.is_mirrored(stage_plan.identity):
            return
        tables = {
            t: v for t in stage_plan.expected if not stage_plan.spec.artifact and (v := self.lake.version(t)) is not None
        }
        result = StageResult(tables=tables, notes=["mirrored after the fact"])
        with self.tracker.stage(stage_plan.spec.name, stage_plan.identity) as run_id:
            self.tracker.log(run_id, stage_plan, self._pins(stage_plan), result)

    def _pins(self, stage_plan: StagePlan) -> dict[str, int]:
        """The version of every table that the stage reads, its own outputs' earlier partitions included."""
        spec = stage_plan.spec
        names = {r.source for output in spec.outputs for r in spec.reads(output, self.config) if r.source in TABLES}
        return {name: v for name in sorted(names) if (v := self.lake.version(name)) is not None}


def restrict(stage_plan: StagePlan, date: datetime.date, calendar: Calendar) -> None:
    """Leaves of the plan what concerns `date`. Raises MissingUpstream for a day after the log, ConfigError for another."""
    if date > calendar.days[-1]:
        raise MissingUpstream(
            f"--date {date} is newer than the log, which ends on {calendar.days[-1]}; ingest that day first."
        )
    days = {day for expected in stage_plan.expected.values() for day in expected}
    if date not in days:
        known = f"{min(days)} to {max(days)}" if len(days) > 1 else str(min(days))
        raise ConfigError(f"--date {date} is no day of stage {stage_plan.spec.name}, which has partitions for {known}.")
    stage_plan.todo = {table: tuple(d for d in todo if d == date) for table, todo in stage_plan.todo.items()}
    stage_plan.missing = [sentence for sentence in stage_plan.missing if str(date) >= sentence.rsplit(" ", 1)[-1]]
