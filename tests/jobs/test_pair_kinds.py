"""Swing and user-to-item against brute force, in one pass and in any split into days; the cap of Swing; bad settings."""

from __future__ import annotations

import datetime
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyspark.sql import functions as F

from jobs.item_pairs import pairs_of, positives
from jobs.swing import SEED
from jobs.user_to_item import LatestItems
from schemas.config import Config, EmbedConfig, PairsConfig
from schemas.feedback import mask_of
from schemas.lineage import window_days
from tests.jobs import logs, pair_kinds

KINDS = ("swing", "user_to_item")
NO_PAIRS = EmbedConfig(("text",), (1.0,))  # it reads co-occurrence, which would have to be there
CONFIGS = (
    Config(item_pairs=PairsConfig(kinds=KINDS), embed=NO_PAIRS),
    Config(item_pairs=PairsConfig(2, 20.0, KINDS, swing_alpha=0.0, swing_users=6, swing_items=5, latest=3), embed=NO_PAIRS),
    Config(item_pairs=PairsConfig(1, 30.0, KINDS, swing_alpha=0.5, swing_users=4, latest=1), embed=NO_PAIRS),
)
SPLITS = (((0,), (1,), (2,), (3,), (4,)), ((0, 2, 4), (1, 3)), ((3, 4), (0, 1, 2)))
DAYS = logs.days_from(5)
MASK = mask_of(Config().targets.positive)


@pytest.fixture(scope="module", params=range(3))
def case(request):
    """(config, split into days, events, rows of user_sequences) of one seed."""
    config, events = CONFIGS[request.param], logs.random_log(50 + request.param, users=25, items=10, requests=4)
    return config, SPLITS[request.param], events, logs.reference_sequences(events, [], config)


@pytest.fixture(scope="module")
def whole(spark, case):
    config, _, _, sequences = case
    return made(spark, config, sequences, DAYS)


def made(spark, config: Config, sequences: list[logs.Row], days: list[datetime.date]) -> list[logs.Row]:
    """Rows of item_pairs of `days`, from the events that the job would read for them."""
    first = min(days) - datetime.timedelta(days=window_days(config))
    read = [row for row in sequences if first <= row["date"] <= max(days)]
    events = positives(logs.table_frame(spark, "user_sequences", read), MASK)
    return logs.collected(pairs_of(events, config.item_pairs, window_days(config), days), "item_pairs")


def order_of(spark, events: list[logs.Event]):
    users = sorted({e.user_id for e in events})
    frame = spark.createDataFrame([(user,) for user in users], "user_id long")
    hashes = dict(frame.select("user_id", F.xxhash64("user_id", F.lit(SEED))).collect())
    return lambda user: (hashes[user], user)


def test_one_pass_equals_brute_force(spark, case, whole):
    config, _, events, _ = case
    order = order_of(spark, events)
    swings = [row for day in DAYS for row in pair_kinds.reference_swings(events, day, config, order)]
    triggers = [row for day in DAYS for row in pair_kinds.reference_triggers(events, day, config)]
    assert min(len(swings), len(triggers)) > 50
    assert whole == logs.by_key([*swings, *triggers], "item_pairs")


def test_any_split_into_days_gives_the_same_rows(spark, case, whole):
    config, split, _, sequences = case
    parts = [made(spark, config, sequences, [DAYS[place] for place in places]) for places in split]
    assert logs.by_key([row for part in parts for row in part], "item_pairs") == whole


def test_popular_items_keep_the_same_users(spark):
    clicks = [
        logs.Event(2 * user + item, user, user, item, logs.midnight_us(DAYS[0]) + user, flags={"click": True})
        for user in range(100)
        for item in (0, 1)
    ]
    config = Config(item_pairs=PairsConfig(kinds=("swing",), swing_users=10), embed=NO_PAIRS)
    (row,) = made(spark, config, logs.reference_sequences(clicks, [], config), DAYS[:1])
    assert row["weight"] == pytest.approx(math.comb(10, 2) * (1 / 2) / (1 + 2))


def test_the_smaller_item_wins_a_tie_of_triggers(spark):
    # With a window of 1, c(3, 7) = c(5, 7) = c(3, 5) = 2: to the last two users 3 and 5 are equally near to 7.
    shown = [(1, (5, 7)), (2, (3, 7)), (3, (3, 5, 7)), (4, (5, 3, 7))]
    clicks = [
        logs.Event(10 * user + place, user, user, item, logs.midnight_us(DAYS[0]) + place, flags={"click": True})
        for user, items in shown
        for place, item in enumerate(items)
    ]
    config = Config(item_pairs=PairsConfig(window=1, kinds=("user_to_item",)), embed=NO_PAIRS)
    rows = made(spark, config, logs.reference_sequences(clicks, [], config), DAYS[:1])
    found = {(row["item_a"], row["item_b"]): row["weight"] for row in rows}
    assert found == {(3, 7): 3.0, (5, 7): 1.0, (3, 5): 1.0, (5, 3): 1.0}


EVENTS = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 6), st.integers(0, 5)), max_size=60)


@given(EVENTS, st.integers(1, 4), st.integers(0, 2))
def test_latest_items_equal_a_look_at_the_whole_past(events, latest, days_back):
    history, past = LatestItems(latest, days_back), []
    for user, time, item in sorted(events, key=lambda event: event[:2]):
        day = DAYS[0] + datetime.timedelta(days=time // 2)
        seen = [
            other
            for who, when, other, date in reversed(past)
            if who == user and when < time and other != item and (day - date).days <= days_back
        ]
        assert history.before(user, day, time, item) == list(dict.fromkeys(seen))[:latest]
        past.append((user, time, item, day))


@pytest.mark.parametrize(
    "wrong", [{"kinds": ()}, {"kinds": ("swing", "swing")}, {"swing_users": 1}, {"swing_alpha": -1.0}, {"latest": 0}]
)
def test_settings_out_of_range_are_named(wrong):
    (key,) = wrong
    with pytest.raises(ValueError, match=rf"item_pairs\.{key} must"):
        PairsConfig(**wrong)
