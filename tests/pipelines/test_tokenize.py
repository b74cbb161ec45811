"""Semantic ids: every item once, codes that appending and worker counts never move, ranks by a stated order."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from model.rq_kmeans import encode
from pipelines import embed, tokenize_items
from pipelines.catalogue import load_catalogue
from pipelines.engines import Engines
from pipelines.item_ranks import ranks
from pipelines.item_vectors import matrix_of
from pipelines.ray_tables import read_arrow
from pipelines.stage import StageResult
from pipelines.tokenize_items import load_codebook
from schemas.config import Config, EmbedConfig, SplitConfig, TokenizeConfig
from schemas.errors import ContractViolation, MissingUpstream
from schemas.lake import Lake
from schemas.lineage import plan
from tests.pipelines.small_catalogue import DAYS, FIT_DAY, catalogue, context, item_row, rows_by_item, small_lake, write

CONFIG = Config(
    embed=EmbedConfig(sources=("pairs", "attributes"), weights=(1.0, 0.5), pairs_width=16),
    tokenize=TokenizeConfig(levels=3, codes=5, iterations=10),
)


def both(lake: Lake, engines: Engines, config: Config = CONFIG, days: tuple[datetime.date, ...] = DAYS) -> Any:
    embed.run(context("embed", lake, engines, config, days))
    return tokenize_items.run(context("tokenize", lake, engines, config, days))


def rows_of(lake: Lake) -> dict[int, dict[str, Any]]:
    return rows_by_item(lake, "semantic_ids")


def codes_of(lake: Lake) -> dict[int, tuple[int, ...]]:
    return {item: (*row["codes"], row["rank"]) for item, row in rows_of(lake).items()}


def test_every_item_has_the_codes_that_the_saved_codebook_gives_it(lake: Lake, engines: Engines) -> None:
    small_lake(lake)
    result = both(lake, engines)
    found = rows_of(lake)
    assert set(found) == {row["item_id"] for row in catalogue()}
    today = context("tokenize", lake, engines, CONFIG)
    assert today.plan.done
    version = today.plan.expected["semantic_ids"][FIT_DAY]
    assert {row["codebook_version"] for row in found.values()} == {version}
    vectors = read_arrow(lake, "item_embeddings", today.pins["item_embeddings"])
    codes = encode(load_codebook(lake, version), torch.tensor(matrix_of(vectors.column("vector"))))
    assert codes.tolist() == [found[item]["codes"] for item in vectors.column("item_id").to_pylist()]
    assert result.rows == {"semantic_ids": len(found)}
    assert 0 < result.metrics["utilisation_level_1"] <= 1
    assert result.series["inertia_level_1"][0][1] >= result.series["inertia_level_1"][-1][1]
    manifest = lake.manifest("tokenize", version)
    assert manifest is not None
    assert (manifest["levels"], manifest["codes"], manifest["width"]) == (3, 5, 48)
    assert [file.name for file in lake.artifact("tokenize", version).iterdir() if file.is_dir()] == []
    assert len(load_catalogue(lake, result.tables["semantic_ids"], FIT_DAY, DAYS[-1])) == len(found)


def test_ranks_order_by_positives_then_id_and_later_days_follow(lake: Lake, engines: Engines) -> None:
    small_lake(lake)
    both(lake, engines)
    positives = dict.fromkeys((row["item_id"] for row in catalogue()), 0)
    for user in range(20):  # see small_lake: the second play of a user is liked on every day, the third never
        for day in DAYS[:3]:
            positives[user] += 1
            positives[user + 6] += day.day > 1
    buckets: dict[tuple[int, ...], list[dict[str, Any]]] = {}
    for row in rows_of(lake).values():
        buckets.setdefault(tuple(row["codes"]), []).append(row)
    assert max(map(len, buckets.values())) > 1
    for bucket in buckets.values():
        bucket.sort(key=lambda row: row["rank"])
        assert [row["rank"] for row in bucket] == list(range(len(bucket)))
        order = [(r["date"], -positives[r["item_id"]] if r["date"] == FIT_DAY else 0, r["item_id"]) for r in bucket]
        assert order == sorted(order)


@pytest.mark.parametrize("rule", ["rank", "level", "nearest_free"])
def test_appending_days_moves_no_code_and_no_rank(tmp_path, engines: Engines, rule: str) -> None:
    config = dataclasses.replace(CONFIG, tokenize=dataclasses.replace(CONFIG.tokenize, codes=6, collisions=rule))
    whole, grown = Lake(str(tmp_path / "whole")), Lake(str(tmp_path / "grown"))
    small_lake(whole)
    version = both(whole, engines, config).tables["semantic_ids"]
    small_lake(grown, DAYS[:3])
    both(grown, engines, config, DAYS[:3])
    for day in DAYS[3:]:
        before = codes_of(grown)
        small_lake(grown, (day,))
        both(grown, engines, config, DAYS[: DAYS.index(day) + 1])
        after = codes_of(grown)
        assert len(after) == len(before) + 10
        assert {item: after[item] for item in before} == before
    found = codes_of(grown)
    assert found == codes_of(whole) and len(set(found.values())) == len(found)
    catalogue = load_catalogue(whole, version, FIT_DAY, DAYS[-1])
    assert catalogue.levels == 3 + (rule == "level")
    assert rule == "rank" or not catalogue.ranks.any()


def test_a_night_settles_collisions_as_the_fit_did(lake: Lake, engines: Engines) -> None:
    """Whatever the configuration says by then: the codebook stays until a whole run."""
    small_lake(lake)
    both(lake, engines, days=DAYS[:3])
    embed.run(context("embed", lake, engines, CONFIG, DAYS[:4]))
    changed = dataclasses.replace(CONFIG, tokenize=dataclasses.replace(CONFIG.tokenize, collisions="level"))
    night = context("tokenize", lake, engines, changed, DAYS[:4])
    night.plan = plan(night.plan.spec, changed, lake, night.calendar, only=(DAYS[3],))
    tokenize_items.run(night)
    found = codes_of(lake)
    assert len(found) == 120 + 30 and {len(codes) for codes in found.values()} == {4}  # three codes and the rank
    assert len(set(found.values())) == len(found)


def test_a_lost_codebook_is_fitted_anew_with_the_same_codes(lake: Lake, engines: Engines) -> None:
    small_lake(lake)
    both(lake, engines)
    before = codes_of(lake)
    write(lake, "items", [*catalogue(), item_row(5000, DAYS[4])], DAYS[4:], mark="corrected")
    embed.run(context("embed", lake, engines, CONFIG))
    later = context("tokenize", lake, engines, CONFIG)
    assert later.dates == (DAYS[4],)
    version = later.plan.expected["semantic_ids"][FIT_DAY]
    (lake.artifact("tokenize", version) / "manifest.json").unlink()
    with pytest.raises(MissingUpstream, match=f"no codebook {version}"):
        load_codebook(lake, version)
    tokenize_items.run(later)
    after = codes_of(lake)
    assert {item: after[item] for item in before} == before
    assert set(after) - set(before) == {5000}


@pytest.mark.parametrize("balance", ["equal", "capped"])
def test_balanced_codes_stay_and_later_items_get_nearest_ones(lake: Lake, engines: Engines, balance: Any) -> None:
    """Fitted items keep the codes of the fit, which `encode` does not repeat; a lost codebook gives the same ones."""
    small_lake(lake)
    config = dataclasses.replace(CONFIG, tokenize=dataclasses.replace(CONFIG.tokenize, balance=balance))
    both(lake, engines, config)
    found, today = rows_of(lake), context("tokenize", lake, engines, config)
    fitted = np.array([row["codes"] for row in found.values() if row["date"] == FIT_DAY])
    most = {"equal": -(-len(fitted) // 5), "capped": int(1.1 * len(fitted) / 5)}[balance]
    assert all(np.bincount(codes).max() <= most for codes in fitted.T)
    version = today.plan.expected["semantic_ids"][FIT_DAY]
    vectors = read_arrow(lake, "item_embeddings", today.pins["item_embeddings"])
    nearest = encode(load_codebook(lake, version), torch.tensor(matrix_of(vectors.column("vector")))).tolist()
    moved = {
        found[item]["date"]
        for item, codes in zip(vectors["item_id"].to_pylist(), nearest, strict=True)
        if codes != found[item]["codes"]
    }
    assert moved == {FIT_DAY}
    before = lake.artifact("tokenize", version).joinpath("codebook.safetensors").read_bytes()
    (lake.artifact("tokenize", version) / "manifest.json").unlink()
    fitted_again = tokenize_items.fit_day_codes(today, version, StageResult())
    assert lake.artifact("tokenize", version).joinpath("codebook.safetensors").read_bytes() == before
    again = dict(zip(fitted_again.item_ids.tolist(), fitted_again.codes.tolist(), strict=True))
    assert again == {item: row["codes"] for item, row in found.items() if row["date"] == FIT_DAY}


@pytest.mark.long
def test_two_ray_train_workers_give_the_same_table(tmp_path, engines: Engines) -> None:
    lakes = {workers: Lake(str(tmp_path / str(workers))) for workers in (0, 2)}
    for workers, lake in lakes.items():
        small_lake(lake)
        both(lake, engines, dataclasses.replace(CONFIG, tokenize=dataclasses.replace(CONFIG.tokenize, num_workers=workers)))
    assert codes_of(lakes[0]) == codes_of(lakes[2])


def test_by_user_only_train_events_count(lake: Lake, engines: Engines) -> None:
    """A user's last positive is test and the one before validates, so of five days of likes three count."""
    small_lake(lake)
    config = dataclasses.replace(CONFIG, split=SplitConfig(by="user"))
    whole = context("tokenize", _embedded(lake, engines, config), engines, config)
    whole.calendar = dataclasses.replace(whole.calendar, train=DAYS)
    counts = tokenize_items.train_positives(whole, np.arange(120))
    # User 19 likes item 19 on five days and item 25 on four; the two last likes are of day 5 and are held out.
    assert (counts[0], counts[19], counts[25]) == (4, 7, 3)
    assert counts.sum() == 20 * (5 + 4 - 2)


