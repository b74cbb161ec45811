"""The aligner's training on a small lake, and stage embed with it: new items follow, whatever is missing degrades."""

from __future__ import annotations

import dataclasses
import datetime

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipelines import embed
from pipelines.embed import absolute, items_by_day
from pipelines.engines import Engines
from pipelines.item_alignment import Alignment, Pairs, align_items, batches, prepare_pairs, share
from pipelines.item_vectors import Fitted, normalised
from schemas.config import Config, EmbedConfig, PairsConfig
from schemas.errors import ContractViolation
from schemas.item_alignment import ItemAlignmentConfig
from schemas.lake import Lake
from tests.pipelines.small_catalogue import DAYS, FIT_DAY, catalogue, context, pairs, small_lake, topic_of, write
from tests.pipelines.test_embed import vectors_of

ALIGNED = ItemAlignmentConfig(
    width=16, hidden=32, heads=2, queries=2, attributes_width=64, epochs=4, batch_pairs=64, learning_rate=3e-3
)
EMBED = EmbedConfig(sources=("aligned",), weights=(1.0,), pairs_width=8, aligned=ALIGNED)
CONFIG = Config(embed=EMBED)


def with_sources(*sources: str, **aligned: object) -> Config:
    own = dataclasses.replace(ALIGNED, **aligned)  # type: ignore[arg-type]
    settings = dataclasses.replace(EMBED, sources=sources, weights=(1.0,) * len(sources), aligned=own)
    return Config(embed=settings, item_pairs=PairsConfig(kinds=own.kinds))


def sources_of(lake: Lake) -> dict[int, list[str]]:
    version = lake.version("item_embeddings")
    assert version is not None
    rows = embed.read_arrow(lake, "item_embeddings", version).to_pylist()
    return {row["item_id"]: row["sources"] for row in rows}


@given(st.integers(2, 60), st.integers(2, 9), st.integers(1, 4))
def test_every_pair_is_in_one_batch_and_one_share(count: int, size: int, world: int) -> None:
    rows = np.arange(2 * count, dtype=np.int32).reshape(count, 2)
    known = Pairs(rows, np.arange(1, count + 1, dtype=np.float32))
    parts = list(batches(count, size, [0, 1]))
    assert sorted(np.concatenate(parts).tolist()) == list(range(count))
    assert min(map(len, parts)) >= min(size, count)
    for places in parts:
        shares = [share(known, places, rank, world) for rank in range(world)]
        assert len({len(weights) for _, weights in shares}) == 1  # a collective wants equal shapes
        found = [
            (*row, weight) for r, w in shares for row, weight in zip(r.tolist(), w.tolist(), strict=True) if row[0] >= 0
        ]
        assert sorted(found) == [(2 * p, 2 * p + 1, p + 1.0) for p in places]


@pytest.mark.parametrize("held_out", ["share", "day"])
def test_pairs_that_train_and_pairs_held_out(lake: Lake, tmp_path, held_out: str) -> None:
    """Each pair between known items once, with the sum of its days' weights, none of a day after the fit."""
    small_lake(lake)
    ids = np.array([i for i in range(120) if i != 8])
    version = lake.version("item_pairs")
    assert version is not None
    settings = dataclasses.replace(ALIGNED, held_out=held_out)
    count = prepare_pairs(lake, version, DAYS[:3], ids, settings, tmp_path)
    train, held = Pairs.load(tmp_path, "train"), Pairs.load(tmp_path, "held_out")

    def summed(days: tuple[datetime.date, ...]) -> dict[tuple[int, int], float]:
        sums: dict[tuple[int, int], float] = {}
        for row in (row for day in days for row in pairs(day)):
            if 8 not in (row["item_a"], row["item_b"]):
                pair = (row["item_a"], row["item_b"])
                sums[pair] = sums.get(pair, 0.0) + row["weight"]
        mean = np.mean(list(sums.values()))
        return {pair: value / mean for pair, value in sums.items()}

    def found(part: Pairs) -> dict[tuple[int, int], float]:
        return dict(zip(map(tuple, ids[part.rows_P2].tolist()), part.weights_P.tolist(), strict=True))

    assert count == len(train) == len(found(train))
    if held_out == "day":
        assert found(train) == pytest.approx(summed(DAYS[:2]))
        assert found(held) == pytest.approx(summed(DAYS[2:3]))
    else:
        assert found(train) | found(held) == pytest.approx(summed(DAYS[:3]))
        assert not set(found(train)) & set(found(held))
        assert 0.03 < len(held) / (len(train) + len(held)) < 0.2


