"""What the report says of a codebook, from a lake, against the rows of the tables one by one."""

from __future__ import annotations

import dataclasses
import datetime
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from jinja2 import Environment, FileSystemLoader

import pipelines.report
from model.rq_kmeans import Fit, encode, fit
from pipelines import codebook_report, embed, tokenize_items
from pipelines.codebook import save_codebook
from pipelines.codebook_report import codebook_metrics, fit_metrics, quality, tags_of
from pipelines.engines import Engines
from pipelines.ray_tables import read_arrow
from schemas.config import Config, EmbedConfig, TokenizeConfig
from schemas.lake import Lake
from tests.pipelines.small_catalogue import DAYS, FIT_DAY, catalogue, context, item_row, small_lake, write

SETTINGS = TokenizeConfig(levels=3, codes=7, iterations=10)
CONFIG = Config(embed=EmbedConfig(sources=("pairs", "attributes"), weights=(1.0, 0.5), pairs_width=16), tokenize=SETTINGS)
VERSION = "codebook"
TAGS = {3: ["topic 5"], 4: ["topic 4", "topic 0", "topic 4"], 5: []}  # others have the tag of their topic


def vectors() -> dict[int, np.ndarray]:
    """One around its topic's centre for each item of the catalogue."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(6, 12))
    items = [row["item_id"] for row in catalogue()]
    return {item: (centres[item % 6] + 0.4 * generator.normal(size=12)).astype(np.float32) for item in items}


def write_vectors(lake: Lake, x: dict[int, np.ndarray]) -> dict[int, datetime.date]:
    """Writes item_embeddings as stage `embed` would: all items up to the fit day on that day. The day of each item."""
    days = {row["item_id"]: max(row["date"], FIT_DAY) for row in catalogue()}
    rows = [{"item_id": i, "date": days[i], "vector": x[i].tolist(), "sources": []} for i in sorted(x)]
    write(lake, "item_embeddings", rows, DAYS[2:])
    return days


def make(lake: Lake) -> Fit:
    """A lake with items, vectors, a codebook and codes, without an engine. Item 3 has changed its tags."""
    items = [row | {"tags": TAGS.get(row["item_id"], row["tags"])} for row in catalogue() if row["item_id"] != 3]
    changed = [item_row(3, DAYS[0]), item_row(3, DAYS[1], tags=TAGS[3])]
    write(lake, "items", [*items, *changed], DAYS)
    x = vectors()
    days = write_vectors(lake, x)
    fitted = [item for item in sorted(x) if days[item] == FIT_DAY]
    found = fit(torch.tensor(np.stack([x[i] for i in fitted])), torch.tensor(fitted), SETTINGS)
    folder = lake.artifact("tokenize", VERSION)
    folder.mkdir(parents=True)
    save_codebook(folder, found.codebook, VERSION)
    lake.write_manifest("tokenize", VERSION, {"items": len(fitted), "inertia": found.inertia})
    codes = encode(found.codebook, torch.tensor(np.stack([x[i] for i in sorted(x)])))
    rows = [
        {"item_id": i, "date": days[i], "codes": own, "codebook_version": VERSION, "rank": 0}
        for i, own in zip(sorted(x), codes.tolist(), strict=True)
    ]
    write(lake, "semantic_ids", rows, DAYS[2:])
    return found


def rows_of(lake: Lake, table: str) -> list[dict[str, Any]]:
    version = lake.version(table)
    assert version is not None
    return read_arrow(lake, table, version).to_pylist()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Lake, Fit]:
    lake = Lake(str(tmp_path_factory.mktemp("codebook")))
    return lake, make(lake)


def test_purity_counts_each_item_by_its_newest_tags(made: tuple[Lake, Fit]) -> None:
    found = quality(made[0])
    assert found is not None
    codes = {row["item_id"]: tuple(row["codes"]) for row in rows_of(made[0], "semantic_ids")}
    tags = {item: set(TAGS.get(item, [f"topic {item % 6}"])) for item in codes}
    for length, level in enumerate(found[0].levels, 1):
        buckets: dict[tuple[int, ...], list[int]] = {}
        for item in codes:
            buckets.setdefault(codes[item][:length], []).append(item)
        most = [max(Counter(t for i in b for t in tags[i]).values(), default=0) for b in buckets.values()]
        assert level.purity is not None
        assert level.purity.share == pytest.approx(sum(most) / (len(codes) - 1))
        assert level.purity.items == len(codes) - 1
        assert (level.prefix.prefixes, level.prefix.items_max) == (len(buckets), max(map(len, buckets.values())))


def test_the_loss_of_the_fits_items_is_that_of_the_fit_and_later_ones_stand_apart(made: tuple[Lake, Fit]) -> None:
    lake, fitted = made
    found = quality(lake)
    assert found is not None
    losses = fit_metrics(lake, VERSION)
    x, days = vectors(), {row["item_id"]: row["date"] for row in rows_of(lake, "semantic_ids")}
    of_fit = np.stack([x[item] for item, day in days.items() if day == FIT_DAY])
    for number, level in enumerate(found[0].levels, 1):
        assert level.left is not None
        assert level.left.loss == pytest.approx(losses[f"reconstruction_loss_level_{number}"], rel=1e-4)
        assert level.left.variance == pytest.approx(of_fit.var(axis=0).sum(), rel=1e-5)
    late = {row["item_id"]: row["codes"] for row in rows_of(lake, "semantic_ids") if row["date"] > FIT_DAY}
    books = [book.numpy() for book in fitted.codebook.centroids]
    lost = [x[i] - sum(book[code] for book, code in zip(books, own, strict=True)) for i, own in late.items()]
    assert found[0].later is not None and len(late) == 20
    assert found[0].later.loss == pytest.approx(np.square(lost).sum(axis=1).mean(), rel=1e-4)


def test_the_stage_logs_what_the_report_shows(lake: Lake, engines: Engines) -> None:
    small_lake(lake)
    embed.run(context("embed", lake, engines, CONFIG))
    result = tokenize_items.run(context("tokenize", lake, engines, CONFIG))
    found = quality(lake)
    assert found is not None
    for number, level in enumerate(found[0].levels, 1):
        assert level.left is not None
        assert result.metrics[f"reconstruction_loss_level_{number}"] == pytest.approx(level.left.loss, rel=1e-4)
        assert result.metrics[f"entropy_level_{number}"] == level.use.entropy
        assert result.metrics[f"items_a_prefix_max_level_{number}"] == level.prefix.items_max
    assert set(result.figures) | {"codebook_purity"} == set(found[1])


def test_a_sample_keeps_whole_items_and_stays_near_all(made: tuple[Lake, Fit], monkeypatch: Any) -> None:
    whole = quality(made[0])
    monkeypatch.setattr(codebook_report, "SAMPLED_ITEMS", 60)
    sample = quality(made[0])
    assert whole is not None and sample is not None
    losses = [[level.left.loss for level in found[0].levels if level.left] for found in (whole, sample)]
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=0.3)
    assert [level.purity for level in sample[0].levels] == [level.purity for level in whole[0].levels]


def test_the_page_tells_what_is_known_and_leaves_out_what_is_not(made: tuple[Lake, Fit]) -> None:
    found = quality(made[0])
    assert found is not None
    text = section(found[0])
    for level in found[0].levels:
        assert level.purity is not None
        assert f"<td>{level.use.perplexity:.1f}</td>" in text and f"<td>{level.purity.share:.3f}</td>" in text
    assert "Hourglass" in text and "of the variance of the item vectors" in text
    bare = [dataclasses.replace(level, purity=None, left=None) for level in found[0].levels[:2]]
    less = section(dataclasses.replace(found[0], levels=bare, hourglass=None, later=None))
    assert "<td>-</td>" in less and "Hourglass" not in less and "variance of the item vectors" not in less
    assert "No codebook yet" in section(None)


def section(codebook: Any) -> str:
    """The report's section on the codebook."""
    folder = Path(pipelines.report.__file__).parent
    page = Environment(loader=FileSystemLoader(folder), autoescape=True).get_template("report_template.html")
    days = {"days": DAYS, "test": DAYS[-1:], "train": DAYS[:3], "fit_day": FIT_DAY}
    text = page.render(codebook=codebook, images={}, days=days, evaluated={}, train={}, tables={}, ingested={}, peak_gib=0,
                       seconds=0, config={})  # fmt: skip
    return text[text.index("<h2>Codebook") : text.index("<h2>Training")]