def _embedded(lake: Lake, engines: Engines, config: Config) -> Lake:
    embed.run(context("embed", lake, engines, config))
    return lake


def test_a_day_after_a_gap_is_refused(lake: Lake, engines: Engines) -> None:
    small_lake(lake)
    embed.run(context("embed", lake, engines, CONFIG))
    for todo, message in (((DAYS[4],), "2026-01-03, the fit day"), ((FIT_DAY, DAYS[4]), "semantic_ids of 2026-01-04")):
        later = context("tokenize", lake, engines, CONFIG)
        later.plan.todo = {"semantic_ids": todo}
        with pytest.raises(MissingUpstream, match=message):
            tokenize_items.run(later)


def test_an_item_with_two_rows_is_refused(lake: Lake, engines: Engines) -> None:
    small_lake(lake)
    embed.run(context("embed", lake, engines, CONFIG))
    rows = [{"item_id": 7, "date": FIT_DAY, "vector": [float(i), 1.0], "sources": []} for i in range(2)]
    plan_of = context("tokenize", lake, engines, CONFIG)
    plan_of.pins["item_embeddings"] = write(lake, "item_embeddings", rows, DAYS[2:])
    with pytest.raises(ContractViolation, match="2 rows \\(1 items\\)"):
        tokenize_items.run(plan_of)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 3), st.integers(0, 4)), max_size=40))
def test_ranks_agree_with_counting_what_comes_before(items: list[tuple[int, int, int, int]]) -> None:
    codes = np.array([item[:2] for item in items], np.int32).reshape(-1, 2)
    days = np.array([np.datetime64("2026-01-01") + item[2] for item in items], "datetime64[D]")
    counts, ids = np.array([item[3] for item in items], np.int64), np.arange(len(items))
    keys = [(days[i], -counts[i], ids[i]) for i in ids]
    expected = [sum(keys[j] < keys[i] and (codes[j] == codes[i]).all() for j in ids) for i in ids]
    assert ranks(codes, days, counts, ids).tolist() == expected
