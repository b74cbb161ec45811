"""The simulated log is a function of its settings, looks like KuaiRand, and its truth is the truth."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from benchmarks.simulated_oracle import exposed, liked, read_truth
from jobs.latent import SERIES_LAST, SERIES_LIKED
from jobs.simulate import MARKER, is_simulated, simulate
from schemas.config import SimulateConfig
from schemas.errors import ConfigError

SETTINGS = SimulateConfig(impressions=10_000, users=400, items=800, new_items_a_day=20, days=4, topics=6, authors=60)
LOG_COLUMNS = (  # in the order of the files
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
VIDEO_COLUMNS = (
    "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,"
    "music_id,music_type,tag,title"
)


@pytest.fixture(scope="module")
def folder(spark, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("simulated")
    simulate(spark, SETTINGS, str(path))
    return path


def read_log(folder: Path) -> pd.DataFrame:
    return pd.concat([pd.read_csv(file) for file in sorted(folder.glob("log_standard_*.csv.gz"))], ignore_index=True)


@pytest.fixture(scope="module")
def log(folder: Path) -> pd.DataFrame:
    return read_log(folder)


@pytest.fixture(scope="module")
def videos(folder: Path) -> pd.DataFrame:
    return pd.read_csv(folder / "video_features_basic_simulated.csv.gz")


def positive(log: pd.DataFrame) -> pd.Series:
    return (log.is_click + log.is_like + log.long_view) > 0


def test_rows_do_not_depend_on_the_partitioning(spark, folder: Path, log: pd.DataFrame, tmp_path: Path):
    before = spark.conf.get("spark.sql.shuffle.partitions")
    spark.conf.set("spark.sql.shuffle.partitions", "7")
    spark.conf.set("spark.sql.leafNodeDefaultParallelism", "5")
    try:
        simulate(spark, SETTINGS, str(tmp_path))
    finally:
        spark.conf.set("spark.sql.shuffle.partitions", before)
        spark.conf.unset("spark.sql.leafNodeDefaultParallelism")
    pd.testing.assert_frame_equal(read_log(tmp_path), log)  # the order within a file included
    for name in ("user_features_simulated", "video_features_basic_simulated"):
        a, b = (pd.read_csv(f / f"{name}.csv.gz") for f in (folder, tmp_path))
        pd.testing.assert_frame_equal(a, b)


def test_size_and_days_are_as_asked(folder: Path, log: pd.DataFrame):
    assert abs(len(log) / SETTINGS.impressions - 1) < 0.02
    assert set(log.user_id) <= set(range(SETTINGS.users))
    assert sorted(log.date.unique()) == [20260101, 20260102, 20260103, 20260104]
    for file in folder.glob("log_standard_*.csv.gz"):
        assert set(pd.read_csv(file).date.astype(str)) == {file.name.split("_")[2].split("-")[0]}


def test_headers_are_the_official_ones(log: pd.DataFrame, videos: pd.DataFrame):
    assert ",".join(log.columns) == LOG_COLUMNS
    assert ",".join(videos.columns) == VIDEO_COLUMNS


@pytest.mark.data
def test_headers_equal_those_of_the_real_files(folder: Path, data_folder: Path):
    real = data_folder / "kuairand_pure"
    for pattern, last in (("log_standard", []), ("user_features", []), ("video_features_basic", ["title"])):
        ours, theirs = (pd.read_csv(next(f.glob(f"{pattern}*.csv.gz")), nrows=0).columns for f in (folder, real))
        assert ours.tolist() == theirs.tolist() + last


def test_date_and_hour_follow_from_the_time(log: pd.DataFrame):
    time = pd.to_datetime(log.time_ms, unit="ms")
    assert (time.dt.strftime("%Y%m%d").astype(int) == log.date).all()
    assert (time.dt.hour * 100 + time.dt.minute == log.hourmin).all()


def test_requests_hold_three_to_eight_different_items(log: pd.DataFrame):
    sizes = log.groupby(["user_id", "time_ms"]).size()
    assert sizes.max() <= 8
    assert (sizes >= 3).mean() > 0.99  # a repeat that finds no other item is dropped
    assert 4.5 < sizes.mean() < 5.5
    assert not log.duplicated(["user_id", "time_ms", "video_id"]).any()
    assert log.duplicated(["user_id", "video_id"]).mean() < 0.15


def test_values_are_possible(log: pd.DataFrame):
    assert (log.play_time_ms >= 0).all() and (log.duration_ms > 0).all()
    assert (log.play_time_ms > log.duration_ms).mean() > 0.03  # re-watched
    assert 0.30 < positive(log).mean() < 0.45
    assert 0.005 < log.is_hate.mean() < 0.03
    assert not (log.is_hate.astype(bool) & positive(log)).any()


def test_completion_falls_with_duration(log: pd.DataFrame):
    watched = log[positive(log)]
    short, long = watched.duration_ms < 10_000, watched.duration_ms > 40_000
    completion = watched.play_time_ms / watched.duration_ms
    assert completion[short].median() > 1.3 * completion[long].median()


def test_items_are_shown_from_their_upload_day_on(log: pd.DataFrame, videos: pd.DataFrame):
    uploaded = videos.set_index("video_id").upload_dt.str.replace("-", "").astype(int)
    assert (log.date.to_numpy() >= uploaded.loc[log.video_id].to_numpy()).all()
    counts = videos.upload_dt.value_counts()
    assert all(counts[f"2026-01-0{day}"] == SETTINGS.new_items_a_day for day in range(1, 5))


def test_popularity_and_activity_are_heavy_tailed(log: pd.DataFrame):
    for column, size in (("video_id", SETTINGS.items), ("user_id", SETTINGS.users)):
        counts = log[column].value_counts()
        assert counts.iloc[: size // 10].sum() > 0.25 * len(log)


def test_titles_carry_the_topic(folder: Path, videos: pd.DataFrame):
    topic = pd.read_parquet(folder / "truth" / "items").set_index("item_id").topic
    words: dict[int, Counter[str]] = {}
    for item, title in zip(videos.video_id, videos.title, strict=True):
        words.setdefault(topic[item], Counter()).update(title.split()[:2])
    frequent = [{word for word, _ in counts.most_common(3)} for counts in words.values()]
    assert len(frequent) == SETTINGS.topics
    assert len(set().union(*frequent)) == 3 * SETTINGS.topics


def test_the_truth_stays_out_of_the_ingest_globs(folder: Path):
    found = {f.name for p in ("log_*.csv*", "user_features*.csv*", "video_features*.csv*") for f in folder.glob(p)}
    assert len(found) == SETTINGS.days + 2
    assert {f.name for f in folder.iterdir()} == {*found, "truth", MARKER}


def test_positives_occur_with_their_true_probability(folder: Path, log: pd.DataFrame):
    """NumPy's own formula, from the tables of truth/, predicts the rate of positives outside series, in each fifth."""
    day = 1
    truth = read_truth(folder, day, SETTINGS.topics)
    episodes = truth.requests[["user_id", "time_ms", "series_item"]]
    rows = log[log.date == 20260102].merge(episodes, on=["user_id", "time_ms"])
    rows = rows[rows.video_id != rows.series_item]
    users, inverse = np.unique(rows.user_id, return_inverse=True)
    rows = rows.assign(expected=liked(truth, users)[inverse, rows.video_id], positive=positive(rows))
    for _, part in rows.groupby(pd.qcut(rows.expected, 5)):
        error = (part.expected * (1 - part.expected)).mean() ** 0.5 / len(part) ** 0.5
        assert abs(part.positive.mean() - part.expected.mean()) < 4 * error


