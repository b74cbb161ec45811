"""`lazyrec plan`: what a run would do and, for what it would not skip, why. Starts no engine and writes nothing.

Stages are planned in order on the lake as it will be after those before them, so that a correction shows in all that
depends on it. What ingest would bring is known only once it has read the files: where it would run, days that are not
in the lake yet are missing from the plan, and the answer says so.
"""

from __future__ import annotations

import dataclasses
import datetime
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table as Grid

from pipelines import ingest
from pipelines.differences import Historian, in_words
from pipelines.lake_views import PlannedLake
from pipelines.promotion import champion_version
from pipelines.steps import Step, night, whole_run
from schemas.calendar import calendar_of
from schemas.config import Config
from schemas.errors import MissingUpstream
from schemas.lake import Lake, lake_of
from schemas.lineage import RECOMMEND, REGISTER, STAGES, StagePlan, plan

SKIP, RUN, WAIT = "skip", "run", "wait"
Days = list[datetime.date]


@dataclass
class View:
    """What would become of one stage. `reasons` of a table map a sentence to the days that it explains."""

    stage: str
    would: str
    tables: dict[str, Days] = field(default_factory=dict)
    reasons: dict[str, dict[str, Days]] = field(default_factory=dict)
    note: str = ""

    def as_json(self) -> dict[str, Any]:
        days = {table: [str(day) for day in todo] for table, todo in self.tables.items()}
        reasons = {t: {text: [str(d) for d in ds] for text, ds in found.items()} for t, found in self.reasons.items()}
        return {"stage": self.stage, "would": self.would, "tables": days, "reasons": reasons, "note": self.note}


def plan_views(config: Config, date: datetime.date | None = None, explained: bool = True) -> list[View]:
    """One view a stage of the whole run, or of the night of `date`. Raises as the run would, before it starts. The
    reasons cost most, so they may be left out."""
    lake = lake_of(config)
    first = _ingest_view(config, lake)
    virtual = PlannedLake(lake.root, lake.mount)
    try:
        steps = _steps(config, lake, date)
    except MissingUpstream as error:
        if first.would == SKIP:
            raise
        return [first, *(View(spec.name, WAIT, note=str(error)) for spec in STAGES)]
    pinned = {"champion": champion} if (champion := champion_version(config)) else {}
    historian = Historian(lake) if explained else None
    views = [first]
    for step in steps:
        served = dataclasses.replace(step, pinned={**pinned, **step.pinned})
        views.append(_view(served, config, virtual, historian))
    return _served(views, bool(pinned))


def _served(views: list[View], has_champion: bool) -> list[View]:
    """What depends on the champion, which `register` may move, and without which there is nothing to recommend."""
    register = next(view for view in views if view.stage == REGISTER.name)
    for place, view in enumerate(views):
        if view.stage == RECOMMEND.name and register.would == RUN:
            view.note = "another champion would make it anew"
        elif view.stage == RECOMMEND.name and view.would == RUN and not has_champion:
            views[place] = View(view.stage, SKIP, note="no version is champion yet")
    return views


def _steps(config: Config, lake: Lake, date: datetime.date | None) -> list[Step]:
    if date is not None:
        return night(config, lake, date)
    days = lake.identities("impressions")
    if not days:
        raise MissingUpstream("waits for ingest, which tells the days")
    return whole_run(calendar_of(days, config.split))


def _view(step: Step, config: Config, virtual: PlannedLake, historian: Historian | None) -> View:
    if off := step.spec.off(config):
        return View(step.spec.name, SKIP, note=off)
    planned = plan(step.spec, config, virtual, step.calendar, pinned=step.pinned, only=step.only)
    if planned.missing:
        return View(step.spec.name, WAIT, note=planned.missing[0])
    if planned.done:
        return View(step.spec.name, SKIP)
    tables = {name: list(days) for name, days in planned.todo.items() if days}
    reasons = historian.reasons(step, planned, config) if historian else {}
    _commit(virtual, planned)
    return View(step.spec.name, RUN, tables, reasons)


def _commit(virtual: PlannedLake, planned: StagePlan) -> None:
    """Adds what the stage would write to the lake as planned."""
    if planned.spec.artifact:
        virtual.artifacts_made.add((planned.spec.name, planned.identity))
        return
    for table, days in planned.todo.items():
        made = {day: planned.expected[table][day] for day in days}
        virtual.tables_made[table] = virtual.tables_made.get(table, {}) | made


def _ingest_view(config: Config, lake: Lake) -> View:
    from jobs.ingest_plan import remember
    from jobs.source_files import find_files

    config, simulated = _with_source(config, lake)
    if not simulated:
        return View("ingest", RUN, note="the logs are to be simulated first; their days are known after that")
    if ingest.done(lake, config) is not None:
        return View("ingest", SKIP)
    memory = remember(lake).files
    known = {(entry["name"], entry["sha256"]) for entry in memory}
    new = [file.name for file in find_files(config.source, memory) if file.stamp not in known]
    why = f"new or changed: {', '.join(new[:5])}{', ...' if len(new) > 5 else ''}" if new else "settings or tables changed"
    return View("ingest", RUN, note=f"{why}; what it brings is not in this plan")


def _with_source(config: Config, lake: Lake) -> tuple[Config, bool]:
    """The configuration with the folder of the logs, and whether they are there where they would be simulated."""
    if config.source.path or config.simulate is None:
        return config, True
    from jobs.simulate import is_simulated

    folder = str(lake.home / "_raw")
    source = dataclasses.replace(config.source, path=folder)
    return dataclasses.replace(config, source=source), is_simulated(folder, config.simulate)


def answer(views: list[View]) -> dict[str, Any]:
    """The JSON line."""
    would_run = [view.stage for view in views if view.would == RUN]
    return {"stage": "plan", "status": "done", "would_run": would_run, "stages": [view.as_json() for view in views]}


def print_views(views: list[View], console: Console) -> None:
    """One row a stage and output, with days and reasons."""
    grid = Grid("stage", "would", "table", "days", "why")
    for view in views:
        lines = [("", "", view.note)] if view.note or not view.tables else []
        for table, days in view.tables.items():
            found = view.reasons.get(table, {})
            why = [text if len(of) == len(days) else f"{text} ({in_words(of)})" for text, of in found.items()]
            lines.append((table if table != view.stage else "", in_words(days), "; ".join(why)))
        for place, line in enumerate(lines):
            grid.add_row(*((view.stage, view.would) if place == 0 else ("", "")), *line)
    console.print(grid)
