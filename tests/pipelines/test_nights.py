"""Nights on a small lake: a whole run over the first days, then night by night, with recommendations that come back.

The log is a mapped source, so that what users did with recommendations is ingested with the probabilities that the model
gave them. Users like the items of their own group, which a small model learns in no time.
"""

from __future__ import annotations

import datetime
import shutil
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pandas as pd
import pytest
import torch
import yaml

from pipelines.collate import requests_as_of
from pipelines.exposures import load_exposures
from pipelines.long_histories import ARRAYS, LongRows
from pipelines.ray_tables import newest_rows
from pipelines.split import day_start_us
from schemas.errors import EXIT_RETRY
from schemas.lake import Lake
from tests.pipelines.command_line import answer_of, shared_engines

pytestmark = pytest.mark.long

FIRST = datetime.date(2026, 3, 1)
DAYS = [FIRST + datetime.timedelta(days=n) for n in range(8)]
BASE, NIGHTS = DAYS[:6], DAYS[6:]
USERS, ITEMS, GROUPS = 80, 60, 4
TOKENS = 16  # of a long history; users see six items a day and more
CONFIG: dict[str, Any] = {
    "name": "nights",
    "source": {
        "kind": "mapped",
        "log": {
            "files": "day_*.parquet",
            "columns": {name: name for name in ("user_id", "item_id", "ts", "click", "hate", "play_ms", "duration_ms")}
            | {name: name for name in ("behaviour_log_probs", "behaviour_codebook", "behaviour_policy")},
        },
        "items": {"files": "items.parquet", "columns": {"item_id": "item_id", "tags": "tags", "withdrawn": "withdrawn"}},
    },
    "embed": {"sources": ["pairs", "attributes"], "weights": [1.0, 1.0], "pairs_width": 16, "attributes_width": 8},
    "tokenize": {"codes": 8},
    "model": {"d_model": 32, "layers": 2, "heads": 2, "g_kv": 2, "embed_dim": 16, "dropout": 0.0, "hash_buckets": 100}
    | {"lifelong_length": 12, "lifelong_queries": 4},
    "train": {"epochs": 8, "batch_requests": 32, "learning_rate": 5e-3, "warmup_steps": 5},
    "evaluate": {"baselines": ["popularity"], "cutoffs": [5, 10], "beam": 60, "bootstrap": 100, "deep_sample": 20},
    "recommend": {"items": 5, "beam": 60},
    "lifelong": {"enabled": True, "tokens": TOKENS, "every_days": 2},
    "sessions": {"enabled": True},
    "guard": {"enabled": False},
    "resources": {"spark_master": "local[2]", "spark_heap": "2g", "spark_partitions": 2, "object_store_mb": 300},
}


