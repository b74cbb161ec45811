"""A lake as it was at a moment, and as it will be after a plan: what a plan is explained with. Metadata only."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from schemas.lake import Identities, Lake, stamped_identities


def stamps(lake: Lake, table: str) -> dict[Any, tuple[str, int]]:
    """day: (identity, milliseconds of the commit that stamped it), of every partition that was ever made."""
    found: dict[Any, tuple[str, int]] = {}
    if lake.exists(table):
        for commit in lake.open(table).history():  # newest first
            for day, identity in stamped_identities(commit).items():
                found.setdefault(day, (identity, int(commit["timestamp"])))
    return found


@dataclass(frozen=True)
class LakeAt(Lake):
    """The lake's tables as they stood at `moment` (milliseconds); later commits are not there."""

    moment: int = 0

    def identities(self, table: str) -> Identities:
        found: Identities = {}
        if self.exists(table):
            for commit in self.open(table).history():
                if int(commit["timestamp"]) <= self.moment:
                    for day, identity in stamped_identities(commit).items():
                        found.setdefault(day, identity)
        return found


@dataclass(frozen=True)
class PlannedLake(Lake):
    """The lake as it will be once the stages planned so far have run."""

    tables_made: dict[str, Identities] = field(default_factory=dict)
    artifacts_made: set[tuple[str, str]] = field(default_factory=set)

    def identities(self, table: str) -> Identities:
        return super().identities(table) | self.tables_made.get(table, {})

    def manifest(self, stage: str, identity: str) -> dict[str, Any] | None:
        if (stage, identity) in self.artifacts_made:
            return {"planned": True}
        return super().manifest(stage, identity)
