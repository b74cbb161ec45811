"""Why a partition or an artifact is stale: what differs between what it was made from and what is there now.

Identities are hashes and tell nothing by themselves. So a partition's inputs are looked up as they stood when its
commit was made, its settings among the configurations that the lake's manifests remember, and both together are
believed where they give exactly the identity that the commit carries. Sentences only; metadata only.
"""

from __future__ import annotations

import dataclasses
import datetime
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from pipelines.lake_views import LakeAt
from pipelines.steps import Step
from schemas.calendar import Calendar, calendar_of
from schemas.config import Config
from schemas.errors import LazyRecError
from schemas.lake import Identities, Lake
from schemas.lineage import StagePlan, input_days, plan
from schemas.loader import from_mapping, to_mapping

NEVER = "never made"
UNKNOWN = "made by other settings or another release, which the lake does not remember"
Days = list[datetime.date]


@dataclass(frozen=True)
class Past:
    """What a commit was made from: the configuration, the roles of days, and the plan of that time."""

    config: Config
    calendar: Calendar
    plan: StagePlan
    logic: int

    def identities(self, source: str) -> Identities:
        return self.plan.expected.get(source) or self.plan.inputs.get(source, {})


@dataclass
class Historian:
    """Explains the stale outputs of a lake; remembers what it has looked up."""

    lake: Lake
    _pasts: dict[tuple[str, int], list[Past]] = field(default_factory=dict)
    _remembered: list[Config] | None = None

    def reasons(self, step: Step, planned: StagePlan, config: Config) -> dict[str, dict[str, Days]]:
        """By output: sentence: the stale days that it explains."""
        found: dict[str, dict[str, Days]] = {}
        for output, days in planned.todo.items():
            made: dict[datetime.date, tuple[str, int]] = {}
            for made_on, identity, moment in () if step.spec.artifact else self.lake.stamps(output):
                made.setdefault(made_on, (identity, moment))
            for day in days:
                for sentence in self._sentences(step, planned, config, output, day, made.get(day)):
                    found.setdefault(output, {}).setdefault(sentence, []).append(day)
        return found

    def _sentences(
        self,
        step: Step,
        planned: StagePlan,
        config: Config,
        output: str,
        day: datetime.date,
        stamp: tuple[str, int] | None,
    ) -> list[str]:
        if step.spec.artifact:
            return self._of_artifact(step, planned, config)
        if stamp is None:
            return [NEVER]
        identity, moment = stamp
        if identity == planned.expected[output][day]:
            return ["forced"]
        for past in self._pasts_of(step, config, moment):
            if past.plan.expected[output].get(day) == identity:
                return self._compare(step, planned, config, output, day, past) or [UNKNOWN]
        return [UNKNOWN]

    def _pasts_of(self, step: Step, config: Config, moment: int) -> list[Past]:
        """Hypotheses about a commit: every remembered configuration and logic, likely ones first."""
        key = (step.spec.name, moment)
        if key not in self._pasts:
            lake = LakeAt(self.lake.root, self.lake.mount, moment)
            pasts = []
            for candidate in (config, *self._configs()):
                for calendar in _calendars(lake, candidate, step):
                    for logic in range(step.spec.logic, 0, -1):
                        spec = dataclasses.replace(step.spec, logic=logic)
                        then = plan(spec, candidate, lake, calendar, pinned=step.pinned)
                        pasts.append(Past(candidate, calendar, then, logic))
            self._pasts[key] = pasts
        return self._pasts[key]

    def _configs(self) -> list[Config]:
        """The configurations that the manifests of artifacts hold, newest first; those of other releases are left out."""
        if self._remembered is None:
            paths = list((self.lake.home / "_artifacts").glob("*/*/manifest.json"))
            found: list[Config] = []
            for path in sorted(paths, key=lambda p: -p.stat().st_mtime):
                data = (self.lake.manifest(path.parent.parent.name, path.parent.name) or {}).get("config")
                config = _config(data) if isinstance(data, Mapping) else None
                if config is not None and config not in found:
                    found.append(config)
            self._remembered = found
        return self._remembered

    def _compare(
        self, step: Step, planned: StagePlan, config: Config, output: str, day: datetime.date, past: Past
    ) -> list[str]:
        found = changed_settings(step.spec.settings, to_mapping(past.config), to_mapping(config))
        if past.logic != step.spec.logic:
            found.append(f"the stage's logic changed from {past.logic} to {step.spec.logic}")
        if step.spec.by_day is not None:
            before, after = step.spec.by_day(past.config, past.calendar, day), step.spec.by_day(config, step.calendar, day)
            if before and after and before != after:
                found.append(f"organised {before} then and {after} now")
        for read in step.spec.reads(output, config):
            now = planned.expected.get(read.source) or planned.inputs.get(read.source, {})
            then_days = set(input_days(read, day, past.calendar, past.config))
            now_days = input_days(read, day, step.calendar, config)
            found += changed_days(read.source, day, past.identities(read.source), then_days, now, now_days)
        return found

    def _of_artifact(self, step: Step, planned: StagePlan, config: Config) -> list[str]:
        name = step.spec.name
        newest = self.lake.newest_artifact(name)
        manifest = self.lake.manifest(name, newest) if newest else None
        if manifest is None:
            return [NEVER]
        if newest == planned.identity:
            return ["forced"]
        made_with = manifest.get("config", {})
        past = _config(made_with)  # with the defaults of settings that came later
        found = changed_settings(step.spec.settings, to_mapping(past) if past else made_with, to_mapping(config))
        for read in step.spec.reads(name, config):
            stored = manifest.get("inputs", {}).get(read.source, {}).get("identities", {})
            then = {datetime.date.fromisoformat(day): identity for day, identity in stored.items()}
            days = input_days(read, step.calendar.fit_day, step.calendar, config)
            if read.span in ("artifact", "pinned"):
                if set(then.values()) != set(planned.inputs.get(read.source, {}).values()):
                    found.append(f"reads {read.source}, which changed")
            else:
                found += changed_days(read.source, None, then, set(then), planned.inputs.get(read.source, {}), days)
        return found or [UNKNOWN]


