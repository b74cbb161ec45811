"""Codes of items: what the saved codebooks give, the nearest by brute force, and nothing moves when days are appended."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any

import pytest
import torch

from model.nearest import squared_distances
from model.rq_kmeans import encode
from pipelines import embed, quantitative_codes
from pipelines.engines import Engines
from pipelines.item_vectors import matrix_of
from pipelines.quantitative_codes import CodeBooks, vectors_of
from pipelines.ray_tables import read_arrow
from schemas.config import CodesConfig, Config, EmbedConfig, TokenizeConfig
from schemas.errors import ContractViolation, MissingUpstream
from schemas.lake import Lake
from tests.pipelines.small_catalogue import DAYS, FIT_DAY, catalogue, context, item_row, small_lake, write

CONFIG = Config(
    embed=EmbedConfig(sources=("pairs", "attributes"), weights=(1.0, 0.5), pairs_width=16),
    codes=CodesConfig(enabled=True, nearest=7, rq=TokenizeConfig(levels=4, codes=5, iterations=10)),
)


def both(lake: Lake, engines: Engines, config: Config = CONFIG, days: tuple[datetime.date, ...] = DAYS) -> Any:
    embed.run(context("embed", lake, engines, config, days))
    return quantitative_codes.run(context("codes", lake, engines, config, days))


def rows_of(lake: Lake) -> dict[int, dict[str, Any]]:
    version = lake.version("item_codes")
    assert version is not None
    return {row["item_id"]: row for row in read_arrow(lake, "item_codes", version).to_pylist()}


def test_every_item_has_the_codes_that_its_vector_gives(lake: Lake, engines: Engines) -> None:
    small_lake(lake)
    result = both(lake, engines)
    found, today = rows_of(lake), context("codes", lake, engines, CONFIG)
    assert today.plan.done and result.rows == {"item_codes": len(found)} == {"item_codes": len(catalogue())}
    version, pin = today.plan.expected["item_codes"][FIT_DAY], today.pins["item_embeddings"]
    assert {row["codebook_version"] for row in found.values()} == {version}
    books = CodeBooks.load(lake.artifact("codes", version))
    assert [file.name for file in lake.artifact("codes", version).iterdir() if file.is_dir()] == []
    book_ids, book_vectors = vectors_of(lake, pin, FIT_DAY)
    assert torch.equal(books.item_ids, book_ids) and torch.equal(books.vectors, book_vectors)
    vectors = read_arrow(lake, "item_embeddings", pin)
    ids, x = vectors.column("item_id").to_pylist(), torch.tensor(matrix_of(vectors.column("vector")))
    assert encode(books.centroids, x).tolist() == [found[item]["rq"] for item in ids]
    for item, vector in zip(ids, x, strict=True):
        distances = squared_distances(vector.expand(len(book_ids), -1), book_vectors).tolist()
        order = sorted((d, other) for d, other in zip(distances, book_ids.tolist(), strict=True) if other != item)
        assert found[item]["vq"] == [other for _, other in order[:7]]
    assert 0 < result.metrics["utilisation_level_4"] <= 1 and "vq_recall" not in result.metrics


def test_appending_days_moves_no_row(tmp_path, engines: Engines) -> None:
    whole, grown = Lake(str(tmp_path / "whole")), Lake(str(tmp_path / "grown"))
    small_lake(whole)
    both(whole, engines)
    small_lake(grown, DAYS[:3])
    both(grown, engines, days=DAYS[:3])
    for day in DAYS[3:]:
        before = rows_of(grown)
        small_lake(grown, (day,))
        both(grown, engines, days=DAYS[: DAYS.index(day) + 1])
        after = rows_of(grown)
        assert len(after) == len(before) + 10
        assert {item: after[item] for item in before} == before
    assert rows_of(grown) == rows_of(whole)


def test_a_day_without_new_items_gets_its_identity_and_no_row(lake: Lake, engines: Engines) -> None:
    small_lake(lake, items=[row for row in catalogue() if row["date"] < DAYS[4]])
    both(lake, engines)
    assert {row["date"] for row in rows_of(lake).values()} == {FIT_DAY, DAYS[3]}
    assert context("codes", lake, engines, CONFIG).plan.done


def test_a_corrected_day_touches_itself_alone_and_a_lost_codebook_comes_back(lake: Lake, engines: Engines) -> None:
    small_lake(lake)
    both(lake, engines)
    before = rows_of(lake)
    write(lake, "items", [*catalogue(), item_row(5000, DAYS[3])], DAYS[3:4], mark="corrected")
    embed.run(context("embed", lake, engines, CONFIG))
    later = context("codes", lake, engines, CONFIG)
    assert later.dates[0] == DAYS[3] and FIT_DAY not in later.dates
    (lake.artifact("codes", later.plan.expected["item_codes"][FIT_DAY]) / "manifest.json").unlink()
    quantitative_codes.run(later)
    after = rows_of(lake)
    assert {item: after[item] for item in before} == before
    assert set(after) - set(before) == {5000}


def test_search_by_lists_says_what_it_finds(lake: Lake, engines: Engines) -> None:
    small_lake(lake)
    both(lake, engines)
    exact, recalls = rows_of(lake), {}
    for probes in (1, 5):
        codes = dataclasses.replace(CONFIG.codes, search="lists", probes=probes)
        result = quantitative_codes.run(context("codes", lake, engines, dataclasses.replace(CONFIG, codes=codes)))
        found, recalls[probes] = rows_of(lake), result.metrics["vq_recall"]
        shares = [len({*found[i]["vq"]} & {*exact[i]["vq"]}) for i in exact if exact[i]["date"] == FIT_DAY]
        assert recalls[probes] == pytest.approx(sum(shares) / (7 * len(shares)))
        assert all(found[item]["rq"] == exact[item]["rq"] and item not in found[item]["vq"] for item in exact)
    assert recalls[1] < recalls[5] == 1.0


def test_a_later_day_without_its_codebook_and_an_item_twice_are_refused(lake: Lake, engines: Engines) -> None:
    small_lake(lake)
    embed.run(context("embed", lake, engines, CONFIG))
    later = context("codes", lake, engines, CONFIG)
    later.plan.todo = {"item_codes": (DAYS[4],)}
    with pytest.raises(MissingUpstream, match="2026-01-03, the fit day"):
        quantitative_codes.run(later)
    rows = [{"item_id": 7, "date": DAYS[4], "vector": [float(i), 1.0], "sources": []} for i in range(2)]
    pin = write(lake, "item_embeddings", rows, DAYS[4:])
    with pytest.raises(ContractViolation, match="twice on 2026-01-05"):
        vectors_of(lake, pin, DAYS[4])
