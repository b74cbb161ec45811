"""What one pass of ingest writes: the stale days of each table, and the day from which the present snapshots hold. Pure."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from jobs.ingest_plan import OUTPUTS, Day, Log, Memory, select_days
from schemas.lake import Identities, Lake


@dataclass
class Pass:
    """What one pass writes."""

    log: Log
    days: tuple[Day, ...]  # of the pass
    since: Day  # from which the present snapshots hold
    snapshots: dict[tuple[str, str], Day]  # the same for each catalogue file, earlier passes included
    impressions: Identities  # stale
    rejected: Identities  # stale

    @property
    def todo(self) -> tuple[Day, ...]:
        """The days whose rows are read."""
        return tuple(sorted({*self.impressions, *self.rejected}))


def plan_pass(lake: Lake, log: Log, memory: Memory, days: Collection[Day] | None, force: bool) -> Pass:
    """Compares the days of the log, or those asked for, with what the lake's tables and the memory say is there."""
    scope = select_days(log.days, days)
    present = {name: lake.identities(name) for name in OUTPUTS}

    def stale(name: str, expected: Identities) -> Identities:
        return {d: i for d, i in expected.items() if force or present[name].get(d) != i}

    expected = log.identities("impressions", scope)
    impressions = stale("impressions", expected)
    for day, identity in expected.items():  # a kill may have come before the counts were noted
        if memory.days.get(day.isoformat(), {}).get("identity") != identity:
            impressions[day] = identity
    unstamped = {day for day in scope for name in ("items", "users") if day not in present[name]}
    since = min({*impressions, *unstamped}, default=scope[0])
    known = memory.since()
    snapshots = {file.stamp: known.get(file.stamp, since) for file in log.catalogues}
    rejected = stale("rejected_rows", log.identities("rejected_rows", scope, log.further_of_rejected(snapshots)))
    return Pass(log, scope, since, snapshots, impressions, rejected)