def test_exposure_is_a_distribution_over_the_items_of_the_day(folder: Path):
    truth = read_truth(folder, 2, SETTINGS.topics)
    users = np.arange(50)
    for intents in (None, np.arange(50) % SETTINGS.topics):
        shown_RN = exposed(truth, users, intents)
        np.testing.assert_allclose(shown_RN.sum(axis=1), 1.0)
        assert (shown_RN[:, SETTINGS.items + 3 * SETTINGS.new_items_a_day :] == 0).all()


def test_a_liked_episode_announces_the_next(folder: Path, log: pd.DataFrame):
    """In consecutive requests a run shows the author's items in order, and goes on exactly where a like is likely."""
    items = pd.read_parquet(folder / "truth" / "items").set_index("item_id")
    state = pd.read_parquet(folder / "truth" / "requests").sort_values(["user_id", "k"])
    runs = state[state.series_item.notna()]
    following = runs.merge(runs.assign(k=runs.k - 1), on=["user_id", "k"], suffixes=("", "_next"))
    following = following[following.series_liked == SERIES_LIKED]
    a, b = items.loc[following.series_item.astype(int)], items.loc[following.series_item_next.astype(int)]
    steps = (a.author_id.to_numpy() == b.author_id.to_numpy()) & (b.episode.to_numpy() - a.episode.to_numpy() == 1)
    assert steps.mean() > 0.75  # elsewhere the next stretch of requests begins another run
    shown = runs.merge(log.assign(positive=positive(log)), on=["user_id", "time_ms"])
    rate = shown[shown.video_id == shown.series_item].groupby("series_liked").positive.mean()
    assert abs(rate[SERIES_LIKED] - SERIES_LIKED) < 0.06 and abs(rate[SERIES_LAST] - SERIES_LAST) < 0.08


def test_only_a_complete_folder_of_the_same_settings_counts(folder: Path, tmp_path: Path):
    assert is_simulated(str(folder), SETTINGS)
    assert not is_simulated(str(folder), dataclasses.replace(SETTINGS, seed=8))
    assert not is_simulated(str(tmp_path / "nowhere"), SETTINGS)
    assert json.loads((folder / MARKER).read_text())["settings"]["impressions"] == SETTINGS.impressions


def test_foreign_logs_are_not_overwritten(spark, tmp_path: Path):
    foreign = tmp_path / "log_standard_4_25_to_5_06_pure.csv.gz"
    foreign.write_bytes(b"theirs")
    with pytest.raises(ConfigError, match="not simulated"):
        simulate(spark, SETTINGS, str(tmp_path))
    assert foreign.read_bytes() == b"theirs"


@pytest.mark.parametrize("key", ["impressions", "users", "days", "topics"])
def test_settings_that_describe_no_log_are_refused(spark, tmp_path: Path, key: str):
    with pytest.raises(ConfigError, match=key):
        simulate(spark, dataclasses.replace(SETTINGS, **{key: 0}), str(tmp_path))