def changed_settings(sections: Iterable[str], then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One sentence a key that differs."""
    found = []
    for section in sections:
        before, after = flat(then.get(section, {}), section), flat(now.get(section, {}), section)
        for key in sorted(before.keys() | after.keys()):
            if before.get(key) != after.get(key):
                found.append(f"settings {key} changed from {before.get(key)} to {after.get(key)}")
    return found


def flat(value: Any, key: str) -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    if not isinstance(value, Mapping):
        return {key: value}
    return {name: leaf for part, inner in value.items() for name, leaf in flat(inner, f"{key}.{part}").items()}


def changed_days(
    source: str, day: datetime.date | None, then: Identities, then_days: set[datetime.date], now: Identities, now_days: Days
) -> list[str]:
    """Sentences about an input of the partition of `day`: days that changed, came or went."""
    changed = [d for d in now_days if d in then_days and then.get(d) != now.get(d)]
    new = [d for d in now_days if d not in then_days]
    parts = [(f"reads {source} of", changed, ", which changed"), (f"reads {source} of", new, ", which is new")]
    return [f"{words} {in_words(days, day)}{what}" for words, days, what in parts if days]


def in_words(days: Iterable[datetime.date], own: datetime.date | None = None) -> str:
    """Days as a person says them: `that day`, one, two, or first to last with their number."""
    ordered = sorted(days)
    if ordered == [own]:
        return "that day"
    if len(ordered) <= 2:
        return " and ".join(str(day) for day in ordered)
    return f"{ordered[0]} to {ordered[-1]} ({len(ordered)} days)"


def _calendars(lake: LakeAt, config: Config, step: Step) -> list[Calendar]:
    """The roles of days at that time: those of a whole run, and those of a night like this one."""
    try:
        return [calendar_of(lake.identities("impressions"), config.split), step.calendar]
    except LazyRecError:  # too few days for the split
        return [step.calendar]


def _config(data: Mapping[str, Any]) -> Config | None:
    try:
        return from_mapping(Config, data, "manifest")
    except LazyRecError:
        return None
