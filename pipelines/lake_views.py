"""A lake as it was at a moment, and as it will be after a plan: what a plan is explained with. Metadata only."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from schemas.lake import Identities, Lake


@dataclass(frozen=True)
class LakeAt(Lake):
    """The lake's tables as they stood at `moment` (milliseconds); later commits are not there."""

    moment: int = 0

    def stamps(self, table: str) -> Iterator[tuple[datetime.date, str, int]]:
        return (stamp for stamp in super().stamps(table) if stamp[2] <= self.moment)


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