def test_without_symmetry_undirected_pairs_stand_in_both_directions(lake: Lake, tmp_path) -> None:
    rows = [row for day in DAYS[:3] for row in pairs(day)]
    rows += [row | {"kind": "user_to_item"} for row in pairs(DAYS[0])[:5]]
    write(lake, "item_pairs", rows, DAYS[:3])
    version = lake.version("item_pairs")
    assert version is not None
    both = {(row["item_a"], row["item_b"]) for row in rows}
    settings = dataclasses.replace(ALIGNED, symmetric=False, kinds=("cooccurrence", "user_to_item"))
    prepare_pairs(lake, version, DAYS[:3], np.arange(120), settings, tmp_path)
    parts = [Pairs.load(tmp_path, name).rows_P2.tolist() for name in ("train", "held_out")]
    assert {tuple(row) for part in parts for row in part} == both | {(b, a) for a, b in both}
    assert {tuple(row) for row in parts[1]} == {tuple(row[::-1]) for row in parts[1]}  # held out in both as well


@pytest.mark.parametrize("model", ["mlp", "qformer"])
def test_new_items_get_their_vector_from_content_alone(lake: Lake, engines: Engines, model: str) -> None:
    small_lake(lake)
    result = embed.run(context("embed", lake, engines, with_sources("aligned", model=model)))
    assert result.notes == [
        "The aligner does without text: no item has a title.",
        "The aligner does without vector: no item brings a vector.",
    ]
    curves = result.series
    assert set(curves) == {"aligner_loss", "aligner_content_loss", "aligner_validation_loss"}
    assert curves["aligner_loss"][-1][1] < curves["aligner_loss"][0][1]
    found = vectors_of(lake)
    items = np.array([item for item, _ in found])
    vectors = np.array(list(found.values()), np.float32)
    assert vectors.shape == (160, 16)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-5)
    old = items < 1000
    nearest = items[old][(vectors[~old] @ vectors[old].T).argmax(1)]
    assert (topic_of(nearest) == topic_of(items[~old])).mean() > 0.95
    assert {tuple(names) for names in sources_of(lake).values()} == {("aligned",)}


def test_days_one_by_one_equal_one_pass_and_a_rerun(tmp_path, engines: Engines) -> None:
    """Beside pairs too, whose block of a new item is that of its neighbours by the aligned vector."""
    config = with_sources("aligned", "pairs")
    whole, grown = Lake(str(tmp_path / "whole")), Lake(str(tmp_path / "grown"))
    small_lake(whole)
    embed.run(context("embed", whole, engines, config))
    small_lake(grown, DAYS[:3])
    embed.run(context("embed", grown, engines, config, DAYS[:3]))
    for day in DAYS[3:]:
        small_lake(grown, (day,))
        embed.run(context("embed", grown, engines, config, DAYS[: DAYS.index(day) + 1]))
    assert vectors_of(whole) == vectors_of(grown)
    block = np.array([vector for (item, _), vector in vectors_of(whole).items() if item >= 1000])[:, 16:]
    assert (np.linalg.norm(block, axis=1) > 0.99).all()


