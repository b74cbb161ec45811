"""A new codebook takes the numbers of the one before it, and which one that is belongs to its identity."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from pipelines import tokenize_items
from pipelines.engines import Engines
from pipelines.ray_tables import read_arrow
from pipelines.stage import StageContext, StageResult
from pipelines.tokenize_items import load_codebook
from schemas.config import Config, SplitConfig, TokenizeConfig
from schemas.lake import Lake
from tests.pipelines.small_catalogue import DAYS, context, write

LATER = Config(tokenize=TokenizeConfig(levels=2, codes=6, iterations=10))  # fitted on the third day
EARLIER = dataclasses.replace(LATER, split=SplitConfig(validation_days=2, test_days=1))  # on the second
FIT_DAYS = {"earlier": DAYS[1], "later": DAYS[2]}
MOVED = 5  # items of the later fit that lie elsewhere


def vectors(day: int, ids: range, moved: int = 0) -> list[dict[str, Any]]:
    """Items in eight heaps; the first `moved` of them lie in another one."""
    centres = np.random.default_rng(1).normal(size=(8, 4)) * 3
    noise = np.random.default_rng(2).normal(size=(200, 4)) / 10
    heap = [(item + (3 if item < moved else 0)) % 8 for item in ids]
    points = centres[heap] + noise[list(ids)]
    return [
        {"item_id": item, "date": DAYS[day], "vector": point.tolist(), "sources": []}
        for item, point in zip(ids, points, strict=True)
    ]


@pytest.fixture
def filled(lake: Lake) -> Lake:
    """Plays of no day, vectors of the two fit days in one space."""
    write(lake, "user_sequences", [], DAYS)
    write(lake, "item_embeddings", [*vectors(1, range(100)), *vectors(2, range(120), MOVED)], DAYS)
    return lake


def pass_over(lake: Lake, engines: Engines, config: Config, force: bool = False) -> tuple[StageContext, StageResult]:
    days = DAYS if config.split == LATER.split else DAYS[:2]  # the log grows between the two
    today = context("tokenize", lake, engines, config, days, force)
    return today, tokenize_items.run(today)


def codes_on(lake: Lake, name: str) -> dict[int, list[int]]:
    rows = read_arrow(lake, "semantic_ids", lake.open("semantic_ids").version(), days=[FIT_DAYS[name]]).to_pylist()
    return {row["item_id"]: row["codes"] for row in rows}


def test_most_items_keep_their_codes_and_a_lost_codebook_finds_the_same_numbers(filled: Lake, engines: Engines) -> None:
    before, _ = pass_over(filled, engines, EARLIER)
    earlier, old = before.plan.expected["semantic_ids"][DAYS[1]], codes_on(filled, "earlier")
    today, result = pass_over(filled, engines, LATER)
    version, new = today.plan.expected["semantic_ids"][DAYS[2]], codes_on(filled, "later")
    assert today.plan.artifact("codebook") == earlier
    manifest = filled.manifest("tokenize", version) or {}
    assert (manifest["earlier"]["codebook"], manifest["earlier"]["items"]) == (earlier, 100)
    kept = [np.mean([new[item][:n] == old[item][:n] for item in old]) for n in (1, 2)]
    assert [result.metrics["kept_prefix_1"], result.metrics["kept_prefix_2"]] == pytest.approx(kept)
    names = itertools.permutations(range(6))  # no other names of the new codes keep more first codes
    assert kept[0] == max(np.mean([name[new[item][0]] == old[item][0] for item in old]) for name in names)
    assert earlier in result.notes[0]
    assert codes_on(filled, "earlier") == old
    saved = load_codebook(filled, version)
    again, _ = pass_over(filled, engines, LATER, force=True)
    (filled.artifact("tokenize", version) / "manifest.json").unlink()
    pass_over(filled, engines, LATER, force=True)
    assert again.plan.expected["semantic_ids"][DAYS[2]] == version and codes_on(filled, "later") == new
    assert all((a == b).all() for a, b in zip(load_codebook(filled, version).centroids, saved.centroids, strict=True))


def test_without_an_earlier_codebook_of_its_shape_codes_are_numbered_as_fitted(
    filled: Lake, engines: Engines, tmp_path
) -> None:
    wider = dataclasses.replace(EARLIER, tokenize=TokenizeConfig(levels=2, codes=7, iterations=10))
    pass_over(filled, engines, wider)
    today, result = pass_over(filled, engines, LATER)
    assert "other levels or codes" in result.notes[0] and "kept_prefix_1" not in result.metrics
    fresh = Lake(str(tmp_path / "fresh"))
    write(fresh, "user_sequences", [], DAYS)
    write(fresh, "item_embeddings", vectors(2, range(120), MOVED), DAYS)
    alone, _ = pass_over(fresh, engines, LATER)
    assert codes_on(fresh, "later") == codes_on(filled, "later")
    assert alone.plan.expected["semantic_ids"][DAYS[2]] != today.plan.expected["semantic_ids"][DAYS[2]]