def day_rows(day: datetime.date, rng: np.random.Generator) -> pd.DataFrame:
    """Two requests a user of three items each; items of the user's group are liked, others left or disliked."""
    users = np.repeat(np.arange(USERS), 6)
    own = rng.random(len(users)) < 0.6
    known = ITEMS - 4 + (day - FIRST).days // 2  # a new item every other day
    item = rng.integers(0, known, len(users))
    item = np.where(own, (item // GROUPS * GROUPS + users % GROUPS) % known, item)
    hours = np.tile([9, 9, 9, 18, 18, 18], USERS)
    start = datetime.datetime.combine(day, datetime.time(), datetime.UTC)
    times = [
        start + datetime.timedelta(hours=h, minutes=u % 60) for h, u in zip(hours.tolist(), users.tolist(), strict=True)
    ]
    return exposures(users, item, times, rng)


def exposures(users: Any, items: Any, times: Any, rng: np.random.Generator) -> pd.DataFrame:
    liked = np.asarray(items) % GROUPS == np.asarray(users) % GROUPS
    return pd.DataFrame(
        {
            "user_id": users,
            "item_id": items,
            "ts": pd.to_datetime(times, utc=True),
            "click": liked.astype(int),
            "hate": (~liked & (rng.random(len(liked)) < 0.3)).astype(int),
            "play_ms": np.where(liked, 20_000, 2_000) + rng.integers(0, 1000, len(liked)),
            "duration_ms": 30_000,
            "behaviour_log_probs": pd.Series([None] * len(liked), dtype=object),
            "behaviour_codebook": pd.Series([None] * len(liked), dtype=object),
            "behaviour_policy": pd.Series([None] * len(liked), dtype=object),
        }
    )


def write_day(folder: Path, day: datetime.date, rows: pd.DataFrame) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.Schema.from_pandas(rows.drop(columns=[c for c in rows if c.startswith("behaviour")]))
    schema = schema.append(pa.field("behaviour_log_probs", pa.list_(pa.float32())))
    for name in ("behaviour_codebook", "behaviour_policy"):
        schema = schema.append(pa.field(name, pa.string()))
    pq.write_table(pa.Table.from_pandas(rows, schema=schema, preserve_index=False), folder / f"day_{day}.parquet")


def write_items(folder: Path) -> None:
    """The last item of the first group is withdrawn from the start."""
    items = {"item_id": range(ITEMS), "tags": [[f"group{i % GROUPS}"] for i in range(ITEMS)]}
    withdrawn = [FIRST if item == 0 else None for item in range(ITEMS)]
    pd.DataFrame(items | {"withdrawn": withdrawn}).to_parquet(folder / "items.parquet")


def rows_of(lake: Lake, table: str, day: datetime.date | None = None) -> pd.DataFrame:
    rows = lake.open(table).to_pandas()
    return rows if day is None else rows[rows["date"] == day]


@pytest.fixture(scope="module")
def nights(tmp_path_factory: pytest.TempPathFactory, migrated_database: Path, engines: Any) -> dict[str, Any]:
    """A whole run, a night, and a night whose log holds what users did with the recommendations of the one before."""
    folder = tmp_path_factory.mktemp("nights")
    source, rng = folder / "source", np.random.default_rng(5)
    source.mkdir()
    shutil.copy(migrated_database, folder / "mlflow.db")
    config = CONFIG | {"lake": str(folder / "lake"), "tracking_uri": f"sqlite:///{folder}/mlflow.db"}
    (folder / "nights.yaml").write_text(yaml.safe_dump(config | {"source": CONFIG["source"] | {"path": str(source)}}))
    arguments = ["run", "--config", str(folder / "nights.yaml"), "--quiet"]
    lake = Lake(str(folder / "lake"))
    write_items(source)
    for day in BASE:
        write_day(source, day, day_rows(day, rng))
    found: dict[str, Any] = {"lake": lake, "folder": folder, "arguments": arguments, "answers": []}
    with shared_engines(engines, folder):
        found["base"] = answer_of(arguments, folder)
        found["codes"] = rows_of(lake, "semantic_ids")
        write_day(source, NIGHTS[0], day_rows(NIGHTS[0], rng))
        found["answers"].append(answer_of([*arguments, "--date", str(NIGHTS[0])], folder))
        shown = rows_of(lake, "recommendations", NIGHTS[0])
        write_day(source, NIGHTS[1], served(shown, day_rows(NIGHTS[1], rng), rng))
        found["answers"].append(answer_of([*arguments, "--date", str(NIGHTS[1])], folder))
        yield found


def served(shown: pd.DataFrame, organic: pd.DataFrame, rng: np.random.Generator) -> pd.DataFrame:
    """The day's log: some rows of another system, and the recommended items as they were shown at noon."""
    noon = datetime.datetime.combine(NIGHTS[1], datetime.time(12), datetime.UTC)
    rows = exposures(shown["user_id"].to_numpy(), shown["item_id"].to_numpy(), [noon] * len(shown), rng)
    rows["behaviour_log_probs"] = shown["log_probs"].to_list()
    rows["behaviour_codebook"] = shown["codebook_version"].to_list()
    rows["behaviour_policy"] = shown["model_version"].to_list()
    return pd.concat([organic, rows], ignore_index=True)


def manifests(lake: Lake, stage: str) -> list[dict[str, Any]]:
    """Those of all artifacts of a stage, oldest first."""
    folders = lake.artifact(stage, "any").parent.glob("*/manifest.json")
    return [lake.manifest(stage, path.parent.name) or {} for path in sorted(folders, key=lambda path: path.stat().st_mtime)]


def test_a_candidate_is_scored_on_a_day_before_it_trains_on_it(nights: dict[str, Any]) -> None:
    models, scores = manifests(nights["lake"], "align"), manifests(nights["lake"], "evaluate")
    assert [m["trained_until"] for m in models] == [str(BASE[3]), *map(str, NIGHTS)]
    assert len(scores) == 3
    for score, model in zip(scores[1:], models[:-1], strict=True):
        assert score["inputs"]["align"]["identities"].popitem()[1] == model["identity"]
        assert score["targets"] > 0
    for before, after in zip(models[:-1], manifests(nights["lake"], "train")[1:], strict=True):
        assert after["inputs"]["candidate"]["identities"].popitem()[1] == before["identity"]


def test_a_night_appends_to_the_codebook_and_moves_no_code(nights: dict[str, Any]) -> None:
    before = nights["codes"].set_index("item_id")
    after = rows_of(nights["lake"], "semantic_ids").set_index("item_id")
    assert after["codebook_version"].nunique() == 1
    for name in ("codes", "rank", "date"):
        assert after.loc[before.index, name].map(str).equals(before[name].map(str))


def test_recommendations_are_the_champions_legal_unseen_and_not_withdrawn(nights: dict[str, Any]) -> None:
    assert nights["base"]["model"]["promoted"]
    codes = rows_of(nights["lake"], "semantic_ids").set_index("item_id")
    seen = rows_of(nights["lake"], "user_features")
    for day in (BASE[-1], *NIGHTS):
        shown = rows_of(nights["lake"], "recommendations", day)
        assert set(shown["user_id"]) == set(range(USERS))
        assert not (shown["item_id"] == 0).any()
        assert shown.groupby("user_id")["rank"].agg(lambda ranks: sorted(ranks) == list(range(len(ranks)))).all()
        assert set(shown["item_id"]) <= set(codes.index)
        assert (np.stack(shown["log_probs"]) <= 0).all()
        newest = seen[seen["date"] <= day].sort_values("date").groupby("user_id").last()
        for user, items in shown.groupby("user_id")["item_id"]:
            history = {*newest.loc[user, "short_item_ids"], *newest.loc[user, "positive_item_ids"]}
            assert not history & set(items)


def test_what_was_shown_comes_back_with_its_probabilities(nights: dict[str, Any]) -> None:
    lake = nights["lake"]
    shown = rows_of(lake, "recommendations", NIGHTS[0]).set_index(["user_id", "item_id"])
    logged = rows_of(lake, "impressions", NIGHTS[1])
    ours = logged[logged["behaviour_codebook"].notna()]
    assert len(ours) == len(shown) > USERS
    version = shown["codebook_version"].iloc[0]
    pins = {name: lake.version(name) for name in ("rewards", "impressions")}
    exposures = load_exposures(lake, pins, [NIGHTS[1]], version, 3)
    old = exposures.of(torch.tensor(ours["impression_id"].to_numpy()))[2].numpy()
    wanted = np.stack([shown.loc[(u, i), "log_probs"] for u, i in zip(ours["user_id"], ours["item_id"], strict=True)])
    assert np.array_equal(old, wanted)
    newest = manifests(lake, "align")[-1]
    assert newest["model"]["stage"] == "align" and newest["trained_until"] == str(NIGHTS[1])


def test_nights_add_to_long_histories_and_sessions(nights: dict[str, Any]) -> None:
    lake, logged = nights["lake"], rows_of(nights["lake"], "impressions")
    for night in NIGHTS:
        histories = rows_of(lake, "lifelong_sequences", night)
        seen = logged[logged["date"] <= night].groupby("user_id").size()
        assert 0 < len(histories) < USERS  # about every other user is due
        assert (histories["weights"].map(sum).to_numpy() == seen[histories["user_id"]].to_numpy()).all()
        assert (histories["weights"].map(len) <= TOKENS).all()
        requests = logged.loc[logged["date"] == night, ["user_id", "request_id"]].drop_duplicates()
        assert len(rows_of(lake, "sessions", night)) == len(requests)


def test_models_learn_from_long_histories_and_recommend_by_them(nights: dict[str, Any]) -> None:
    """The champion's answer to each user's newest row at or before the night is what the table of recommendations holds."""
    lake, night = nights["lake"], NIGHTS[0]
    for stage in ("train", "align", "evaluate", "register"):
        assert all(manifest["inputs"]["lifelong_sequences"]["version"] > 0 for manifest in manifests(lake, stage))
    shown = rows_of(lake, "recommendations", night)
    served = mlflow.pyfunc.load_model(f"models:/{shown['model_version'].iloc[0]}").unwrap_python_model().bundle
    assert served.lifelong_length == 12
    features = lake.open("user_features").to_pyarrow_table()
    features = newest_rows(features, "user_id", night).combine_chunks()
    long = rows_of(lake, "lifelong_sequences")
    newest = long[long["date"] <= night].sort_values("date").groupby("user_id").last().loc[range(USERS)]
    arrays = {field: np.concatenate(newest[name].to_list()) for name, field in ARRAYS.items()}
    arrays["items"] = served.catalogue.dense(arrays["items"])
    rows = LongRows(np.arange(USERS), np.cumsum([0, *newest["item_ids"].map(len)]), arrays)
    after = day_start_us(night + datetime.timedelta(days=1), "UTC")
    bare = requests_as_of(features, served.catalogue, served.ranker.decoder.engaged_mask, after)
    wanted = np.stack(shown.sort_values(["user_id", "rank"])["log_probs"]).reshape(USERS, -1, 3)
    withheld = torch.from_numpy(served.catalogue.item_ids == 0)
    for requests, same in ((rows.given_to(bare, np.arange(USERS)), True), (bare, False)):
        ranking = served.ranker.ranking(requests, wanted.shape[1], 60, True, withheld)
        assert np.allclose(ranking.log_probs.numpy(), wanted, atol=1e-4) == same


def test_a_night_again_changes_nothing_and_an_unknown_one_is_retried(nights: dict[str, Any]) -> None:
    again = answer_of([*nights["arguments"], "--date", str(NIGHTS[1])], nights["folder"])
    assert again["status"] == "skipped"
    assert again["tables"] == nights["answers"][1]["tables"]
    missing = str(NIGHTS[1] + datetime.timedelta(days=1))
    assert answer_of([*nights["arguments"], "--date", missing], nights["folder"], EXIT_RETRY) == {}


def test_a_whole_run_after_nights_fits_a_new_codebook(nights: dict[str, Any]) -> None:
    answer = answer_of(nights["arguments"], nights["folder"])
    assert answer["status"] == "done"
    codes = rows_of(nights["lake"], "semantic_ids")
    newest = codes[codes["date"] >= DAYS[5]]
    assert newest["codebook_version"].nunique() == 1
    assert newest["codebook_version"].iloc[0] != nights["codes"]["codebook_version"].iloc[0]
    assert manifests(nights["lake"], "align")[-1]["trained_until"] == str(DAYS[5])