def test_missing_content_degrades(lake: Lake, engines: Engines) -> None:
    """An item with a vector only, one with attributes only, one with nothing; no title at all."""
    bare = {"author_id": None, "tags": [], "attributes": [], "duration_ms": None}
    rows = catalogue()
    for row in rows:
        image, sound = np.eye(6)[topic_of(row["item_id"])].tolist(), [float(row["item_id"]), 1.0]
        row["vectors"] = [{"name": "image", "values": image}, {"name": "sound", "values": sound}][: 1 + row["item_id"] % 2]
    rows[1] |= bare
    rows[2]["vectors"] = None
    rows[3] |= bare | {"vectors": None}
    small_lake(lake, items=rows)
    result = embed.run(context("embed", lake, engines, with_sources("aligned")))
    assert result.notes == ["The aligner does without text: no item has a title."]
    found = {item: np.array(vector) for (item, _), vector in vectors_of(lake).items()}
    lengths = {item: float(np.linalg.norm(vector)) for item, vector in found.items()}
    assert lengths.pop(3) == 0.0
    assert sources_of(lake)[3] == []
    assert set(np.round(list(lengths.values()), 4)) == {1.0}
    fitted = Fitted.load(next((lake.home / "_artifacts" / "embed").glob("*/fitted.npz")))
    assert fitted.aligner_content == ("attributes", "vector")
    assert fitted.aligner is not None and fitted.aligner.widths[1:] == (6, 2)  # a block each
    others = np.array([i for i in range(4, 120) if i not in (1, 2)])
    for item in (1, 2):
        nearest = others[(normalised(np.stack([found[i] for i in others])) @ found[item]).argmax()]
        assert topic_of(nearest) == topic_of(item)


def test_data_without_pairs_leaves_the_aligner_out(lake: Lake, engines: Engines) -> None:
    small_lake(lake)
    write(lake, "item_pairs", [], DAYS)
    result = embed.run(context("embed", lake, engines, with_sources("aligned", "attributes")))
    assert result.notes == ["Item vectors leave out aligned: no pair to learn from."]
    assert set(map(tuple, sources_of(lake).values())) == {("attributes",)}
    with pytest.raises(ContractViolation, match=r"no pair to learn from\. No source is left"):
        embed.run(context("embed", lake, engines, with_sources("aligned")))
    foreign = [row | {"item_a": row["item_a"] + 5000, "item_b": row["item_b"] + 5000} for day in DAYS for row in pairs(day)]
    write(lake, "item_pairs", foreign, DAYS, mark="foreign")
    result = embed.run(context("embed", lake, engines, with_sources("aligned", "attributes")))
    assert result.notes[-1] == "Item vectors leave out aligned: no pair has content on both sides."


def test_a_kind_that_no_stage_makes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"embed\.aligned\.kinds must be among item_pairs\.kinds: cooccurrence"):
        Config(embed=dataclasses.replace(EMBED, aligned=dataclasses.replace(ALIGNED, kinds=("swing",))))


def trained(lake: Lake, engines: Engines, folder, settings: ItemAlignmentConfig) -> Alignment:
    today = context("embed", lake, engines, CONFIG)
    items = items_by_day(today, [FIT_DAY])[FIT_DAY]
    ids = items.column("item_id").to_numpy()
    block = normalised(np.eye(6, dtype=np.float32)[topic_of(ids)] + np.random.default_rng(0).normal(size=(len(ids), 6)))
    version = today.pins["item_pairs"]
    found = align_items(engines.ray(), absolute(lake), version, today.calendar.until_fit, ids, [block], settings, folder)
    assert found is not None
    return found


def test_training_stops_early_and_keeps_the_best_epoch(lake: Lake, engines: Engines, tmp_path) -> None:
    small_lake(lake)
    settings = dataclasses.replace(ALIGNED, epochs=60, patience=2, learning_rate=0.02)
    long = trained(lake, engines, tmp_path / "long", settings)
    losses = [row["validation_loss"] for row in long.history]
    best = int(np.argmin(losses))
    assert len(losses) == best + 3 < 60
    short = trained(lake, engines, tmp_path / "short", dataclasses.replace(settings, epochs=best + 1))
    for name, value in long.aligner.state_dict().items():
        assert torch.equal(value, short.aligner.state_dict()[name])


@pytest.mark.long
def test_two_workers_train_as_one(lake: Lake, engines: Engines, tmp_path) -> None:
    small_lake(lake)
    one, two = (
        trained(lake, engines, tmp_path / str(n), dataclasses.replace(ALIGNED, dropout=0.0, num_workers=n)) for n in (0, 2)
    )
    for name, value in one.aligner.state_dict().items():
        torch.testing.assert_close(value, two.aligner.state_dict()[name], rtol=1e-3, atol=1e-4)
    curves = [[row["validation_loss"] for row in run.history] for run in (one, two)]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)