def test_vectors_that_were_made_anew_since_are_not_held_against_older_codes(lake: Lake) -> None:
    assert quality(lake) is None
    make(lake)
    before = quality(lake)
    time.sleep(0.002)  # commits are told apart by milliseconds
    write_vectors(lake, {item: x[:5] for item, x in vectors().items()})
    found = quality(lake)
    assert before is not None and found is not None
    assert before[0].levels[0].left is not None and [level.left for level in found[0].levels] == [None] * 3
    assert found[0].later is None and found[0].shared == before[0].shared


def test_the_report_is_of_the_newest_codebook_alone(lake: Lake) -> None:
    make(lake)
    older = datetime.date(2025, 12, 31)
    rows = [{"item_id": 7, "date": older, "codes": [0, 0, 0], "codebook_version": "older", "rank": 0}]
    write(lake, "semantic_ids", rows, (older,))
    write(lake, "item_embeddings", [{"item_id": 7, "date": older, "vector": [1.0], "sources": []}], (older,))
    found = quality(lake)
    assert found is not None and (found[0].items, found[0].version) == (len(catalogue()), VERSION)
    (lake.artifact("tokenize", VERSION) / "manifest.json").unlink()
    assert quality(lake) is None


def test_items_without_tags_and_tags_of_items_without_codes_are_left_out(lake: Lake) -> None:
    rows = [item_row(1, DAYS[0], tags=["a", "a"]), item_row(2, DAYS[0], tags=[]), item_row(9, DAYS[0], tags=["b", "a"])]
    write(lake, "items", rows, DAYS)
    owners, tags = tags_of(lake, np.array([1, 2, 5]))
    assert owners.tolist() == [0] and len(tags) == 1
    assert len(tags_of(lake, np.array([2]))[0]) == 0
    assert set(codebook_metrics(np.zeros((4, 1), np.int32), [3])).isdisjoint({"hourglass", "hourglass_waist"})
