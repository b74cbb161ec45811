"""The table of item ids: who has a row, and embeddings that start at the items' vectors, as alike as those, and as long as
random ones."""

from __future__ import annotations

import math
from dataclasses import replace

import pyarrow as pa
import pytest
import torch

from model.pathways import INIT_STD
from pipelines.checkpoints import save_model
from pipelines.item_start import VECTORS, start_at_vectors, vectors_of
from pipelines.ray_tables import replace_days
from pipelines.train_loop import Training
from schemas.config import Config, TrainConfig
from schemas.feedback import mask_of
from schemas.lake import Lake
from schemas.lineage import TRAIN
from schemas.model_config import ModelConfig
from schemas.tables import TABLES
from tests.model.requests import catalogue, small_decoder
from tests.pipelines.examples import CONFIG, calendar, example_rows, write_lake
from tests.pipelines.test_train import opened, settings_for


@pytest.mark.parametrize("width", [3, 8])
def test_started_items_are_as_alike_as_their_vectors_and_as_long_as_random_ones(width: int) -> None:
    decoder, items = small_decoder(fields=("item",), embed_dim=8, hash_buckets=10_000), catalogue(30, buckets=10_000)
    rows = decoder.context.fields.items.places(items.ids)
    assert len(set(rows.tolist())) == 31  # no two in one bucket
    table = decoder.context.fields.items.weight
    before, vectors = table.clone(), torch.randn(30, width, generator=torch.Generator().manual_seed(1))
    known = torch.arange(0, 30, 2)
    start_at_vectors(decoder, items, known, vectors[known])
    started, wanted = table[rows[known]].detach(), vectors[known]
    factor = started.norm() / wanted.norm()
    assert torch.allclose(started @ started.T, factor**2 * wanted @ wanted.T, atol=1e-5)
    assert math.isclose(started.square().sum(1).mean().sqrt(), INIT_STD * 8**0.5, rel_tol=1e-4)
    others = torch.ones(len(table), dtype=torch.bool).index_fill(0, rows[known], False)
    assert torch.equal(table[others], before[others])


def test_wide_vectors_keep_their_strongest_directions_and_a_bucket_its_mean() -> None:
    decoder, items = small_decoder(fields=("item",), embed_dim=4, hash_buckets=3), catalogue(40, buckets=3)
    strong = torch.randn(40, 4, generator=torch.Generator().manual_seed(1))
    turned, _ = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(2)))
    vectors = torch.cat([strong, torch.zeros(40, 5)], 1) @ turned
    start_at_vectors(decoder, items, torch.arange(40), vectors)
    rows = decoder.context.fields.items.places(items.ids[:-1])
    means = torch.stack([strong[rows == bucket].mean(0) for bucket in (1, 2, 3)])
    started = decoder.context.fields.items.weight[1:4]
    factor = INIT_STD * 2 / strong.square().sum(1).mean().sqrt()
    assert torch.allclose(started @ started.T, factor**2 * means @ means.T, atol=1e-6)


def test_training_reads_the_vectors_only_where_it_starts_at_them(ray_module, tmp_path) -> None:
    lake = Lake(str(tmp_path / "lake"))
    pins = write_lake(lake, example_rows(20))
    config = replace(CONFIG, model=replace(CONFIG.model, fields=("item",)), train=TrainConfig(item_start="vectors"))
    item_ids = opened((lake, pins), config).catalogue.item_ids.tolist()
    day = calendar().fit_day
    rows = [{"item_id": i, "date": day, "vector": [float(i), 1.0], "sources": ["pairs"]} for i in [*item_ids[1:], 10**9]]
    pins[VECTORS] = replace_days(lake, VECTORS, pa.Table.from_pylist(rows, schema=TABLES[VECTORS].schema), {day: "x"})
    data = opened((lake, pins), config)
    known, vectors = vectors_of(lake, pins[VECTORS], data.catalogue, calendar())
    assert [item_ids[dense] for dense in known] == item_ids[1:] == vectors[:, 0].tolist()
    table = Training(settings_for((lake, pins), tmp_path, config), data, 0, 1).decoder.context.fields.items
    start, rows = table.weight, table.places(data.items.ids[known])
    plain = replace(config, train=TrainConfig())
    other = Training(settings_for((lake, pins), tmp_path, plain), data, 0, 1).decoder.context.fields.items.weight
    read = torch.zeros(len(start), dtype=torch.bool).index_fill(0, rows, True)
    assert torch.equal(start[~read], other[~read])
    assert not torch.isclose(start[read], other[read]).all(1).any()
    assert {VECTORS} == {r.source for r in TRAIN.reads("train", config)} - {r.source for r in TRAIN.reads("train", plain)}


@pytest.mark.parametrize("rows", [10, 100])
def test_the_most_engaged_items_have_rows_and_a_training_that_goes_on_keeps_them(ray_module, tmp_path, rows: int) -> None:
    lake = Lake(str(tmp_path / "lake"))
    examples = example_rows(20)
    pins = write_lake(lake, examples)
    config = replace(CONFIG, model=replace(CONFIG.model, fields=("item",), item_rows=rows), train=TrainConfig(epochs=1))
    data = opened((lake, pins), config)
    begun = Training(settings_for((lake, pins), tmp_path, config), data, 0, 1).decoder.context.fields.items
    targets = [
        item
        for row in examples
        if row["date"] in calendar().train
        for item, bits in zip(row["target_item_ids"], row["target_feedback"], strict=True)
        if bits & mask_of(config.targets.positive)
    ]
    known = data.catalogue.item_ids.tolist()
    own = sorted(known, key=lambda item: (-targets.count(item), item))[:rows]
    places = begun.places(torch.tensor(known)).tolist()
    assert {item for item, place in zip(known, places, strict=True) if place > config.model.hash_buckets} == set(own)

    begun.give_rows(torch.tensor(own[1:]))  # as if the first had not been there
    folder = tmp_path / "earlier"
    earlier = small_decoder(**vars(config.model), sizes=data.catalogue.sizes)
    earlier.context.fields.items.load_state_dict(begun.state_dict())
    save_model(folder, earlier, data.description(earlier))
    again = Training(settings_for((lake, pins), tmp_path, config) | {"initial": str(folder)}, data, 0, 1)
    assert torch.equal(again.decoder.context.fields.items.own_ids, begun.own_ids)


def test_vectors_need_a_table_of_items() -> None:
    with pytest.raises(ValueError, match=r"train\.item_start"):
        Config(train=TrainConfig(item_start="vectors"))
    with pytest.raises(ValueError, match=r"model\.item_rows"):
        ModelConfig(item_rows=5)
