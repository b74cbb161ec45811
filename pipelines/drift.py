"""Drift of the items that are appended to a codebook: the report of a night, and `lazyrec drift`, which asks for it.

The yardstick is what the fit left beside the codebook (`statistics.json`) and, for collisions, the ids of the fit day.
It reads metadata, codes of the catalogue and the vectors of the appended days, one day at a time, and starts no engine.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table as Grid

from model.codebook_metrics import collisions
from model.drift import CodebookUse, LevelDrift, code_counts, codebook_use, known_codes, level_drifts
from model.rq_kmeans import encode
from pipelines.codebook import load_codebook
from pipelines.item_vectors import matrix_of
from pipelines.ray_tables import read_arrow
from schemas.config import Config, DriftConfig, TokenizeConfig
from schemas.errors import CLUSTER_ANEW, ConfigError, MissingUpstream
from schemas.lake import Lake, lake_of
from schemas.lineage import newest_codebook

IDS, VECTORS = "semantic_ids", "item_embeddings"
FILE = "statistics.json"
FINE, TOO_FEW = "fine", "too few items"


@dataclass(frozen=True)
class Drift:
    """How the appended items of some days fit their codebook."""

    codebook: str
    fit_day: datetime.date
    days: list[datetime.date]
    items: int
    levels: list[LevelDrift]  # empty without items
    collision_rate: float  # share of the items whose codes an item of the fit day has
    expected_collision_rate: float  # share of the fit's items that share their codes
    verdict: str
    reasons: list[str]

    def metrics(self) -> dict[str, float]:
        found = {"drift_items": float(self.items), "drift_cluster_anew": float(self.verdict == CLUSTER_ANEW)}
        for n, level in enumerate(self.levels, 1):
            found |= {f"drift_residual_growth_level_{n}": level.growth, f"drift_divergence_level_{n}": level.excess}
        return found | ({"drift_collision_rate": self.collision_rate} if self.items else {})

    def sentence(self) -> str:
        why = f": {'; '.join(self.reasons)}" if self.reasons else ""
        return f"Drift of {self.items:,} items appended to codebook {self.codebook}: {self.verdict}{why}."


def save_statistics(folder: Path, codes: np.ndarray, k: int, inertia: list[list[float]]) -> None:
    """What the fit's items, with the codebook's own codes [N, L], make of it; the last inertia is the sum of squares."""
    content = {
        "items": len(codes),
        "squares": [curve[-1] for curve in inertia],
        "counts": code_counts(codes, k).tolist(),
        "collision_rate": collisions(torch.from_numpy(codes)).rate,
    }
    (folder / FILE).write_text(json.dumps(content))


def drift_of(lake: Lake, settings: TokenizeConfig, fit_day: datetime.date, days: Collection[datetime.date]) -> Drift:
    """Of the items that `days` appended to the codebook of `fit_day`. Raises MissingUpstream where it has no statistics."""
    codebook = lake.identities(IDS)[fit_day]
    path = lake.artifact("tokenize", codebook) / FILE
    if not path.is_file():
        raise MissingUpstream(f"Codebook {codebook} keeps no {FILE} of its fit, as older releases left it; fit it anew.")
    stored = json.loads(path.read_text())
    fitted = CodebookUse(stored["items"], np.array(stored["squares"]), np.array(stored["counts"], np.int64))
    appended, codes = use_of(lake, codebook, sorted(days), settings.chunk)
    expected = stored["collision_rate"]
    if appended.items == 0:
        return Drift(codebook, fit_day, sorted(days), 0, [], 0.0, expected, TOO_FEW, [])
    levels = level_drifts(fitted, appended)
    shared = float(known_codes(codes, ids_of(lake, fit_day, codes.shape[1])).mean())
    reasons = reasons_of(settings.drift, levels, shared - expected)
    verdict = TOO_FEW if appended.items < settings.drift.min_items else CLUSTER_ANEW if reasons else FINE
    return Drift(codebook, fit_day, sorted(days), appended.items, levels, shared, expected, verdict, reasons)


def use_of(lake: Lake, version: str, days: list[datetime.date], chunk: int) -> tuple[CodebookUse, np.ndarray]:
    """What the items of later days make of a codebook, and its own codes of them, int32 [N, L]."""
    codebook, found = load_codebook(lake, version), []
    parts = [np.zeros((0, codebook.levels), np.int32)]
    for day in days:
        rows = read_arrow(lake, VECTORS, lake.open(VECTORS).version(), ["vector"], [day])
        if len(rows):
            x_ND = torch.tensor(matrix_of(rows.column("vector")))
            parts.append(encode(codebook, x_ND, chunk).numpy())
            found.append(codebook_use(codebook, x_ND, parts[-1]))
    codes = np.concatenate(parts)
    squares = np.sum([use.squares_L for use in found], axis=0) if found else np.zeros(codebook.levels)
    return CodebookUse(len(codes), squares, code_counts(codes, codebook.codes)), codes


def ids_of(lake: Lake, day: datetime.date, levels: int) -> np.ndarray:
    """int32 [N, L]: the first codes of the ids of a day."""
    codes = read_arrow(lake, IDS, lake.open(IDS).version(), ["codes"], [day]).column("codes").combine_chunks()
    return codes.flatten().to_numpy().reshape(len(codes), -1)[:, :levels]


def reasons_of(limits: DriftConfig, levels: list[LevelDrift], more_collisions: float) -> list[str]:
    """A sentence for each measure that is beyond its limit."""
    found = []
    for n, level in enumerate(levels, 1):
        if level.growth > limits.residual:
            found.append(f"residuals after level {n} are {level.growth:.2f} times as long as expected")
        if level.excess > limits.divergence:
            found.append(f"use of the codes of level {n} diverges by {level.excess:.2f} nats more than by chance")
    if more_collisions > limits.collisions:
        found.append(f"{more_collisions:.0%} more of them share their codes with items of the fit than those do")
    return found


def report(config: Config, date: datetime.date | None) -> Drift:
    """Of the items of `date`, or of all that were appended to the newest codebook. Raises MissingUpstream where there is no
    codebook, or no ids of that day, ConfigError for the day of a fit."""
    lake = lake_of(config)
    there = lake.identities(IDS)
    if date in there and lake.manifest("tokenize", there[date]) is not None:
        raise ConfigError(f"--date {date} is the day of a fit, and its items made the codebook; give a later day.")
    fit_day, _ = newest_codebook(lake, date or datetime.date.max)
    if fit_day is None:
        before = f" from before {date}" if date else ""
        raise MissingUpstream(f"{lake.root} has no codebook{before}; run `lazyrec run` without --date first.")
    if date is not None and date not in there:
        raise MissingUpstream(f"Table {IDS} has no partition {date}; run the night of that day first.")
    days = [day for day in there if day > fit_day] if date is None else [date]
    return drift_of(lake, config.tokenize, fit_day, days)


def answer(drift: Drift) -> dict[str, Any]:
    """The JSON line."""
    levels = [asdict(level) | {"growth": level.growth, "excess": level.excess} for level in drift.levels]
    for level in levels:  # JSON knows no infinity
        level["expected"] = level["expected"] if np.isfinite(level["expected"]) else None
    return {
        "stage": "drift",
        "status": "done",
        "verdict": drift.verdict,
        "reasons": drift.reasons,
        "codebook": drift.codebook,
        "fit_day": str(drift.fit_day),
        "days": [str(day) for day in drift.days],
        "items": drift.items,
        "levels": levels,
        "collision_rate": drift.collision_rate,
        "expected_collision_rate": drift.expected_collision_rate,
    }


def print_drift(drift: Drift, console: Console) -> None:
    grid = Grid("level", "residual", "expected", "divergence", "by chance")
    for n, level in enumerate(drift.levels, 1):
        values = (level.residual, level.expected, level.divergence, level.by_chance)
        grid.add_row(str(n), *(f"{value:.4f}" for value in values))
    console.print(grid)
    console.print(f"Codes of an item of the fit: {drift.collision_rate:.1%}, expected {drift.expected_collision_rate:.1%}")
    console.print(drift.sentence(), soft_wrap=True, markup=False)
