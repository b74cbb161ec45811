"""A shifted catalogue trips the report of drift and an unshifted one does not; appending never fits."""

from __future__ import annotations

import dataclasses
import datetime
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines import tokenize_items
from pipelines.cli import main
from pipelines.engines import Engines
from pipelines.progress import Progress
from pipelines.ray_tables import read_arrow
from pipelines.run import run_append
from schemas.config import Config, TokenizeConfig
from schemas.errors import EXIT_ANEW, EXIT_DONE, EXIT_RETRY, EXIT_USAGE, ConfigError, MissingUpstream
from schemas.lake import Lake, lake_of
from tests.conftest import REPOSITORY
from tests.pipelines.small_catalogue import DAYS, FIT_DAY, context, write

ALIKE, SHIFTED = DAYS[3], DAYS[4]


def vectors(day: datetime.date, ids: range, shift: float = 0.0) -> list[dict[str, Any]]:
    rng = np.random.default_rng(ids[0])
    points = 3 * np.random.default_rng(1).normal(size=(8, 6))[rng.integers(0, 8, len(ids))] + rng.normal(size=(len(ids), 6))
    rows = (points + shift).tolist()
    return [{"item_id": item, "date": day, "vector": row, "sources": []} for item, row in zip(ids, rows, strict=True)]


@pytest.fixture
def config(tmp_path: Path, tracking_uri: str) -> Config:
    tokenize = TokenizeConfig(levels=2, codes=12, iterations=8)
    return Config(lake=str(tmp_path / "lake"), tracking_uri=tracking_uri, tokenize=tokenize)


def filled(config: Config, days: tuple[datetime.date, ...] = DAYS) -> Lake:
    """Items of the fit day, of a day like it and of one whose items lie elsewhere, those of `days`."""
    lake = lake_of(config)
    write(lake, "impressions", [], days)
    write(lake, "user_sequences", [], days)
    rows = [*vectors(FIT_DAY, range(300)), *vectors(ALIKE, range(300, 380)), *vectors(SHIFTED, range(380, 460), 5.0)]
    write(lake, "item_embeddings", rows, tuple(day for day in days if day >= FIT_DAY))
    return lake


def command(config: Config, *more: str) -> int:
    places = ["--set", f"lake={config.lake}", "--set", f"tracking_uri={config.tracking_uri}"]
    places += ["--set", f"tokenize.collisions={config.tokenize.collisions}"]
    return main(["drift", "--config", str(REPOSITORY / "conf" / "demo.yaml"), *places, *more])


def test_a_shifted_catalogue_trips_it_and_an_unshifted_one_does_not(
    config: Config, engines: Engines, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(config) == EXIT_RETRY
    lake = filled(config, DAYS[:4])
    result = tokenize_items.run(context("tokenize", lake, engines, config, DAYS[:4]))
    assert result.metrics["drift_items"] == 80 and result.metrics["drift_cluster_anew"] == 0
    assert result.notes[-1].endswith("fine.")
    assert command(config, "--quiet") == EXIT_DONE
    filled(config)
    result = tokenize_items.run(context("tokenize", lake, engines, config))
    assert result.metrics["drift_cluster_anew"] == 1 and "residuals after level 1" in result.notes[-1]
    capsys.readouterr()
    answers = {}
    for day, status in ((ALIKE, EXIT_DONE), (SHIFTED, EXIT_ANEW)):
        assert command(config, "--date", str(day)) == status
        answers[day] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [answers[day]["verdict"] for day in (ALIKE, SHIFTED)] == ["fine", "cluster anew"]
    assert result.metrics["drift_residual_growth_level_1"] == answers[SHIFTED]["levels"][0]["growth"] > 1.25
    assert command(config, "--quiet") == EXIT_ANEW  # both days together
    assert json.loads(capsys.readouterr().out)["items"] == 160
    assert command(config, "--quiet", "--set", "tokenize.drift.min_items=161") == EXIT_DONE
    assert command(config, "--date", str(FIT_DAY)) == EXIT_USAGE
    assert command(config, "--date", "2026-02-01") == EXIT_RETRY


def test_appending_gives_new_items_ids_and_never_fits(config: Config, engines: Engines) -> None:
    def appended(day: datetime.date | None, settings: Config = config) -> str:
        return run_append("tokenize", settings, False, day, Progress(quiet=True)).status

    lake = filled(config, DAYS[:4])
    with pytest.raises(MissingUpstream, match="no codebook from before"):
        appended(ALIKE)
    tokenize_items.run(context("tokenize", lake, engines, config, DAYS[:3]))
    with pytest.raises(ConfigError, match="needs --date"):
        appended(None)
    with pytest.raises(MissingUpstream, match="no codebook from before"):
        appended(FIT_DAY)
    with pytest.raises(MissingUpstream, match="has no day 2026-01-05"):
        appended(SHIFTED)
    before = read_arrow(lake, "semantic_ids", lake.open("semantic_ids").version()).to_pylist()
    more = dataclasses.replace(config, tokenize=dataclasses.replace(config.tokenize, codes=13))
    with pytest.raises(MissingUpstream, match="is stale: settings or data differ"):
        appended(ALIKE, more)
    assert appended(ALIKE) == "done"
    assert appended(ALIKE) == "skipped"
    after = read_arrow(lake, "semantic_ids", lake.open("semantic_ids").version()).to_pylist()
    assert [row for row in after if row["date"] == FIT_DAY] == before
    assert len(after) == 380
    write(lake, "item_embeddings", vectors(FIT_DAY, range(10, 310)), (FIT_DAY,), mark="corrected")
    filled_day = (SHIFTED,)
    for table in ("impressions", "user_sequences"):
        write(lake, table, [], filled_day)
    write(lake, "item_embeddings", vectors(SHIFTED, range(380, 460)), filled_day)
    with pytest.raises(MissingUpstream, match="is stale: settings or data differ"):
        appended(SHIFTED)
