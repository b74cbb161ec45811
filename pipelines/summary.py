"""What a run did and what the lake holds now: the material of the terminal's summary, the JSON line and the report."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.item_names import readable
from pipelines.runner import Outcome
from schemas.calendar import Calendar
from schemas.config import Config
from schemas.lake import Lake

MODELS = ("train", "align", "evaluate", "register")  # stages whose manifests the summary shows


@dataclass
class Summary:
    config: Config
    lake: Lake
    calendar: Calendar
    outcomes: list[Outcome]
    ingested: dict[str, Any]  # counts and reasons of the newest ingest
    manifests: dict[str, dict[str, Any]]  # of MODELS
    samples: list[dict[str, Any]]  # recommendations in words
    seconds: float = 0.0
    peak_memory_bytes: int = 0
    report: Path | None = None

    @property
    def status(self) -> str:
        return "done" if any(outcome.status == "done" for outcome in self.outcomes) else "skipped"

    def tables(self) -> dict[str, tuple[int, int]]:
        """name: (version, rows) of every table that exists."""
        lake = self.lake
        return {name: (lake.open(name).version(), lake.row_count(name)) for name in lake.tables()}


def summarise(
    config: Config,
    lake: Lake,
    calendar: Calendar,
    identities: Mapping[str, str],
    ingested: dict[str, Any],
    outcomes: list[Outcome],
) -> Summary:
    """`identities` names the artifact of each of MODELS."""
    manifests = {name: lake.manifest(name, identities.get(name, "none")) or {} for name in MODELS}
    samples = readable(lake, manifests["evaluate"].get("samples", []))
    return Summary(config, lake, calendar, outcomes, ingested, manifests, samples)
